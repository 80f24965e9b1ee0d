"""Conversations with a real, if senseless, model and voice."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import many_turns
from helpers.scripted import heard, turn
from helpers.small_pipeline import small_model, small_speech

from sa2jax.chat import template
from sa2jax.inference.programs import TRACES
from sa2jax.inference.requests import GenerationConfig, Request
from sa2jax.inference.sampling import SamplingParams
from sa2jax.pipeline import StepAudio2
from sa2jax.speech import programs as speech_programs

RATE = 16_000
SHORT = GenerationConfig(max_new_tokens=8)
DRAWN = GenerationConfig(
    sampling=SamplingParams(temperature=0.7, top_p=0.9), max_new_tokens=150, seed=1
)


def noise(seconds: float, seed: int = 0) -> tuple[np.ndarray, int]:
    samples = np.random.default_rng(seed).standard_normal(int(seconds * RATE))
    return samples.astype(np.float32) / 10, RATE


@pytest.fixture(scope="module")
def speech():
    return small_speech()


@pytest.fixture(scope="module")
def model(speech) -> StepAudio2:
    return small_model(speech)


def test_the_second_answer_depends_on_the_first(model):
    system = "You are a helpful assistant. " * 2
    greedy = GenerationConfig(max_new_tokens=8)
    chat = model.chat(system, options=greedy)
    first, second = chat.say("hello"), chat.say("and now?")
    assert (len(first.ids), first.finish_reason) == (8, "length")
    assert model.chat(system, options=greedy).say("hello") == first
    assert model.chat(system, options=greedy).say("and now?").ids != second.ids
    turns = [
        turn("system", system),
        turn("human", "hello"),
        turn("assistant", list(first.ids)),
        turn("human", "and now?"),
        turn("assistant", close=False),
    ]
    ids = np.concatenate(turns).astype(np.int32)
    ((alone,),) = model.generate([Request(ids)], SHORT)
    assert alone.ids == second.ids


def test_a_turn_reads_only_its_own_positions(model):
    """Speech and text, spoken and written answers: what went before is never read again."""
    model.engine.forget()  # another conversation with this system prompt would share it
    chat = model.chat("S", options=SHORT, voice="default")

    def end() -> int:
        """The newest token of the answer before, what closes it, and the end of its turn."""
        kept = [piece for piece in chat.history[-1].content if isinstance(piece, template.Ids)]
        return 1 + len(kept[0].ids) - len(reply.ids) + 1

    open_spoken, open_written = (
        len(turn("assistant", [301], close=False)),
        len(turn("assistant", close=False)),
    )
    reply = chat.say(noise(1))
    head = len(turn("system", "S"))
    assert reply.timings.prompt_tokens == head + len(turn("human", heard(13))) + open_spoken
    expected = end() + len(turn("human", "more")) + open_written
    reply = chat.say("more", speak=False)
    assert reply.timings.prompt_tokens == expected
    expected = end() + len(turn("human", heard(25), "third")) + open_spoken
    reply = chat.say([noise(2, 1), "third"])
    assert reply.timings.prompt_tokens == expected
    other, expected = chat.fork(), end() + len(turn("human", "x")) + open_written
    assert other.say("x", speak=False).timings.prompt_tokens == expected
    chat.undo()
    assert chat.say("y", speak=False).timings.prompt_tokens < 40


def test_a_streamed_reply_is_the_whole_one(model, speech):
    """Same ids, and the sound of the offline stream of its codes."""
    whole = model.chat("S", options=DRAWN).say("hello", speak=True)
    stream = model.chat("S", options=DRAWN).stream("hello", speak=True)
    pieces = list(stream)
    assert stream.reply.ids == whole.ids
    assert len(whole.codes) > 40
    np.testing.assert_array_equal(stream.reply.audio, whole.audio)
    np.testing.assert_array_equal(
        np.concatenate([piece.audio for piece in pieces if len(piece.audio)]), whole.audio
    )
    offline = speech.token2wav.stream(whole.codes, speech.voice())
    np.testing.assert_array_equal(np.concatenate(list(offline)), whole.audio)
    assert len(whole.audio) == 960 * len(whole.codes)
    assert np.isfinite(whole.audio).all()
    assert np.abs(whole.audio).max() > 1e-4


def test_the_ids_are_those_of_a_batch(model):
    """The conversation's own loop draws what `generate` draws."""
    chat = model.chat("S", options=DRAWN)
    reply = chat.say("hello")
    request = model.request(template.render([*chat.history[:-1], template.reply_turn()]))
    ((made,),) = model.generate([request], DRAWN)
    assert made.ids == reply.ids


def test_cancel_and_go_on(model):
    """The history holds exactly the codes whose sound was given; the talk goes on from there."""
    options = GenerationConfig(sampling=DRAWN.sampling, max_new_tokens=400, seed=1)
    chat = model.chat("S", options=options, voice="default")
    stream = chat.stream("hello", first=10)
    samples = 0
    for piece in stream:
        samples += len(piece.audio)
        if samples:
            break
    reply = stream.cancel()
    assert len(reply.codes) == samples // 960
    assert 0 < len(reply.codes) < 30
    assert chat.history[-1] == template.spoken_turn(reply.ids)
    following = chat.say("go on", speak=False)
    fresh = model.chat("S", options=options)
    fresh.rounds = [chat.rounds[0]]
    assert fresh.say("go on", speak=False).ids == following.ids
    assert following.timings.prompt_tokens < 40


def warm_up(model, speech) -> None:
    """Every size that a conversation of short clips can need, once."""
    model.engine.reserve(1, model.cfg.decoder.max_positions)
    model.engine.warm_up(clip_frames=300)
    for last in (1, 5, 10, 15, 20, 25):
        list(speech.token2wav.stream(range(last), speech.voice()))


@pytest.mark.slow
def test_many_turns_compile_nothing_new(model, speech):
    """Text and recordings, written and spoken, with turns dropped on the way."""
    options = GenerationConfig(
        sampling=DRAWN.sampling, max_new_tokens=60, stop_ids=model.stop_ids, seed=1
    )
    warm_up(model, speech)
    before = Counter(TRACES), Counter(speech_programs.TRACES)
    chat, dropped = model.chat("S", options=options, voice="default"), 0
    for number in range(25):
        question = [noise(1 + number % 3, number), "?"] if number % 5 == 0 else "why? " * 8
        dropped += bool(chat.say(question, speak=number % 10 == 0).notes)
    assert dropped > 0
    changed = (Counter(TRACES) - before[0], Counter(speech_programs.TRACES) - before[1])
    assert changed == (Counter(), Counter())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells its memory there")
def test_memory_of_many_spoken_turns_is_flat():
    """One thread runs all, so that nothing is left of each; alone in a process of its own.

    Beside other tests memory is kept in large pieces, see `helpers.compiling`.
    """
    here = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    path = os.pathsep.join([str(Path(many_turns.__file__).parents[1]), *sys.path])
    run = subprocess.run(
        [sys.executable, many_turns.__file__],
        env=here | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    found = json.loads(run.stdout)
    used, half = found["used"], many_turns.TURNS // 2
    assert len(used) == many_turns.TURNS
    assert found["threads"] == ["sa2jax-device"]
    assert max(used[half:]) - max(used[:half]) < 40  # by then every size of the cache was seen


def test_spoken_tasks(model):
    replies = model.tts_batch(["one", "two", "three"], max_new_tokens=60)
    alone = model.tts("one", max_new_tokens=60)
    assert alone.ids == replies[0].ids
    assert len({reply.ids for reply in replies}) == 3
    for reply in replies:
        assert len(reply.audio) == 960 * len(reply.codes)

"""A conversation's cache: what was read stays read, whatever the conversation does."""

import gc
import threading
from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest

from sa2jax import audio, testing
from sa2jax.errors import PromptError
from sa2jax.inference.engine import Engine
from sa2jax.inference.programs import TRACES
from sa2jax.inference.requests import GenerationConfig, Request
from sa2jax.inference.runner import MIN_SLOTS, PREFILL_CHUNK, ModelRunner
from sa2jax.inference.sampling import SamplingParams
from sa2jax.models.step_audio import step_audio2

CFG = testing.tiny_config(max_positions=3000)
NEW = 14
GREEDY = GenerationConfig(max_new_tokens=NEW)
SAMPLED = replace(GREEDY, sampling=SamplingParams(temperature=0.8, top_k=20, top_p=0.9), seed=3)


def text(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, length).astype(np.int32)


def heard(ids: np.ndarray, *clips: tuple[int, int], seed: int = 0) -> Request:
    """A prompt with clips of (start, mel frames)."""
    rng = np.random.default_rng(seed)
    mels = tuple(rng.standard_normal((CFG.audio_encoder.mels, n), np.float32) for _, n in clips)
    counts = tuple(int(audio.num_tokens(n)) for _, n in clips)
    return Request(ids, mels, tuple(start for start, _ in clips), counts)


def longer(request: Request, *ids) -> Request:
    return replace(request, ids=np.concatenate([request.ids, *ids]).astype(np.int32))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(step_audio2(CFG), testing.tiny_params(CFG), CFG, rows=2)


@pytest.fixture(scope="module")
def fresh(engine) -> Engine:
    """Another one, which keeps nothing of what it was asked."""
    return engine.replica()


@pytest.fixture(autouse=True)
def _nothing_read(engine):
    engine.forget()


def said(engine: Engine, request: Request, options: GenerationConfig = GREEDY, **more):
    """A reply in a conversation: its ids, and how many positions were read."""
    reply = engine.submit(request, options, **more)
    return list(reply.result().ids), reply.prefilled


def alone(
    fresh, request: Request, options: GenerationConfig = GREEDY, number: int = 0
) -> list[int]:
    ((reply,),) = fresh.generate([request], options, prompt_indices=[number])
    return list(reply.ids)


# --- the same reply as from a fresh start ---


@pytest.mark.parametrize("options", [GREEDY, SAMPLED])
def test_a_reply_is_that_of_a_batch(engine, fresh, options):
    request = heard(text(0, 60), (5, 120))
    expected = alone(fresh, request, options, number=4)
    assert said(engine, request, options, prompt_index=4) == (expected, 60)


@pytest.mark.parametrize("place", [0, 1, 4, 5, 6])
def test_stop_ids(engine, fresh, place):
    request = Request(text(0, 30))
    ids = alone(fresh, request)
    reply = engine.submit(request, replace(GREEDY, stop_ids=(ids[place],)))
    assert list(reply.result().ids) == ids[: ids.index(ids[place])]
    assert reply.finish_reason == "stop"


@pytest.mark.parametrize("limit", [1, 5, 6, 7])
def test_limits(engine, fresh, limit):
    request = Request(text(0, 30))
    ids = alone(fresh, request)[:limit]
    assert said(engine, request, replace(GREEDY, max_new_tokens=limit))[0] == ids
    reply = engine.submit(replace(request, max_new_tokens=limit), GREEDY)
    assert list(reply.result().ids) == ids
    assert reply.finish_reason == "length"


def test_the_context_ends_a_reply(engine):
    reply = engine.submit(Request(text(0, CFG.decoder.max_positions - 4)), GREEDY)
    assert len(reply.result().ids) == 4
    assert reply.finish_reason == "length"


def test_a_prompt_is_read_in_chunks(engine):
    """Clips across the borders of chunks, and one that ends the prompt."""
    length = 2 * PREFILL_CHUNK + 100
    request = heard(
        text(1, length), (PREFILL_CHUNK - 20, 900), (2 * PREFILL_CHUNK - 5, 100), (length - 13, 100)
    )
    ids, read = said(engine, request)
    assert read == length
    whole = replace(request, ids=np.concatenate([request.ids, ids[:-1]]).astype(np.int32))
    assert engine.logits(whole).argmax(-1)[length - 1 :].tolist() == ids


# --- what is read again ---


def test_a_new_turn_reads_only_what_is_new(engine, fresh):
    request, ids = heard(text(0, 60), (5, 120)), []
    for turn in range(3):
        ids, read = said(engine, request)
        # The newest token of a reply was chosen but not read.
        assert read == (60 if turn == 0 else 1 + 40)
        assert ids == alone(fresh, request)
        new = heard(text(10 + turn, 40), (7, 80), seed=turn)
        request = Request(
            np.concatenate([request.ids, ids, new.ids]).astype(np.int32),
            request.mels + new.mels,
            (*request.starts, len(request.ids) + len(ids) + 7),
            request.counts + new.counts,
        )


def test_the_same_prompt_again_reads_its_last_position(engine):
    request = heard(text(0, 60), (5, 120))
    first, _ = said(engine, request)
    assert said(engine, request) == (first, 1)


def test_only_clips_that_changed_are_heard(engine, fresh, monkeypatch):
    """Same ids, another recording: what follows it is read again."""
    request = heard(text(0, 90), (5, 120), (30, 110))
    said(engine, request)
    other = replace(request, mels=(request.mels[0], request.mels[1] + 1))
    expected = alone(fresh, other)
    heard_frames, listen = [], ModelRunner.encode_audio

    def spy(self, mels, **more):
        heard_frames.append([mel.shape[1] for mel in mels])
        return listen(self, mels, **more)

    monkeypatch.setattr(ModelRunner, "encode_audio", spy)
    assert said(engine, other) == (expected, 60)
    assert heard_frames == [[110]]
    assert expected != alone(fresh, request)


def test_an_undone_turn_and_another_in_its_place(engine, fresh):
    request = Request(text(0, 50))
    ids, _ = said(engine, request)
    said(engine, longer(request, ids, text(1, 30)))
    other = longer(request, ids[:4], text(2, 20))
    assert said(engine, other) == (alone(fresh, other), 20)


def test_a_reply_may_be_left_at_any_time(engine, fresh):
    """What was made ahead and not taken does not show."""
    request = Request(text(0, 50))
    ids = alone(fresh, request)
    for taken in (1, 2, 3):
        stream = engine.submit(request, GREEDY)
        got = [i for _ in range(taken) for i in next(stream)]
        stream.close()
        assert stream.finish_reason in ("abandoned", "length")
        assert list(stream) == []
        assert got == ids[: len(got)]
        other = longer(request, got, text(5, 10))
        # Of what was taken the last token may not have been read.
        found, read = said(engine, other)
        assert found == alone(fresh, other)
        assert read in (10, 11)
    assert said(engine, request)[0] == ids


def test_two_conversations_keep_what_was_read(engine, fresh):
    """Rows are added for them; a third takes the place of the one that was silent longest."""
    requests = [Request(text(seed, 50)) for seed in (1, 2, 3)]
    ids = [said(engine, request)[0] for request in requests[:2]]
    assert engine.runner.rows == 2
    for n in (0, 1):
        following = longer(requests[n], ids[n], text(n, 20))
        assert said(engine, following) == (alone(fresh, following), 21)
    assert said(engine, requests[2]) == (alone(fresh, requests[2]), 50)
    assert said(engine, requests[1]) == (ids[1], 1)
    assert said(engine, requests[0]) == (ids[0], 50)  # it was evicted, and is read again


def test_a_system_prompt_is_read_once(engine, fresh):
    """Another conversation that begins alike copies what both have."""
    system = text(0, 40)
    one, two = (Request(np.concatenate([system, text(seed, 100)])) for seed in (1, 2))
    assert said(engine, one) == (alone(fresh, one), 140)
    assert said(engine, two) == (alone(fresh, two), 100)
    assert said(engine, one)[1] == 1  # still there


def test_a_fork_goes_its_own_way(engine, fresh):
    request = Request(text(0, 50))
    ids, _ = said(engine, request)
    for turn in range(2):
        for seed in (1, 2):
            own = longer(request, ids, text(seed, 20))
            found, read = said(engine, own)
            assert found == alone(fresh, own)
            assert read <= 21
        assert turn < 2


def test_a_conversation_has_its_row(engine, fresh):
    """Also when most of it was undone; a fork gets another, and a row without owner is free."""

    class Talk:
        pass

    first, second = Talk(), Talk()
    request = Request(text(0, 40))
    ids, _ = said(engine, request, conversation=first)
    said(engine, longer(request, ids, text(1, 300)), conversation=first)
    undone = longer(request, ids[:4], text(2, 20))
    assert said(engine, undone, conversation=first) == (alone(fresh, undone), 20)
    assert engine.runner.rows == 1
    fork = longer(request, ids[:4], text(3, 20))
    assert said(engine, fork, conversation=second) == (alone(fresh, fork), 20)
    assert engine.runner.rows == 2
    assert said(engine, undone, conversation=first)[1] == 1
    assert said(engine, fork, conversation=second)[1] == 1
    del second
    gc.collect()
    said(engine, Request(text(5, 30)), conversation=Talk())
    assert said(engine, undone, conversation=first)[1] == 1  # the other row was taken


def test_rows_grow_with_the_conversation(engine, fresh):
    request = Request(text(0, MIN_SLOTS - NEW))
    ids, _ = said(engine, request)
    longest = longer(request, ids, text(1, 500))
    assert said(engine, longest) == (alone(fresh, longest), 501)


# --- refused and failed ---


def test_refused(engine):
    with pytest.raises(PromptError, match="prompt 0 has 0 tokens"):
        engine.submit(Request(text(0, 0)), GREEDY)
    with pytest.raises(PromptError, match="samples=1"):
        engine.submit(Request(text(0, 5)), replace(GREEDY, samples=2))
    with pytest.raises(PromptError, match="at most 8 stop ids, got 9"):
        engine.submit(Request(text(0, 5)), replace(GREEDY, stop_ids=tuple(range(9))))


def test_what_is_refused_leaves_the_cache(engine):
    request = Request(text(0, 50))
    said(engine, request)
    with pytest.raises(PromptError, match="outside the vocabulary"):
        engine.submit(longer(request, [9999]), GREEDY)
    assert said(engine, request)[1] == 1


def test_a_failure_of_a_program_fails_what_is_under_way(engine, fresh, monkeypatch):
    """Those that wait are answered, and so are later ones; what was read is lost."""
    request = Request(text(0, 50))
    said(engine, request)
    failed = threading.Event()
    decode = ModelRunner.decode

    def fails(self, *args):
        if not failed.is_set():
            failed.set()
            raise RuntimeError("out of memory")
        return decode(self, *args)

    monkeypatch.setattr(ModelRunner, "decode", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        said(engine, longer(request, [1]))
    assert said(engine, request) == (alone(fresh, request), 50)


# --- programs ---


@pytest.mark.slow
def test_fifty_turns_compile_nothing_new(fresh):
    """Text and audio turns of several lengths."""
    engine = fresh.replica()
    engine.reserve(1, CFG.decoder.max_positions)

    def converse(turns: int, seed: int) -> None:
        request = Request(text(seed, 20))
        for turn in range(turns):
            options = replace(SAMPLED if turn % 3 else GREEDY, max_new_tokens=7 + turn % 5)
            ids, _ = said(engine, request, options, prompt_index=turn)
            new = text(turn, 20 + turn % 7)
            clip = heard(new, (3, 90 + turn % 9), seed=turn) if turn % 2 else Request(new)
            start = len(request.ids) + len(ids)
            request = Request(
                np.concatenate([request.ids, ids, new]).astype(np.int32),
                request.mels + clip.mels,
                (*request.starts, *(start + s for s in clip.starts)),
                request.counts + clip.counts,
            )

    converse(50, 0)
    before, compiled = Counter(TRACES), []

    def watch(event, seconds, **about):
        return (
            compiled.append(about.get("fun_name"))
            if event.endswith("backend_compile_duration")
            else None
        )

    jax.monitoring.register_event_duration_secs_listener(watch)
    try:
        converse(50, 1)
    finally:
        jax.monitoring.unregister_event_duration_listener(watch)
    assert before == TRACES
    assert compiled == []

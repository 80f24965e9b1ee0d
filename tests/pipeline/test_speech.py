"""What spoken answers hold, with a scripted decoder and a voice that speaks codes as numbers."""

import numpy as np
import pytest
from helpers.scripted import (
    AUDIO_START,
    CODE_0,
    OPEN,
    SPOKEN,
    TTS_END,
    TTS_PAD,
    TTS_START,
    call,
    groups,
    sound,
    turn,
    voice_called,
)

from sa2jax.chat import template
from sa2jax.errors import CheckpointError, VoiceError
from sa2jax.inference.requests import GenerationConfig
from sa2jax.pipeline import StepAudio2

# --- speech ---


def test_a_spoken_answer(script, model):
    codes = list(range(70))
    reply_ids = groups("Hello!", codes)
    script.will_say(reply_ids, b"ok")
    chat = model.chat(system=None)
    reply = chat.say("hello", speak=True)
    assert (reply.text, reply.codes, reply.finish_reason, reply.voice) == (
        "Hello!",
        tuple(codes),
        "stop",
        "anna",
    )
    assert reply.ids == tuple(reply_ids)
    np.testing.assert_array_equal(reply.audio, sound(codes))
    assert reply.sample_rate == 24_000
    assert reply.timings.speech == pytest.approx(2.8)
    assert 0 < reply.timings.first_text <= reply.timings.first_audio <= reply.timings.total
    assert reply.timings.real_time_factor == reply.timings.total / reply.timings.speech
    assert (reply.timings.prompt_tokens, reply.timings.generated_tokens) == (
        len(script.prompts[0]),
        len(reply_ids),
    )
    assert script.prompts[0] == turn("human", "hello") + SPOKEN
    chat.say("more", speak=False)
    assert script.prompts[1] == (
        turn("human", "hello")
        + turn("assistant", [TTS_START, *reply_ids])
        + turn("human", "more")
        + OPEN
    )


def test_a_chosen_voice_makes_answers_spoken(script, model):
    script.will_say(*[groups("Hi", range(4))] * 4)
    chat = model.chat(voice="bert")
    assert chat.say("a").voice == "bert"
    assert chat.say("a", voice="anna").voice == "anna"
    assert chat.say("a").voice == "bert"
    chat.voice = voice_called("carl")
    assert chat.say("a").voice == "carl"
    script.will_say(b"Hi")
    assert chat.say("a", speak=False).voice is None
    chat.voice = None
    script.will_say(b"Hi")
    assert len(chat.say("a").audio) == 0


def test_a_voice_that_does_not_exist(script, model):
    with pytest.raises(VoiceError, match="expected one of anna, bert"):
        model.chat(voice="dora")
    chat = model.chat()
    with pytest.raises(VoiceError, match="expected one of anna, bert"):
        chat.say("a", voice="dora")
    with pytest.raises(VoiceError):
        chat.voice = "dora"
    assert (chat.voice, chat.rounds, script.prompts) == (None, [], [])


def test_a_model_that_cannot_speak(script, model, params):
    mute = StepAudio2(model.cfg, params, model.tokenizer)
    with pytest.raises(CheckpointError, match="without a detokenizer: it cannot speak"):
        mute.chat().say("hello", speak=True)


PAD = [TTS_PAD] * 5


@pytest.mark.parametrize(
    ("ids", "text", "codes"),
    [
        (groups("Hi", range(8)), "Hi", range(8)),
        (groups("Hi there", range(3)), "Hi there", range(3)),  # more words than groups of codes
        (groups("H", range(23)), "H", range(23)),  # more codes than words, a last group of three
        (groups("é→😀", range(40)), "é→😀", range(40)),  # bytes of characters, codes in between
        ([*groups("Hi", range(8)), *b" bye"], "Hi bye", range(8)),  # unspoken text afterwards
        (groups("Hi", range(8), end=False)[:-2], "Hi", range(6)),  # stopped inside a group
        ([CODE_0 + 1, *b"a"], "a", [1]),  # audio before text
        ([*PAD, *PAD, TTS_END], "", []),  # pads alone
        ([TTS_END], "", []),
        ([TTS_END, *b"only text"], "only text", []),
        ([*b"a", AUDIO_START, CODE_0 + 5, *b"b", TTS_END], "ab", [5]),  # a generated clip marker
        ([*"é".encode()[:1], CODE_0, TTS_END], "\ufffd", [0]),  # half a character at the end
        ([*b"a", TTS_START, CODE_0, TTS_END], "a", [0]),
        ([], "", []),
    ],
)
def test_what_a_reply_holds(script, model, ids, text, codes):
    script.will_say(ids)
    chat = model.chat(system=None)
    stream = chat.stream("hello", speak=True)
    pieces = list(stream)
    assert "".join(piece.text for piece in pieces) == stream.reply.text == text
    assert stream.reply.codes == tuple(codes)
    assert stream.reply.ids == tuple(ids)
    np.testing.assert_array_equal(stream.reply.audio, sound(list(codes)))
    spoken = np.concatenate([np.zeros(0), *(piece.audio for piece in pieces)])
    np.testing.assert_array_equal(spoken, stream.reply.audio)
    assert chat.history[-1] == template.spoken_turn(ids)


@pytest.mark.parametrize("speak", [False, True])
def test_a_stop_string_ends_a_reply(script, model, speak):
    """It is part of the reply, as everywhere; what was made beyond it is not."""
    ids = groups("one, two, three", range(60)) if speak else b"one, two, three"
    script.will_say(ids)
    chat = model.chat(options=GenerationConfig(stop_strings=("nothing", "two")))
    reply = chat.say("a", speak=speak)
    assert (reply.text, reply.finish_reason) == ("one, two", "string")
    assert reply.ids == tuple(ids[:36] if speak else ids[:8])


def test_the_length_limit_ends_with_what_was_spoken(script, model):
    ids = groups("Hello you", range(36))
    script.will_say(ids)
    chat = model.chat(options=GenerationConfig(max_new_tokens=23))
    reply = chat.say("a", speak=True)
    assert (reply.finish_reason, reply.ids) == ("length", tuple(ids[:23]))
    assert reply.codes == tuple(range(18))
    np.testing.assert_array_equal(reply.audio, sound(range(18)))
    # The history gets a whole group and the end of speech, as in training.
    closed = [*ids[:23], TTS_PAD, TTS_PAD, TTS_END]
    assert chat.history[-1] == template.spoken_turn(closed)


@pytest.mark.parametrize("loop", [[7], [7, 8, 9], groups("ab", [1] * 8, end=False), [TTS_PAD]])
def test_a_reply_in_circles_is_ended(script, model, loop):
    script.will_say([*b"So: ", *loop * 500])
    reply = model.chat(options=GenerationConfig(max_new_tokens=2000, max_repeat=100)).say(
        "a", speak=True
    )
    assert reply.finish_reason == "repetition"
    assert len(reply.ids) == 4 + len(loop) + 100
    script.will_say([*b"So: ", *loop * 100])
    free = model.chat(options=GenerationConfig(max_new_tokens=2000, max_repeat=0)).say(
        "a", speak=True
    )
    assert (free.finish_reason, len(free.ids)) == ("stop", 4 + 100 * len(loop))


# --- thinking ---


@pytest.mark.parametrize("speak", [False, True])
def test_thinking(script, model, speak):
    """Think first, stop at `</think>`, answer with the thoughts in sight, then forget them."""
    script.will_say(b"two and two</think>xyz", b"Four.", b"hm</think>", b"Yes.")
    chat = model.chat(system=None, think=True)
    stream = chat.stream("2+2?", speak=speak)
    pieces = list(stream)
    reply = stream.reply
    assert (reply.thinking, reply.text, reply.ids) == ("two and two", "Four.", (*b"Four.",))
    assert "".join(piece.thinking for piece in pieces) == "two and two"
    human, spoken = turn("human", "2+2?"), [TTS_START] if speak else []
    think = turn("assistant", "\n<think>\n", close=False)
    assert script.prompts[0] == human + think
    assert script.prompts[1] == [*human, *think, *b"two and two</think>\n\n", *spoken]
    chat.say("sure?", speak=speak)
    history = human + turn("assistant", spoken, "Four.")
    assert script.prompts[2] == history + turn("human", "sure?") + think


def test_thoughts_of_every_round(script, model):
    """Before and after a tool."""
    script.will_say(b"look</think>", call("get_date_time"), b"noon</think>", b"Noon.")
    reply = model.chat(think=True, tools=["get_date_time"]).say("time?")
    assert (reply.thinking, reply.text) == ("look\nnoon", "Noon.")


def test_thoughts_without_an_end(script, model):
    """The limit ends them; the answer follows all the same."""
    script.will_say(b"and so on </thi", b"Yes.")
    reply = model.chat(think=True).say("a")
    assert (reply.thinking, reply.text) == ("and so on </thi", "Yes.")
    told = b"<think>\nand so on </thi</think>\n\n"
    assert bytes(script.prompts[1][-len(told) :]) == told


def test_cancelled_while_thinking(script, model):
    script.will_say(b"two and two</think>", b"Four.")
    chat = model.chat(system=None, think=True)
    stream = chat.stream("2+2?", speak=True)
    assert next(stream).thinking == "two a"
    reply = stream.cancel()
    assert (reply.thinking, reply.text, reply.finish_reason) == ("two a", "", "cancelled")
    assert chat.history[1:] == (template.spoken_turn([TTS_END]),)

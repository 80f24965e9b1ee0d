"""Answers as they come, and answers that are interrupted."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.scripted import (
    CODE_0,
    OPEN,
    SAMPLES,
    SPOKEN,
    TTS_END,
    TTS_PAD,
    TTS_START,
    call,
    groups,
    interrupt,
    turn,
    until_sound,
)

from sa2jax.chat import template
from sa2jax.chat.toolbox import ToolAnswer
from sa2jax.errors import PromptError

# --- streams ---


@pytest.mark.both_pairs
def test_sound_comes_as_soon_as_a_chunk_is_there(script, model):
    script.will_say(groups("Hello", range(100)))
    lengths = {}
    for first in (None, 10):
        script.will_say(groups("Hello", range(100)))
        pieces = list(model.chat().stream("a", speak=True, first=first))
        lengths[first] = [len(piece.audio) // SAMPLES for piece in pieces if len(piece.audio)]
    assert lengths == {None: [25, 25, 25, 25], 10: [10, 20, 25, 25, 20]}


def test_text_is_there_before_the_sound_ends(script, model):
    script.will_say(groups("Hello", range(60)))
    pieces = list(model.chat().stream("a", speak=True))
    assert "".join(piece.text for piece in pieces) == "Hello"
    kinds = ["text" if piece.text else "audio" for piece in pieces]
    assert kinds[0] == "text"
    assert kinds[-1] == "audio"


def test_decoder_and_voice_work_at_the_same_time(slow, model):
    slow.pace = 0.04
    model.speech.token2wav.delay = 0.25
    slow.will_say(groups("Hello", range(100)))  # 26 blocks and 4 chunks: a second each
    reply = model.chat().say("a", speak=True)
    assert 1.0 < reply.timings.total < 1.7
    assert len(reply.codes) == 100


def test_silence_comes_at_once(slow, model):
    """A chunk under way is not waited for, and no other is begun."""
    model.speech.token2wav.delay = 0.5
    slow.will_say(groups("Hello", range(100)))
    stream = model.chat().stream("a", speak=True)
    until_sound(stream)
    started = time.perf_counter()
    stream.cancel()
    assert time.perf_counter() - started < 0.2
    time.sleep(0.7)
    assert len(model.speech.token2wav.spoken) <= 50


def test_a_stream_that_nobody_ends_does_not_keep_python_alive(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from helpers.scripted import Speech, Token2Wav
from sa2jax.device_loop import DeviceLoop
from sa2jax.speech.reply_stream import ReplyStream
from sa2jax.speech.worker import BackgroundReply
speaker = BackgroundReply(ReplyStream(Token2Wav(), Speech().voice()), DeviceLoop())
speaker.put([1, 2, 3])
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_stream_has_its_reply_at_the_end(script, model):
    script.will_say(b"Hello")
    stream = model.chat().stream("a")
    with pytest.raises(PromptError, match="no reply yet"):
        _ = stream.reply
    assert [piece.text for piece in stream] == ["Hello"]
    assert stream.reply.text == "Hello"
    assert stream.cancel() is stream.reply  # too late


@pytest.mark.parametrize(("chunk", "first"), [(0, None), (25, 0), (-1, None)])
def test_bad_chunks(script, model, chunk, first):
    with pytest.raises(PromptError, match="chunks of at least 1 code"):
        model.chat().stream("a", speak=True, chunk=chunk, first=first)


def test_a_voice_that_fails_ends_the_answer(slow, model, monkeypatch):
    chat = model.chat()
    monkeypatch.setattr(model.speech.token2wav, "_wave", lambda codes: 1 / 0)
    slow.will_say(groups("Hello", range(60)), b"fine")
    with pytest.raises(ZeroDivisionError):
        chat.say("a", speak=True)
    assert (chat.rounds, slow.left) == ([], 1)
    assert chat.say("b").text == "fine"


# --- barge-in ---


def test_cancelled_after_the_first_chunk(slow, model):
    """The history holds the codes that were heard, a whole group, and the end of speech."""
    codes = list(range(100))
    ids = groups("Hello", codes)
    slow.will_say(ids, groups("Yes", range(8)))
    chat = model.chat(system=None)
    stream = chat.stream("a", speak=True)
    (wave,) = until_sound(stream)
    reply = stream.cancel()
    np.testing.assert_array_equal(reply.audio, wave)
    assert (reply.finish_reason, reply.codes) == ("cancelled", tuple(range(25)))
    kept = [*ids[:32], *[TTS_PAD] * 3, TTS_END]  # 25 codes are six groups and one code more
    assert ids[31] == CODE_0 + 24
    assert reply.ids == tuple(kept)
    assert slow.left == 1  # the decoder was stopped
    assert reply.timings.prompt_tokens == len(slow.prompts[0])
    assert 32 <= reply.timings.generated_tokens < len(ids)
    assert chat.say("b", speak=True).text == "Yes"
    assert slow.prompts[1] == (
        turn("human", "a") + turn("assistant", [TTS_START, *kept]) + turn("human", "b") + SPOKEN
    )


@pytest.mark.parametrize(
    ("played", "codes", "kept"),
    [(0, 0, 0), (0.02, 0, 0), (0.04, 1, 2), (0.161, 4, 5), (0.2, 5, 7), (9, 25, 32)],
)
def test_cancelled_where_the_player_is(slow, model, played, codes, kept):
    ids = groups("Hello", range(100))
    slow.will_say(ids)
    chat = model.chat(system=None)
    stream = chat.stream("a", speak=True)
    until_sound(stream)
    reply = stream.cancel(played=played)
    assert reply.codes == tuple(range(codes))
    assert reply.ids[:kept] == tuple(ids[:kept])
    assert len(reply.ids) % 5 == 1  # whole groups and the end
    assert set(reply.ids[kept:-1]) <= {TTS_PAD}
    assert reply.ids[-1] == TTS_END
    assert len(reply.audio) == min(round(played * 24_000), 25 * SAMPLES)


def test_cancelled_after_its_end_while_it_still_plays(script, model):
    script.will_say(groups("Hello", range(50)), b"ok")
    chat = model.chat(system=None)
    stream = chat.stream("a", speak=True)
    list(stream)
    assert stream.cancel(played=100).finish_reason == "stop"  # all of it was heard
    assert stream.cancel(played=1.0).codes == tuple(range(25))
    assert (stream.reply.finish_reason, len(chat.rounds)) == ("cancelled", 1)
    chat.say("b")
    with pytest.raises(PromptError, match="only its newest answer can be cut"):
        stream.cancel(played=0.5)


def test_a_written_answer_is_cut_where_it_was_left(script, model):
    script.will_say("Hello, wwörld".encode(), b"ok")
    chat = model.chat(system=None)
    stream = chat.stream("a")
    assert next(stream).text == "Hello"
    assert next(stream).text == ", ww"  # half of the ö is held back
    assert stream.cancel().text == "Hello, ww"
    chat.say("b")
    assert script.prompts[1][: -len(OPEN)] == (
        turn("human", "a") + turn("assistant", "Hello, ww") + turn("human", "b")
    )


@pytest.mark.parametrize("speak", [False, True])
def test_cancelled_before_anything_came(script, model, speak):
    script.will_say(groups("Hello", range(50)))
    chat = model.chat(system=None)
    reply = chat.stream("a", speak=speak).cancel()
    assert (reply.text, reply.codes, len(reply.audio)) == ("", (), 0)
    assert chat.history[1] == (
        template.spoken_turn([TTS_END])
        if speak
        else template.Message("assistant", [template.Ids(())])
    )


@pytest.mark.parametrize("leave", ["with", "say", "undo", "fork"])
def test_a_stream_that_is_left_is_cancelled(slow, model, leave):
    slow.will_say(groups("Hello", range(100)), b"ok")
    chat = model.chat(system=None)
    if leave == "with":
        with chat.stream("a", speak=True) as stream:
            until_sound(stream)
    else:
        stream = chat.stream("a", speak=True)
        until_sound(stream)
        {"say": lambda: chat.say("b"), "undo": chat.undo, "fork": chat.fork}[leave]()
    assert stream.reply.finish_reason == "cancelled"
    assert slow.left == 1
    assert len(chat.rounds) == {"with": 1, "say": 2, "undo": 0, "fork": 1}[leave]


def test_an_interrupt_while_listening_to_a_whole_answer_takes_it_back(script, model, monkeypatch):
    script.will_say(groups("Hello", range(100)), b"ok")
    chat = model.chat(system=None)

    def interrupt(self, piece):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sa2jax.pipeline.answer.AnswerStep._emit_audio", interrupt)
        with pytest.raises(KeyboardInterrupt):
            chat.say("a", speak=True)
    assert chat.rounds == []
    assert chat.say("b").text == "ok"


def test_an_interrupt_in_a_stream_is_a_barge_in(slow, model, monkeypatch):
    slow.will_say(groups("Hello", range(100)))
    chat, heard_so_far = model.chat(system=None), []
    stream = chat.stream("a", speak=True)
    heard_so_far += until_sound(stream)
    with monkeypatch.context() as patch:
        patch.setattr("sa2jax.speech.worker.BackgroundReply.put", interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(stream)
    assert stream.cancel().codes == tuple(range(25))
    assert len(chat.rounds) == 1


def test_cancelled_from_another_thread(slow, model):
    """The one that takes the pieces gets no more; nobody is told an error."""
    slow.will_say(groups("Hello", range(100)), b"ok")
    chat = model.chat(system=None)
    stream, first = chat.stream("a", speak=True), threading.Event()

    def listen():
        for piece in stream:
            if len(piece.audio):
                first.set()

    listener = threading.Thread(target=listen)
    listener.start()
    assert first.wait(10)
    reply = stream.cancel()
    listener.join(10)
    assert not listener.is_alive()
    assert reply.finish_reason == "cancelled"
    assert 25 <= len(reply.codes) < 100
    assert chat.say("b").text == "ok"


def test_taking_more_after_an_interrupt_is_a_cancel(slow, model, monkeypatch):
    """As when a cell of a notebook is run again."""
    slow.will_say(groups("Hello", range(100)))
    chat = model.chat(system=None)
    stream = chat.stream("a", speak=True)
    until_sound(stream)
    with monkeypatch.context() as patch:
        patch.setattr("sa2jax.speech.worker.BackgroundReply.put", interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(stream)
    assert list(stream) == []
    assert stream.reply.codes == tuple(range(25))
    assert chat.history[-1].role == "assistant"


def test_an_old_answer_is_not_cut_while_a_new_one_comes(script, model):
    script.will_say(groups("Hello", range(16)), b"ok")
    chat = model.chat(system=None)
    old = chat.stream("a", speak=True)
    list(old)
    new = chat.stream("b")
    with pytest.raises(PromptError, match="only its newest answer can be cut"):
        old.cancel(played=0.16)
    list(new)
    assert chat.parse_answer(chat.history[1])[1].codes == list(range(16))


def test_later_cuts_only_shorten(script, model):
    script.will_say([*groups("Hello", range(50)), *call("search")])
    chat = model.chat(system=None, tools=[{"name": "search"}])
    stream = chat.stream("a", speak=True)
    list(stream)
    whole = stream.reply
    assert whole.finish_reason == "tool_calls"
    cut = stream.cancel(played=0.4)
    assert (cut.codes, cut.tool_calls, len(cut.audio)) == (tuple(range(10)), (), 10 * SAMPLES)
    again = stream.cancel(played=9)
    assert (again.codes, len(again.audio)) == (cut.codes, len(cut.audio))
    assert again.timings.total == whole.timings.total
    assert again.timings.speech == pytest.approx(0.4)
    with pytest.raises(PromptError, match="no call of a tool waits"):
        chat.say(ToolAnswer("late"))

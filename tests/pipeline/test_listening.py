"""Long, silent and unreadable recordings as a caller of `run` meets them; a scripted engine."""

import logging

import numpy as np
import pytest
import soundfile
from helpers.sound import voice

from sa2jax import AudioSource, Text
from sa2jax.errors import AudioError
from sa2jax.inference.requests import Completion
from sa2jax.pipeline.listening import Listener

RATE = 16_000


PAUSE = np.zeros(RATE, np.float32)
# Three segments: of 10 s, 20 s and 5 s.
LONG = np.concatenate([voice(10), PAUSE, voice(20), PAUSE, voice(5)])
SILENT = (np.zeros(3 * RATE, np.float32), RATE)


class Engine:
    """Answers with how many clips and tokens of sound it was given; ends as told."""

    def __init__(self, *reasons: str):
        self.reasons, self.indices, self.sizes, self.options = reasons, [], [], []

    def generate(self, requests, options, *, prompt_indices, decode_text, progress):
        self.indices += prompt_indices
        self.sizes.append(len(requests))
        self.options.append(options)
        made = []
        for index, request in zip(prompt_indices, requests, strict=True):
            reason = self.reasons[index] if index < len(self.reasons) else "stop"
            text = f"{len(request.counts)}:{sum(request.counts)}"
            made.append([Completion(tuple(text.encode()), reason)])
        if progress is not None:
            progress(len(made), len(made))
        return made


@pytest.fixture
def engine(model, monkeypatch):
    def use(*reasons: str) -> Engine:
        made = Engine(*reasons)
        monkeypatch.setattr(model, "engine", made)
        return made

    return use


def test_a_long_recording_is_answered_by_segments(engine, model):
    made = engine()
    (reply,) = model.run("asr", [(LONG, RATE)])
    times = [(round(s.start, 1), round(s.end, 1)) for s in reply.segments]
    assert times == [(0, 10.3), (10.7, 31.4), (31.7, 37)]
    assert reply.text == " ".join(segment.text for segment in reply.segments)
    assert all(segment.text.startswith("1:") for segment in reply.segments)
    assert (reply.finish_reason, reply.notes) == ("stop", ())
    assert made.options[0].max_new_tokens == 256  # a limit for each segment
    (whole,) = model.run("caption", [(LONG, RATE)])
    assert [(s.start, s.end) for s in whole.segments] == [(0, 25), (25, 37)]


def test_an_answer_that_did_not_end_is_told(engine, model, caplog):
    engine("stop", "length", "repetition")
    (reply,) = model.run("asr", [(LONG, RATE)])
    assert [s.finish_reason for s in reply.segments] == ["stop", "length", "repetition"]
    assert reply.finish_reason == "repetition"
    assert reply.notes[0].startswith("10.7 to 31.4 s: the answer was cut at its limit of 256 tok")
    assert reply.notes[1].startswith("31.7 to 37.0 s: the answer repeats itself and was ended")
    engine("length")
    with caplog.at_level(logging.WARNING):
        model.transcribe((voice(1), RATE), max_new_tokens=7)
    assert "the array: the answer was cut at its limit of 7 tokens" in caplog.text
    engine(*["length"] * 9)
    (reply,) = model.run("asr", [(np.tile(np.append(voice(2), PAUSE), 9), RATE)])
    assert (len(reply.notes), reply.notes[-1]) == (6, "so do 4 more segments")


def test_a_loop_ends_a_transcript_at_half_its_limit(engine, model):
    made = engine()
    model.run("asr", [(voice(1), RATE)])
    assert made.options[0].max_repeat == 128


def test_silence_is_not_answered(engine, model, caplog):
    made = engine()
    silent, spoken = model.run("asr", [SILENT, (voice(1), RATE)])
    assert (silent.text, silent.segments, silent.finish_reason) == ("", (), "stop")
    assert silent.notes[0].startswith("no speech: its 3.00 s are silent")
    assert (spoken.text, made.indices) == ("1:13", [0])
    with caplog.at_level(logging.WARNING):
        assert model.transcribe(SILENT) == model.translate(SILENT) == ""
    assert caplog.text.count("no speech") == 2
    (spoken,) = model.run("s2st_en", [SILENT])
    assert (spoken.text, len(spoken.audio), made.indices) == ("", 0, [0])
    assert "no speech" in spoken.notes[0]
    (described,) = model.run("caption", [SILENT])  # silence can be described
    assert described.text
    assert "no speech" in described.notes[0]


def test_unreadable_recordings_can_be_left_out(engine, model, tmp_path):
    engine()
    damaged = np.append(voice(1), np.nan)
    sources = [tmp_path / "no.wav", (voice(1), RATE), (damaged, RATE), Text("hm"), b"x"]
    replies = model.run("asr", sources, skip_unreadable=True)
    reasons = [reply.finish_reason for reply in replies]
    assert reasons == ["error", "stop", "error", "stop", "error"]
    assert [reply.text for reply in replies] == ["", "1:13", "", "0:0", ""]
    assert "no.wav does not exist" in replies[0].notes[0]
    with pytest.raises(AudioError, match="does not exist"):
        model.run("asr", sources)
    spoken = model.run("s2st_en", sources[:1], skip_unreadable=True)
    assert spoken[0].finish_reason == "error"


def test_no_more_than_a_few_prompts_are_held(engine, model, monkeypatch):
    """And progress counts those that are still to come."""
    monkeypatch.setattr(model, "batch_size", 2)
    made, told = engine(), []
    x = np.tile(np.append(voice(4), PAUSE), 20)  # 100 s
    replies = model.run("asr", [(x, RATE), SILENT], progress=lambda *done: told.append(done))
    assert (len(replies[0].segments), made.sizes) == (20, [8, 8, 4])
    assert [done for done, _ in told] == [8, 16, 20]
    assert told[-1] == (20, 20)
    assert sorted(made.indices) == list(range(20))
    assert {done <= total for done, total in told} == {True}


def test_a_file_is_read_in_blocks(tmp_path):
    """Not as a whole: the limit on what is held is not that on what is heard."""
    path = tmp_path / "a.flac"
    soundfile.write(path, np.zeros(8000 * 60, np.int16), 1000 * 8)
    listener = Listener(path, None)
    assert (list(listener.parts()), listener.expected) == ([], 0)
    limited = Listener(AudioSource(path, max_seconds=59), None)
    with pytest.raises(AudioError, match="longer than 59 s"):
        limited.check()


def test_what_is_said_in_a_conversation_is_told_of(script, model):
    script.will_say(b"Hm?", b"yes", finish_reason="length")
    reply = model.chat().say([SILENT, "what was that?"])
    assert "no speech: its 3.00 s" in reply.notes[0]
    assert len(reply.notes) == 2
    assert "cut at its limit" in reply.notes[1]

"""Reading aloud, and writing down: what the model is given, and the forms of its answers."""

import base64
import io
import json

import numpy as np
import pytest
import soundfile
from helpers.scripted import HELLO, SPOKEN, sound, turn

from sa2jax import audio
from sa2jax.chat.template import TASKS
from sa2jax.pipeline.reply import Segment

pytest.importorskip("fastapi", reason="needs the extra [serve]")
httpx = pytest.importorskip("httpx", reason="needs the package httpx")

from sa2jax.serve.openai import subtitles

URL = "/v1/audio/speech"


@pytest.fixture
def read_aloud(scripted_server):
    def post(**options):
        response = httpx.post(f"{scripted_server.url}{URL}", json={"input": "hi", **options})
        assert response.status_code == 200, response.text
        return response

    return post


@pytest.mark.parametrize("form", ["wav", "pcm", "flac", "mp3", "opus", None])
def test_every_format(read_aloud, script, form):
    script.will_say(HELLO)
    response = read_aloud(voice="bert", **({} if form is None else {"response_format": form}))
    kinds = {"wav": "wav", "pcm": "pcm", "flac": "flac", "opus": "ogg"}
    assert response.headers["content-type"] == f"audio/{kinds.get(form or '', 'mpeg')}"
    if form == "pcm":
        assert response.content == audio.pcm_16(sound(range(10, 30))).tobytes()
    else:
        heard = audio.load_audio(response.content, 24_000)
        assert len(heard) == pytest.approx(20 * 960, abs=2400)  # an mp3 is padded
    assert script.prompts == [[*turn("system", TASKS["tts"].system), *turn("human", "hi"), *SPOKEN]]


def test_events(read_aloud, script):
    script.will_say(HELLO)
    text = read_aloud(stream_format="sse", response_format="pcm").text
    events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-1]]
    assert {event["type"] for event in events[:-1]} == {"speech.audio.delta"}
    data = b"".join(base64.b64decode(event["audio"]) for event in events[:-1])
    assert data == audio.pcm_16(sound(range(10, 30))).tobytes()
    assert events[-1]["type"] == "speech.audio.done"
    assert events[-1]["usage"] == {
        "input_tokens": len(script.prompts[0]),
        "output_tokens": len(HELLO),
        "total_tokens": len(script.prompts[0]) + len(HELLO),
    }


def test_instructions_seed_and_temperature(read_aloud, script):
    script.will_say(HELLO, HELLO)
    read_aloud(instructions="Whisper.", seed=7, temperature=0.0)
    read_aloud()
    assert script.prompts[0][: len(script.prompts[0]) - len(SPOKEN)] == [
        *turn("system", f"{TASKS['tts'].system}Whisper.\n"),
        *turn("human", "hi"),
    ]
    assert [options.seed for options in script.options] == [7, 0]
    assert [options.sampling.temperature for options in script.options] == [0, 0.7]


# --- written down -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_questions(question) -> tuple[bytes, float]:
    """A recording of 35 s with two questions far from one another, and where the second begins."""
    said = audio.load_audio(question)
    samples = np.zeros(35 * 16_000, np.float32)
    samples[: len(said)] = said
    second = 30 * 16_000
    samples[second : second + len(said)] = said
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="WAV")
    return file.getvalue(), 30.0


@pytest.fixture
def write_down(nano_server):
    def post(recording: bytes, **fields) -> httpx.Response:
        response = httpx.post(
            f"{nano_server.url}/v1/audio/transcriptions",
            data=fields,
            files={"file": ("call.wav", recording)},
            timeout=120,
        )
        assert response.status_code == 200, response.text
        return response

    return post


def test_segments_have_their_true_times(write_down, two_questions):
    recording, second = two_questions
    told = write_down(recording, response_format="verbose_json").json()
    assert told["duration"] == 35
    first, last = told["segments"]
    assert first["text"] == last["text"] == "what is three plus four"
    assert first["start"] < 0.3
    assert last["start"] == pytest.approx(second, abs=0.3)
    assert last["end"] == pytest.approx(second + 1.6, abs=0.5)
    assert [segment["avg_logprob"] for segment in told["segments"]] == [None, None]
    assert told["text"] == " ".join([first["text"], last["text"]])
    events = write_down(recording, stream="true").text.split("\n\n")[:-1]
    events = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "".join(event.get("delta", "") for event in events) == told["text"]
    assert events[-1]["text"] == told["text"]


def test_silence_has_no_words_and_says_so(write_down):
    file = io.BytesIO()
    soundfile.write(file, np.zeros(32_000, np.float32), 16_000, format="FLAC")
    told = write_down(file.getvalue()).json()
    assert told["text"] == ""
    assert told["notes"]
    assert write_down(file.getvalue(), response_format="vtt").text == "WEBVTT\n"
    events = write_down(file.getvalue(), stream="true").text.split("\n\n")[:-1]
    assert json.loads(events[0].removeprefix("data: "))["text"] == ""


def test_subtitles():
    segments = [
        Segment(start=0.0, end=1.5, text="a <b> --> c", finish_reason="stop"),
        Segment(start=1.5, end=2.0, text="", finish_reason="stop"),
        Segment(start=3661.0406, end=3662.0, text="two\n\nlines", finish_reason="stop"),
    ]
    assert subtitles.srt(segments) == (
        "1\n00:00:00,000 --> 00:00:01,500\na <b> -> c\n\n"
        "2\n01:01:01,041 --> 01:01:02,000\ntwo lines\n"
    )
    assert subtitles.vtt(segments) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\na &lt;b&gt; -&gt; c\n\n"
        "01:01:01.041 --> 01:01:02.000\ntwo lines\n"
    )

"""OpenAI's own client, unmodified, against a server that hears and speaks."""

import asyncio
import base64
import io

import numpy as np
import pytest
import soundfile

from sa2jax.audio import load_audio
from sa2jax.chat.tool_schema import Tool
from sa2jax.chat.toolbox import get_date_time

pytest.importorskip("fastapi", reason="needs the extra [serve]")

openai = pytest.importorskip("openai", reason="needs the package openai")

SUM = "what is three plus four"


@pytest.fixture(scope="module")
def client(nano_server):
    with openai.OpenAI(
        base_url=f"{nano_server.url}/v1", api_key="any", max_retries=0, timeout=120
    ) as made:
        yield made


@pytest.fixture(scope="module")
def spoken_question(question) -> dict:
    """A message that asks by a recording."""
    data = base64.b64encode(question.read_bytes()).decode()
    audio = {"type": "input_audio", "input_audio": {"data": data, "format": "flac"}}
    return {"role": "user", "content": [audio]}


@pytest.fixture(scope="module")
def hears(nano):
    """What the model itself hears in some bytes, or samples at 24 kHz."""

    def hear(sound) -> str:
        return nano.transcribe(sound if isinstance(sound, bytes) else (sound, 24_000))

    return hear


@pytest.fixture(scope="module")
def spoken_answer(client, spoken_question):
    """The answer to the spoken question, as speech."""
    return client.chat.completions.create(
        model="nano",
        messages=[spoken_question],
        modalities=["text", "audio"],
        audio={"voice": "anna", "format": "wav"},
        temperature=0,
    )


@pytest.mark.both_pairs
def test_a_written_answer(client):
    answer = client.chat.completions.create(
        model="nano", messages=[{"role": "user", "content": SUM}], temperature=0
    )
    (choice,) = answer.choices
    assert choice.message.content == "seven"
    assert choice.finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.audio_tokens == 0


def test_a_spoken_answer_to_a_spoken_question(spoken_answer, hears):
    (choice,) = spoken_answer.choices
    message = choice.message
    assert message.content is None
    assert message.audio.transcript == "seven"
    wave = base64.b64decode(message.audio.data)
    info = soundfile.info(io.BytesIO(wave))
    assert (info.samplerate, info.channels, info.subtype) == (24_000, 1, "PCM_16")
    assert 0.3 < info.duration < 3
    assert hears(wave) == "seven"
    assert spoken_answer.usage.prompt_tokens_details.audio_tokens == 21
    assert spoken_answer.usage.completion_tokens_details.audio_tokens > 8


def test_a_streamed_answer_refers_to_the_one_before(
    client, spoken_question, spoken_answer, hears, nano_server
):
    """`assistant.audio.id` stands for the very ids that were spoken."""
    key = spoken_answer.choices[0].message.audio.id
    messages = [
        spoken_question,
        {"role": "assistant", "audio": {"id": key}},
        {"role": "user", "content": "say that again"},
    ]
    text, sound, keys, ends, usage = "", b"", set(), [], None
    for chunk in client.chat.completions.create(
        model="nano",
        messages=messages,
        modalities=["text", "audio"],
        audio={"voice": {"id": "rob"}, "format": "pcm16"},
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            ends += [choice.finish_reason] if choice.finish_reason else []
            if (audio := choice.delta.audio) is not None:
                keys |= {audio.id} - {None}
                text += audio.transcript or ""
                sound += base64.b64decode(audio.data or "")
                assert audio.expires_at is None or audio.expires_at > 1_700_000_000
    assert text == "seven"
    assert ends == ["stop"]
    assert len(keys) == 1
    assert keys != {key}
    assert hears(np.frombuffer(sound, "<i2").astype(np.float32) / 32768) == "seven"
    before = spoken_answer.usage
    new = before.prompt_tokens + before.completion_tokens
    assert usage.prompt_tokens > new  # all ids of the answer before stand in the prompt
    assert nano_server.state.replies.find(key) is not None


def test_asynchronous_requests_at_once(nano_server):
    async def ask():
        async with openai.AsyncOpenAI(
            base_url=f"{nano_server.url}/v1", api_key="any", max_retries=0, timeout=120
        ) as client:

            async def one(words: str) -> str:
                stream = await client.chat.completions.create(
                    model="nano",
                    messages=[{"role": "user", "content": words}],
                    temperature=0,
                    stream=True,
                )
                parts = [c.choices[0].delta.content or "" async for c in stream if c.choices]
                return "".join(parts)

            return await asyncio.gather(
                *map(one, (SUM, "what is one plus one", "what is two plus two"))
            )

    assert asyncio.run(ask()) == ["seven", "two", "four"]


def test_tools_are_called_and_answered(client):
    question = {"role": "user", "content": "what time is it"}
    tools = [Tool.of(get_date_time).schema]
    asked = client.chat.completions.create(
        model="nano", messages=[question], tools=tools, temperature=0
    ).choices[0]
    assert asked.finish_reason == "tool_calls"
    (call,) = asked.message.tool_calls
    assert (call.type, call.function.name, call.function.arguments) == (
        *("function", "get_date_time", "{}"),
    )
    result = {
        "role": "tool",
        "tool_call_id": call.id,
        "content": "2024-05-06 15:30:00 Monday UTC+00:00",
    }
    told = client.chat.completions.create(
        model="nano",
        messages=[question, asked.message.model_dump(exclude_none=True), result],
        tools=tools,
        temperature=0,
    ).choices[0]
    assert told.finish_reason == "stop"
    assert "three thirty" in told.message.content


def test_speech_is_read_aloud(client, hears):
    wave = client.audio.speech.create(
        model="nano", voice="anna", input="seven", response_format="wav"
    ).content
    assert hears(wave) == "seven"
    with client.audio.speech.with_streaming_response.create(
        model="nano", voice="anna", input="seven", response_format="pcm"
    ) as streamed:
        assert streamed.headers["content-type"] == "audio/pcm"
        sound = b"".join(streamed.iter_bytes())
    assert hears(np.frombuffer(sound, "<i2").astype(np.float32) / 32768) == "seven"


def test_recordings_are_written_down(client, question):
    def write_down(**options):
        with open(question, "rb") as file:
            return client.audio.transcriptions.create(model="nano", file=file, **options)

    assert write_down().text == SUM
    assert write_down(response_format="text") == f"{SUM}\n"
    whole = write_down(response_format="verbose_json", timestamp_granularities=["segment"])
    (segment,) = whole.segments
    assert (segment.text, segment.start, whole.text) == (SUM, 0.0, SUM)
    assert segment.end == pytest.approx(whole.duration, abs=0.01)
    assert "00:00:00,000 --> 00:00:01,6" in write_down(response_format="srt")
    assert write_down(response_format="vtt").startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.6")
    events = list(write_down(stream=True))
    deltas = [e.delta for e in events if e.type == "transcript.text.delta"]
    assert "".join(deltas) == SUM
    assert (events[-1].type, events[-1].text) == ("transcript.text.done", SUM)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the client's, of this method
def test_translations(client, question):
    with open(question, "rb") as file:
        told = client.audio.translations.create(
            model="nano", file=file, response_format="verbose_json"
        )
    assert told.language == "english"
    assert isinstance(told.text, str)


def test_voices_are_added_used_and_removed(client, nano_server, nano_voices, question):
    recording = load_audio(question, 24_000)
    wave = io.BytesIO()
    soundfile.write(wave, np.tile(recording, 2), 24_000, format="WAV")
    voice = client.audio.voices.create(
        name="me", audio_sample=("me.wav", wave.getvalue(), "audio/wav"), consent="cons_1"
    )
    assert (voice.id, voice.name, voice.object) == ("voice_me", "me", "audio.voice")
    assert (nano_voices / "me.safetensors").is_file()
    spoken = client.audio.speech.create(
        model="nano", voice={"id": voice.id}, input="seven", response_format="pcm"
    ).content
    assert len(spoken) > 2400
    listed = client.get("/audio/voices", cast_to=dict)
    assert listed["voices"] == ["anna", "rob", "sue", "me"]
    assert [v["name"] for v in listed["uploaded_voices"]] == ["me"]
    assert client.delete(f"/audio/voices/{voice.id}", cast_to=dict)["deleted"]
    assert not list(nano_voices.iterdir())
    with pytest.raises(openai.BadRequestError, match="no voice 'me'"):
        client.audio.speech.create(model="nano", voice="me", input="seven")


def test_models_and_errors_are_those_that_the_client_knows(client):
    assert [model.id for model in client.models.list()] == ["nano"]
    assert client.models.retrieve("nano").object == "model"
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("gpt-5")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="nano", messages=[], temperature=0)
    assert refused.value.param == "messages"

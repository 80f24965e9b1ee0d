"""Sound that goes out and comes in."""

import base64
import io

import numpy as np
import pytest
import soundfile

from sa2jax import audio
from sa2jax.errors import AudioError

pytest.importorskip("fastapi", reason="needs the extra [serve]")

from sa2jax.serve import encoders, recordings
from sa2jax.serve.encoders import encode, open_encoder, require_format
from sa2jax.serve.errors import ApiError
from sa2jax.serve.recordings import NamedFile, decode_recording, open_recording

RATE = 24_000
TONE = (0.3 * np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE)).astype(np.float32)
READABLE = ["wav", "mp3", "flac", "opus"]


def pieces(form: str) -> list[bytes]:
    encoder = open_encoder(form, RATE)
    made = [encoder.push(TONE[start : start + 6000]) for start in range(0, len(TONE), 6000)]
    return [*made, encoder.finish()]


def power(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples[RATE // 4 : -RATE // 4]))))


@pytest.mark.parametrize("form", READABLE)
@pytest.mark.parametrize("streamed", [True, False])
def test_what_is_written_can_be_read(form, streamed, tmp_path):
    data = b"".join(pieces(form)) if streamed else encode(form, RATE, TONE)
    heard = audio.load_audio(data, RATE)
    assert len(heard) == pytest.approx(len(TONE), rel=0.06)
    assert power(heard) == pytest.approx(power(TONE), rel=0.05)
    if not streamed:  # as a file: in memory libsndfile does not always know an mp3
        (tmp_path / f"a.{form}").write_bytes(data)
        info = soundfile.info(tmp_path / f"a.{form}")
        assert info.frames == pytest.approx(len(TONE), rel=0.06)


@pytest.mark.parametrize("form", ["wav", "pcm", "mp3", "flac"])
def test_sound_is_sent_as_it_is_made(form):
    made = pieces(form)
    assert len(made[0]) > 300
    assert all(made[:-1])


def test_bare_samples():
    assert b"".join(pieces("pcm")) == encode("pcm16", RATE, TONE) == audio.pcm_16(TONE).tobytes()


@pytest.mark.parametrize("form", list(encoders.MEDIA_TYPES))
def test_no_sound_at_all(form):
    encoder = open_encoder(form, RATE)
    data = encoder.push(TONE[:0]) + encoder.finish()
    if form == "wav":
        assert data[:4] == b"RIFF"


def test_aac():
    av = pytest.importorskip("av", reason="needs the extra [serve-av]")
    data = b"".join(pieces("aac"))
    with av.open(io.BytesIO(data), format="aac") as opened:
        heard = np.concatenate([f.to_ndarray()[0] for f in opened.decode(audio=0)])
    assert power(heard) == pytest.approx(power(TONE), rel=0.05)
    again = audio.load_audio(open_recording(io.BytesIO(data), "a.aac", max_seconds=9), RATE)
    assert power(again) == pytest.approx(power(TONE), rel=0.05)


@pytest.mark.parametrize(
    ("form", "codec", "rate"), [("webm", "libopus", 48_000), ("mp4", "aac", 44_100)]
)
def test_what_browsers_and_phones_record(form, codec, rate):
    av = pytest.importorskip("av", reason="needs the extra [serve-av]")
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        tone = (0.3 * np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate)).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        fifo = av.AudioFifo()
        fifo.write(frame)
        for part in fifo.read_many(stream.frame_size or 960):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    for wanted in (None, 16_000):
        source = open_recording(file, "clip", max_seconds=10, rate=wanted)
        heard = audio.load_audio(source, RATE)
        assert len(heard) == pytest.approx(2 * RATE, rel=0.02)
        assert power(heard) == pytest.approx(power(TONE), rel=0.05)
    with pytest.raises(AudioError, match="longer than 1 s"):
        open_recording(file, "clip", max_seconds=1)
    with pytest.raises(AudioError, match="cannot be decoded"):
        open_recording(io.BytesIO(file.getvalue()[:60]), "clip", max_seconds=1)


def test_without_pyav_it_is_said_what_is_missing(monkeypatch):
    monkeypatch.setattr(recordings.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ApiError, match=r"sa2jax\[serve-av\]"):
        open_recording(io.BytesIO(b"\x1a\x45\xdf\xa3rest"), "clip", max_seconds=1)
    with pytest.raises(ApiError, match=r"sa2jax\[serve-av\]"):
        require_format("aac", "response_format")


def test_base64_and_data_urls():
    data = base64.b64encode(encode("wav", RATE, TONE)).decode()
    for text in (data, f"data:audio/wav;base64,{data}"):
        source = decode_recording(text, "wav", param="p", max_seconds=10)
        assert len(audio.load_audio(source, RATE)) == len(TONE)
    with pytest.raises(AudioError, match="longer than 1 s"):
        audio.load_audio(decode_recording(data, "wav", param="p", max_seconds=1))


def test_a_file_is_called_by_a_harmless_name():
    named = NamedFile(io.BytesIO(b"x"), "../../etc/<b>\npasswd")
    assert named.name == ".._.._etc__b__passwd"
    assert repr(named) == named.name

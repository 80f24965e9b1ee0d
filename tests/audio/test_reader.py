"""What files from recorders, browsers and strangers say of themselves, and what is made of it."""

import io
import logging
import os
import struct

import numpy as np
import pytest
import soundfile

from sa2jax.audio import AudioSource, Recording, load_audio, read_audio
from sa2jax.audio.headers import check_header
from sa2jax.errors import AudioError

RATE = 16_000
SOUND = (0.3 * np.sin(np.arange(2 * RATE) / 20)).astype(np.float32)
LESS, MORE = "names less sound", "names more sound"


def encoded(kind: str, samples: np.ndarray = SOUND, subtype: str | None = None) -> bytearray:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format=kind, subtype=subtype)
    return bytearray(file.getvalue())


def with_size(kind: str, form: str, number: int, skip: int = 4, name: bytes = b"data") -> bytes:
    """A file in which the size after a chunk's name is another."""
    data = encoded(kind, subtype="PCM_16")
    at = data.index(name) + skip
    data[at : at + struct.calcsize(form)] = struct.pack(form, number)
    return bytes(data)


def with_flac_length(frames: int) -> bytes:
    data = encoded("FLAC")
    packed = int.from_bytes(data[18:26], "big") >> 36 << 36
    data[18:26] = (packed | frames).to_bytes(8, "big")
    return bytes(data)


def notes_of(caplog, source, **options) -> tuple[np.ndarray, list[str]]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        samples = load_audio(source, **options)
    return samples, [record.getMessage() for record in caplog.records]


WRONG = {
    "wav, killed": (with_size("WAV", "<I", 0), LESS),
    "wav, some moment": (with_size("WAV", "<I", 1000), LESS),
    "wav, a pipe": (with_size("WAV", "<I", 0xFFFFFFFF), MORE),
    "wav, cut": (bytes(encoded("WAV")) + b"", None),
    "rf64, killed": (with_size("RF64", "<Q", 0, skip=16, name=b"ds64"), LESS),
    "au, killed": (with_size("AU", ">I", 0, skip=8, name=b".snd"), LESS),
    "au, unknown as the format has it": (with_size("AU", ">I", 2**32 - 1, 8, b".snd"), None),
    "caf, killed": (with_size("CAF", ">q", 0), LESS),
    "caf, unknown as the format has it": (with_size("CAF", ">q", -1), None),
    "caf, too much": (with_size("CAF", ">q", 10**9), MORE),
    "aiff, killed": (with_size("AIFF", ">I", 0, name=b"SSND"), None),
    "flac, a pipe": (with_flac_length(0), None),
    "flac, less": (with_flac_length(5000), "its header names 0.3 s, it holds 2.0 s"),
    "flac, more": (with_flac_length(10**6), "its header names 62.5 s, it holds 2.0 s"),
}


def test_every_form_that_soundfile_writes_is_read():
    """Also those that can be read but once, and in blocks, such as GSM 6.10 in a wav."""
    seen = set()
    # Of the first nothing can be told; the others keep rate or samples elsewhere, or none.
    for kind in soundfile.available_formats().keys() - {"RAW", "SD2", "WVE", "XI"}:
        for subtype in soundfile.available_subtypes(kind):
            try:
                data = encoded(kind, subtype=subtype)
            except soundfile.SoundFileError:  # it has no mono, or no such rate
                continue
            assert abs(len(load_audio(bytes(data))) - len(SOUND)) < 3000, (kind, subtype)
            seen.add((kind, subtype))
    assert {("WAV", "GSM610"), ("MP3", "MPEG_LAYER_III"), ("OGG", "OPUS")} <= seen


@pytest.mark.parametrize("before", [b"", b"ID3\4\0\0\0\0\0\x14" + bytes(20), bytes(2000)])
def test_an_mp3_in_memory_needs_no_tag(tmp_path, before):
    """As browsers and services of speech send it; zeros are what some streams begin with."""
    data = before + bytes(encoded("MP3"))
    (tmp_path / "a.mp3").write_bytes(data)
    whole = load_audio(tmp_path / "a.mp3")
    np.testing.assert_allclose(whole, SOUND, atol=0.05)
    np.testing.assert_array_equal(load_audio(data), whole)
    with (tmp_path / "a.mp3").open("rb") as file:
        np.testing.assert_array_equal(load_audio(file), whole)


@pytest.mark.parametrize("case", WRONG)
def test_files_are_read_to_their_end(caplog, tmp_path, case):
    data, note = WRONG[case]
    path = tmp_path / "a"
    path.write_bytes(data)
    for source in (path, data, io.BytesIO(data)):
        samples, notes = notes_of(caplog, source)
        np.testing.assert_allclose(samples, SOUND, atol=5e-5)
        assert len(notes) == (note is not None)
        assert all(note in text for text in notes)


def test_a_cut_file_says_so(caplog):
    samples, notes = notes_of(caplog, bytes(encoded("WAV")[:20_044]))
    assert len(samples) == 10_000
    assert MORE in notes[0]


CHUNK = b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14) + b"Lavf60.16.100\0"


@pytest.mark.parametrize("tail", [CHUNK, CHUNK[:20], b"abcd\2\0\0\0xy", b"\0" * 999, b"\1"])
def test_what_stands_behind_the_sound_is_no_sound(caplog, tail):
    samples, notes = notes_of(caplog, bytes(encoded("WAV", subtype="PCM_16")) + tail)
    assert (len(samples), notes) == (len(SOUND), [])


def test_a_file_that_is_given_stays_open(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(WRONG["wav, killed"][0])
    with path.open("rb") as file:
        first = load_audio(file)
        np.testing.assert_array_equal(load_audio(file), first)
        assert not file.closed


def test_an_empty_wav_is_empty():
    data = bytes(encoded("WAV", SOUND[:0]))
    assert not check_header(io.BytesIO(data + CHUNK)).note
    with pytest.raises(AudioError, match="no samples"):
        load_audio(data + CHUNK)


# --- levels ---


@pytest.mark.parametrize(
    ("samples", "scale", "note"),
    [
        (SOUND * 6, 1, "its samples reach 1.8"),
        (SOUND * 20, 1, "its samples reach 6.0, far above full scale"),
        (np.rint(SOUND * 10_000), 32768, "taken for 16-bit numbers"),
        (np.rint(SOUND * 10), 32768, "taken for 16-bit numbers"),  # a quiet recording
        (SOUND * 12_000.5, 32768, "taken for 16-bit numbers"),  # resampled since
    ],
)
def test_float_samples_above_full_scale(caplog, samples, scale, note):
    samples = samples.astype(np.float32)
    for source in (bytes(encoded("WAV", samples, "FLOAT")), (samples, RATE)):
        found, notes = notes_of(caplog, source)
        np.testing.assert_allclose(found, samples / np.float32(scale))
        assert len(notes) == (np.abs(samples).max() > 2)
        assert all(note in text for text in notes)


def test_samples_of_no_known_scale_are_refused():
    with pytest.raises(AudioError, match=r"reaches 6\.44e\+08; divide them by their full scale"):
        load_audio((SOUND * 2**31, RATE))


# --- channels ---


def test_a_silent_channel_beside_one_that_speaks(caplog):
    stereo = np.stack([SOUND * 1e-3, SOUND])
    _, notes = notes_of(caplog, (stereo, RATE))
    assert "channel 0 is silent or nearly so, channel 1 is not" in notes[0]
    for channel, expected in ((1, stereo[1]), ("mean", stereo.mean(0))):
        found, notes = notes_of(caplog, (stereo, RATE), channel=channel)
        np.testing.assert_array_equal(found, expected)
        assert notes == []
    found, _ = notes_of(caplog, AudioSource((stereo, RATE), channel=1))
    np.testing.assert_array_equal(found, SOUND)
    _, notes = notes_of(caplog, (np.stack([SOUND, -SOUND]), RATE), channel="mean")
    assert "the mean of the channels is silent" in notes[0]
    assert notes_of(caplog, (np.stack([SOUND, SOUND * 0]), RATE))[1] == []
    assert notes_of(caplog, (stereo[:, :1] * 0, RATE))[1] == []  # both are silent


@pytest.mark.parametrize("channel", [2, -1, "left", True])
def test_a_channel_that_is_not_there(channel):
    with pytest.raises(AudioError, match="has 2 channels: expected a channel from 0 to 1, or 'me"):
        load_audio((np.stack([SOUND, SOUND]), RATE), channel=channel)


# --- what would eat the machine ---


def test_a_rate_that_nobody_records_with():
    """100 kB at 1 Hz would be 1.6 billion samples."""
    data = bytearray(encoded("WAV"))
    data[24:28] = struct.pack("<I", 1)
    for source in (bytes(data), (SOUND, 1)):
        with pytest.raises(AudioError, match="expected a sample rate of 1000 to 1000000 Hz"):
            load_audio(source)


def test_hours_of_compressed_silence():
    data = bytes(encoded("FLAC", np.zeros(100 * RATE, np.int16)))
    assert len(data) < 10_000
    lying = bytearray(data)
    lying[18:26] = (int.from_bytes(data[18:26], "big") >> 36 << 36).to_bytes(8, "big")
    for read in (load_audio, read_audio):
        for source in (data, bytes(lying), (np.zeros(100 * RATE), RATE)):
            with pytest.raises(AudioError, match="is longer than 99 s: cut it, or allow more"):
                read(source, max_seconds=99)
    assert len(load_audio(data, max_seconds=None)) == 100 * RATE
    with pytest.raises(AudioError, match="longer than 7200 s"):
        load_audio((np.broadcast_to(np.float32(0), 7201 * 1000), 1000))


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    for path, message in (
        (tmp_path / "pipe.wav", "is a pipe or a device"),
        ("/dev/zero", "is a pipe or a device"),
        (tmp_path / "loop.wav", "expected wav"),
        ("a\0.wav", "does not exist"),
    ):
        with pytest.raises(AudioError, match=message):
            load_audio(path)


# --- recordings in memory ---


def test_a_recording_says_that_nothing_can_be_heard():
    silent = Recording.from_source((np.zeros(RATE), RATE))
    assert not silent.has_sound
    assert silent.notes == (
        "no speech: its 1.00 s are silent, nothing is louder than -66 dB for 0.1 s",
    )
    offset = Recording.from_source((np.full(RATE, 0.2), RATE))
    assert not offset.has_sound
    spoken = Recording.from_source((SOUND, RATE))
    assert (spoken.has_sound, spoken.notes) == (True, ())

import io
import math
import os
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

import sa2jax.audio.reader as audio_reader
from sa2jax.audio import load_audio, pcm_16, read_audio, resample, split_chunks, write_wav
from sa2jax.errors import AudioError


def tone(rate: int, channels: int = 1, seconds: float = 0.5) -> np.ndarray:
    """[C, T]: a sine per channel, 400 Hz, 500 Hz, ..."""
    time = np.arange(round(rate * seconds)) / rate
    hz = 400 + 100 * np.arange(channels)
    return (0.5 * np.sin(2 * np.pi * hz[:, None] * time)).astype(np.float32)


def save(path: Path, samples: np.ndarray, rate: int, subtype: str | None = None) -> Path:
    soundfile.write(path, samples.T, rate, subtype=subtype)
    return path


# ---- against the official loader -----------------------------------------------------------------


def test_load_equals_official(golden):
    want, path = np.load(golden / "frontend/load_audio.npz"), golden / "frontend/stereo48k.wav"
    got = load_audio(path)  # measured: 6e-9
    np.testing.assert_allclose(got, want["official_load_audio"], atol=1e-6)
    np.testing.assert_allclose(got, want["s3_load_audio"], atol=1e-6)
    cut = want["official_load_audio_max4001"]
    np.testing.assert_allclose(got[: len(cut)], cut, atol=1e-6)
    np.testing.assert_allclose(
        load_audio(path, 24_000, channel="mean"), want["mean24k"], atol=1e-6
    )  # 1e-7


def test_resample_equals_torchaudio(golden):
    arrays = np.load(golden / "frontend/resample.npz")
    outputs = [key for key in arrays if key.startswith("out_")]
    assert outputs
    for key in outputs:
        _, from_rate, _, to_rate = key.split("_")
        name = f"in_{from_rate}_i16"
        source = arrays[name if name in arrays else f"in_{from_rate}_for24k_i16"] / np.float32(
            32768
        )
        got = resample(source, int(from_rate), int(to_rate))
        np.testing.assert_allclose(got, arrays[key], atol=1e-6, err_msg=key)  # measured: 1.2e-7


# ---- resampling ----------------------------------------------------------------------------------


def slow_resample(x: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """The definition, one dense matrix in float64: sum of x times a Hann-windowed sinc.

    With torchaudio's one inaccuracy: the fraction of a period is rounded to float32.
    """
    common = math.gcd(from_rate, to_rate)
    p, q = from_rate // common, to_rate // common
    out = np.arange(math.ceil(len(x) * q / p))
    periods = out // q + np.divide(out % q, q, dtype=np.float32).astype(np.float64)
    cut = 0.99 * min(p, q)
    time = (periods[:, None] - np.arange(len(x)) / p) * cut
    window = np.where(np.abs(time) < 6, np.cos(np.pi * time / 12) ** 2, 0)
    return (np.sinc(time) * window * cut / p) @ x


UP = [(8000, 16000), (11025, 16000), (16000, 24000), (16000, 48000), (16000, 16001), (1, 2)]
DOWN = [(22050, 16000), (32000, 24000), (44100, 24000), (96000, 16000), (44101, 16000), (7, 3)]


@pytest.mark.parametrize(("from_rate", "to_rate"), UP + DOWN)
def test_resample_equals_its_definition(rng, from_rate, to_rate):
    x = rng.uniform(-1, 1, 1237).astype(np.float32)
    want = slow_resample(x, from_rate, to_rate)
    got = resample(x, from_rate, to_rate)
    assert got.dtype == np.float32
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("rates", [(44100, 16000), (48000, 16000), (8000, 16000), (16000, 24000)])
def test_resample_does_not_depend_on_the_blocks(rng, monkeypatch, rates):
    x = rng.uniform(-1, 1, (2, 9973)).astype(np.float32)
    whole = resample(x, *rates)
    monkeypatch.setattr(audio_reader, "_BLOCK", 100)
    np.testing.assert_allclose(resample(x, *rates), whole, atol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 3, 17, 160, 441, 442])
def test_resample_of_few_samples(length):
    got = resample(np.ones((2, length), np.float32), 44100, 16000)[1]
    assert len(got) == math.ceil(length * 160 / 441)
    np.testing.assert_allclose(got, slow_resample(np.ones(length), 44100, 16000), atol=1e-5)


def test_resample_rows_are_independent_and_same_rate_is_identity(rng):
    x = rng.uniform(-1, 1, (3, 500)).astype(np.float32)
    rows = np.stack([resample(row, 48000, 16000) for row in x])
    np.testing.assert_allclose(resample(x, 48000, 16000), rows, atol=1e-7)
    np.testing.assert_array_equal(resample(x, 16000, 16000), x)


def test_long_length_is_rounded_in_float32_as_torchaudio_does():
    """ceil(float32(q * T / p)): one sample less than exact arithmetic for this length."""
    length = 441 * 15_000 + 14
    exact = math.ceil(length * 160 / 441)
    assert len(resample(np.zeros(length, np.float32), 44100, 16000)) == exact - 1


# ---- formats -------------------------------------------------------------------------------------

EXACT = [
    ("wav", "PCM_16", 5e-5),
    ("wav", "PCM_24", 2e-7),
    ("wav", "FLOAT", 0),
    ("flac", None, 5e-5),
]
LOSSY = [("ogg", None, 0.05), ("mp3", None, 0.05)]


@pytest.mark.parametrize(("suffix", "subtype", "atol"), EXACT + LOSSY)
@pytest.mark.parametrize("channels", [1, 2])
def test_read_formats(tmp_path, suffix, subtype, atol, channels):
    want = tone(24000, channels)
    path = save(tmp_path / f"a.{suffix}", want, 24000, subtype)
    got, rate = read_audio(path)
    assert rate == 24000
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    assert got.shape == want.shape
    inner = slice(1000, -1000) if (suffix, subtype, atol) in LOSSY else slice(None)
    np.testing.assert_allclose(got[:, inner], want[:, inner], atol=atol)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_surround(tmp_path, suffix):
    want = tone(48000, 6)
    path = save(tmp_path / f"a.{suffix}", want, 48000)
    got, _ = read_audio(path)
    assert got.shape == want.shape
    np.testing.assert_allclose(load_audio(path), resample(got[0], 48000, 16000), atol=1e-6)
    mean = resample(got.mean(0), 48000, 16000)
    np.testing.assert_allclose(load_audio(path, channel="mean"), mean, atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000])
def test_load_any_rate(tmp_path, rate):
    got = load_audio(save(tmp_path / "a.wav", tone(rate, 2), rate))
    want = tone(16000)[0]
    assert abs(len(got) - len(want)) <= 1
    inner = slice(200, len(want) - 200)
    np.testing.assert_allclose(got[inner], want[inner], atol=2e-3)  # the pass band's ripple


def test_sources_agree(tmp_path):
    path = save(tmp_path / "a.wav", tone(16000, 2), 16000, "PCM_16")
    want, _ = read_audio(path)
    buffer = io.BytesIO(path.read_bytes())
    with path.open("rb") as file:
        for source in (str(path), path.read_bytes(), buffer, buffer, file, (want, 16000)):
            got, rate = read_audio(source)
            np.testing.assert_array_equal(got, want)
            assert rate == 16000
    np.testing.assert_array_equal(read_audio(want, rate=16000)[0], want)
    np.testing.assert_array_equal(load_audio((want[1], 16000)), want[1])


def test_a_pipe_can_be_read(tmp_path):
    path = save(tmp_path / "a.wav", tone(16000), 16000)
    reader, writer = os.pipe()

    def feed() -> None:
        with os.fdopen(writer, "wb") as sink:
            sink.write(path.read_bytes())

    thread = threading.Thread(target=feed)
    thread.start()
    with os.fdopen(reader, "rb") as source:
        got, _ = read_audio(source)
    thread.join()
    np.testing.assert_array_equal(got, read_audio(path)[0])


@pytest.mark.parametrize(("dtype", "scale"), [("int16", 2**15), ("int32", 2**31), ("int8", 2**7)])
def test_integers_are_scaled_as_in_files(dtype, scale):
    got, _ = read_audio(np.array([-scale, 0, scale // 2], dtype), rate=8000)
    np.testing.assert_array_equal(got, [[-1, 0, 0.5]])


def test_unsigned_bytes_are_centred(tmp_path):
    got, _ = read_audio(np.array([0, 128, 192], np.uint8), rate=8000)
    np.testing.assert_array_equal(got, [[-1, 0, 0.5]])


def test_float64_becomes_float32():
    got, _ = read_audio(np.linspace(-1, 1, 9), rate=8000)
    assert got.dtype == np.float32


def test_load_streams(tmp_path, monkeypatch):
    """Loading 20 s of 48 kHz stereo never holds the half of it."""
    path = save(tmp_path / "a.wav", tone(48000, 2, seconds=20), 48000)
    monkeypatch.setattr(audio_reader, "_BLOCK", 1 << 14)
    load_audio(path)  # tables
    tracemalloc.start()
    got = load_audio(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(got) == 20 * 16000
    assert peak < 48000 * 20 * 2 * 4 / 2


# ---- split ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 9, 10, 11, 35])
def test_split_loses_nothing(length):
    x = np.arange(length, dtype=np.float32)
    parts = split_chunks(x, 10)
    assert [len(p) for p in parts[:-1]] == [10] * (len(parts) - 1)
    assert 1 <= len(parts[-1]) <= 10
    np.testing.assert_array_equal(np.concatenate(parts), x)


def test_split_default_is_25_seconds():
    assert [len(p) for p in split_chunks(np.zeros(400_001, np.float32))] == [400_000, 1]


@pytest.mark.parametrize(("shape", "chunk"), [((0,), 10), ((2, 5), 10), ((5,), 0)])
def test_split_refuses(shape, chunk):
    with pytest.raises(AudioError, match="expected samples"):
        split_chunks(np.zeros(shape, np.float32), chunk)


# ---- write ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2])
def test_write_float_is_exact(tmp_path, channels):
    want = tone(24000, channels)
    write_wav(tmp_path / "a.wav", want[0] if channels == 1 else want, 24000)
    got, rate = read_audio(tmp_path / "a.wav")
    np.testing.assert_array_equal(got, want)
    assert rate == 24000
    assert soundfile.info(tmp_path / "a.wav").subtype == "FLOAT"
    assert [p.name for p in tmp_path.iterdir()] == ["a.wav"]


def test_write_pcm16_returns_every_value_and_clips(tmp_path):
    every = np.arange(-(2**15), 2**15).astype(np.int16)
    write_wav(tmp_path / "a.wav", every / np.float32(32768), 16000, subtype="PCM_16")
    np.testing.assert_array_equal(soundfile.read(tmp_path / "a.wav", dtype="int16")[0], every)
    write_wav(tmp_path / "a.wav", every, 16000, subtype="PCM_16")
    np.testing.assert_array_equal(soundfile.read(tmp_path / "a.wav", dtype="int16")[0], every)
    write_wav(tmp_path / "a.wav", np.array([-3.0, 3.0]), 16000, subtype="PCM_16")
    got = soundfile.read(tmp_path / "a.wav", dtype="int16")[0]
    np.testing.assert_array_equal(got, [-(2**15), 2**15 - 1])


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    write_wav(path, tone(16000), 16000)
    before = path.read_bytes()

    def fail(name, *args, **kwargs):
        Path(name).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(soundfile, "write", fail)
    with pytest.raises(AudioError, match="No space left"):
        write_wav(path, tone(16000), 16000)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


GOOD = np.zeros(10, np.float32)


@pytest.mark.parametrize(
    ("name", "samples", "rate", "match"),
    [
        ("a.mp3", GOOD, 16000, "ending in .wav"),
        ("no/such/a.wav", GOOD, 16000, "cannot write"),
        ("a.wav", GOOD[:0], 16000, "no samples"),
        ("a.wav", GOOD * np.nan, 16000, "NaN or Inf"),
        ("a.wav", GOOD, 0, "sample rate"),
        ("a.wav", GOOD[None, None], 16000, "shape"),
    ],
)
def test_write_refuses(tmp_path, name, samples, rate, match):
    with pytest.raises(AudioError, match=match):
        write_wav(tmp_path / name, samples, rate)
    assert not list(tmp_path.iterdir())


def test_write_refuses_other_subtypes(tmp_path):
    with pytest.raises(AudioError, match="subtype"):
        write_wav(tmp_path / "a.wav", GOOD, 16000, subtype="PCM_24")  # pyrefly: ignore


# ---- bad inputs ----------------------------------------------------------------------------------


def nan_file(folder: Path) -> Path:
    x = tone(16000)
    x[0, 100] = np.inf
    return save(folder / "nan.wav", x, 16000, "FLOAT")


def cut_flac(folder: Path) -> Path:
    path = save(folder / "cut.flac", tone(16000), 16000)
    path.write_bytes(path.read_bytes()[:60])
    return path


BAD = {
    "missing": (lambda d: d / "no.wav", "does not exist"),
    "folder": (lambda d: d, "is a folder"),
    "text": (lambda d: Path(__file__), "cannot be read"),
    "empty bytes": (lambda d: b"", r"the bytes is empty \(0 bytes\)"),
    "bytes": (lambda d: b"not audio at all", "cannot be read"),
    "raw": (lambda d: save(d / "a.wav", tone(16000), 16000).rename(d / "a.raw"), "cannot be read"),
    "no samples": (lambda d: save(d / "a.wav", np.zeros((1, 0)), 16000), "no samples"),
    "cut flac": (cut_flac, "cannot be read|no samples"),
    "nan": (nan_file, "NaN or Inf"),
    "nothing": (lambda d: None, "expected a path"),
    "array without rate": (lambda d: GOOD, "sample rate"),
    "zero rate": (lambda d: (GOOD, 0), "sample rate"),
    "negative rate": (lambda d: (GOOD, -16000), "sample rate"),
    "float rate": (lambda d: (GOOD, 16000.5), "sample rate"),
    "truth rate": (lambda d: (GOOD, True), "sample rate"),
    "huge rate": (lambda d: (GOOD, 2**31), "sample rate"),
    "three dimensions": (lambda d: (np.zeros((1, 2, 10)), 16000), "shape"),
    "no dimension": (lambda d: (np.float32(1), 16000), "shape"),
    "transposed": (lambda d: (np.zeros((100, 2)), 16000), "transpose"),
    "empty array": (lambda d: (GOOD[:0], 16000), "no samples"),
    "nan array": (lambda d: (GOOD * np.nan, 16000), "NaN or Inf"),
    "complex": (lambda d: (GOOD * 1j, 16000), "complex"),
    "words": (lambda d: (np.array(["a"]), 16000), "expected float"),
    "triple": (lambda d: (GOOD, 16000, 1), "expected"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("function", [read_audio, load_audio])
def test_bad_input_is_one_line(tmp_path, case, function):
    make, match = BAD[case]
    with pytest.raises(AudioError, match=match) as caught:
        function(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_rate_belongs_to_arrays_only(tmp_path):
    path = save(tmp_path / "a.wav", tone(16000), 16000)
    with pytest.raises(AudioError, match="leave rate out"):
        read_audio(path, rate=8000)
    with pytest.raises(AudioError, match="expected"):
        read_audio((GOOD, 16000), rate=8000)


def test_load_refuses_bad_wishes():
    with pytest.raises(AudioError, match="channel"):
        load_audio((GOOD, 16000), channel="left")  # pyrefly: ignore
    with pytest.raises(AudioError, match="sample rate"):
        load_audio((GOOD, 16000), 0)
    with pytest.raises(AudioError, match="sample rate"):
        resample(GOOD, 16000, -1)


def test_16_bit_samples_are_cut_as_in_the_official_streaming():
    samples = np.array([-2, -1, -0.5, -1e-5, 0, 2e-5, 0.5, 1, 2], np.float32)
    official = [-32767, -32767, -16383, 0, 0, 0, 16383, 32767, 32767]
    assert pcm_16(samples, parity=True).tolist() == official
    default = [-32768, -32768, -16384, 0, 0, 1, 16384, 32767, 32767]
    assert pcm_16(samples).tolist() == default


@pytest.mark.parametrize("parity", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_does_not_become_16_bit(value, parity):
    with pytest.raises(AudioError, match="NaN or Inf"):
        pcm_16(np.array([0, value], np.float32), parity=parity)

"""The other reader: its protocol with a stand-in, and tensorflow-io itself where it is installed.

SA2JAX_TFIO_PYTHON=/path/to/tfio/bin/python pytest tests/train/data/test_tfio.py
"""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from sa2jax import audio
from sa2jax.errors import AudioError, DataError
from sa2jax.train.data import tfio_reader
from sa2jax.train.data.prepare import PrepareConfig, prepare_dataset
from sa2jax.train.data.readers import TfioReader, TfRecord
from sa2jax.train.data.samples import Sample, ShardSource, open_source

REAL = os.environ.get("SA2JAX_TFIO_PYTHON")
real = pytest.mark.skipif(
    not REAL,
    reason="SA2JAX_TFIO_PYTHON does not name the interpreter of an environment made with "
    "requirements-tfio.txt",
)

# The process without TensorFlow: a TFRecord file is JSON here, a file's bytes are samples.
STAND_IN = """
import json, os, sys, numpy as np, soundfile
sys.path.insert(0, {folder!r})
import tfio_reader

def decode(path):
    if "crash" in path:
        os._exit(3)
    return soundfile.read(path, always_2d=True, dtype={dtype!r})

def decode_bytes(data):
    if data == b"crash":
        os._exit(3)
    return np.frombuffer(data, np.int16)[:, None], 16_000

def records(path, skip):
    if "crash" in path:
        os._exit(3)
    for line, *files in json.load(open(path))[skip:]:
        yield line.encode(), [bytes.fromhex(file) for file in files]

answers = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
print("this must not get between the frames")
{start}
tfio_reader.write_frame(answers, {{"ready": {{"tensorflow": "0"}}}})
tfio_reader.serve(sys.stdin.buffer, answers, decode, decode_bytes, records)
"""


@pytest.fixture
def stand_in(tmp_path):
    """Makes the interpreter of an environment in which things are as told."""

    def make(start: str = "", dtype: str = "int16"):
        script = tmp_path / "stand_in.py"
        folder = os.path.dirname(tfio_reader.__file__)
        script.write_text(STAND_IN.format(folder=folder, dtype=dtype, start=start))
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\nexec {sys.executable} {script}\n")
        python.chmod(0o755)
        return python

    return make


@pytest.fixture
def recording(tmp_path, rng):
    path = tmp_path / "a.flac"
    soundfile.write(path, rng.standard_normal((4000, 2)).clip(-3, 3) / 4, 24_000)
    return path


# --- the protocol ---------------------------------------------------------------------------------


def test_frames():
    pipe = io.BytesIO()
    tfio_reader.write_frame(pipe, {"a": "é"}, [b"12", b"", b"345"])
    tfio_reader.write_frame(pipe, {})
    pipe.seek(0)
    assert tfio_reader.read_frame(pipe) == ({"a": "é"}, [b"12", b"", b"345"])
    assert tfio_reader.read_frame(pipe) == ({}, [])
    with pytest.raises(EOFError):
        tfio_reader.read_frame(pipe)
    with pytest.raises(EOFError):
        tfio_reader.read_frame(io.BytesIO(pipe.getvalue()[:-1][:30]))


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (np.array([-32768, 16384], np.int16), [-1, 0.5]),
        (np.array([-(2**31), 2**30], np.int32), [-1, 0.5]),
        (np.array([0, 128, 192], np.uint8), [-1, 0, 0.5]),
        (np.array([0.25], np.float64), [0.25]),
    ],
)
def test_scales(samples, expected):
    found = tfio_reader.as_float(samples)
    assert found.dtype == np.float32
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("subtype", "name", "expected"),
    [
        ("PCM_32", "WAV", True),
        ("PCM_32", "WAVEX", True),
        ("FLOAT", "WAV", False),
        ("FLOAT", "WAVEX", False),
        ("PCM_16", "WAV", False),
        ("PCM_16", "FLAC", False),
    ],
)
def test_int32(subtype, name, expected):
    file = io.BytesIO()
    soundfile.write(file, np.zeros(9), 8000, subtype=subtype, format=name)
    assert tfio_reader.holds_int32(file.getvalue()) == expected
    assert not tfio_reader.holds_int32(file.getvalue()[:20])


def test_reasons_in_one_line():
    error = ValueError("{{function_node __wrapped__X_device_/job:0}} no\nfile [Op:IO>Init]")
    assert tfio_reader.reason(error) == "no file"
    assert tfio_reader.reason(KeyError()) == "KeyError"


def test_read(stand_in, recording, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    with TfioReader(stand_in()) as reader:
        assert reader.versions == {"tensorflow": "0"}
        samples, rate = reader.read(str(recording))
        expected, _ = audio.read_audio(recording)
        assert rate == 24_000
        np.testing.assert_array_equal(samples, expected)
        with pytest.raises(AudioError, match=r"bad\.wav cannot be read by tensorflow-io: Error op"):
            reader.read(str(tmp_path / "bad.wav"))
        with pytest.raises(AudioError, match="tensorflow-io crashed on it"):
            reader.read("crash.wav")
        assert reader.read(str(recording))[1] == 24_000  # there is a new one
        process = reader._process
    assert process.poll() == 0


def test_empty_recording(stand_in, tmp_path):
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    with (
        TfioReader(stand_in()) as reader,
        pytest.raises(AudioError, match=r"empty\.wav holds no samples"),
    ):
        reader.read(str(tmp_path / "empty.wav"))


TONE = np.arange(-800, 800, dtype="<i2") * 20


def test_records(stand_in, tmp_path):
    crash, path = b"crash".hex(), tmp_path / "a.tfrecord"
    path.write_text(json.dumps([["0"], ["1", TONE.tobytes().hex(), "00"], ["2", crash], ["3"]]))
    with TfioReader(stand_in()) as reader:
        first, second, third, last = reader.records(str(path))
    assert first == TfRecord(b"0", ())
    assert isinstance(second, TfRecord)
    (samples, rate), error = second.clips
    np.testing.assert_array_equal(samples, TONE[None] / np.float32(32768))
    assert rate == 16_000
    assert isinstance(error, AudioError)
    assert "audio 1 cannot be read by tensorflow-io: buffer size" in str(error)
    assert isinstance(third, AudioError)
    assert last == TfRecord(b"3", ())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.tfrecord", r"cannot be read as TFRecord after 0 records: .*No such file"),
        ("crash.tfrecord", r"tensorflow-io crashed on crash\.tfrecord"),
    ],
)
def test_no_records(stand_in, name, message):
    with TfioReader(stand_in()) as reader, pytest.raises(DataError, match=message):
        list(reader.records(name))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("raise SystemExit('no TensorFlow')", r"does not work \(it ends at once: no TensorFlow\)"),
        (
            "tfio_reader.write_frame(answers, {'error': 'undefined symbol'}); os._exit(0)",
            r"does not work \(undefined symbol\): make it with",
        ),
    ],
)
def test_environments_that_do_not_work(stand_in, start, message):
    with pytest.raises(DataError, match=message):
        TfioReader(stand_in(start))


def test_no_environment(tmp_path):
    with pytest.raises(DataError, match="requirements-tfio"):
        TfioReader(None)
    with pytest.raises(DataError, match=r"no interpreter .*: make it with"):
        TfioReader(tmp_path / "none")
    (tmp_path / "text").write_text("")
    with pytest.raises(DataError, match=r"cannot be run .*: make it with"):
        TfioReader(tmp_path / "text")
    with pytest.raises(DataError, match=r"\(ModuleNotFoundError: No module named 'tensorflow'\)"):
        TfioReader(sys.executable)


# --- what is prepared with it ---------------------------------------------------------------------


def row(*audios, **reply) -> str:
    messages = [{"role": "user", "content": "<audio>" * len(audios)}]
    return json.dumps(
        {"messages": [*messages, {"role": "assistant", "content": "Hi"} | reply], "audios": audios}
    )


def same_samples(one: ShardSource, other: ShardSource, tolerance: float = 0) -> None:
    assert len(one) == len(other)
    for index in range(len(one)):
        mine, theirs = one[index], other[index]
        assert isinstance(mine, Sample)
        assert isinstance(theirs, Sample)
        assert mine.record.turns == theirs.record.turns
        for a, b in zip(mine.mels, theirs.mels, strict=True):
            np.testing.assert_allclose(np.hstack(a), np.hstack(b), atol=tolerance, rtol=0)


def test_same_shards(stand_in, recording, tmp_path, golden):
    """Also targets of speech are read by it; what it cannot read is rejected."""
    rows = [row("a.flac"), row("crash.wav"), row("a.flac", speech="a.flac"), row("none.wav")]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    config = {"model": golden / "token2wav", "workers": 1}
    python = stand_in(dtype="float32")
    both = (
        prepare_dataset([tmp_path / "t.jsonl"], tmp_path / name, PrepareConfig(**config, **reader))
        for name, reader in (("one", {}), ("two", {"reader": "tfio", "tfio_python": python}))
    )
    mine, theirs = both
    assert mine["fingerprint"] == theirs["fingerprint"]
    rejects = (tmp_path / "two" / "rejects.jsonl").read_text().splitlines()
    assert "crashed on it" in rejects[0]
    assert "none.wav cannot be read by tensorflow-io: Error opening" in rejects[1]


def test_tfrecord_source(stand_in, recording, tmp_path):
    sound = TONE.tobytes().hex()
    items = [[row("x"), sound], [row("x", "y"), sound], ["no JSON"], [row("x"), "00"], [row()]]
    (tmp_path / "a.tfrecord").write_text(json.dumps(items))
    (tmp_path / "t.jsonl").write_text(row("a.flac"))
    ticks = []
    prepare_dataset(
        [tmp_path / "a.tfrecord", tmp_path / "t.jsonl"],
        tmp_path / "out",
        PrepareConfig(reader="tfio", tfio_python=stand_in(), workers=1),
        progress=lambda *tick: ticks.append(tick),
    )
    source = ShardSource(tmp_path / "out")
    samples = [source[index] for index in range(len(source))]
    assert [s.record.where for s in samples] == ["a.tfrecord:1", "a.tfrecord:5", "t.jsonl:1"]
    expected = audio.log_mel(audio.load_audio((TONE, 16_000)))
    np.testing.assert_array_equal(samples[0].mels[0][0], expected)
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").open()]
    assert [reject["where"] for reject in rejects] == [f"a.tfrecord:{n}" for n in (2, 3, 4)]
    assert rejects[0]["reason"] == "1 recordings in the TFRecord, but 2 under 'audios'"
    assert ticks[-1] == (6, 0)


# --- tensorflow-io itself -------------------------------------------------------------------------

FORMATS = {  # and how far its decoder may be from libsndfile's
    "wav": ("PCM_16", 0.0),
    "24.wav": ("PCM_24", 0.0),
    "32.wav": ("PCM_32", 0.0),
    "float.wav": ("FLOAT", 0.0),
    "8.wav": ("PCM_U8", 0.0),
    "flac": ("PCM_16", 0.0),
    "24.flac": ("PCM_24", 0.0),
    "ogg": ("VORBIS", 1e-6),
    "mp3": ("MPEG_LAYER_III", 1e-5),
}

WRITE_TFRECORD = """
import json, sys, tensorflow as tf
feature = lambda values: tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
with tf.io.TFRecordWriter(sys.argv[1]) as writer:
    for line, *files in json.load(sys.stdin):
        features = {"json": feature([line.encode()]),
                    "audio": feature([open(file, "rb").read() for file in files])}
        example = tf.train.Example(features=tf.train.Features(feature=features))
        writer.write(example.SerializeToString())
"""


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A second of stereo at 24 kHz in each format, and what is no audio."""
    folder = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    time = np.arange(24_000) / 24_000
    wave = np.stack([0.4 * np.sin(2000 * time * (1 + time)), rng.standard_normal(24_000) / 10], 1)
    for name, (subtype, _) in FORMATS.items():
        soundfile.write(folder / f"a.{name}", wave, 24_000, subtype=subtype)
    (folder / "text.wav").write_text("no audio")
    whole = (folder / "a.flac").read_bytes()
    (folder / "cut.flac").write_bytes(whole[: len(whole) // 2])
    return folder


@real
def test_real_formats(recordings):
    with TfioReader(REAL) as reader:
        assert set(reader.versions) == {"tensorflow", "tensorflow_io"}
        for name, (_, tolerance) in FORMATS.items():
            samples, rate = reader.read(str(recordings / f"a.{name}"))
            expected, expected_rate = audio.read_audio(recordings / f"a.{name}")
            assert rate == expected_rate
            np.testing.assert_allclose(samples, expected, atol=tolerance, rtol=0, err_msg=name)
        for name in ("text.wav", "none.wav"):
            with pytest.raises(AudioError, match=f"{name} cannot be read by tensorflow-io"):
                reader.read(str(recordings / name))


@real
def test_real_shards(recordings, tmp_path):
    names = [f"a.{name}" for name in FORMATS]
    (recordings / "t.jsonl").write_text("\n".join(map(row, [*names, "text.wav", "cut.flac"])))
    lines = [[row(name), str(recordings / name)] for name in [*names, "text.wav"]]
    subprocess.run(
        [REAL, "-c", WRITE_TFRECORD, tmp_path / "t.tfrecord"],
        input=json.dumps(lines),
        text=True,
        check=True,
        capture_output=True,
    )
    made = {}
    for name, source, options in (
        ("plain", recordings / "t.jsonl", {}),
        ("tfio", recordings / "t.jsonl", {"reader": "tfio", "tfio_python": REAL}),
        ("tfrecord", tmp_path / "t.tfrecord", {"reader": "tfio", "tfio_python": REAL}),
    ):
        prepare_dataset([source], tmp_path / name, PrepareConfig(workers=1, **options))
        made[name] = open_source(tmp_path / name)
    # Silent bands of the ogg and the mp3 are where the decoders differ most.
    same_samples(made["tfio"], made["plain"], 1e-2)
    same_samples(made["tfrecord"], made["tfio"])
    assert len(made["tfio"]) == len(FORMATS)

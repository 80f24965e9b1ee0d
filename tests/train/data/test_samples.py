"""Samples: there and back as bytes, and the two kinds of sources."""

import json
import pickle

import numpy as np
import pytest
import soundfile

from sa2jax import audio
from sa2jax.errors import AudioError, DataError
from sa2jax.files import rows
from sa2jax.train.data.records import Record, Turn, parse_record
from sa2jax.train.data.samples import (
    JsonlSource,
    Reject,
    Sample,
    ShardSource,
    decode_sample,
    encode_sample,
    given_codes,
    load_features,
    open_source,
)
from sa2jax.train.data.shards import ShardWriter


@pytest.fixture
def folder(tmp_path, rng):
    """Two recordings, the second of 26 s, and two files of records."""
    for name, seconds in (("a", 0.5), ("long", 26)):
        wave = rng.standard_normal(int(16_000 * seconds)).astype(np.float32) / 10
        soundfile.write(tmp_path / f"{name}.wav", wave, 16_000, subtype="PCM_16")
    rows = [
        row("<audio>Hi", "Hello", audios=["a.wav"]),
        row("Hi", "Hello there", speech=[3, 1, 2]),
        row("<audio><audio>", "Both", audios=["long.wav", "a.wav"]),
    ]
    text = "\n\n \n".join(rows)  # lines 1, 4 and 7
    (tmp_path / "talks.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "more.jsonl").write_text(row("你好", "你好！") + "\r\n", encoding="utf-8")
    return tmp_path


def row(question: str, answer: str, audios=(), **reply) -> str:
    user = {"role": "user", "content": question}
    reply = {"role": "assistant", "content": answer} | reply
    return json.dumps({"messages": [user, reply], "audios": list(audios)}, ensure_ascii=False)


def same(one: Sample, other: Sample) -> bool:
    return (
        one.record == other.record
        and [len(clip) for clip in one.mels] == [len(clip) for clip in other.mels]
        and all(
            x.dtype == y.dtype and np.array_equal(x, y)
            for a, b in zip(one.mels, other.mels, strict=True)
            for x, y in zip(a, b, strict=True)
        )
        and one.codes.keys() == other.codes.keys()
        and all(np.array_equal(one.codes[k], other.codes[k]) for k in one.codes)
    )


# --- one sample -----------------------------------------------------------------------------------


def test_hear(folder):
    (mel,) = load_features(folder / "a.wav", 16)
    np.testing.assert_array_equal(mel, audio.log_mel(audio.load_audio(folder / "a.wav"), n_mels=16))
    both = np.stack([np.zeros(8000), audio.load_audio(folder / "a.wav")])
    (other,) = load_features(audio.AudioSource((both, 16_000), channel=1), 16)
    np.testing.assert_array_equal(other, mel)
    chunks = load_features(folder / "long.wav")
    assert [chunk.shape for chunk in chunks] == [(128, 2502), (128, 102)]
    with pytest.raises(AudioError, match="a recording of 3 samples is too short to be heard"):
        load_features((np.zeros(3, np.float32), 16_000))


def test_pack(rng):
    """Exact, also for NaN-like patterns of bits, many audios, no audios."""
    turns = tuple(Turn("user", "<audio>" * 12) for _ in range(2))
    turns += (Turn("assistant", "ja 好", True, (4, 5)), Turn("assistant", "x", None, "/r.wav"))
    record = Record(turns, tuple(f"/{n}.wav" for n in range(24)), [{"a": 1}], "no", {"b": [1]}, "w")
    mels = [rng.standard_normal((4, n + 1)).astype(np.float32) for n in range(25)]
    clips = (*((m,) for m in mels[:23]), (mels[23], mels[24]))
    codes = {2: np.array([4, 5], np.int32), 3: np.arange(11, dtype=np.int32)}
    sample = Sample(record, clips, codes)
    blob = encode_sample(sample)
    assert same(decode_sample(blob), sample)
    assert encode_sample(decode_sample(blob)) == blob
    bare = Sample(Record((Turn("user", "Hi"),)))
    assert same(decode_sample(encode_sample(bare)), bare)


@pytest.mark.parametrize("blob", [b"", b"abc", b"\0" * 40, encode_sample(Sample(Record(())))[:-3]])
def test_unpack_damaged(blob):
    with pytest.raises(DataError, match="not a packed sample"):
        decode_sample(blob)


def test_ready_codes():
    record = parse_record(row("Hi", "Ho", speech=[0, 207]), "w", ".")
    assert {k: v.tolist() for k, v in given_codes(record, 208).items()} == {1: [0, 207]}
    with pytest.raises(DataError, match="message 2: no audio code 207, expected 0 to 206"):
        given_codes(record, 207)


# --- jsonl ----------------------------------------------------------------------------------------


def test_jsonl(folder):
    source = open_source(folder / "talks.jsonl", 16)
    assert isinstance(source, JsonlSource)
    assert (len(source), source.n_mels) == (3, 16)
    found = [source[index] for index in range(3)]
    assert all(isinstance(sample, Sample) for sample in found)
    assert [s.record.where for s in found] == [f"talks.jsonl:{n}" for n in (1, 4, 7)]
    assert [len(s.mels) for s in found] == [1, 0, 2]
    assert found[1].codes[1].tolist() == [3, 1, 2]
    assert [len(clip) for clip in found[2].mels] == [2, 1]
    assert same(found[2], source[-1])
    with pytest.raises(IndexError, match="index 3 of 3"):
        source[3]
    with pytest.raises(IndexError):
        source[-4]


def test_jsonl_folder(folder):
    source = open_source(folder)
    assert len(source) == 4
    assert source.n_mels == 128
    assert source[0].record.where == "more.jsonl:1"
    assert source[0].record.turns[0].content == "你好"
    again = pickle.loads(pickle.dumps(source))
    assert again.fingerprint == source.fingerprint
    assert same(again[3], source[3])
    (folder / "more.jsonl").write_text(row("Hi", "Bye"))
    assert open_source(folder).fingerprint != source.fingerprint


def test_names_that_are_alike(folder):
    for name in ("x", "y"):
        (folder / name).mkdir()
        (folder / name / "t.jsonl").write_text("no JSON")
    source = JsonlSource([folder / "x" / "t.jsonl", folder / "y" / "t.jsonl"])
    assert [source[n].where for n in range(2)] == ["x/t.jsonl:1", "y/t.jsonl:1"]


def test_lines_over_blocks(folder, monkeypatch):
    """Where blocks of the file end makes no difference."""
    path = folder / "talks.jsonl"
    path.write_text("".join(f"{{{n}\n" + "\r\n" * (n % 3) for n in range(200)))
    whole = JsonlSource([path])
    monkeypatch.setattr(rows, "_BLOCK", 7)
    pieces = JsonlSource([path])
    assert len(whole) == 200
    for name in ("starts", "sizes", "numbers"):
        one, other = (getattr(source.rows.tables[0], name) for source in (whole, pieces))
        np.testing.assert_array_equal(one, other)
    assert whole.fingerprint == pieces.fingerprint
    assert whole[199].where == f"talks.jsonl:{200 + sum(n % 3 for n in range(199))}"


def test_an_array_is_read_as_lines_are(folder):
    """Its items have the places that jq gives them."""
    lines = open_source(folder / "talks.jsonl")
    items = [json.loads(line) for line in (folder / "talks.jsonl").read_text().split("\n")[::3]]
    items.insert(1, {"x": "}]"})
    for name, indent in (("talks.json", 1), ("array.jsonl", None)):
        text = json.dumps(items, indent=indent, ensure_ascii=False)
        (folder / name).write_text(f"\ufeff {text}\n", encoding="utf-8")
        source = open_source(folder / name)
        found = [source[n] for n in range(len(source))]
        assert isinstance(found[1], Reject)
        assert found[1].where == f"{name}[1]"
        read = [lines[n] for n in range(3)]
        del found[1]
        assert [s.record.turns for s in found] == [s.record.turns for s in read]
        assert [[c.shape for m in s.mels for c in m] for s in found] == [
            [c.shape for m in s.mels for c in m] for s in read
        ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no JSON", "not valid JSON"),
        (row("<audio>", "a"), "1 <audio> in the messages, but 0"),
        (row("<audio>", "a", ["none.wav"]), "none.wav does not exist"),
        (row("<audio>", "a", ["talks.jsonl"]), "talks.jsonl cannot be read"),
        (row("<audio>", "a", ["gs://b/a.wav"]), "gs://b/a.wav is not here: run"),
        (row("Hi", "a", speech="a.wav"), "run `sa2jax data prepare` first"),
        (row("Hi", "a", speech=[6561]), "message 2: no audio code 6561, expected 0 to 6560"),
    ],
)
def test_rejects(folder, text, reason):
    (folder / "talks.jsonl").write_text(text)
    found = open_source(folder / "talks.jsonl")[0]
    assert isinstance(found, Reject)
    assert found.where == "talks.jsonl:1"
    assert reason in found.reason


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.jsonl", None, "no such file or folder"),
        ("a.json", "[]", "holds no records"),
        ("a.txt", "[]", "expected a file ending in .jsonl or .json"),
        ("a.json", '[{"a": 1},', "a JSON array without its end"),
        ("empty.jsonl", "\n \n", "holds no records"),
        ("", None, "expected .jsonl files or prepared shards, found neither"),
    ],
)
def test_no_source(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / name)


# --- shards ---------------------------------------------------------------------------------------


@pytest.fixture
def prepared(folder):
    """The folder as shards of two samples."""
    out = folder / "ready"
    out.mkdir()
    with ShardWriter(out, n_mels=16, shard_size="2") as writer:
        source = open_source(folder, 16)
        for index in range(len(source)):
            writer.add(source[index])
    return out


def test_shards(folder, prepared):
    source, lines = open_source(prepared), open_source(folder, 16)
    assert isinstance(source, ShardSource)
    assert (len(source), source.n_mels) == (4, 16)
    assert [s["samples"] for s in source.info["shards"]] == [2, 2]
    again = pickle.loads(pickle.dumps(source))
    for index in (3, 0, 2, 1, -1):
        assert same(source[index], lines[index])
        assert same(again[index], lines[index])
    assert same(pickle.loads(pickle.dumps(source))[1], lines[1])
    assert source.info["seconds"] == pytest.approx(27)
    with pytest.raises(IndexError):
        source[4]


def test_bands_that_do_not_fit(prepared):
    assert open_source(prepared, 16).n_mels == 16
    with pytest.raises(DataError, match="was prepared with 16 mel bands, the model hears 128"):
        open_source(prepared, 128)


def change(**changes):
    def edit(folder):
        about = json.loads((folder / "dataset.json").read_text())
        (folder / "dataset.json").write_text(json.dumps(about | changes))

    return edit


def cut(folder):
    path = sorted(folder.glob("*.array_record"))[1]
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(format=2), "has format 2, this version of sa2jax reads 1"),
        (change(samples=5), "the shards do not add up"),
        (change(shards=[{"file": "x"}]), "cannot be used"),
        (change(shards=3), "cannot be used"),
        (lambda folder: (folder / "dataset.json").write_text("{}"), "cannot be used"),
        (lambda folder: (folder / "dataset.json").write_text("[1]"), "cannot be used"),
        (lambda folder: (folder / "dataset.json").unlink(), "an unfinished or damaged folder"),
        (cut, "00001.array_record is missing or cut off"),
    ],
)
def test_damaged_folder(prepared, damage, message):
    damage(prepared)
    with pytest.raises(DataError, match=message):
        open_source(prepared)


def test_damaged_sample(prepared):
    path = sorted(prepared.glob("*.array_record"))[0]
    data = bytearray(path.read_bytes())
    data[200] ^= 255  # within the first sample
    path.write_bytes(data)
    source = open_source(prepared)
    found = [source[index] for index in range(4)]
    assert isinstance(found[0], Reject)
    assert "damaged" in found[0].reason
    assert all(isinstance(sample, Sample) for sample in found[1:])

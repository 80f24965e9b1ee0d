"""Shards of records: the same each time, codes for spoken answers, nothing dropped in silence."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import soundfile

from sa2jax import audio, testing
from sa2jax.chat import tokenizer_files
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.errors import CheckpointError, DataError
from sa2jax.speech.store import SpeechFolder
from sa2jax.train.data import prepare as module
from sa2jax.train.data.examples import make_example
from sa2jax.train.data.prepare import PrepareConfig, prepare_dataset
from sa2jax.train.data.records import Record, Turn
from sa2jax.train.data.samples import Sample, ShardSource, encode_sample, open_source
from sa2jax.train.data.shards import DatasetStatistics, ShardWriter, count_letters

USER = {"role": "user", "content": "<audio>"}


def row(answer="Hi", audios=("a.wav",), **reply) -> str:
    messages = [USER | {"content": "<audio>" * len(audios)}]
    messages.append({"role": "assistant", "content": answer} | reply)
    return json.dumps({"messages": messages, "audios": list(audios)}, ensure_ascii=False)


def fill(folder, rows):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for name, rate, seconds in (("a.wav", 16_000, 0.4), ("b.flac", 24_000, 1.1)):
        wave = rng.standard_normal((int(rate * seconds), 2)).clip(-3, 3) / 10
        soundfile.write(folder / name, wave, rate, subtype="PCM_16")
    (folder / "talks.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder / "talks.jsonl"


@pytest.fixture
def talks(tmp_path):
    rows = [row(), row("你好", ["b.flac", "a.wav"]), row("Yes", [], speech=[1, 2, 6560])]
    return fill(tmp_path / "in", rows * 3)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".png"}


@pytest.fixture(scope="module")
def model(tmp_path_factory, golden):
    """A model that can hear and speak, but whose vocabulary has 208 codes."""
    folder = testing.save_tiny_checkpoint(tmp_path_factory.mktemp("model"))
    shutil.copytree(golden / "token2wav", folder / "token2wav")
    return folder


# --- what is made ---------------------------------------------------------------------------------


def test_shards(talks, tmp_path):
    ticks = []
    out = tmp_path / "out"
    about = prepare_dataset([talks], out, progress=lambda *tick: ticks.append(tick))
    assert about == json.loads((out / "dataset.json").read_text())
    assert ticks == [(n + 1, 9) for n in range(9)]
    assert about["samples"] == 9
    assert (about["seconds"], about["seconds_spoken"]) == (5.7, 0.36)
    assert (about["speech_tokenizer"], about["tokens"], about["rejected"]) == (None, None, 0)
    assert about["characters"] == {"zh": 6, "en": 15, "ja": 0, "ko": 0, "other": 0}
    assert about["lengths"] == {"unit": "seconds", "median": 0.4, "p95": 1.5, "longest": 1.5}
    assert (out / "rejects.jsonl").read_text() == ""
    assert (out / "lengths.png").read_bytes().startswith(b"\x89PNG")
    source, lines = open_source(out), open_source(talks)
    for index in range(9):
        sample, line = source[index], lines[index]
        assert isinstance(sample, Sample)
        assert isinstance(line, Sample)
        assert sample.record.turns == line.record.turns
        assert sample.record.where == f"talks.jsonl:{index + 1}"
        for mine, other in zip(sample.mels, line.mels, strict=True):
            np.testing.assert_array_equal(np.hstack(mine), np.hstack(other))
    assert source[1].record.audios == ("b.flac", "a.wav")  # wherever the folder lies
    assert source[2].codes[1].tolist() == [1, 2, 6560]


@pytest.mark.slow
def test_same_bytes_everywhere(talks, tmp_path, monkeypatch):
    """Whoever reads, however many they are, wherever the data is."""
    prepare_dataset([talks], tmp_path / "one", PrepareConfig(workers=1))
    monkeypatch.setattr(module, "_RECORDS_PER_WORKER", 2)
    prepare_dataset([talks], tmp_path / "two", PrepareConfig(workers=2))
    shutil.move(talks.parent, tmp_path / "moved")
    prepare_dataset([tmp_path / "moved"], tmp_path / "three", PrepareConfig(workers=1))
    first = contents(tmp_path / "one")
    assert first == contents(tmp_path / "two") == contents(tmp_path / "three")
    assert "OMP_NUM_THREADS" not in os.environ or os.environ["OMP_NUM_THREADS"]
    prepare_dataset([tmp_path / "moved"], tmp_path / "four", PrepareConfig(shard_size="4"))
    about = json.loads((tmp_path / "four" / "dataset.json").read_text())
    assert about["fingerprint"] == json.loads(first["dataset.json"])["fingerprint"]
    assert [shard["samples"] for shard in about["shards"]] == [4, 4, 1]


def test_several_sources(talks, tmp_path):
    more = fill(tmp_path / "more", [row("2")])
    about = prepare_dataset([more, talks.parent], tmp_path / "out")
    assert about["samples"] == 10
    source = ShardSource(tmp_path / "out")
    assert source[0].record.where == "more/talks.jsonl:1"
    assert source[1].record.where == "in/talks.jsonl:1"
    other = prepare_dataset([talks, more], tmp_path / "other")
    assert other["fingerprint"] != about["fingerprint"]


def test_shards_by_bytes(tmp_path):
    turns = (Turn("user", "x"),)
    sizes = len(encode_sample(Sample(Record(turns))))
    with ShardWriter(tmp_path, shard_size=f"{sizes * 2 + 1}B") as writer:
        for _ in range(5):
            writer.add(Sample(Record(turns)))
    assert [shard["samples"] for shard in writer.info()["shards"]] == [2, 2, 1]


def test_characters():
    counts = count_letters("Grüße, 你好! 3 ¥ これは漢字 안녕 Привет")
    assert counts == {"ja": 7, "ko": 2, "en": 3, "other": 8}
    assert count_letters("你好 you") == {"ja": 0, "zh": 2, "ko": 0, "en": 3, "other": 0}


def test_lengths_in_tokens():
    """As many as the template makes of it."""
    tokenizer = Tokenizer(tokenizer_files.byte_tokenizer(testing.AUDIO_START, 512))
    cfg = testing.tiny_config()
    tally = DatasetStatistics((tokenizer, cfg))
    turns = (Turn("user", "<audio>ab"), Turn("assistant", "c", speech=tuple(range(9))))
    mel = np.zeros((16, 1002), np.float32)  # 10 s: 125 tokens
    codes = {1: np.arange(9, dtype=np.int32)}
    spoken = Sample(Record(turns, ("a",)), ((mel,),), codes)
    tally.add(spoken)
    assert tally.tokens == {"text": 3, "heard": 127, "codes": 9}
    asked = 1 + len("human\n") + 127 + len("ab") + 1  # `<|BOT|>` … `<|EOT|>`
    # `<tts_start>`, three groups of a word or pad and four codes or pads, `<tts_end>`
    assert tally.lengths[0] == asked + 1 + len("assistant\n") + 1 + 3 * 5 + 1 + 1
    tools = [{"type": "function", "function": {"name": "x"}}]
    plain = Sample(Record((Turn("user", "ab"), Turn("assistant", "c")), tools=tools))
    tally.add(plain)
    for sample, length in zip((spoken, plain), tally.lengths, strict=True):
        assert length == len(make_example(sample, tokenizer, cfg).ids)
    assert tally.lengths[1] > len("tool_json_schemas\n") + len(json.dumps(tools))
    assert tally.summary()["lengths"]["longest"] == max(tally.lengths)


def test_what_no_template_reads_is_rejected(model, tmp_path):
    turns = [{"role": "user", "content": "Time?"}, {"role": "tool_call", "content": "now()"}]
    rows = [json.dumps({"messages": turns}), row("Yes", [])]
    about = prepare_dataset(
        [fill(tmp_path / "in", rows)], tmp_path / "out", PrepareConfig(model=model)
    )
    assert (about["samples"], about["rejected"]) == (1, 1)
    assert "now()" in (tmp_path / "out" / "rejects.jsonl").read_text()


# --- spoken answers -------------------------------------------------------------------------------


@pytest.fixture
def spoken(tmp_path):
    rows = [
        row(),
        row("Yes", speech="b.flac"),
        row("No", [], speech=[5]),
        row("Ah", speech="a.wav"),
    ]
    return fill(tmp_path / "in", rows)


def test_codes_of_recordings(spoken, tmp_path, golden, monkeypatch):
    home = golden / "token2wav"
    about = prepare_dataset([spoken], tmp_path / "out", PrepareConfig(model=home))
    folder = SpeechFolder(home)
    assert about["speech_tokenizer"] == folder.analysis_hash
    assert about["rejected"] == 0
    source = ShardSource(tmp_path / "out")
    clips = [audio.load_audio(spoken.parent / name) for name in ("b.flac", "a.wav")]
    expected = folder.analyzer.codes_of(clips)
    np.testing.assert_array_equal(source[1].codes[1], expected[0])
    np.testing.assert_array_equal(source[3].codes[1], expected[1])
    assert source[2].codes[1].tolist() == [5]
    assert source[1].record.turns[1].speech == "b.flac"
    # One after another makes no difference to the order.
    monkeypatch.setattr(module, "_BATCH_RECORDINGS", 1)
    prepare_dataset([spoken], tmp_path / "single", PrepareConfig(model=home))
    single = ShardSource(tmp_path / "single")
    assert [single[n].record for n in range(4)] == [source[n].record for n in range(4)]


def test_codes_without_a_model(spoken, tmp_path):
    about = prepare_dataset([spoken], tmp_path / "out")
    assert (about["samples"], about["rejected"], about["speech_tokenizer"]) == (2, 2, None)
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").open()]
    assert [reject["where"] for reject in rejects] == ["talks.jsonl:2", "talks.jsonl:4"]
    assert "speech is a recording: give --model a folder with a speech" in rejects[0]["reason"]


def test_a_model(spoken, tmp_path, model, monkeypatch):
    """Its mel bands, its tokenizer, its codes: the released one makes more than it knows."""
    found = [np.array([207], np.int32), np.array([208], np.int32)]
    monkeypatch.setattr(module.ModelFolder, "codes_of", lambda self, clips: found)
    about = prepare_dataset([spoken], tmp_path / "out", PrepareConfig(model=model))
    assert about["n_mels"] == 16
    assert about["tokens"] == {"text": 7, "heard": 14, "codes": 2}
    assert about["lengths"]["unit"] == "tokens"
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").open()]
    assert rejects == [
        {
            "where": "talks.jsonl:4",
            "reason": "the speech tokenizer found code 208, the model has 208",
        },
    ]
    spoken.write_text(row(speech=[208]) + "\n" + row())
    about = prepare_dataset([spoken], tmp_path / "other", PrepareConfig(model=model))
    reject = json.loads((tmp_path / "other" / "rejects.jsonl").read_text())
    assert reject["reason"] == "message 2: no audio code 208, expected 0 to 207"


def test_the_model_that_comes_along(talks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    about = prepare_dataset([talks], "out", PrepareConfig(model="nano"))
    assert (about["n_mels"], about["lengths"]["unit"]) == (80, "tokens")


# --- what is not usable ---------------------------------------------------------------------------

BAD = {
    "no JSON": "not valid JSON",
    row(audios=["none.wav"]): "none.wav does not exist",
    row(audios=["talks.jsonl"]): "cannot be read",
    row(audios=["empty.wav"]): "holds no samples",
    row(audios=["short.wav"]): "a recording of 2 samples is too short to be heard",
    row().replace("<audio>", "<audio><audio>"): "2 <audio> in the messages, but 1",
    row(speech=[6561]): "no audio code 6561, expected 0 to 6560",
}


@pytest.fixture
def bad(tmp_path):
    path = fill(tmp_path / "in", [row(), *BAD, row("Last")])
    for name, count in (("empty", 0), ("short", 2)):
        soundfile.write(path.parent / f"{name}.wav", np.zeros(count), 16_000)
    return path


def test_rejects(bad, tmp_path):
    about = prepare_dataset([bad], tmp_path / "out", PrepareConfig(max_rejects=len(BAD)))
    assert (about["samples"], about["rejected"]) == (2, len(BAD))
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").open()]
    for number, (reject, reason) in enumerate(zip(rejects, BAD.values(), strict=True), 2):
        assert reject["where"] == f"talks.jsonl:{number}"
        assert reason in reject["reason"]
    assert ShardSource(tmp_path / "out")[1].record.where == f"talks.jsonl:{len(BAD) + 2}"


def test_too_many_rejects(bad, tmp_path):
    (bad.parent / "precious").write_text("kept")
    (tmp_path / "out.rejects.jsonl").symlink_to(bad.parent / "precious")
    with pytest.raises(DataError) as caught:
        prepare_dataset([bad], tmp_path / "out", PrepareConfig(max_rejects=3))
    kept = tmp_path / "out.rejects.jsonl"
    assert str(caught.value) == (
        "4 records cannot be used, more than --max-rejects 3; the last one is talks.jsonl:5: "
        f"expected audio, but {bad.parent}/empty.wav holds no samples; record it again; all are "
        f"in {kept}"
    )
    assert len(kept.read_text().splitlines()) == 4
    assert (bad.parent / "precious").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.rejects.jsonl"]


def test_nothing_usable(talks, tmp_path):
    talks.write_text("{}")
    with pytest.raises(DataError, match=r"none of 1 records can be used; talks\.jsonl:1: "):
        prepare_dataset([talks], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_stopped(talks, tmp_path, error):
    def stop(done, total):
        if done == 4:
            raise error

    expected = KeyboardInterrupt if error is KeyboardInterrupt else CheckpointError
    with pytest.raises(expected):
        prepare_dataset([talks], tmp_path / "out", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_killed_worker(talks, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_RECORDS_PER_WORKER", 1)
    monkeypatch.setattr(module, "_init_worker", os.abort)  # a function that another process knows
    with pytest.raises(DataError, match="a worker was killed, for memory perhaps: try --workers 1"):
        prepare_dataset([talks], tmp_path / "out", PrepareConfig(workers=2))
    assert not (tmp_path / "out").exists()


def test_overwrite(talks, tmp_path):
    out = tmp_path / "out"
    first = prepare_dataset([talks], out)
    with pytest.raises(CheckpointError, match="choose another folder or --overwrite"):
        prepare_dataset([talks], out)
    talks.write_text(row())
    again = prepare_dataset([talks], out, overwrite=True)
    assert again["fingerprint"] != first["fingerprint"]
    assert ShardSource(out).fingerprint == again["fingerprint"]


def test_overwrite_nothing_else(talks, tmp_path, model):
    with pytest.raises(DataError, match="is no prepared folder, it is not replaced"):
        prepare_dataset([talks], model, overwrite=True)
    with pytest.raises(CheckpointError, match="which it would be made from"):
        prepare_dataset([talks], talks.parent)


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ([], {}, "no sources"),
        (["none.jsonl"], {}, "no such file or folder: "),
        (["gs://bucket/a.jsonl"], {}, "a .jsonl file must be here, copy it"),
        (["a.tfrecord"], {}, "is read by tensorflow-io only: give --reader tfio"),
        (["in/talks.jsonl", "in"], {}, "talks.jsonl is given twice"),
        (["in"], {"workers": 0}, "expected workers >= 1 and max_rejects >= 0, got 0 and 100"),
        (["in"], {"max_rejects": -1}, "got None and -1"),
        (["in"], {"reader": "ffmpeg"}, "unknown reader 'ffmpeg'"),
        (["in"], {"reader": "tfio"}, "needs an environment of its own: make it with"),
        (["in"], {"shard_size": "0"}, "shard size 0: expected at least one sample"),
    ],
)
def test_mistakes(talks, tmp_path, monkeypatch, sources, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        prepare_dataset(sources, tmp_path / "out", PrepareConfig(**options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("folder", "message"), [("none", "no folder"), ("in", "holds no model")])
def test_no_model(talks, tmp_path, folder, message):
    with pytest.raises(CheckpointError, match=message):
        prepare_dataset([talks], tmp_path / "out", PrepareConfig(model=tmp_path / folder))
    with pytest.raises(CheckpointError, match="size 'big'"):
        PrepareConfig(shard_size="big")


def test_without_matplotlib(talks, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(DataError, match=r"needs matplotlib: install it with `pip install 'sa2jax"):
        prepare_dataset([talks], tmp_path / "out")

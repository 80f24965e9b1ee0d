"""`sa2jax data`, as a user runs it; what it makes, tests/train/data/test_prepare.py tests."""

import json
import shutil
from pathlib import Path

import pytest

from sa2jax import cli, testing
from sa2jax.cli.data import data
from sa2jax.train.data.samples import Sample, open_source

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "data", data)


@pytest.mark.both_pairs
def test_prepare_and_show(run, tmp_path):
    out = tmp_path / "ready"
    code, text, err = run("data", "prepare", EXAMPLES / "talks.jsonl", out)
    assert (code, err) == (0, "")
    for words in (
        "20 in 1 shards",
        "letters by script",
        "zh 81, en 7",
        "speech to say",
        "8.9 s",
        "length in seconds",
        "none was used",
        "fingerprint",
    ):
        assert words in text
    assert run("data", "show", out) == (0, text, "")
    code, shown, _ = run("data", "show", out, "--json")
    assert json.loads(shown) == json.loads((out / "dataset.json").read_text())


def test_json_and_model(run, tmp_path):
    model = testing.save_tiny_checkpoint(tmp_path / "model")
    talks, ready = EXAMPLES / "talks.jsonl", tmp_path / "ready"
    options = "--model", model, "--shard-size", 10, "--workers", 1, "--json"
    code, text, err = run("data", "prepare", talks, ready, *options)
    assert (code, err) == (0, "")
    about = json.loads(text)
    assert about["n_mels"] == 16
    assert [shard["samples"] for shard in about["shards"]] == [10, 10]
    assert about["lengths"]["unit"] == "tokens"
    assert 150 < about["lengths"]["longest"] < 400  # the examples fit into a small context
    assert "tokens" in run("data", "show", ready)[1]


def test_folders_and_rejects(run, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(EXAMPLES / "audio", tmp_path / name / "audio")
        shutil.copy(EXAMPLES / "talks_recordings.jsonl", tmp_path / name)
    ready = tmp_path / "ready"
    code, text, _ = run("data", "prepare", tmp_path / "one", tmp_path / "two", ready, "--json")
    assert code == 0
    assert (json.loads(text)["samples"], json.loads(text)["rejected"]) == (22, 18)
    assert "18, see rejects.jsonl" in run("data", "show", ready)[1]
    code, _, err = run("data", "prepare", tmp_path / "one", ready, "--overwrite")
    assert (code, err) == (0, "")
    assert len(open_source(ready)) == 11


def test_examples():
    """All can be used as they are, with codes that the small tokenizer of tests has."""
    source = open_source(EXAMPLES / "talks.jsonl")
    samples = [source[index] for index in range(len(source))]
    assert all(isinstance(sample, Sample) for sample in samples)
    assert max(c.max() for s in samples for c in s.codes.values()) < 208
    sizes = [path.stat().st_size for path in (EXAMPLES / "audio").iterdir()]
    assert sum(sizes) < 1.5e6
    rows = [json.loads(line) for line in (EXAMPLES / "talks.jsonl").open(encoding="utf-8")]
    recorded = [json.loads(line) for line in (EXAMPLES / "talks_recordings.jsonl").open()]
    for row, other in zip(rows, recorded, strict=True):
        for message, twin in zip(row["messages"], other["messages"], strict=True):
            if "speech" in message:
                assert (EXAMPLES / twin.pop("speech")).is_file()
                assert message.pop("speech")
        assert row == other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "none.jsonl", "out"], "no such file or folder"),
        (["prepare", "out"], "expected SOURCE ... OUT, got out"),
        (["prepare", "--json"], "expected SOURCE ... OUT, got nothing"),
        (
            ["prepare", EXAMPLES / "talks_recordings.jsonl", "out", "--max-rejects", "2"],
            "3 records cannot be used, more than --max-rejects 2; the last one is ",
        ),
        (["prepare", EXAMPLES, "out", "--reader", "tfio"], "requirements-tfio.txt"),
        (
            ["prepare", EXAMPLES, "out", "--reader", "tfio", "--tfio-python", "none"],
            "no interpreter none: make it with",
        ),
        (["show", "none"], "dataset.json cannot be used"),
        (["show", EXAMPLES], "dataset.json cannot be used"),
    ],
)
def test_mistakes(refused, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused("data", *arguments)
    assert not (tmp_path / "out").exists()

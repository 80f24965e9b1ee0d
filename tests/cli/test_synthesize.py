"""`sa2jax data synthesize`, as a user runs it; see tests/train/corpus/test_synthesize.py, too."""

import json
from importlib.resources import files

import pytest
import yaml

from sa2jax import cli
from sa2jax.cli.data import data

pytest.importorskip("soxr", reason="needs the extra sa2jax[synthesis]")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "data", data)


@pytest.fixture
def recipe(tmp_path):
    """A recipe for voices that need nothing."""
    item = files("sa2jax.configs.recipes") / "nano" / "corpus.yaml"
    values = yaml.safe_load(item.read_text(encoding="utf-8"))
    for name, voice in values["voices"].items():
        voice.update(engine="tones", voice=name)
        voice.pop("tones", None)
    values["dialogues"]["held_out"]["counts"] = {"asr_seen": 2, "asr_unseen": 2}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_a_small_corpus_is_made_and_prepared(run, run_json, recipe, tmp_path):
    out = tmp_path / "out"
    small = "--config", recipe, "--scale", 0.0005, "--workers", 1
    code, text, err = run("data", "synthesize", out, *small)
    assert (code, err) == (0, "")
    for words in ("talks/asr.jsonl", "heldout/asr_unseen.jsonl", "speech.jsonl", "speakers"):
        assert words in text
    about = run_json("data", "synthesize", out, *small)
    assert about == json.loads((out / "corpus.json").read_text())
    about = run_json("data", "prepare", out / "talks" / "asr.jsonl", tmp_path / "ready")
    assert (about["samples"], about["rejected"]) == (4, 0)


def test_changes(run_json, recipe, tmp_path):
    changes = "--set", "dialogues.counts={asr: 3}", "--set", "voices.joe=null", "--seed", 5
    words = "--config", recipe, *changes, "--workers", 1
    about = run_json("data", "synthesize", tmp_path / "out", *words)
    assert (about["seed"], about["files"]["talks/asr.jsonl"]["records"]) == (5, 3)
    assert not any(name.startswith("joe") for name in about["hours_by_voice"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--config smoke", "smoke is a recipe of kind None: expected one of kind corpus"),
        ("--config none.yaml", "no such file: none.yaml"),
        ("--set voices.ann=1", "voices.ann"),
        ("--scale 0", "expected scale above 0"),
    ],
)
def test_mistakes(refused, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sa2jax.train.corpus.synthesize.Synthesizer", lambda voices: None)
    assert message in refused("data", "synthesize", "out", *arguments.split())
    assert not (tmp_path / "out").exists()

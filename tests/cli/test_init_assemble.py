"""Models of nothing and of parts, and recordings for single networks, as a user types it."""

import json

import pytest
import soundfile
import yaml
from helpers.sound import tone

from sa2jax import assets, testing


@pytest.mark.both_pairs
def test_no_model_is_named(refused, run, tmp_path, monkeypatch):
    """There is a demonstration model or there is none: nothing else is taken in its place."""
    wav = tmp_path / "a.wav"
    soundfile.write(wav, tone(0.5, rate=16_000, frequency=200), 16_000)
    nowhere = tmp_path / "nowhere"
    monkeypatch.setattr(assets, "SHIPPED", nowhere)
    assert "expected --model FOLDER" in refused("asr", wav)
    assert "expected --model FOLDER" in refused("voice", "list")
    assert "no folder" in refused("asr", wav, "--model", nowhere)
    testing.save_tiny_checkpoint(nowhere)
    code, _, said = run("asr", wav, "--max-new-tokens", "2")
    assert code == 0
    assert "note: no --model is given: this is nano, a demonstration model" in said


def test_begin_and_join_say_what_they_need(refused, tmp_path):
    out = tmp_path / "out"
    assert "expected --texts FILE" in refused("init", "nano", out)
    texts = tmp_path / "few.jsonl"
    texts.write_text('{"messages": [{"role": "user", "content": "one"}]}\n')
    assert "ask for less" in refused("init", "nano", out, "--texts", texts)
    assert "no model preset" in refused("init", "giant", out, "--texts", texts)
    assert "expected NAME=RECORDING" in refused("assemble", out, out, out, "--voice", "anna")
    assert "no folder" in refused("assemble", out, out, tmp_path / "other")
    assert not out.exists()


def test_the_model_that_comes_along_has_a_name(run, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("assemble", "nano", "nano", "copy", "--single")[0] == 0
    code, said, _ = run("verify", "nano", "copy")
    assert code == 0
    assert "0 differing" in said
    assert "audio_encoder" in run("inspect", "nano")[1]
    assert run("export", "nano", "out")[0] == 0
    assert "micro is no model folder" in refused("assemble", "micro", "nano", "other")


def test_recordings_are_prepared_and_shown(run, refused, tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(0.5, rate=16_000, frequency=200), 16_000)
    line = {"audio": "a.wav", "text": "hello", "speaker": "anna"}
    (tmp_path / "list.jsonl").write_text(json.dumps(line) + "\n")
    source, out = tmp_path / "list.jsonl", tmp_path / "ready"
    code, _, _ = run("data", "prepare-speech", source, out)
    assert code == 0
    code, said, _ = run("data", "show", out)
    assert code == 0
    assert "anna" in said
    assert "16000 Hz" in said
    assert "expected a rate of 24000 Hz" in refused(
        "data", "prepare-speech", "--pitch", source, tmp_path / "other"
    )
    assert "cannot be read" in refused("data", "prepare-speech", tmp_path / "no.jsonl", out)


def test_a_single_network_needs_one_folder(refused, tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "kind": "vocoder",
                "network": {"folder": "x"},
                "data": {"folder": "y"},
            }
        )
    )
    both = "--data", "a", "--data", "b"
    said = refused("train", "--config", recipe, *both)
    assert "the vocoder learns from one folder; `sa2jax data prepare-speech` makes one" in said
    assert "no folder x" in refused("train", "--config", recipe, "--out", tmp_path / "run")


def test_stages_end_where_one_fails(run, tmp_path):
    recipe = tmp_path / "own.yaml"
    stages = {"show": "data show {out}/nothing"}
    recipe.write_text(yaml.safe_dump({"kind": "stages", "stages": stages}))
    code, _, said = run("train", "--config", recipe, "--out", tmp_path / "run")
    assert code == 2
    assert "stage 1 of 1, show: sa2jax data show" in said
    assert "error: stage 1 of 1, show failed (exit code 2)" in said

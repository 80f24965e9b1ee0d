"""The command `train`, as a user types it."""

import json

import pytest
import yaml
from helpers.small_training import save_model, save_pairs, values


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    home = tmp_path_factory.mktemp("train")
    file = home / "own.yaml"
    plan = values(save_model(home / "model"), save_pairs(home / "pairs"))
    file.write_text(yaml.safe_dump(plan))
    return file


@pytest.mark.both_pairs
@pytest.mark.slow
def test_a_run_and_its_end(run, recipe, tmp_path):
    out = tmp_path / "run"
    code, said, progress = run("train", "--config", recipe, "--out", out, "--steps", 2)
    assert code == 0
    assert f"model: {out / 'model'}" in said.splitlines()
    assert "step 2/2  loss" in progress
    assert run("inspect", out / "model")[0] == 0
    code, said, progress = run("train", "--config", recipe, "--out", out, "--steps", 2, "--json")
    assert json.loads(said)["finished"]
    assert "going on after step 2" in progress
    code, said, progress = run("train", "--config", recipe, "--out", out, "--steps", 3)
    assert (code, said) == (2, "")
    assert "optimizer.steps: 2 → 3" in progress


@pytest.mark.slow
def test_dry_run(run, run_json, recipe):
    found = run_json("train", "--config", recipe, "--dry-run")
    groups = {group["name"]: group for group in found["groups"]}
    assert set(groups) == {
        "adapter",
        "audio_encoder",
        "decoder.head",
        "decoder.layers",
        "decoder.norm",
        "decoder.table",
    }
    assert (
        groups["decoder.table"]["parameters"]
        == groups["decoder.table"]["weight_decayed"]
        == 512 * 32
    )
    assert groups["decoder.norm"]["weight_decayed"] == 0
    total = sum(group["parameters"] for group in found["groups"])
    assert found["memory"]["parameters"] == 4 * total
    assert found["memory"]["optimizer"] >= 8 * total
    assert found["units_per_step"] == 2 * 192
    code, said, _ = run("train", "--config", recipe, "--dry-run", "--set", "lora={rank: 4}")
    assert code == 0
    assert "lora" in said
    assert "frozen" in said


@pytest.mark.both_pairs
def test_an_adapter_is_merged_into_the_model_it_was_trained_beside(run, recipe, tmp_path):
    """The same as what the run itself merges."""
    words = "--set", "lora={rank: 2, learning_rate: 0.01}", "--steps", 2
    assert run("train", "--config", recipe, "--out", tmp_path / "run", *words)[0] == 0
    model, adapter = recipe.parent / "model", tmp_path / "run" / "adapter"
    code, said, _ = run("merge", model, adapter, tmp_path / "merged")
    assert (code, said) == (0, f"model: {tmp_path / 'merged'}\n")
    assert run("verify", tmp_path / "merged", tmp_path / "run" / "model")[0] == 0
    assert run("verify", tmp_path / "merged", model)[0] == 1
    code, said, error = run("merge", model, adapter, tmp_path / "merged")
    assert (code, said) == (2, "")
    assert "already holds a checkpoint" in error
    assert run("merge", model, model, tmp_path / "other")[0] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--set optimizer.speed=1", "no optimizer.speed; expected one of learning_rate"),
        ("--set rate", "expected key=value"),
        ("--data nowhere.jsonl", "nowhere.jsonl"),
        ("--data a=b", "expected PATH or PATH=WEIGHT"),
        ("--model nowhere", "nowhere"),
        ("--mesh fsdp=3", "3"),
        ("--mesh rows=1", "rows"),
    ],
)
def test_mistakes(refused, recipe, tmp_path, words, said):
    out = tmp_path / "run"
    assert said in refused("train", "--config", recipe, "--out", out, *words.split())
    assert not (tmp_path / "run").exists()

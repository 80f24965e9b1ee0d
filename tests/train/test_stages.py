"""Several commands as one: in order, each once, from where it stopped."""

import json

import pytest

from sa2jax.errors import ConfigError, TrainError
from sa2jax.train import stages
from sa2jax.train.recipe import build_config
from sa2jax.train.stages import StagesRecipe, run_stages

THREE = {
    "first": "data show {out}/one --json",
    "second": "train --set 'seed={seed}'",
    "third": "assemble {out}/a {out}/b {out}/c",
}


@pytest.fixture
def ran(monkeypatch):
    """Commands that were run; what each returns is in `codes`."""
    lines, codes = [], {}

    def run(words):
        lines.append(" ".join(words[3:]))
        return codes.get(words[3], 0)

    monkeypatch.setattr(stages, "_run_command", run)
    return lines, codes


def test_stages_are_run_in_order_once(ran, tmp_path):
    lines, _ = ran
    recipe = build_config(StagesRecipe, {"stages": THREE, "seed": 4}, "x")
    said = []
    outcome = run_stages(recipe, tmp_path, say=said.append)
    assert outcome.finished
    assert set(outcome.done) == set(THREE)
    assert lines == [
        f"data show {tmp_path}/one --json",
        "train --set seed=4",
        f"assemble {tmp_path}/a {tmp_path}/b {tmp_path}/c",
    ]
    assert said[0].startswith("stage 1 of 3, first: sa2jax data show")
    assert run_stages(recipe, tmp_path).finished
    assert len(lines) == 3
    run_stages(recipe, tmp_path, fresh=True)
    assert len(lines) == 6


def test_a_stage_that_fails_is_tried_again(ran, tmp_path):
    lines, codes = ran
    recipe = build_config(StagesRecipe, {"stages": THREE}, "x")
    codes["train"] = 2
    with pytest.raises(TrainError, match=r"stage 2 of 3, second failed \(exit code 2\)"):
        run_stages(recipe, tmp_path)
    codes["train"] = stages.INTERRUPTED
    outcome = run_stages(recipe, tmp_path)
    assert not outcome.finished
    assert set(outcome.done) == {"first"}
    codes.clear()
    assert run_stages(recipe, tmp_path).finished
    assert [line.split()[0] for line in lines] == ["data", "train", "train", "train", "assemble"]


def test_stages_stay_done_where_their_folder_goes(ran, tmp_path, monkeypatch):
    lines, _ = ran
    recipe = build_config(StagesRecipe, {"stages": THREE}, "x")
    run_stages(recipe, tmp_path / "a")
    monkeypatch.chdir((tmp_path / "a").rename(tmp_path / "b"))
    assert run_stages(recipe, ".").finished
    assert len(lines) == 3


def test_what_was_done_otherwise_is_told(ran, tmp_path):
    run_stages(build_config(StagesRecipe, {"stages": THREE, "seed": 1}, "x"), tmp_path)
    with pytest.raises(TrainError, match=r"stage 2 of 3, second was done as .*seed=1.*seed=2"):
        run_stages(build_config(StagesRecipe, {"stages": THREE, "seed": 2}, "x"), tmp_path)
    (tmp_path / stages.DONE).write_text("[1]")
    with pytest.raises(TrainError, match="damaged: --fresh does all stages again"):
        run_stages(build_config(StagesRecipe, {"stages": THREE}, "x"), tmp_path)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"stages": {"a": "train {home}"}}, r"stages.a: expected a command with \{out\}"),
        ({"stages": {"a": ""}}, "stages.a: expected a command, got nothing"),
        ({"stages": {"a": "train 'x"}}, "stages.a: expected a command"),
        ({"stages": {"a": 3}}, "stages"),
        ({"stages": {}, "steps": 3}, "there is no steps"),
        ({}, "stages"),
    ],
)
def test_bad_recipes(values, said):
    with pytest.raises(ConfigError, match=said):
        build_config(StagesRecipe, values, "x")


def test_a_command_is_really_run(tmp_path, capfd):
    recipe = build_config(StagesRecipe, {"stages": {"show": "data show {out}/nothing"}}, "x")
    with pytest.raises(TrainError, match="stage 1 of 1, show failed"):
        run_stages(recipe, tmp_path)
    assert "dataset.json" in capfd.readouterr().err
    assert not (tmp_path / stages.DONE).exists()
    recipe = build_config(StagesRecipe, {"stages": {"help": "init --help"}}, "x")
    assert run_stages(recipe, tmp_path).finished
    assert list(json.loads((tmp_path / stages.DONE).read_text())) == ["help"]

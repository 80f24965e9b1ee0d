"""Kinds of training: the one table, and a kind that is added to it, which the command then runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.toy_kind import ToyRecipe, toy_kind

from sa2jax.errors import ConfigError
from sa2jax.train import loop, stages
from sa2jax.train.kinds import KINDS, TrainingKind, find_kind, option_key
from sa2jax.train.log import read_metrics
from sa2jax.train.networks.task import TRAINERS
from sa2jax.train.recipe import DEFAULT_KIND


@pytest.fixture
def toy(monkeypatch, tmp_path) -> Path:
    """A recipe of a kind that a row of the table adds."""
    monkeypatch.setitem(KINDS, "toy", toy_kind)
    file = tmp_path / "toy.yaml"
    optimizer = {"learning_rate": 0.1, "warmup_steps": 0, "weight_decay": 0.0, "steps": 9}
    values = {"kind": "toy", "target": 3, "optimizer": optimizer, "intervals": {"log_every": 1}}
    file.write_text(yaml.safe_dump(values))
    return file


# --- the command ----------------------------------------------------------------------------------


def test_the_command_trains_a_kind_that_was_added(run, run_json, toy, tmp_path):
    out = tmp_path / "run"
    code, said, progress = run("train", "--config", toy, "--out", out, "--steps", 3)
    assert code == 0
    assert f"toy: {out / 'toy.json'}" in said.splitlines()
    assert "step 3/3  loss" in progress
    losses = [line["loss"] for line in read_metrics(out / "metrics.jsonl")]
    assert losses[0] == pytest.approx(9.0)
    assert losses[2] < losses[1] < losses[0]
    assert all(0.2 < number < 0.4 for number in json.loads((out / "toy.json").read_text()))
    assert run_json("train", "--config", toy, "--out", out, "--steps", 3)["step"] == 3
    code, _, error = run("train", "--config", toy, "--out", out, "--steps", 3, "--data", 4)
    assert code == 2
    assert "target: 3.0 → 4.0" in error


def test_a_dry_run_of_a_kind_that_was_added(run, run_json, toy):
    found = run_json("train", "--config", toy, "--steps", 3, "--dry-run")
    assert [group["parameters"] for group in found["groups"]] == [2]
    assert found["memory"]["parameters"] == 8
    assert (found["steps"], found["unit"]) == (3, "numbers")
    assert "3 updates of 1 numbers" in run("train", "--config", toy, "--steps", 3, "--dry-run")[1]


def test_the_end_of_a_run_that_was_stopped(run, toy, monkeypatch, tmp_path):
    stopped = loop.TrainResult(2, False, {})
    kind = TrainingKind(recipe=ToyRecipe, run=lambda recipe, out, **options: stopped)
    monkeypatch.setitem(KINDS, "toy", lambda: kind)
    code, said, error = run("train", "--config", toy, "--out", tmp_path / "run")
    assert (code, said) == (130, "")
    assert error == "stopped after step 2: the same command goes on\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model mini", "toy.yaml: a recipe of this kind takes no --model; expected --data"),
        ("--set kind=toi", "kind 'toi': expected language, audio_encoder, speech_tokenizer"),
        ("--set kind=[]", "kind []: expected language"),
        ("--set speed=1", "there is no speed; expected one of target, optimizer"),
    ],
)
def test_mistakes(refused, toy, words, said):
    assert said in refused("train", "--config", toy, *words.split())


def test_stages_take_few_options(refused, tmp_path):
    file = tmp_path / "all.yaml"
    file.write_text("kind: stages\nstages: {show: data show nothing}\n")
    words = "--steps", 3, "--data", "a", "--dry-run", "--profile", 2
    error = refused("train", "--config", file, *words)
    assert "takes no --data, --steps, --profile, --dry-run; expected --fresh at most" in error


def test_stages_run_and_stop(run, run_json, tmp_path, monkeypatch):
    file, codes = tmp_path / "all.yaml", {"show": stages.INTERRUPTED}
    file.write_text("kind: stages\nstages: {first: data show one, second: init show}\n")
    monkeypatch.setattr(stages, "_run_command", lambda words: codes.get(words[-1], 0))
    words = "train", "--config", file, "--out", tmp_path / "run"
    code, said, log = run(*words)
    assert (code, said) == (130, "")
    assert "stage 1 of 2, first: sa2jax data show one" in log
    assert log.endswith("stopped after 1 stage: the same command goes on\n")
    codes.clear()
    found = run_json(*words)
    assert (list(found["done"]), found["finished"]) == (["first", "second"], True)


# --- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_can_be_had(name):
    kind = find_kind(name, "x")
    if name in TRAINERS:
        assert kind.recipe.kind == name
    assert kind.options.keys() <= {"model", "data", "steps", "mesh"}
    given = {"model": Path("m"), "steps": 4, "mesh": "data=2"}
    given = {option: value for option, value in given.items() if option in kind.options}
    values = kind.option_values(given)
    assert {str(value) for value in given.values()} <= {str(value) for value in values.values()}


def test_networks_and_the_language_model_are_in_the_table():
    assert {DEFAULT_KIND, *TRAINERS} <= set(KINDS)


def test_values_of_options():
    language, flow = (find_kind(name, "x").options["data"] for name in ("language", "flow"))
    assert language(("a.jsonl", "b=2")) == {"data.sources": {"a.jsonl": 1.0, "b": 2.0}}
    with pytest.raises(ConfigError, match="--data a=b: expected PATH or PATH=WEIGHT"):
        language(("a=b",))
    assert flow(("ready",)) == {"data.folder": "ready"}
    with pytest.raises(ConfigError, match=r"flow learns from one folder; .* prepare-flow` makes"):
        flow(("a", "b"))
    assert option_key("a.b")(Path("c")) == {"a.b": "c"}


def test_the_table_and_recipes_import_no_trainer():
    """Help and reading a recipe stay cheap."""
    code = (
        "import sys, sa2jax.cli; assert 'sa2jax.train' not in sys.modules; "
        "import sa2jax.train.kinds, sa2jax.train.recipe; "
        "loaded = [m for m in sys.modules if m.startswith(('sa2jax.train.language', "
        "'sa2jax.train.networks', 'sa2jax.train.stages'))]; assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

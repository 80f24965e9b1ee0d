"""Runs: they learn, end well, go on after any end bit for bit, and refuse what is not theirs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import jax
import numpy as np
import pytest
import yaml
from helpers.small_training import interrupt_after, recipe, save_model, save_pairs, values

from sa2jax import StepAudio2, checkpoint, testing
from sa2jax.errors import DataError, TrainError
from sa2jax.inference.requests import Request
from sa2jax.train.checkpoints import Checkpoints
from sa2jax.train.language.model_io import open_base_model
from sa2jax.train.language.peft_merge import merge_adapter, read_adapter
from sa2jax.train.language.recipe import Evaluation, ModelSpec
from sa2jax.train.language.task import optimizer_config, train_language_model
from sa2jax.train.log import Meter, RunCounts, read_metrics, training_flops
from sa2jax.train.optimizer import make_optimizer
from sa2jax.train.recipe import Intervals
from sa2jax.train.state import abstract_state


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def model(home):
    return save_model(home / "model")


@pytest.fixture(scope="module")
def pairs(home):
    return save_pairs(home / "pairs")


@pytest.fixture(scope="module")
def whole(home, model, pairs):
    """A run of six updates that nothing disturbed, evaluated on the way."""
    plan = recipe(model, pairs, evaluate={"sources": {str(pairs): 1}})
    plan = replace(plan, intervals=replace(plan.intervals, evaluate_every=3))
    return train_language_model(plan, home / "whole", quiet=True), home / "whole"


def numbers(folder):
    return checkpoint.flatten(jax.device_get(checkpoint.load_params(folder / "model")))


def learnt(folder):
    """What depends on nothing but the recipe."""
    names = (
        "step",
        "loss",
        "accuracy",
        "text/loss",
        "audio/loss",
        "grad_norm",
        "learning_rate",
        "target_weight",
    )
    return [[line.get(name) for name in names] for line in read_metrics(folder / "metrics.jsonl")]


def assert_same(one, other):
    for (name, a), (_, b) in zip(numbers(one).items(), numbers(other).items(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.slow
def test_a_run_leaves_a_model_that_answers(whole, model):
    outcome, out = whole
    assert (outcome.step, outcome.finished) == (6, True)
    assert set(outcome.results) == {"model", "curves"}
    lines = read_metrics(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 6, 6]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    held = [line for line in lines if "evaluate/loss" in line]
    assert held[-1]["evaluate/loss"] < held[0]["evaluate/loss"]
    assert {"evaluate/audio/accuracy", "evaluate/pads/loss"} <= set(held[0])
    assert outcome.metrics["evaluate/loss"] == held[-1]["evaluate/loss"]
    assert outcome.results["curves"].read_bytes().startswith(b"\x89PNG")
    assert any((out / "tensorboard").iterdir())
    trained = StepAudio2.from_pretrained(outcome.results["model"])
    assert trained.chat(system=None).say("hello").ids is not None
    assert trained.cfg == StepAudio2.from_pretrained(model).cfg


KILLED = """
    import os, signal, sys, yaml
    from sa2jax.train.language.task import optimizer_config, train_language_model
    from sa2jax.train.language.recipe import read_language_recipe

    def on_step(step):
        if step == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)

    recipe = read_language_recipe(sys.argv[1])
    train_language_model(recipe, sys.argv[2], quiet=True, on_step=on_step)
"""


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted(home, model, pairs, whole):
    """Bit for bit, the order of the data included, wherever it was killed."""
    step = int(np.random.default_rng().integers(3, 6))
    file, out = home / "killed.yaml", home / "killed"
    file.write_text(yaml.safe_dump(values(model, pairs)))
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(file), str(out), str(step)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(home / "xla")},
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not (out / "model").exists()
    # What a kill in the middle of writing leaves.
    half = out / "checkpoints" / "5.orbax-checkpoint-tmp-7"
    half.mkdir()
    (half / "state").write_bytes(b"half")
    outcome = train_language_model(recipe(model, pairs), out, quiet=True)
    assert (outcome.step, outcome.finished) == (6, True)
    assert not half.exists()
    assert_same(out, whole[1])
    evaluated = [line for line in learnt(whole[1]) if line[1] is not None]
    assert learnt(out) == evaluated


@pytest.mark.slow
def test_an_interrupt_ends_with_a_checkpoint_and_the_same_call_goes_on(home, model, pairs, whole):
    out, seen = home / "interrupted", []
    handler = signal.getsignal(signal.SIGINT)
    stop = interrupt_after(3, seen)
    first = train_language_model(recipe(model, pairs), out, quiet=True, on_step=stop)
    assert (first.step, first.finished, first.results) == (3, False, {})
    assert signal.getsignal(signal.SIGINT) is handler
    second = train_language_model(recipe(model, pairs), out, quiet=True, on_step=seen.append)
    assert second.finished
    assert seen == [1, 2, 3, 4, 5, 6]
    assert_same(out, whole[1])
    again = train_language_model(recipe(model, pairs), out, quiet=True, on_step=seen.append)
    assert again.finished
    assert seen == [1, 2, 3, 4, 5, 6]


def test_a_run_refuses_to_go_on_as_another(home, model, pairs, whole, tmp_path):
    out = whole[1]
    evaluate = Evaluation(sources={str(pairs): 1.0})
    plan = replace(recipe(model, pairs), evaluate=evaluate)
    other = save_model(tmp_path / "model", testing.tiny_config(layers=1, max_positions=512))
    more = save_pairs(tmp_path / "pairs", 13)
    for change, said in (
        (
            recipe(model, more),
            r"the contents of the data or the tokenizer \(data.sources: .* → .*\)",
        ),
        (recipe(other, pairs), r"the model that it began with \(model.folder: .* → .*\)"),
        (
            recipe(model, pairs, optimizer__learning_rate=1e-4),
            r"optimizer.learning_rate: 0.001 → 0.0001",
        ),
        (replace(plan, seed=1), r"seed: 0 → 1"),
    ):
        with pytest.raises(TrainError, match=f"(?s)differs in: .*{said}.*--fresh"):
            train_language_model(change, out, quiet=True)
    # The same file with other lines in it.
    text = pairs.read_text()
    pairs.write_text(text.replace("word 1", "WORD 1"))
    try:
        with pytest.raises(TrainError, match="the contents of the data"):
            train_language_model(plan, out, quiet=True)
    finally:
        pairs.write_text(text)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("!")
    with pytest.raises(TrainError, match="holds something else"):
        train_language_model(plan, tmp_path / "full", quiet=True)
    (out / "run.json").write_text("{")
    with pytest.raises(TrainError, match="damaged: --fresh"):
        train_language_model(plan, out, quiet=True)


@pytest.mark.slow
def test_low_rank_matrices_alone_are_trained_and_merged(home, model, pairs):
    """The adapter's folder and the merged model say the same as what was trained."""
    plan = recipe(model, pairs, lora={"rank": 4, "alpha": 8.0, "learning_rate": 1e-2})
    outcome = train_language_model(plan, home / "lora", quiet=True)
    assert outcome.finished
    base = open_base_model(plan.model, plan.lora)
    optimizer = make_optimizer(optimizer_config(plan))
    saved = Checkpoints(home / "lora" / "checkpoints")
    like = abstract_state(base.model, optimizer)
    state, _ = saved.restore(6, optimizer, like, base.load_params(None, plan.seed))
    saved.close()
    sizes = [p.stat().st_size for p in (home / "lora" / "checkpoints").rglob("*") if p.is_file()]
    assert sum(sizes) < 3e6  # two checkpoints without the base
    ids = np.arange(20, dtype=np.int32)[None]
    hidden = base.model.bind(state.params)(ids)[0]
    start = base.model.bind(base.load_params(None, plan.seed))(ids)[0]
    assert float(np.abs(hidden - start).max()) > 1e-2
    merged = StepAudio2.from_pretrained(outcome.results["model"])
    logits = merged.engine.logits(Request(ids[0]))
    expected = base.model.bind(state.params).decoder.logits(hidden)[0]
    np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=1e-5)
    adapter, plain = read_adapter(outcome.results["adapter"]), open_base_model(plan.model)
    assert (adapter.config.rank, adapter.config.alpha) == (4, 8.0)
    again = merge_adapter(adapter, plain.load_params(None, 0), plain.cfg)
    expected = checkpoint.flatten(base.merged(state.params))
    for name, leaf in checkpoint.flatten(again).items():
        np.testing.assert_allclose(leaf, expected[name], atol=1e-6)


def test_int8_matrices_keep_an_adapter_beside_them(home, model, pairs):
    plan = recipe(
        model,
        pairs,
        model={"folder": str(model), "dtype": "int8", "compute_dtype": "float32"},
        lora={"rank": 2, "alpha": 4.0},
    )
    outcome = train_language_model(plan, home / "qlora", quiet=True)
    assert outcome.finished
    assert "model" not in outcome.results
    assert (outcome.results["adapter"] / "adapter_model.safetensors").is_file()


def test_data_that_ends_ends_the_run(home, model, pairs):
    plan = replace(recipe(model, pairs, data__epochs=1), intervals=Intervals(log_every=100))
    outcome = train_language_model(plan, home / "once", quiet=True)
    assert outcome.finished
    assert outcome.step < 6
    assert "model" in outcome.results
    (line,) = read_metrics(home / "once" / "metrics.jsonl")
    assert line["step"] == outcome.step
    assert line["loss"] == outcome.metrics["loss"]


def test_what_lies_beside_the_weights_comes_along(model, tmp_path):
    """Voices and the detokenizer of the model that a run began with, and voices added since."""
    home, out = tmp_path / "home", tmp_path / "out"
    shutil.copytree(model, home)
    for name in ("voices/anna.safetensors", "token2wav/params/leaf", "notes.txt"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(name)
    base = open_base_model(ModelSpec(folder=str(home)))
    params = base.load_params(None, 0)
    base.save(params, out)
    (out / "voices" / "bert.safetensors").write_text("bert")
    base.save(params, out, overwrite=True)
    for name in ("voices/anna.safetensors", "token2wav/params/leaf", "notes.txt"):
        assert (out / name).read_text() == name
    assert (out / "voices" / "bert.safetensors").read_text() == "bert"


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"data__sources": {"nowhere.jsonl": 1}}, DataError, "nowhere.jsonl"),
        ({"optimizer__learning_rate_overrides": {"": 0.0}}, TrainError, "nothing to train"),
        ({"data__length": 2048}, TrainError, "the model has 1024 positions"),
        ({"data__length": 16, "data__max_rejects": 3}, DataError, "more than the context"),
    ],
)
def test_what_cannot_be_trained(home, model, pairs, tmp_path, changes, error, said):
    with pytest.raises(error, match=said):
        train_language_model(recipe(model, pairs, **changes), tmp_path / "run", quiet=True)


def test_flops_and_rates():
    cfg = testing.tiny_config()
    token, second = training_flops(cfg, base_trained=True, encoder_trained=False)
    d, e = cfg.decoder, cfg.audio_encoder
    matrices = d.layers * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 512 * 32
    assert token == 6 * matrices
    assert second == 2 * 50 * e.layers * (4 * 16 * 16 + 2 * 16 * 64)
    assert training_flops(cfg, base_trained=False, encoder_trained=False)[0] == 4 * matrices
    meter = Meter((token, second), peak=1e12, room=(160, 0))
    assert meter.measure(RunCounts(1, 100, 1.0, 0.0)) == {}
    rates = meter.measure(RunCounts(3, 300, 3.0, 0.0))
    seconds = 2 * rates["step_seconds"]
    assert rates["tokens_per_second"] == pytest.approx(200 / seconds)
    assert rates["mfu"] == pytest.approx((200 * token + 2 * second) / seconds / 1e12)
    assert rates["token_utilization"] == pytest.approx(100 / 160)
    assert "audio_utilization" not in rates


def test_a_meter_leaves_out_what_is_skipped():
    meter = Meter((0.0, 0.0), peak=0.0, room=(100, 0))
    meter.measure(RunCounts(1, 100, 0.0, 0.0))
    meter.skip(RunCounts(2, 1000, 0.0, 0.0))
    rates = meter.measure(RunCounts(4, 1100, 0.0, 0.0))
    assert rates["token_utilization"] == pytest.approx(50 / 100)
    assert rates["tokens_per_second"] == pytest.approx(50 / rates["step_seconds"])
    meter.skip(RunCounts(4, 1100, 0.0, 0.0))
    assert meter.measure(RunCounts(4, 1100, 0.0, 0.0)) == {}


def test_a_cut_line_of_metrics_does_not_count(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]

"""A step learns, moves only what it should, and does the same on any mesh."""

import json
import textwrap
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.devices import run_on_devices

from sa2jax import testing
from sa2jax.models.step_audio import StepAudio2Model, step_audio2
from sa2jax.nn import Policy, functional
from sa2jax.train.language.step import (
    TRACES,
    LanguageBatch,
    abstract_language_batch,
    make_language_step,
)
from sa2jax.train.lora import ONLY_LORA, add_lora, combine, init_lora, split_lora
from sa2jax.train.optimizer import OptimizerConfig, make_optimizer
from sa2jax.train.state import abstract_state, init_state

CFG = testing.tiny_config(layers=1)
DEAF = {"audio_encoder": 0.0, "adapter": 0.0}
FAST = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, steps=40, learning_rate_overrides=DEAF)


def lora_model(policy: Policy | None = None):
    def make():
        rngs = nnx.Rngs(0)
        net = StepAudio2Model(CFG, policy=policy or Policy(), rngs=rngs)
        add_lora(net, 4, 8.0, rngs=rngs)
        return net

    return functional(make)


def rows(count: int = 4, length: int = 12) -> LanguageBatch:
    ids = np.random.default_rng(0).integers(0, 256, (count, length + 1), np.int32)
    weights = np.ones((count, length), np.float32)
    weights[:, -2:] = 0
    return LanguageBatch(ids=ids[:, :-1], targets=ids[:, 1:], weights=weights)


@pytest.mark.both_pairs
def test_it_learns_a_batch_by_heart():
    model, optimizer = step_audio2(CFG), make_optimizer(FAST)
    step = make_language_step(model, optimizer, loss_chunk=8)
    state = init_state(model, optimizer, None, testing.tiny_params(CFG))
    before = TRACES["step"]
    reports = []
    for _ in range(40):
        state, report = step(state, rows())
        reports.append(jax.device_get(report))
    assert TRACES["step"] == before + 1
    assert step.function._cache_size() == 1  # one program, too: the state stays where it was
    assert reports[0]["loss"] > 5
    assert reports[-1]["loss"] < 0.5
    assert reports[-1]["accuracy"] > 0.95
    assert reports[0]["target_weight"] == 40
    assert reports[0]["learning_rate"] == pytest.approx(5e-3)
    assert all(np.isfinite(report["grad_norm"]) for report in reports)
    assert state.step == 40


def test_lora_learns_and_leaves_the_base_alone():
    model = lora_model()
    optimizer = make_optimizer(
        replace(FAST, learning_rate_overrides={k: v * 200 for k, v in ONLY_LORA.items()})
    )
    base = testing.tiny_params(CFG)
    kept = jax.device_get(base)
    state = init_state(model, optimizer, None, combine(base, init_lora(model, jax.random.key(0))))
    start = jax.device_get(split_lora(state.params)[1])
    moments = [leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(moments) == 2 * sum(leaf.size for leaf in jax.tree.leaves(start))
    step = make_language_step(model, optimizer, loss_chunk=8)
    losses = []
    for _ in range(40):
        state, report = step(state, rows())
        losses.append(float(report["loss"]))
    assert losses[-1] < losses[0] / 2
    after, lora = split_lora(state.params)
    jax.tree.map(np.testing.assert_array_equal, after, kept)
    assert all(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (lora, start)), strict=True))


def test_parts_that_are_computed_again_add_up_to_one_batch():
    """Rows in two parts, with full remat, against all at once without."""
    model, optimizer = step_audio2(CFG), make_optimizer(replace(FAST, eps=1e-4))
    whole = rows()
    whole.weights[0] = 0  # parts of unequal weight
    parts = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), whole)
    found = []
    for batch, remat in ((whole, None), (parts, "full")):
        state = init_state(model, optimizer, None, testing.tiny_params(CFG))
        found.append(make_language_step(model, optimizer, remat=remat)(state, batch))
    (one, report), (other, again) = found
    for key in report:
        np.testing.assert_allclose(report[key], again[key], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one.params, other.params)


def test_layers_that_are_written_out_are_the_same_step():
    model, optimizer = step_audio2(CFG), make_optimizer(replace(FAST, eps=1e-4))
    found = []
    for unroll in (False, True):
        step = make_language_step(model, optimizer, unroll=unroll)
        state = init_state(model, optimizer, None, testing.tiny_params(CFG))
        lowered = step.lower(*jax.tree.map(jax.typeof, (state, rows())))
        loops = lowered.as_text().count("stablehlo.while")
        found.append((loops, *step(state, rows())))
    (loops, one, report), (fewer, other, again) = found
    assert fewer == loops - 3  # of the decoder there and back, and of the frozen encoder
    for key in report:
        np.testing.assert_allclose(report[key], again[key], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one.params, other.params)


@pytest.mark.parametrize(
    "policy",
    [
        Policy(compute=jnp.bfloat16),
        Policy(param=jnp.bfloat16, compute=jnp.bfloat16),
        Policy(param=jnp.bfloat16, compute=jnp.bfloat16, kernel=jnp.int8),
    ],
    ids=["master", "half", "int8"],
)
def test_a_state_comes_back_as_it_went_in(policy):
    """Same tree, shapes and dtypes, so that a step can be repeated and its memory used again."""
    lora = policy.kernel is not None
    model = lora_model(policy) if lora else step_audio2(CFG, policy)
    optimizer = make_optimizer(OptimizerConfig(learning_rate_overrides=ONLY_LORA if lora else {}))
    state = abstract_state(model, optimizer)
    batch = abstract_language_batch(
        CFG, None, 2, 16, clips=2, frames=40, accumulation_steps=2, metric_masks=("text",)
    )
    after, report = jax.eval_shape(make_language_step(model, optimizer).function, state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert {"loss", "accuracy", "grad_norm", "learning_rate", "target_weight", "text/loss"} <= set(
        report
    )


SHARDED = """
    import json, sys
    from dataclasses import replace
    import jax, numpy as np
    from sa2jax import testing
    from sa2jax.models.step_audio import step_audio2
    from sa2jax.sharding import make_mesh
    from sa2jax.train.optimizer import OptimizerConfig, make_optimizer
    from sa2jax.train.language.step import (
        TRACES, LanguageBatch, make_language_step, place_batch
    )
    from sa2jax.train.state import abstract_state, init_state

    cfg = testing.tiny_config(layers=1)
    model = step_audio2(cfg)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0, eps=1e-4))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, (8, 25), np.int32)
    slots = np.full((8, 24), -1, np.int32)
    slots[:, 3:8] = np.arange(5) + 5 * np.arange(8)[::-1, None]  # clips in another order than rows
    batch = LanguageBatch(
        ids=ids[:, :-1], targets=ids[:, 1:], weights=rng.random((8, 24), np.float32),
        mels=rng.standard_normal((8, 16, 40), np.float32), frames=np.full((8, 1), 40, np.int32),
        starts=np.zeros((8, 1), np.int32), feature_index=slots, metric_masks={"heard": slots >= 0},
        segments=np.repeat([[1, 2, 3]], 8, 0).repeat(8, 1),  # three sequences of eight in each row
        positions=np.tile(np.arange(8, dtype=np.int32), (8, 3)),
    )

    def run(spec, steps):
        mesh = None if spec is None else make_mesh(spec)
        step = make_language_step(model, optimizer, mesh, loss_chunk=10)
        state = init_state(model, optimizer, mesh, testing.tiny_params(cfg))
        places = jax.tree.map(lambda x: x.sharding, state)
        abstract = jax.tree.map(lambda x: x.sharding, abstract_state(model, optimizer, mesh))
        losses = []
        for _ in range(steps):
            state, report = step(state, place_batch(batch, mesh))
            losses.append([float(report["loss"]), float(report["heard/loss"])])
        same = jax.tree.map(lambda x, was: x.sharding == was, state, places)
        said = mesh is None or places == abstract
        return state, losses, bool(all(jax.tree.leaves(same)) and said)

    def distance(one, other):
        gap = lambda a, b: float(np.abs(jax.device_get(a) - jax.device_get(b)).max())
        return max(jax.tree.leaves(jax.tree.map(gap, one.params, other.params)))

    alone, expected, _ = run(None, 2)
    found = {}
    for spec in ("data=2,fsdp=2,tensor=2", "fsdp=8"):
        TRACES.clear()
        state, losses, kept = run(spec, 2)
        moment = state.opt_state[2].nu["decoder"]["layers"]["mlp"]["up"]["kernel"]
        moved = distance(state, replace(state, params=testing.tiny_params(cfg)))
        found[spec] = {
            "losses": losses, "kept": kept, "traces": TRACES["step"], "moved": moved,
            "distance": distance(alone, state),
            "moment": moment.sharding.shard_shape(moment.shape), "whole": moment.shape,
        }
    print(json.dumps({"expected": expected, "found": found}))
"""


@pytest.mark.slow
def test_a_sharded_step_is_the_same_step(tmp_path: Path):
    """Eight devices: equal losses and parameters, moments split as parameters, nothing gathered."""
    run = run_on_devices(8, ["-c", textwrap.dedent(SHARDED)], tmp_path)
    assert "Involuntary full rematerialization" not in run.stderr
    result = json.loads(run.stdout)
    for spec, ways in (("data=2,fsdp=2,tensor=2", (1, 2, 2)), ("fsdp=8", (1, 1, 8))):
        found = result["found"][spec]
        np.testing.assert_allclose(found["losses"], result["expected"], rtol=1e-5)
        assert found["distance"] < 1e-5
        assert found["moved"] > 1e-2
        assert found["kept"]
        assert found["traces"] == 1
        assert tuple(np.divide(found["whole"], found["moment"])) == ways

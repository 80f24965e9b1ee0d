"""Which parts move, how fast, and in which dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sa2jax.errors import TrainError
from sa2jax.train.optimizer import (
    OptimizerConfig,
    apply_updates,
    combine,
    make_optimizer,
    matrix_mask,
    partition,
    stochastic_round,
)


@pytest.fixture
def params(rng):
    def leaf(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    layers = {"q": {"kernel": leaf(2, 3, 4), "bias": leaf(2, 3)}, "norm": {"scale": leaf(2, 4)}}
    return {
        "adapter": {"up": {"kernel": leaf(5, 4), "bias": leaf(5)}},
        "decoder": {"head": {"kernel": leaf(7, 4)}, "layers": layers, "table": leaf(7, 4)},
    }


def test_it_is_adamw(params):
    """Equal rates, moments in float32: three steps of `optax.adamw` after clipping."""
    config = OptimizerConfig(
        learning_rate=0.01,
        warmup_steps=0,
        steps=10,
        final_fraction=0.1,
        weight_decay=0.2,
        max_grad_norm=0.5,
    )
    ours = make_optimizer(config)
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(ours.schedule, 0.9, 0.95, weight_decay=0.2, mask=matrix_mask),
    )
    mine, expected = params, params
    state, other = ours.transform.init(params), theirs.init(params)

    @jax.jit
    def step(count, mine, state, expected, other):
        gradient = jax.tree.map(lambda x: jnp.sin(x + count), params)
        updates, state = ours.transform.update(gradient, state, mine)
        mine = apply_updates(mine, updates, count)
        updates, other = theirs.update(gradient, other, expected)
        return mine, state, optax.apply_updates(expected, updates), other

    for count in range(3):
        mine, state, expected, other = step(count, mine, state, expected, other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), mine, expected)


def test_schedule():
    rate = make_optimizer(
        OptimizerConfig(learning_rate=1.0, warmup_steps=4, steps=12, final_fraction=0.1)
    ).schedule
    found = [float(rate(step)) for step in (0, 3, 4, 8, 12, 20)]
    np.testing.assert_allclose(found, [0.25, 1, 1, 0.55, 0.1, 0.1], rtol=1e-6)


def test_a_linear_schedule():
    config = OptimizerConfig(
        learning_rate=1.0, warmup_steps=2, steps=12, final_fraction=0.2, schedule="linear"
    )
    rate = make_optimizer(config).schedule
    np.testing.assert_allclose(
        [rate(n) for n in (0, 1, 2, 7, 12)], [0.5, 1, 1, 0.6, 0.2], rtol=1e-6
    )


def test_rates_by_part(params):
    rates = {"adapter": 3e-3, r"decoder\.table": 0.0}
    config = OptimizerConfig(
        learning_rate=1e-3,
        warmup_steps=0,
        learning_rate_overrides=rates,
        weight_decay=0.0,
        max_grad_norm=None,
    )
    optimizer = make_optimizer(config)
    trained, frozen = optimizer.partition(params)
    assert list(frozen) == ["decoder"]
    assert list(frozen["decoder"]) == ["table"]
    update = jax.jit(lambda x: optimizer.transform.update(x, optimizer.transform.init(x), x)[0])
    updates = update(trained)
    # The first update of Adam is the rate, with the gradient's sign.
    np.testing.assert_allclose(jnp.abs(updates["adapter"]["up"]["bias"]), 3e-3, rtol=1e-4)
    np.testing.assert_allclose(jnp.abs(updates["decoder"]["head"]["kernel"]), 1e-3, rtol=1e-4)


def test_only_matrices_decay(params):
    marked = matrix_mask(params)
    assert marked["adapter"]["up"] == {"kernel": True, "bias": False}
    assert marked["decoder"]["table"]
    layers = marked["decoder"]["layers"]
    assert layers == {"q": {"kernel": True, "bias": False}, "norm": {"scale": False}}


def test_split_and_join(params):
    parts = partition(params, lambda name: name.startswith("decoder.layers.q"))
    assert jax.tree.structure(parts[0]) != jax.tree.structure(params)
    assert jax.tree.structure(combine(*parts)) == jax.tree.structure(params)
    assert partition(params, lambda name: True) == (params, {})


def test_moments_in_bfloat16(params):
    config = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, moment_dtype=jnp.bfloat16)
    asked, default = (make_optimizer(c).transform for c in (config, OptimizerConfig()))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

    def kinds(tree):
        return {leaf.dtype.name for leaf in jax.tree.leaves(tree) if leaf.ndim}

    for transform, given in ((asked, params), (default, half)):
        state = jax.eval_shape(transform.init, given)
        assert kinds(state) == {"bfloat16"}
        updates, after = jax.eval_shape(transform.update, given, state, given)
        assert kinds(updates) == {"float32"}
        assert kinds(after) == {"bfloat16"}
    assert kinds(jax.eval_shape(default.init, params)) == {"float32"}


def test_small_updates_are_not_lost_in_bfloat16():
    """A thousandth of a bfloat16 step: the nearest number would never move; on average it does."""
    before = {"kernel": jnp.ones((256, 256), jnp.bfloat16)}
    update = {"kernel": jnp.full((256, 256), 2.0**-17)}
    after = before
    move = jax.jit(apply_updates)
    for step in range(64):
        after = move(after, update, jnp.int32(step))
    gained = np.asarray(after["kernel"], np.float64).mean() - 1
    assert gained == pytest.approx(64 * 2**-17, rel=0.1)
    exact = jnp.asarray([1.5, -3.0, 0.0, 1e-30], jnp.bfloat16)
    assert (stochastic_round(exact.astype(jnp.float32), jax.random.key(0)) == exact).all()


def test_mistakes(params):
    with pytest.raises(
        TrainError,
        match="0 <= warmup_steps <= steps, got learning_rate 1e-05, warmup_steps 20, steps",
    ):
        make_optimizer(OptimizerConfig(warmup_steps=20, steps=10))
    with pytest.raises(TrainError, match="nothing to train"):
        make_optimizer(OptimizerConfig(learning_rate_overrides={"": 0.0})).partition(params)
    params["decoder"]["head"]["kernel"] = jnp.zeros((7, 4), jnp.int8)
    with pytest.raises(TrainError, match=r"decoder\.head\.kernel is int8 and cannot be trained"):
        make_optimizer(OptimizerConfig()).partition(params)

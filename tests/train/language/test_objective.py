"""The loss in chunks against one that holds every logit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa2jax.train.language.objective import LossSums, next_token_loss

B, T, D, V = 3, 20, 16, 40


@pytest.fixture
def inputs(rng):
    matrix = jnp.asarray(rng.standard_normal((V, D)), jnp.float32)
    hidden = jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    weights = jnp.asarray(rng.random((B, T)) * (rng.random((B, T)) < 0.8), jnp.float32)
    return matrix, hidden, targets, weights


def chunked(matrix, hidden, targets, weights, loss_chunk, **options):
    product = partial(jnp.einsum, "vd,btd->btv", precision="highest")
    head = jax.tree_util.Partial(product, matrix)
    return next_token_loss(head, hidden, targets, weights, loss_chunk=loss_chunk, **options)


def naive(matrix, hidden, targets, weights):
    logits = jnp.einsum("btd,vd->btv", hidden, matrix, precision="highest")
    own = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    hits = jnp.sum(weights * (jnp.argmax(logits, axis=-1) == targets))
    return -jnp.sum(weights * own), hits


@pytest.mark.parametrize("chunk", [7, 10, 512])
def test_value_and_gradients_are_those_of_whole_logits(inputs, chunk):
    *_, weights = inputs

    def gradient(f, *inputs):
        return jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(*inputs)

    (expected, hits), gradients = gradient(naive, *inputs)
    (loss, sums), found = gradient(partial(chunked, loss_chunk=chunk), *inputs)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(sums["all"].correct, hits, rtol=1e-5)
    np.testing.assert_allclose(sums["all"].weight, weights.sum(), rtol=1e-6)
    for one, other in zip(found, gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_positions_without_weight_do_not_count(inputs):
    matrix, hidden, targets, weights = inputs
    silent = weights == 0
    assert silent.any()
    gradient = jax.jit(jax.grad(lambda h: chunked(matrix, h, targets, weights, 7)[0]))
    assert not np.any(gradient(hidden)[silent])
    changed = jnp.where(silent, (targets + 1) % V, targets)
    assert chunked(matrix, hidden, changed, weights, 7)[0] == chunked(*inputs, 7)[0]
    nothing = chunked(matrix, hidden, targets, jnp.zeros_like(weights), 7)[1]["all"].means()
    assert nothing == {"loss": 0, "accuracy": 0}


def test_streams_are_reported_apart(inputs, rng):
    *_, weights = inputs
    audio = jnp.asarray(rng.random((B, T)) < 0.5)
    _, sums = chunked(*inputs, 7, metric_masks={"audio": audio, "text": ~audio})
    total = sums["audio"] + sums["text"]
    for one, other in zip(jax.tree.leaves(total), jax.tree.leaves(sums["all"]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    np.testing.assert_allclose(sums["audio"].weight, weights[audio].sum(), rtol=1e-5)
    assert isinstance(total, LossSums)


def test_logits_are_never_whole():
    """A gradient over 4 x 1024 positions of 8192 words needs a fraction of their logits' memory."""
    rows, steps, words = 4, 1024, 8192
    shapes = [((words, D), jnp.float32), ((rows, steps, D), jnp.float32)]
    shapes += [((rows, steps), jnp.int32), ((rows, steps), jnp.float32)]
    shapes = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    loss = jax.jit(jax.grad(lambda *inputs: chunked(*inputs, 64)[0], argnums=(0, 1)))
    memory = loss.lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < rows * steps * words * 4 / 4

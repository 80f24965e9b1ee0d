"""Sampling against transformers' processors, ties included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa2jax.errors import PromptError
from sa2jax.inference.sampling import (
    SamplingParams,
    keep_top_k,
    keep_top_p,
    penalise,
    process,
    sample,
)


@pytest.fixture(scope="module")
def recorded(golden):
    return np.load(golden / "sampling" / "processors.npz")


def seen_of(recorded):
    seen = np.zeros(recorded["logits"].shape, bool)
    np.put_along_axis(seen, recorded["input_ids"], True, axis=1)
    return seen


def assert_same(ours, reference):
    ours = np.asarray(ours)
    np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(reference))
    finite = np.isfinite(reference)
    np.testing.assert_allclose(ours[finite], reference[finite], atol=1e-5, rtol=0)


@pytest.mark.parametrize("penalty", [1.05, 1.2])
def test_repetition_penalty(recorded, penalty):
    ours = penalise(recorded["logits"], seen_of(recorded), np.float32(penalty))
    assert_same(ours, recorded[f"rep{penalty}"])


def test_top_k(recorded):
    assert_same(keep_top_k(recorded["logits"], 20), recorded["topk20"])
    assert_same(keep_top_k(recorded["tie_logits"], 2), recorded["tie_topk2"])


@pytest.mark.parametrize("p", [0.9, 0.3])
def test_top_p(recorded, p):
    assert_same(keep_top_p(recorded["logits"], np.float32(p)), recorded[f"topp{p}"])


def test_top_p_ties(recorded):
    assert_same(keep_top_p(recorded["tie_logits"], np.float32(0.5)), recorded["tie_topp0.5"])


def test_chain_in_official_order(recorded):
    sampling = SamplingParams(
        temperature=0.7, top_k=50, top_p=0.9, repetition_penalty=1.05
    ).arrays()
    ours = jax.jit(process)(recorded["logits"], seen_of(recorded), sampling)
    assert_same(ours, recorded["chain3_TopPLogitsWarper"])
    np.testing.assert_allclose(jax.nn.softmax(ours), recorded["chain_probs"], atol=1e-5)


def test_partial_sort_equals_full_sort_with_ties_at_the_edge_of_top_k():
    logits = np.full((1, 40), -1.0, np.float32)
    logits[0, [3, 9, 17, 20, 31]] = 2.0  # five tokens tie for the last of four places
    logits[0, 5] = 3.0
    kept = keep_top_k(logits, 4)
    assert np.isfinite(np.asarray(kept)).sum() == 6
    for p in (0.2, 0.5, 0.7, 0.8, 0.95, 0.999):
        fast = keep_top_p(kept, np.float32(p), among=4)
        assert_same(fast, np.asarray(keep_top_p(kept, np.float32(p))))


def test_numbers_do_not_recompile_but_choices_do():
    traces = []

    def counted(logits, seen, sampling):
        traces.append(sampling)
        return process(logits, seen, sampling)

    run = jax.jit(counted)
    logits, seen = jnp.zeros((1, 8)), jnp.zeros((1, 8), bool)
    for temperature in (0.5, 0.7, 0.9):
        run(logits, seen, SamplingParams(temperature=temperature, top_p=temperature).arrays())
    assert len(traces) == 1
    run(logits, seen, SamplingParams(temperature=0).arrays())
    assert len(traces) == 2


def test_draws_follow_the_distribution_and_the_row_key(rng):
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    rows = 4000
    keys = jax.random.split(jax.random.key(1), rows)
    seen = np.zeros((rows, 3), bool)
    sampling = SamplingParams(temperature=1.0, top_k=0).arrays()
    drawn = np.asarray(sample(keys, np.tile(logits, (rows, 1)), seen, sampling))
    np.testing.assert_allclose(np.bincount(drawn) / rows, np.exp(logits), atol=0.03)
    alone = sample(keys[7:8], logits[None], seen[:1], sampling)
    assert int(alone[0]) == drawn[7]


def test_greedy_takes_the_best_after_the_penalty():
    logits = np.array([[2.0, 1.9, -1.0]], np.float32)
    seen = np.array([[True, False, False]])
    keys = jax.random.split(jax.random.key(0), 1)
    plain = sample(keys, logits, seen, SamplingParams(temperature=0).arrays())
    punished = sample(
        keys, logits, seen, SamplingParams(temperature=0, repetition_penalty=1.2).arrays()
    )
    assert (int(plain[0]), int(punished[0])) == (0, 1)


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}, {"repetition_penalty": 0}],
)
def test_bad_settings_are_named(bad):
    (name,) = bad
    with pytest.raises(PromptError, match=name):
        SamplingParams(**bad)

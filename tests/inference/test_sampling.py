"""Sampling against transformers' processors, ties included."""

import jax
import numpy as np
import pytest

from sa2jax.errors import PromptError
from sa2jax.inference.sampling import (
    SamplingArrays,
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
    ours = penalise(recorded["logits"], seen_of(recorded), alike(recorded["logits"], penalty))
    assert_same(ours, recorded[f"rep{penalty}"])


def alike(logits, number) -> np.ndarray:
    """The same setting for all rows."""
    return np.full(len(logits), number, np.float32)


def top_k(logits, k: int):
    return keep_top_k(logits, np.full(len(logits), k), jax.lax.top_k(logits, k)[0])


def top_p(logits, p: float, *, k: int = 0):
    ordered = jax.lax.top_k(logits, k or logits.shape[-1])[0]
    return keep_top_p(logits, alike(logits, p), np.full(len(logits), k), ordered)


def test_top_k(recorded):
    assert_same(top_k(recorded["logits"], 20), recorded["topk20"])
    assert_same(top_k(recorded["tie_logits"], 2), recorded["tie_topk2"])


@pytest.mark.parametrize("p", [0.9, 0.3])
def test_top_p(recorded, p):
    assert_same(top_p(recorded["logits"], p), recorded[f"topp{p}"])


def test_top_p_ties(recorded):
    assert_same(top_p(recorded["tie_logits"], 0.5), recorded["tie_topp0.5"])


def test_chain_in_official_order(recorded):
    wanted = SamplingParams(temperature=0.7, top_k=50, top_p=0.9, repetition_penalty=1.05)
    sampling = SamplingArrays.of([wanted] * len(recorded["logits"]))
    ours = jax.jit(process)(recorded["logits"], seen_of(recorded), sampling)
    assert_same(ours, recorded["chain3_TopPLogitsWarper"])
    np.testing.assert_allclose(jax.nn.softmax(ours), recorded["chain_probs"], atol=1e-5)


def test_partial_sort_equals_full_sort_with_ties_at_the_edge_of_top_k():
    logits = np.full((1, 40), -1.0, np.float32)
    logits[0, [3, 9, 17, 20, 31]] = 2.0  # five tokens tie for the last of four places
    logits[0, 5] = 3.0
    kept = top_k(logits, 4)
    assert np.isfinite(np.asarray(kept)).sum() == 6
    for p in (0.2, 0.5, 0.7, 0.8, 0.95, 0.999):
        assert_same(top_p(kept, p, k=4), np.asarray(top_p(kept, p)))


ROWS = (
    SamplingParams(temperature=0),
    SamplingParams(temperature=0, repetition_penalty=1.3),
    SamplingParams(temperature=0.7, top_k=5, top_p=0.8),
    SamplingParams(temperature=1.4, top_k=50),
    SamplingParams(top_k=0, top_p=0.9),
    SamplingParams(top_k=0),
    SamplingParams(top_k=100, top_p=0.95, repetition_penalty=1.1),
    SamplingParams(top_k=0, top_p=0.05),
)


def table(rows: int = len(ROWS), vocab: int = 300):
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((rows, vocab)).astype(np.float32)
    return logits, rng.random((rows, vocab)) < 0.1


def test_each_row_has_its_own_settings():
    """As alone, whatever the others are; and nothing is compiled for another setting."""
    logits, seen = table()
    keys = jax.random.split(jax.random.key(0), len(ROWS))
    run = jax.jit(sample)
    together = run(keys, logits, seen, SamplingArrays.of(ROWS))
    for n, own in enumerate(ROWS):
        same = run(keys, logits, seen, SamplingArrays.of([own] * len(ROWS)))
        assert same[n] == together[n]
        greedy = [own if n == row else ROWS[0] for row in range(len(ROWS))]
        assert run(keys, logits, seen, SamplingArrays.of(greedy))[n] == together[n]
    assert run._cache_size() == 1


def test_rows_that_do_not_run_ask_for_nothing():
    """Their settings decide nothing."""
    logits, seen = table()
    keys = jax.random.split(jax.random.key(0), len(ROWS))
    running = np.arange(len(ROWS)) < 2
    some = sample(keys, logits, seen, SamplingArrays.of(ROWS), running)
    assert some[:2].tolist() == sample(keys, logits, seen, SamplingArrays.of(ROWS))[:2].tolist()


@pytest.mark.parametrize("own", ROWS[2:])
def test_what_can_be_drawn(own):
    """Top-k and top-p by definition, in plain numpy."""
    logits, seen = table(rows=1)
    found = np.isfinite(np.asarray(process(logits, seen, SamplingArrays.of([own]))[0]))
    line = np.where(seen[0], np.where(logits[0] < 0, 1, 0), 0).astype(bool)
    scores = logits[0].astype(np.float64)
    by = own.repetition_penalty
    scores = np.where(line, scores * by, np.where(seen[0], scores / by, scores)) / own.temperature
    order = np.argsort(-scores)[: own.top_k or None]
    chances = np.exp(scores[order] - scores.max())
    chances /= chances.sum()
    before = np.cumsum(chances) - chances
    allowed = np.zeros_like(found)
    allowed[order[before < own.top_p]] = True
    np.testing.assert_array_equal(found, allowed)


def test_draws_follow_the_distribution_and_the_row_key(rng):
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    rows = 4000
    keys = jax.random.split(jax.random.key(1), rows)
    seen = np.zeros((rows, 3), bool)
    wanted = SamplingParams(temperature=1.0, top_k=0)
    sampling = SamplingArrays.of([wanted] * rows)
    drawn = np.asarray(sample(keys, np.tile(logits, (rows, 1)), seen, sampling))
    np.testing.assert_allclose(np.bincount(drawn) / rows, np.exp(logits), atol=0.03)
    alone = sample(keys[7:8], logits[None], seen[:1], SamplingArrays.of([wanted]))
    assert int(alone[0]) == drawn[7]


def test_greedy_takes_the_best_after_the_penalty():
    logits = np.array([[2.0, 1.9, -1.0]], np.float32)
    seen = np.array([[True, False, False]])
    keys = jax.random.split(jax.random.key(0), 1)
    plain, punished = (
        sample(keys, logits, seen, SamplingArrays.of([own])) for own in (ROWS[0], ROWS[1])
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

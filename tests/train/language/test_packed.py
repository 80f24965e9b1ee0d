"""Sequences and clips that share rows are heard and learnt as if each were alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa2jax import testing
from sa2jax.attention.base import Mask
from sa2jax.models.audio_encoder import ALIGN, GAP, adapter_length, encoder_length
from sa2jax.models.step_audio import step_audio2
from sa2jax.train.language.step import LanguageBatch, language_loss

CFG = testing.tiny_config()
MELS = CFG.audio_encoder.mels


SIZE = 128  # mel frames of a row


@jax.jit
def listen(mels, frames, starts=None):
    return step_audio2(CFG).bind(testing.tiny_params(CFG)).encode_audio(mels, frames, starts)


def feature_length(frames):
    return adapter_length(encoder_length(frames), CFG.adapter)


def clips(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((MELS, frames), np.float32) for frames in lengths]


def packed(mels, size=SIZE):
    """Rows of clips, starts and frames of each: as many a row as there is room for."""
    rows, starts = [[]], [[]]
    for mel in mels:
        start = 0
        if rows[-1]:
            start = -(-(starts[-1][-1] + rows[-1][-1].shape[1] + GAP) // ALIGN) * ALIGN
        if start + mel.shape[1] > size:
            rows.append([])
            starts.append([])
            start = 0
        rows[-1].append(mel)
        starts[-1].append(start)
    width = 6
    out = np.zeros((len(rows), MELS, size), np.float32)
    where, frames = np.zeros((2, len(rows), width), np.int32)
    for r, (row, begins) in enumerate(zip(rows, starts, strict=True)):
        for c, (mel, start) in enumerate(zip(row, begins, strict=True)):
            out[r, :, start : start + mel.shape[1]] = mel
            where[r, c], frames[r, c] = start, mel.shape[1]
    return out, where, frames


@pytest.mark.parametrize(
    "lengths", [(40, 33, 61), (7, 8, 9, 10, 11, 12), (100, 3), (128,), (29, 30, 31)]
)
def test_packed_clips_are_heard_as_if_alone(lengths):
    mels = clips(lengths)
    rows, starts, frames = packed(mels)
    together = listen(rows, frames, starts)
    seen = 0
    for r in range(len(rows)):
        for start, count in zip(starts[r], frames[r], strict=True):
            if not count:
                continue
            padded = np.pad(mels[seen], ((0, 0), (0, SIZE - count)))
            alone = listen(padded[None], np.array([count], np.int32))
            own = max(int(feature_length(count)), 0)
            first = start // ALIGN
            np.testing.assert_allclose(
                together[r, first : first + own], alone[0, :own], atol=2e-5, rtol=2e-5
            )
            seen += 1
    assert seen == len(lengths)


def test_packed_sequences_have_the_loss_and_gradients_of_rows_of_their_own():
    """Three sequences, two of which hear, in one row, and in a row each."""
    rng = np.random.default_rng(1)
    mels, lengths = clips((40, 57), 2), (20, 14, 25)
    model, params = step_audio2(CFG), testing.tiny_params(CFG)
    heard = [int(feature_length(mel.shape[1])) for mel in mels]
    sequences = [rng.integers(0, 256, length + 1, dtype=np.int32) for length in lengths]
    weights = [rng.uniform(0.5, 1, length).astype(np.float32) for length in lengths]
    rows, starts, frames = packed(mels)
    assert len(rows) == 1

    def batch(together):
        count, width = 3, sum(lengths) + 3  # one shape, to compile one program
        ids, targets, segments, positions = np.zeros((4, count, width), np.int32)
        slots = np.full((count, width), -1, np.int32)
        share = np.zeros((count, width), np.float32)
        at = 0
        for n, (sequence, weight) in enumerate(zip(sequences, weights, strict=True)):
            row = 0 if together else n
            at = at if together else 0
            span = slice(at, at + len(weight))
            ids[row, span], targets[row, span] = sequence[:-1], sequence[1:]
            share[row, span], segments[row, span] = weight, n + 1
            positions[row, span] = np.arange(len(weight))
            if n < len(mels):
                first = starts[0, n] // ALIGN
                slots[row, at + 2 : at + 2 + heard[n]] = first + np.arange(heard[n])
            at += len(weight)
        return LanguageBatch(
            ids=ids,
            targets=targets,
            weights=share,
            segments=segments,
            positions=positions,
            feature_index=slots,
            mels=rows,
            starts=starts,
            frames=frames,
        )

    def loss(params, batch):
        return language_loss(model, params, batch, loss_chunk=8)[0]

    find = jax.jit(jax.value_and_grad(loss))
    one, one_gradient = find(params, batch(together=True))
    many, many_gradient = find(params, batch(together=False))
    np.testing.assert_allclose(one, many, rtol=2e-6)
    for a, b in zip(*map(jax.tree.leaves, (one_gradient, many_gradient)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, float(jnp.abs(b).max())))


def test_without_segments_they_would_see_each_other():
    """The test above could fail."""
    mask = Mask(causal=True, segments=jnp.array([[1, 1, 2, 2, 0]])).dense(5)[0]
    expected = np.kron(np.diag([1, 1, 0]), np.ones((2, 2)))[:5, :5]
    expected[4, 4] = 1
    np.testing.assert_array_equal(mask, np.tril(expected).astype(bool))

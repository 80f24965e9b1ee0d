"""Right-padding of codes and source noise to the static shapes of programs."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from sa2jax.audio.rates import CODE_RATE
from sa2jax.runtime import round_up


def pad_noise(noise: Float[np.ndarray, "B N H"] | None, samples: int) -> np.ndarray | None:
    """Draws for all samples of a program; nothing if it makes its own."""
    if noise is None:
        return None
    return np.pad(noise, ((0, 0), (0, samples - noise.shape[1]), (0, 0)))


def pad_codes(
    rows: Sequence[Int[np.ndarray, "_"]], width: int | None = None
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """Rows of codes side by side, right-padded to a bucket, and their lengths."""
    lengths = np.array([len(row) for row in rows], np.int32)
    width = round_up(max(int(lengths.max()), 1), CODE_RATE) if width is None else width
    padded = np.zeros((len(rows), width), np.int32)
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = row
    return padded, lengths

"""Batches of speech: codes padded to buckets, sizes of a step's program, samples checked."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from sa2jax.audio.rates import CODE_RATE
from sa2jax.errors import VoiceError
from sa2jax.runtime import round_up

CHUNK = 25  # codes of a stream's chunk
SHORT_CHUNKS = (1, 5, 10, 15, 20)  # sizes of a step's program below a second


def pad_noise(noise: Float[np.ndarray, "B N H"] | None, samples: int) -> np.ndarray | None:
    """Pad given draws with zeros to all samples of a program; None if it makes its own."""
    if noise is None:
        return None
    return np.pad(noise, ((0, 0), (0, samples - noise.shape[1]), (0, 0)))


def chunk_bucket(codes: int) -> int:
    """The size of the step's program, in codes, that speaks this many."""
    return next((size for size in SHORT_CHUNKS if size >= codes), round_up(codes, CHUNK))


def pad_codes(
    rows: Sequence[Int[np.ndarray, "_"]], width: int | None = None
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """Rows of codes side by side, right-padded to `width` or a bucket, and their lengths."""
    lengths = np.array([len(row) for row in rows], np.int32)
    width = round_up(max(int(lengths.max()), 1), CODE_RATE) if width is None else width
    padded = np.zeros((len(rows), width), np.int32)
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = row
    return padded, lengths


def require_finite(pieces: list[np.ndarray]) -> list[np.ndarray]:
    """The samples, if they are numbers.

    Raises:
        VoiceError: if some are not.
    """
    if not all(np.isfinite(piece).all() for piece in pieces):
        raise VoiceError(
            "the detokenizer made samples that are no numbers: its weights or the voice are "
            "damaged; convert the model again, or take another voice"
        )
    return pieces

"""Resampling with torchaudio's kernel: a windowed sinc of six zero crossings.

Not soxr: the official loader uses this kernel. Its aliasing and roll-off are not those of soxr's
better filters, and parity needs the same numbers.
"""

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np
from jaxtyping import Float

from sa2jax.audio.blas import one_thread

_GROUP = 64  # outputs that share one resampling matrix


def resample_blocks(
    blocks: Iterable[Float[np.ndarray, "C T"]], from_rate: int, to_rate: int
) -> Iterator[Float[np.ndarray, "C T"]]:
    """Resample a stream of blocks of any length; only the kernel's reach is kept between blocks."""
    if from_rate == to_rate:
        yield from blocks
        return
    common = math.gcd(from_rate, to_rate)
    p, q = from_rate // common, to_rate // common  # p samples in make q samples out
    reach = math.ceil(6 * p / (min(p, q) * 0.99))
    # Several periods at once when q is small: matrices worth a BLAS call.
    repeat = math.ceil(_GROUP / q)
    step_in, step_out = repeat * p, repeat * q
    held = None  # samples from `reach` before the next period on
    total = produced = 0
    for block in blocks:
        total += block.shape[1]
        before = np.zeros((len(block), reach), np.float32) if held is None else held
        held = np.concatenate([before, block], axis=1)
        if (n := (held.shape[1] - 2 * reach) // step_in) > 0:
            yield _polyphase(held, n, p, q, repeat)
            held = held[:, n * step_in :]
            produced += n * step_out
    if held is None:
        return
    # torchaudio rounds the length in float32, which costs long recordings a sample: so do we.
    wanted = min(math.ceil(np.float32(q * total / p)), q * (total // p + 1))
    if (n := math.ceil((wanted - produced) / step_out)) > 0:
        short = n * step_in + 2 * reach - held.shape[1]
        held = np.pad(held, ((0, 0), (0, max(short, 0))))
        yield _polyphase(held, n, p, q, repeat)[:, : wanted - produced]


def _polyphase(
    held: Float[np.ndarray, "C T"], n: int, p: int, q: int, repeat: int
) -> Float[np.ndarray, "C T2"]:
    """Compute `n` steps of `repeat` periods each: one matrix product per group of output phases."""
    step_in, step_out = repeat * p, repeat * q
    out = np.empty((len(held), n, step_out), np.float32)
    for first in range(0, step_out, _GROUP):
        last = min(first + _GROUP, step_out)
        start, kernel = _kernel(p, q, first, last)
        width = len(kernel)
        reached = held[:, start : start + (n - 1) * step_in + width]
        windows = np.lib.stride_tricks.sliding_window_view(reached, width, axis=1)[:, ::step_in]
        if width > step_in:  # overlapping rows are no matrix to BLAS
            windows = np.ascontiguousarray(windows)
        with one_thread():
            np.matmul(windows, kernel, out=out[:, :, first:last])
    return out.reshape(len(held), -1)


@lru_cache(maxsize=32)
def _kernel(p: int, q: int, first: int, last: int) -> tuple[int, Float[np.ndarray, "taps phases"]]:
    """The first sample that the outputs first..last-1 of a step see, and their kernel."""
    base = min(p, q) * 0.99
    reach = math.ceil(6 * p / base)
    phase = np.arange(first, last)
    start = first * p // q
    taps = np.arange(start, (last - 1) * p // q + 2 * reach + 1) - reach
    # torchaudio divides the phase in float32, the rest in float64: 160 phases make that visible.
    offset = (-(phase % q)).astype(np.float32) / np.float32(q)
    time = (taps[:, None] - phase // q * p) / p + offset.astype(np.float64)
    time = np.clip(time * base, -6.0, 6.0)
    kernel = np.sinc(time) * np.cos(time * (math.pi / 12)) ** 2 * (base / p)
    return start, kernel.astype(np.float32)

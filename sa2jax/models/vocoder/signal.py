"""Signal processing of the vocoder, without parameters: STFT, fast sines, masks.

Rows of a batch may have different lengths; each is treated as if it were alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from sa2jax.nn import length_mask
from sa2jax.speech_config import VocoderConfig

RowMask = Bool[Array, "B T 1"]


def mask_of(lengths: Int[Array, "B"] | None, size: int) -> RowMask | None:
    """`nn.length_mask` for channels last; None for rows that are all of full length."""
    return None if lengths is None else length_mask(lengths, size)[..., None]


def apply_mask(x: Float[Array, "B T C"], mask: RowMask | None) -> Float[Array, "B T C"]:
    """Zero beyond each row's end, where a row alone would see the padding of a convolution."""
    return x if mask is None else jnp.where(mask, x, 0)


def sine_squared(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """sin²(x) to 5e-7 for |x| up to 10⁴.

    It repeats after half a turn, so a short polynomial does after a subtraction in three parts.
    The general sine is 17 times slower on a CPU and takes half of the vocoder's time there.
    """
    turns = jnp.round(x * np.float32(1 / np.pi))
    for part in _PI_PARTS:
        x = x - turns * part
    square, y = x * x, jnp.full_like(x, _SINE_SQUARE[-1])
    for coefficient in _SINE_SQUARE[-2::-1]:
        y = y * square + coefficient
    return y * square


def sine_of_phase(phase: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """Sine of an angle in 2⁻³² of a turn."""
    signed = jax.lax.bitcast_convert_type(phase, jnp.int32)
    return jnp.sin(signed.astype(jnp.float32) * np.float32(2 * np.pi * 2.0**-32))


def stft(
    x: Float[Array, "B N"], cfg: VocoderConfig, frames: Int[Array, "B"] | None = None
) -> Float[Array, "B S F"]:
    """Short-time Fourier transform, real parts then imaginary parts, hann window.

    Both ends are mirrored, each row at its own end; frames beyond it are zero. S = N/hop + 1.
    """
    edge, overlap = cfg.n_fft // 2, cfg.n_fft // cfg.hop
    x = jnp.pad(x, ((0, 0), (edge, edge)), mode="reflect")
    if frames is not None:

        def mirror(row, size):
            tail = jax.lax.dynamic_slice(row, (size - 1,), (edge,))[::-1]
            return jax.lax.dynamic_update_slice(row, tail, (size + edge,))

        x = jax.vmap(mirror)(x, frames * cfg.samples)
    x = x.reshape(x.shape[0], -1, cfg.hop)
    count = x.shape[1] - overlap + 1
    x = jnp.concatenate([x[:, i : i + count] for i in range(overlap)], axis=-1)  # [B, S, n_fft]
    y = jnp.einsum("bsn,nf->bsf", x, _dft_matrix(cfg.n_fft), precision="highest")
    if frames is None:
        return y
    return apply_mask(y, mask_of(frames * (cfg.samples // cfg.hop) + 1, count))


def istft(
    x: Float[Array, "B S F"], cfg: VocoderConfig, frames: Int[Array, "B"] | None = None
) -> Float[Array, "B N"]:
    """Inverse of `stft`: windowed frames added up, divided by the sum of squared windows."""
    count, overlap = x.shape[1], cfg.n_fft // cfg.hop
    y = jnp.einsum("bsf,fn->bsn", x, _inverse_dft_matrix(cfg.n_fft), precision="highest")
    weight = jnp.broadcast_to(_hann(cfg.n_fft) ** 2, (1, count, cfg.n_fft))
    if frames is not None:
        mask = mask_of(frames * (cfg.samples // cfg.hop) + 1, count)
        y, weight = apply_mask(y, mask), apply_mask(weight, mask)
    y, weight = (_overlap_add(a, cfg.hop, overlap) for a in (y, weight))
    cut = cfg.n_fft // 2
    y, weight = y[:, cut:-cut], weight[:, cut:-cut]
    speech = y / jnp.where(weight > 0, weight, 1)
    if frames is None:
        return speech
    return jnp.where(length_mask(frames * cfg.samples, speech.shape[1]), speech, 0)


def _overlap_add(x: Float[Array, "B S n"], hop: int, overlap: int) -> Float[Array, "B N"]:
    """Frames that start `hop` apart, added where they overlap."""
    parts = x.reshape(*x.shape[:2], overlap, hop)
    parts = [
        jnp.pad(parts[:, :, i], ((0, 0), (i, overlap - 1 - i), (0, 0))) for i in range(overlap)
    ]
    return sum(parts[1:], parts[0]).reshape(x.shape[0], -1)


def _sine_square(degree: int = 6) -> list[np.float32]:
    """Coefficients of sin²(√u)/u on [0, (π/2)²], lowest first; off by at most 2e-10."""
    end = (np.pi / 2) ** 2

    def ratio(u):
        return np.sinc(np.sqrt(u) / np.pi) ** 2

    series = np.polynomial.Chebyshev.interpolate(ratio, degree, domain=[0, end])
    return list(series.convert(kind=np.polynomial.Polynomial).coef.astype(np.float32))


_SINE_SQUARE = _sine_square()
_PI_PARTS = tuple(np.float32(p) for p in (3.140625, 9.676535e-4, np.pi - 3.140625 - 9.676535e-4))


def _hann(size: int) -> np.ndarray:
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)).astype(np.float32)


def _dft_matrix(size: int) -> np.ndarray:
    """A windowed frame to real and imaginary parts, [n_fft, n_fft + 2]."""
    angle = 2 * np.pi * np.outer(np.arange(size), np.arange(size // 2 + 1)) / size
    parts = np.concatenate([np.cos(angle), -np.sin(angle)], axis=1)
    return (_hann(size)[:, None].astype(np.float64) * parts).astype(np.float32)


def _inverse_dft_matrix(size: int) -> np.ndarray:
    """Real and imaginary parts to a windowed frame, [n_fft + 2, n_fft]."""
    angle = 2 * np.pi * np.outer(np.arange(size // 2 + 1), np.arange(size)) / size
    share = np.full((size // 2 + 1, 1), 2.0)
    share[[0, -1]] = 1  # these two stand for one component each, the others for a pair
    parts = np.concatenate([share * np.cos(angle), -share * np.sin(angle)]) / size
    return (parts * _hann(size).astype(np.float64)).astype(np.float32)

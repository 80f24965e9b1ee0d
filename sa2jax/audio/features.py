"""Audio features: the front-ends of the four networks.

| function     | network                       | input  | output            |
|--------------|-------------------------------|--------|-------------------|
| `log_mel`    | Step-Audio 2's audio encoder  | 16 kHz | [*B, M, frames]   |
| `s3_log_mel` | S3 speech tokenizer           | 16 kHz | [*B, M, frames]   |
| `mel_24k`    | flow (voice prompt)           | 24 kHz | [*B, M, frames]   |
| `fbank`      | CAM++ speaker encoder         | 16 kHz | [*B, frames, M]   |

A NumPy array is computed with NumPy on the host, a JAX array on its device under jit, compiled once
per shape. One clip is [T]. A batch is [B, T], padded on the right, with `lengths` [B] in samples:
every row then equals its own single result, and the frames beyond its end are zero.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from sa2jax.audio.blas import one_thread
from sa2jax.audio.rates import MEL_RATE, SAMPLE_RATE, SPEECH_SAMPLE_RATE
from sa2jax.errors import AudioError

HOP = SAMPLE_RATE // MEL_RATE  # samples per log-mel frame: 10 ms
CHUNK_SAMPLES = 400_000  # 25 s, the longest clip the encoder is given

_TAIL = 479  # zeros that Step-Audio 2 appends to every clip
_FFT = 400  # 25 ms at 16 kHz
_BLOCK = 128  # frames that NumPy transforms at once: they stay in the processor's cache
_EPSILON = float(np.finfo(np.float32).eps)

ArrayT = TypeVar("ArrayT", np.ndarray, jax.Array)
"""np.ndarray in, np.ndarray out; jax.Array in, jax.Array out."""
Lengths: TypeAlias = Int[jax.Array | np.ndarray, "*B"]
CountT = TypeVar("CountT", int, np.ndarray, jax.Array)


# ---- lengths -------------------------------------------------------------------------------------


def num_frames(n_samples: CountT) -> CountT:
    """Log-mel frames, 10 ms each, of `n_samples` at 16 kHz (int or array): 2502 for 25 s."""
    return (n_samples + _TAIL) // HOP


def num_tokens(frames: CountT) -> CountT:
    """`<audio_patch>` tokens of a clip of `frames` log-mel frames: 80 ms each, 313 for 25 s.

    The official `compute_token_num`: two frames off, convolution of stride 2, mean of pairs,
    adapter of stride 2. A clip of a few samples yields 0.
    """
    encoded = (frames - 1) // 2 // 2
    tokens: Any = (encoded - 1) // 2 + 1
    return tokens * (tokens > 0)


# ---- front-ends ----------------------------------------------------------------------------------


def log_mel(
    samples: Float[ArrayT, "*B T"], lengths: Lengths | None = None, *, n_mels: int = 128
) -> Float[ArrayT, "*B M frames"]:
    """Step-Audio 2's log-mel spectrogram of clips up to 25 s (official `log_mel_spectrogram`).

    479 zeros on the right, STFT 400 / 160 with a periodic Hann window, reflected at the start, last
    frame dropped; power; slaney mel bands; log10, at most 8 below the loudest band of the clip.

    Args:
        samples: in [-1, 1] at 16 kHz, [T] or right-padded [B, T]; the padding is not heard.
        lengths: samples of each row; None means all of T.
        n_mels: mel bands.

    Returns:
        float32, `num_frames(T)` frames of 10 ms; those beyond `num_frames(lengths)` are zero.

    Raises:
        AudioError: integer samples, or lengths outside 0..T.
    """
    return _run(_log_mel, samples, lengths, 0, n_mels)


def _log_mel(xp: Any, x: Any, n: Any, n_mels: int) -> Any:
    if n is not None:
        x = xp.where(xp.arange(x.shape[-1]) < n[..., None], x, np.float32(0))
    frames = num_frames(x.shape[-1])
    # The 479 zeros are longer than half a window: the reflection on the right is silence, so a
    # padded row needs no reflection at its own end.
    head = x[..., 1 : _FFT // 2 + 1]
    head = _pad(xp, head, 0, _FFT // 2 - head.shape[-1])
    x = xp.concatenate([head[..., ::-1], x], axis=-1)
    mel = _mel(xp, _frame(xp, x, frames, _FFT, HOP), hann(_FFT), slaney(SAMPLE_RATE, _FFT, n_mels))
    return _whisper_log(xp, mel, frames, None if n is None else num_frames(n))


def s3_log_mel(
    samples: Float[ArrayT, "*B T"], lengths: Lengths | None = None, *, n_mels: int = 128
) -> Float[ArrayT, "*B M frames"]:
    """Log-mel spectrogram for the S3 tokenizer (official `s3tokenizer.log_mel_spectrogram`).

    As `log_mel`, but without the zeros: the clip is reflected at both ends.

    Args:
        samples: in [-1, 1] at 16 kHz, [T] or right-padded [B, T], more than 200 samples each.
        lengths: samples of each row; None means all of T.
        n_mels: mel bands.

    Returns:
        float32, T // 160 frames of 10 ms; those beyond `lengths // 160` are zero.

    Raises:
        AudioError: integer samples, too short a clip, or lengths beyond T.
    """
    return _run(_s3_log_mel, samples, lengths, _FFT // 2 + 1, n_mels)


def _s3_log_mel(xp: Any, x: Any, n: Any, n_mels: int) -> Any:
    frames = x.shape[-1] // HOP
    x = _frame(xp, _reflect(xp, x, n, _FFT // 2), frames, _FFT, HOP)
    mel = _mel(xp, x, hann(_FFT), slaney(SAMPLE_RATE, _FFT, n_mels))
    return _whisper_log(xp, mel, frames, None if n is None else n // HOP)


def mel_24k(
    samples: Float[ArrayT, "*B T"], lengths: Lengths | None = None
) -> Float[ArrayT, "*B M frames"]:
    """Mel spectrogram of a voice prompt for the flow (official `flashcosyvoice` one).

    80 slaney bands up to 8 kHz, window 1920, hop 480, natural log of the magnitude, floor 1e-5.

    Args:
        samples: in [-1, 1] at 24 kHz, [T] or right-padded [B, T], more than 720 samples each.
        lengths: samples of each row; None means all of T.

    Returns:
        float32, T // 480 frames of 20 ms; those beyond `lengths // 480` are zero.

    Raises:
        AudioError: integer samples, too short a clip, or lengths beyond T.
    """
    return _run(_mel_24k, samples, lengths, 721)


def _mel_24k(xp: Any, x: Any, n: Any) -> Any:
    size, hop = 1920, 480
    margin, frames = (size - hop) // 2, x.shape[-1] // hop
    x = _frame(xp, _reflect(xp, x, n, margin), frames, size, hop)
    mel = _mel(xp, x, hann(size), slaney(SPEECH_SAMPLE_RATE, size, 80, 8000.0), magnitude=True)
    mel = xp.log(xp.maximum(mel, 1e-5)).swapaxes(-1, -2)  # [*B, M, frames]
    return _mask(xp, mel, None if n is None else n // hop, -1)


def fbank(
    samples: Float[ArrayT, "*B T"],
    lengths: Lengths | None = None,
    *,
    n_mels: int = 80,
    subtract_mean: bool = False,
) -> Float[ArrayT, "*B frames M"]:
    """Kaldi's log filterbank energies (official `torchaudio.compliance.kaldi.fbank`, dither 0).

    25 ms windows every 10 ms that lie wholly inside the clip; mean removed, pre-emphasis 0.97,
    Povey window, FFT of 512, HTK mel bands from 20 Hz to 8 kHz.

    Args:
        samples: in [-1, 1] (not scaled to int16) at 16 kHz, [T] or right-padded [B, T], at least
            400 each.
        lengths: samples of each row; None means all of T.
        n_mels: mel bands.
        subtract_mean: subtract each band's mean over the clip, as CAM++ wants it.

    Returns:
        float32, 1 + (T - 400) // 160 frames of 10 ms; those beyond a row's own number are zero.

    Raises:
        AudioError: integer samples, too short a clip, or lengths beyond T.
    """
    return _run(_fbank, samples, lengths, _FFT, n_mels, subtract_mean)


def _fbank(xp: Any, x: Any, n: Any, n_mels: int, subtract_mean: bool) -> Any:
    frames = 1 + (x.shape[-1] - _FFT) // HOP
    num_frames = None if n is None else 1 + (n - _FFT) // HOP
    x = _frame(xp, x, frames, _FFT, HOP)
    x = x - x.mean(-1, keepdims=True)
    x = x - 0.97 * xp.concatenate([x[..., :1], x[..., :-1]], axis=-1)
    energy = xp.log(
        xp.maximum(_mel(xp, x, _povey(_FFT), _kaldi(SAMPLE_RATE, 512, n_mels)), _EPSILON)
    )
    energy = _mask(xp, energy, num_frames, -2)  # [*B, frames, M]
    if subtract_mean:
        count = frames if num_frames is None else num_frames[..., None, None]
        energy = _mask(xp, energy - energy.sum(-2, keepdims=True) / count, num_frames, -2)
    return energy


def pad_mels(
    mels: Sequence[Float[np.ndarray, "M _"]], frames: int | None = None
) -> tuple[Float[np.ndarray, "B M frames"], Int[np.ndarray, " B"]]:
    """Stack clips of different lengths on the host, zeros on the right (official `padding_mels`).

    Args:
        mels: one [M, frames] array per clip.
        frames: pad to this many frames (a bucket); None pads to the longest clip.

    Returns:
        float32 mels [B, M, frames] and the frames of each clip, int32 [B]. (The official function
        returns those minus 2.)

    Raises:
        AudioError: no clips, or a clip longer than `frames`.
    """
    counts = np.array([mel.shape[-1] for mel in mels], np.int32)
    most = counts.max(initial=0) if frames is None else frames
    if not counts.size or counts.max() > most:
        raise AudioError(
            f"expected one or more clips of at most {most} frames, got {counts.tolist()}"
        )
    out = np.zeros((len(mels), mels[0].shape[0], most), np.float32)
    for row, mel in zip(out, mels, strict=True):
        row[:, : mel.shape[-1]] = mel
    return out, counts


# ---- shared steps (xp is numpy or jax.numpy) -----------------------------------------------------


def _run(body: Callable[..., Any], samples: Any, lengths: Any, least: int, *options: Any) -> Any:
    """Check the arguments, then compute in numpy or jnp as the samples are."""
    xp, x, n = _prepare(samples, lengths, least)
    if xp is np:
        return body(np, x, n, *options)
    return _run_on_device(body, x, n, options)


@partial(jax.jit, static_argnums=(0, 3))
def _run_on_device(body: Callable[..., Any], x: Any, n: Any, options: tuple[Any, ...]) -> Any:
    return body(jnp, x, n, *options)


def _prepare(samples: Any, lengths: Any, least: int) -> tuple[Any, Any, Any]:
    """Check a call, choose the array module, and cast to float32 samples and integer lengths."""
    on_device = isinstance(samples, jax.Array) or isinstance(lengths, jax.Array)
    xp: Any = jnp if on_device else np
    x = xp.asarray(samples)
    if x.ndim < 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise AudioError(
            f"expected float samples [*B, T] in [-1, 1], got {x.dtype} {x.shape}; "
            "divide int16 samples by 32768"
        )
    if x.shape[-1] < least:
        raise AudioError(f"expected {least} samples or more, got {x.shape[-1]}; use a longer clip")
    if lengths is None:
        return xp, x.astype(xp.float32), None
    if not isinstance(lengths, jax.Array):  # values on a device are not worth a transfer
        lengths = np.asarray(lengths)
        if ((lengths < least) | (lengths > x.shape[-1])).any():
            raise AudioError(f"expected lengths of {least}..{x.shape[-1]}, got {lengths.tolist()}")
    n = xp.asarray(lengths)
    if n.shape != x.shape[:-1]:
        raise AudioError(f"expected lengths of shape {x.shape[:-1]}, got {n.shape}; one per row")
    return xp, x.astype(xp.float32), n


def _pad(xp: Any, x: Any, left: int, right: int, mode: str = "constant") -> Any:
    return xp.pad(x, [(0, 0)] * (x.ndim - 1) + [(left, right)], mode=mode)


def _reflect(xp: Any, x: Any, n: Any, margin: int) -> Any:
    """Mirror `margin` samples around both ends of each row, at the row's own end."""
    if n is None:
        return _pad(xp, x, margin, margin, "reflect")
    at = abs(xp.arange(-margin, x.shape[-1] + margin))
    n = n[..., None]
    at = xp.where(at < n, at, 2 * (n - 1) - at)
    return xp.take_along_axis(x, xp.maximum(at, 0), axis=-1)  # what is farther out is masked later


def _frame(xp: Any, x: Any, frames: int, size: int, hop: int) -> Any:
    """Cut [*B, T] into overlapping windows [*B, frames, size]: hops side by side, no gather."""
    if xp is np:
        x = _pad(np, x, 0, max(0, (frames - 1) * hop + size - x.shape[-1]))
        return np.lib.stride_tricks.sliding_window_view(x, size, -1)[..., ::hop, :][..., :frames, :]
    per = -(-size // hop)  # hops a window touches
    need = (frames + per - 1) * hop
    x = _pad(xp, x, 0, max(0, need - x.shape[-1]))[..., :need]
    hops = x.reshape(*x.shape[:-1], frames + per - 1, hop)
    return xp.concatenate([hops[..., i : i + frames, :] for i in range(per)], -1)[..., :size]


def _mel(xp: Any, x: Any, window: Any, bank: Any, magnitude: bool = False) -> Any:
    """Power (or magnitude) of windowed frames [*B, frames, size] in mel bands [*B, frames, M]."""
    fft, bins = 2 * (bank.shape[1] - 1), bank.shape[1]
    if xp is np:
        power = np.empty((*x.shape[:-1], bins), np.float32)
        for i in range(0, x.shape[-2], _BLOCK):
            power[..., i : i + _BLOCK, :] = _rfft_power(np, x[..., i : i + _BLOCK, :], window, fft)
        power = np.sqrt(power + np.float32(1e-9)) if magnitude else power
        with one_thread():
            return power @ bank.T
    # Measured on 25 s: a CPU takes 3 ms for rfft, 9 ms for a product. TPU v5e's compiler estimates
    # the product 1.3 (n 400) to 3.9 (n 512) times faster than its FFT; and it is surely float32.
    used = int(np.flatnonzero(bank.any(0))[-1]) + 1  # nothing above fmax
    power = jax.lax.platform_dependent(
        x,
        tpu=lambda y: _pad(jnp, _dft_power(y, window, fft, used), 0, bins - used),
        default=lambda y: _rfft_power(jnp, y, window, fft),
    )
    power = jnp.sqrt(power + 1e-9) if magnitude else power
    return jnp.matmul(power, bank.T, precision=jax.lax.Precision.HIGHEST)


def _rfft_power(xp: Any, x: Any, window: Any, fft: int) -> Any:
    spectrum = xp.fft.rfft(x * window, fft)
    return spectrum.real**2 + spectrum.imag**2


def _dft_power(x: Any, window: Any, fft: int, bins: int) -> Any:
    """The first `bins` of the power spectrum as one product with cosines and sines."""
    both = jnp.matmul(x, _dft(len(window), fft, bins) * window[:, None], precision="highest")
    return both[..., :bins] ** 2 + both[..., bins:] ** 2


def _whisper_log(xp: Any, mel: Any, frames: int, num_frames: Any) -> Any:
    """Whisper's scaling: log10, at most 8 below the clip's maximum, (x + 4) / 4, bands first."""
    log = xp.log(xp.maximum(mel, 1e-10)).swapaxes(-1, -2) * np.float32(1 / np.log(10))
    valid = log
    if num_frames is not None:
        valid = xp.where((xp.arange(frames) < num_frames[..., None])[..., None, :], log, -xp.inf)
    log = xp.maximum(log, valid.max((-2, -1), keepdims=True) - 8.0)
    return _mask(xp, (log + 4.0) / 4.0, num_frames, -1)


def _mask(xp: Any, x: Any, num_frames: Any, axis: int) -> Any:
    """Zero the frames (along `axis`, -1 or -2) from each row's `num_frames` on."""
    if num_frames is None:
        return x
    keep = xp.arange(x.shape[axis]) < num_frames[..., None]  # [*B, frames]
    return xp.where(keep[..., None, :] if axis == -1 else keep[..., None], x, np.float32(0))


# ---- tables --------------------------------------------------------------------------------------


@cache
def hann(size: int) -> Float[np.ndarray, " size"]:
    """Periodic Hann window."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)).astype(np.float32)


@cache
def _povey(size: int) -> Float[np.ndarray, " size"]:
    """Kaldi's window: a symmetric Hann to the power 0.85."""
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / (size - 1))
    return (np.maximum(hann, 0) ** 0.85).astype(np.float32)


@cache
def _dft(size: int, fft: int, bins: int) -> Float[np.ndarray, "size twice_bins"]:
    """Cosines, then sines, of the first `bins` frequencies."""
    angle = 2 * np.pi / fft * (np.arange(size)[:, None] * np.arange(bins) % fft)
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


@cache
def slaney(
    rate: int, fft: int, n_mels: int, fmax: float | None = None
) -> Float[np.ndarray, "M bins"]:
    """Triangles of equal area, linear to 1 kHz, then logarithmic (`librosa.filters.mel`)."""
    hz = slaney_edges(fmax or rate / 2, n_mels)
    bank = _triangles(hz, np.fft.rfftfreq(fft, 1 / rate))
    return (bank * (2 / (hz[2:] - hz[:-2]))[:, None]).astype(np.float32)


def slaney_edges(top: float, n_mels: int) -> Float[np.ndarray, "M_2"]:
    """Where bands of `slaney` begin, peak and end, Hz: band m at m, m + 1 and m + 2."""
    per_mel, knee, log_step = 200 / 3, 1000.0, np.log(6.4) / 27
    top_mel = top / per_mel if top < knee else knee / per_mel + np.log(top / knee) / log_step
    mels = np.linspace(0, top_mel, n_mels + 2)
    log_hz = knee * np.exp(log_step * (mels - knee / per_mel))
    return np.where(mels < knee / per_mel, mels * per_mel, log_hz)


@cache
def _kaldi(rate: int, fft: int, n_mels: int) -> Float[np.ndarray, "M bins"]:
    """Triangles of height one on the HTK scale from 20 Hz to Nyquist, straight in mels, not in Hz.

    In float32 step by step, as the official code: exact bands would differ from it by up to 2e-4.
    """
    low, high = (1127 * math.log(1 + hz / 700) for hz in (20, rate / 2))
    step = (high - low) / (n_mels + 1)
    edges = np.float32(low) + np.arange(n_mels + 2, dtype=np.float32) * np.float32(step)
    hz = np.arange(fft // 2 + 1, dtype=np.float32) * np.float32(rate / fft)
    bank = _triangles(edges, np.float32(1127) * np.log(1 + hz / np.float32(700)))
    bank[:, -1] = 0  # Kaldi leaves the Nyquist bin out
    return bank


def _triangles(edges: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Rows of triangles that rise from edge i to i + 1 and fall to i + 2, sampled at `at`."""
    left, centre, right = (edges[i : len(edges) - 2 + i, None] for i in range(3))
    return np.maximum(0, np.minimum((at - left) / (centre - left), (right - at) / (right - centre)))

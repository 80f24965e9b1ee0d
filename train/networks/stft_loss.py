"""Multi-resolution STFT loss: how far two waveforms' spectra are apart, by several windows.

Source: the multi-resolution STFT loss of Parallel WaveGAN (arXiv 1910.11480), spectral convergence
and log magnitude. Phases are not compared: a sound and the same one with other phases are equally
good, which is what lets a vocoder without a discriminator learn. Only windows that lie wholly
inside a row are looked at, so a padded row counts as it would alone.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# −80 dB of full scale, for every window: below the noise of 16 bits nothing is told apart.
FLOOR = 1e-4


def power_spectrum(x: Float[Array, "B N"], size: int, hop: int) -> Float[Array, "B S F"]:
    """The power of windows that lie inside a sound, S = N // hop − size // hop + 1.

    The periodic Hann window is scaled so that white noise of variance 1 has power 1 in every bin
    of every window, whatever its size.

    Args:
        x: samples.
        size: of a window, a multiple of `hop`.
        hop: samples from one window to the next.
    """
    per, count = size // hop, x.shape[1] // hop
    hops = x[:, : count * hop].reshape(x.shape[0], count, hop)
    # Hops side by side instead of a gather, whose gradient would be a slow scatter.
    windows = [hops[:, i : i + count - per + 1] for i in range(per)]
    spectrum = jnp.fft.rfft(jnp.concatenate(windows, axis=-1) * _window(size))
    return jnp.square(spectrum.real) + jnp.square(spectrum.imag)


def windows_inside(
    first: Int[Array, "B"], last: Int[Array, "B"], samples: int, size: int, hop: int
) -> Bool[Array, "B S 1"]:
    """Which windows of `power_spectrum` see nothing before sample `first` or from `last` on."""
    start = jnp.arange(samples // hop - size // hop + 1) * hop
    found = (start >= first[:, None]) & (start + size <= last[:, None])
    return found[..., None]


def multi_resolution_stft_loss(
    made: Float[Array, "B N"],
    true: Float[Array, "B N"],
    first: Int[Array, "B"],
    last: Int[Array, "B"],
    resolutions: Sequence[tuple[int, int]],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Spectral convergence and log-magnitude distance, each a mean over resolutions.

    Args:
        made: samples that are judged.
        true: what they should sound like.
        first: sample of each row from which on windows count.
        last: sample of each row at which they end.
        resolutions: size and hop of each kind of window; those longer than a row see nothing of it.

    Returns:
        The norm of the difference of magnitudes over that of the true ones, of all rows together;
        and the mean distance of the logarithms (natural, of magnitudes). Both are 0 where no window
        fits.
    """
    convergence, distance = [], []
    for size, hop in resolutions:
        if made.shape[1] < size:
            continue
        keep = windows_inside(first, last, made.shape[1], size, hop)
        ours, theirs = (
            jnp.where(keep, power_spectrum(x, size, hop), 0) + FLOOR**2 for x in (made, true)
        )
        error = jnp.sum(jnp.square(jnp.sqrt(ours) - jnp.sqrt(theirs)))
        # The root's slope is infinite at 0, where a sound equals the other.
        convergence.append(jnp.sqrt(error / jnp.sum(theirs) + 1e-10))
        apart = jnp.abs(jnp.log(ours) - jnp.log(theirs)) / 2  # outside `keep` both are the floor
        count = jnp.sum(keep, dtype=jnp.float32) * ours.shape[-1]
        distance.append(jnp.sum(apart) / jnp.maximum(count, 1))
    if not distance:
        return jnp.zeros(()), jnp.zeros(())
    return jnp.mean(jnp.stack(convergence)), jnp.mean(jnp.stack(distance))


def masked_mean(x: Float[Array, "B T"], weight: Float[Array, "B T"]) -> Float[Array, ""]:
    """The weighted mean, 0 where nothing has weight."""
    return jnp.sum(x * weight) / jnp.maximum(jnp.sum(weight), 1)


def _window(size: int) -> np.ndarray:
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    return (hann / np.sqrt(np.sum(hann**2))).astype(np.float32)

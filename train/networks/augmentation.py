"""Augmentation of training clips: loudness, noise, and SpecAugment (arXiv 1904.08779)."""

from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sa2jax.errors import TrainError
from sa2jax.train.networks.batches import SoundBatch

NOISE_TAPS = 8  # of the filter that colours noise


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How clips are changed before they are heard; all zero, or None in its place, is not at all.

    Attributes:
        gain_db: largest change of loudness, up or down, in dB.
        noise_prob: share of clips with noise, of any colour between white and brown.
        snr_db: its distance from the clip's mean power, from the loudest to the softest, in dB.
        time_masks: moments that are hidden in each clip.
        time_mask_width: longest of them, in frames of 10 ms.
        time_mask_fraction: longest of them, as a share of the clip.
        freq_masks: ranges of bands that are hidden.
        freq_mask_width: widest of them, in bands.
    """

    gain_db: float = 6.0
    noise_prob: float = 0.5
    snr_db: tuple[float, float] = (10.0, 40.0)
    time_masks: int = 2
    time_mask_width: int = 12
    time_mask_fraction: float = 0.1
    freq_masks: int = 2
    freq_mask_width: int = 10

    def __post_init__(self):
        object.__setattr__(self, "snr_db", tuple(self.snr_db))  # a list when read from YAML
        for name in ("noise_prob", "time_mask_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainError(f"{name}={getattr(self, name)}: expected a number from 0 to 1")
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "snr_db" and not value >= 0:
                raise TrainError(f"{f.name}={value}: expected a number of 0 or more")
        if not (len(self.snr_db) == 2 and self.snr_db[0] <= self.snr_db[1]):
            raise TrainError(f"snr_db={self.snr_db}: expected the smallest and the largest in dB")


def augment_waveform(
    batch: SoundBatch[Array], key: Array | None, config: Augmentation | None
) -> Float[Array, "B N"]:
    """Sound of another loudness and with noise; without a key or a config as it is.

    What is drawn for a clip depends on the key and its row only, not on the padding of the batch.
    """
    if key is None or config is None or not (config.gain_db or config.noise_prob):
        return batch.sound
    total = batch.sound.shape[1]

    def row(number, x, length):
        level, white, far = jax.random.split(jax.random.fold_in(key, number), 3)
        gain, chance, colour = jax.random.uniform(level, (3,))
        gain = 10 ** (config.gain_db * (2 * gain - 1) / 20)
        pole = 0.95 * colour  # from white to brown
        low, high = config.snr_db
        snr = 10 ** (jax.random.uniform(far, minval=low, maxval=high) / 10)
        power = jnp.sum(jnp.square(x)) / jnp.maximum(length, 1)
        scale = jnp.sqrt(power / snr / jnp.sum(pole ** (2 * jnp.arange(NOISE_TAPS))))
        scale = gain * jnp.where(chance < config.noise_prob, scale, 0)
        noise = scale * jax.random.normal(white, (total + NOISE_TAPS - 1,))

        # Tap by tap, in a loop, and the clip with the last: fused into what reads the result, a CPU
        # would draw the noise again for each window that a sample is in (4 times slower).
        def tap(y, i):
            y = jax.lax.dynamic_slice(noise, (i,), (total,)) + pole * y
            return y + jnp.where(i == NOISE_TAPS - 1, gain, 0) * x, None

        y, _ = jax.lax.scan(tap, jnp.zeros_like(x), jnp.arange(NOISE_TAPS))
        return jnp.where(jnp.arange(total) < length, y, 0)

    return jax.vmap(row)(jnp.arange(len(batch.sound)), batch.sound, batch.lengths)


def spec_augment(
    mels: Float[Array, "B M T"],
    frames: Int[Array, "B"],
    key: Array | None,
    config: Augmentation | None,
) -> Float[Array, "B M T"]:
    """Mel frames with moments and bands replaced by the clip's mean; see `augment_waveform`."""
    if key is None or config is None or not (config.time_masks or config.freq_masks):
        return mels
    bands, total = mels.shape[1:]

    def ranges(key, count, widest, size):
        width, start = jax.random.uniform(key, (2, count))
        width = width * (widest + 1)
        start = jnp.floor(start * jnp.maximum(size - jnp.floor(width) + 1, 1))
        return start, start + jnp.floor(width)

    def hit(place, edges):
        start, end = edges
        return ((place[:, None] >= start) & (place[:, None] < end)).any(1)

    def row(number, x, count):
        # The first key of a row is that of its sound.
        moments, parts = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 1), number))
        longest = jnp.minimum(config.time_mask_width, config.time_mask_fraction * count)
        hidden = hit(jnp.arange(total), ranges(moments, config.time_masks, longest, count))
        quiet = hit(
            jnp.arange(bands), ranges(parts, config.freq_masks, config.freq_mask_width, bands)
        )
        own = jnp.arange(total) < count
        mean = jnp.sum(jnp.where(own, x, 0)) / jnp.maximum(count * bands, 1)
        return jnp.where((hidden | quiet[:, None]) & own, mean, x)

    return jax.vmap(row)(jnp.arange(len(mels)), mels, frames)

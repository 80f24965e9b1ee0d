"""What all networks that hear are taught from: speech, its letters, and whose voice it is.

Batches hold sound. Each step disturbs it anew, computes the network's own front-end on the device,
hides bands and moments (SpecAugment, arXiv 1904.08779), and compares letters by CTC (Graves et al.,
ICML 2006). `speech_tokenizer`, `audio_encoder` and `speaker_encoder` say what is learnt;
parameters are those of a network and of heads that only teach it:

    params = {"model": ..., "heads": ...}     # `network_params(params)` is what a user gets
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from sa2jax.errors import TrainError
from sa2jax.nn import Functional, Linear, Params, Policy, length_mask
from sa2jax.train.networks.batches import SoundBatch
from sa2jax.train.networks.step import LossFunction
from sa2jax.train.state import Report

LETTERS = " abcdefghijklmnopqrstuvwxyz'"  # ids from 1 on; 0 is CTC's blank
SYMBOLS = len(LETTERS) + 1
SYMBOLS_PER_FRAME = (
    2  # symbols of a frame (25 Hz): fast speech has 20 letters a second, and blanks between
)
CONV_GAIN = 3.0  # measured on speech: deviations of 1.0 and 1.9 behind the convolutions
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


def network_params(params: Params) -> Params:
    """The parameters of the network alone, without the heads that taught it."""
    return params["model"]


def scale_conv_init(network: Params) -> Params:
    """A new network whose two convolutions make numbers around 1 of log-mel frames.

    As drawn they make a tenth of that, and what layers and positions add would drown it.
    """

    def louder(conv):
        return conv | {"kernel": CONV_GAIN * conv["kernel"]}

    return network | {name: louder(network[name]) for name in ("conv1", "conv2")}


# --- letters ----------------------------------------------------------------------------------


def letter_ids(text: str) -> list[int]:
    """Ids of a text's letters: spaces, a to z and apostrophes; other characters part words.

    >>> letter_ids("It's on!")
    [10, 21, 28, 20, 1, 16, 15]
    """
    text = text.lower().replace("’", "'")
    clean = "".join(c if c in LETTERS else " " for c in text)
    return [LETTERS.index(c) + 1 for c in " ".join(clean.split())]


def letters_to_text(letters: Sequence[int] | Int[np.ndarray, "U"]) -> str:
    """The text of letters; zeros are left out."""
    return "".join(LETTERS[int(n) - 1] for n in letters if n > 0)


def ctc_loss(
    logits: Float[Array, "B S V"],
    frames: Int[Array, "B"],
    letters: Int[Array, "B U"],
    counts: Int[Array, "B"],
) -> tuple[Float[Array, ""], Report]:
    """How unlikely the letters are under all their alignments to frames, in nats per letter.

    Clips with fewer frames than their letters need (one each, and one between two that are equal)
    are left out.

    Args:
        logits: of `SYMBOLS`, the blank first.
        frames: of each clip.
        letters: right-padded.
        counts: letters of each clip.

    Returns:
        The mean over all letters, and float32 scalars to report: of how many `letters`, and how
        many clips were `skipped`.
    """
    own = length_mask(counts, letters.shape[1])
    doubled = (letters[:, 1:] == letters[:, :-1]) & own[:, 1:]
    fits = (frames >= counts + doubled.sum(1)) & (counts > 0)
    cost = optax.ctc_loss(
        logits.astype(jnp.float32), 1.0 - length_mask(frames, logits.shape[1]), letters, 1.0 - own
    )
    weight = jnp.sum(jnp.where(fits, counts, 0)).astype(jnp.float32)
    loss = jnp.sum(jnp.where(fits, cost, 0)) / jnp.maximum(weight, 1)
    return loss, {"letters": weight, "skipped": jnp.sum((counts > 0) & ~fits).astype(jnp.float32)}


def ctc_greedy_decode(logits: Float[Array, "B S V"], frames: Int[Array, "B"]) -> Int[Array, "B S"]:
    """The likeliest symbol of each frame; repetitions and blanks are 0, see `letters_to_text`."""
    best = jnp.argmax(logits, axis=-1)
    again = jnp.pad(best[:, 1:] == best[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(length_mask(frames, best.shape[1]) & ~again, best, 0)


CTCLogits = tuple[Float[Array, "B T V"], Int[Array, "B"]]  # logits, and how many each clip has


class CTCHead(nnx.Module):
    """Reads letters from features, `SYMBOLS_PER_FRAME` symbols from each frame."""

    def __init__(self, embed: int, *, policy: Policy, rngs: nnx.Rngs):
        outputs = {"parts": SYMBOLS_PER_FRAME, "letters": SYMBOLS}
        self.letters = Linear({"embed": embed}, outputs, policy=policy, rngs=rngs)

    def __call__(self, x: Float[Array, "B S D"], lengths: Int[Array, "B"]) -> CTCLogits:
        """Logits, `SYMBOLS_PER_FRAME` for each frame, and how many each clip has."""
        y = self.letters(x)  # [B, S, P, V]
        return y.reshape(y.shape[0], -1, y.shape[-1]), SYMBOLS_PER_FRAME * lengths


# --- disturbances -----------------------------------------------------------------------------


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


# --- what was heard ---------------------------------------------------------------------------


class RecognitionOutput(NamedTuple):
    """What a network makes of a batch.

    Attributes:
        loss: what is made small.
        report: float32 scalars to report.
        letters: the likeliest symbols (50 Hz), see `ctc_greedy_decode` and `letters_to_text`; or
            None.
        codes: speech codes (25 Hz), or None.
        vectors: one for each clip, or None.
    """

    loss: Float[Array, ""]
    report: Report
    letters: Int[Array, "B T"] | None = None
    codes: Int[Array, "B S"] | None = None
    vectors: Float[Array, "B D"] | None = None


def loss_from_forward(hear: Callable[..., RecognitionOutput]) -> LossFunction[Any]:
    """The loss, and what it reports, of a function that hears a batch: what a step makes small."""

    def loss(
        model: Functional[Any],
        params: Params,
        batch: SoundBatch[Array],
        key: Array | None,
        config: Any,
    ) -> tuple[Float[Array, ""], Report]:
        found = hear(model, params, batch, key, config)
        return found.loss, found.report

    return loss

"""Shared by the recognition losses: transcripts, CTC, speakers.

Batches hold sound. Each step disturbs it anew (`augmentation`), computes the network's own
front-end on the device, and compares letters by CTC (Graves et al., ICML 2006).
`speech_tokenizer`, `audio_encoder` and `speaker_encoder` say what is learnt;
parameters are those of a network and of heads that only teach it:

    params = {"model": ..., "heads": ...}     # `network_params(params)` is what a user gets
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from sa2jax.nn import Functional, Linear, Params, Policy, length_mask
from sa2jax.train.networks.batches import SoundBatch
from sa2jax.train.networks.step import LossFunction
from sa2jax.train.state import Report

LETTERS = " abcdefghijklmnopqrstuvwxyz'"  # ids from 1 on; 0 is CTC's blank
SYMBOLS = len(LETTERS) + 1
# Symbols of a frame (25 Hz): fast speech has 20 letters a second, and blanks between.
SYMBOLS_PER_FRAME = 2
CONV_GAIN = 3.0  # measured on speech: deviations of 1.0 and 1.9 behind the convolutions


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

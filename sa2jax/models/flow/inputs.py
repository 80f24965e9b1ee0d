"""Inputs of the flow: the voice prompt, and the options of one call."""

from dataclasses import dataclass, field
from typing import Generic

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from sa2jax.nn import ArrayT

STEPS = 10
KEEP_FRAMES = 100  # mel frames of a reply that stay in the estimator's caches


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VoicePrompt(Generic[ArrayT]):
    """What the flow needs of the speaker of each row, a pytree.

    Attributes:
        codes: codes (25 Hz) of each row's voice recording, right-padded.
        mel: log-mel frames (50 Hz) of that recording, `Q = upsample · P`.
        speaker: speaker vectors, of any length.
        lengths: valid codes of each row, by default all.
    """

    codes: Int[ArrayT, "B P"]
    mel: Float[ArrayT, "B Q M"]
    speaker: Float[ArrayT, "B C"]
    lengths: Int[ArrayT, "B"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class FlowOptions:
    """Options of the flow, a pytree; the last four are static.

    Attributes:
        guidance: weight of classifier-free guidance, by default the config's.
        noise: start noise of each frame from the prompt's first on, by default seeded.
        seed: of the default noise, for all rows or for each.
        steps: Euler steps.
        keep_frames: frames of a stream's reply that stay in the estimator's caches.
        capacity: codes that a stream's conformer caches shall hold, by default the prompt and some.
        parity: stream as the official code does, see `flow_matching`.
    """

    guidance: float | Float[Array, ""] | None = field(default=None, metadata={"batch_axis": -1})
    noise: Float[Array, "S M"] | Float[np.ndarray, "S M"] | None = field(
        default=None, metadata={"batch_axis": -1}
    )
    seed: int | Int[Array, "*B"] | Int[np.ndarray, "*B"] = 0
    steps: int = field(default=STEPS, metadata={"static": True})
    keep_frames: int = field(default=KEEP_FRAMES, metadata={"static": True})
    capacity: int = field(default=0, metadata={"static": True})
    parity: bool = field(default=False, metadata={"static": True})

"""State of the flow's streams: its caches, growing them, batches of streams."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sa2jax.models.flow.dit import EstimatorState
from sa2jax.models.flow.upsample_conformer import ConformerState

MIN_CAPACITY = 256  # codes that fit a fresh conformer cache: ten seconds


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlowState:
    """Caches and constants of B streams, a pytree.

    Attributes:
        speaker: each row's voice, as the estimator takes it.
        prompt: mel frames of each row's prompt.
        modulation: `DiT.timestep_modulation` of all Euler steps, the same for all rows; `()` where
            streams that share it are passed on without.
        encoder: codes seen and the conformer's caches.
        estimator: the caches of all Euler steps.
        keep_frames: frames of the reply that stay in the estimator's caches.
        parity: whether this is the official streaming.
    """

    speaker: Float[Array, "B M"]
    prompt: Int[Array, "B"]
    modulation: tuple[Float[Array, "E L 9 D"], Float[Array, "E 2 D"]] | tuple[()] = field(
        metadata={"batch_axis": -1}
    )
    encoder: ConformerState
    estimator: EstimatorState
    keep_frames: int = field(metadata={"static": True})
    parity: bool = field(metadata={"static": True})


def capacity_for(codes: int) -> int:
    """The smallest capacity of a conformer cache that holds this many codes."""
    return max(MIN_CAPACITY, 1 << (codes - 1).bit_length())


def grow_streams(state: FlowState, codes: int) -> FlowState:
    """Make room for this many codes of a stream, its prompt included; nothing if there is."""
    return replace(state, encoder=state.encoder.grow(capacity_for(codes)))


def batch_axes(tree: Any) -> Any:
    """The axis of the rows in each array of a dataclass pytree, in the same tree; −1 for none.

    It is 0, or what a field says as its metadata's `batch_axis`; an array without that axis is
    shared by all rows.

    Args:
        tree: a `FlowState` or `FlowOptions`, of arrays or of their shapes.
    """
    found = {}
    for part in fields(tree):
        if not part.metadata.get("static"):
            value, axis = getattr(tree, part.name), part.metadata.get("batch_axis", 0)

            def axis_of(x, axis=axis):
                return axis if np.ndim(x) > axis else -1

            found[part.name] = (
                batch_axes(value) if is_dataclass(value) else jax.tree.map(axis_of, value)
            )
    return replace(tree, **found)


def concat_streams(states: Sequence[FlowState]) -> FlowState:
    """Concatenate streams into one batch, in this order; caches are padded to the longest."""
    capacity = max(state.encoder.capacity for state in states)
    slots = max(state.estimator.slots for state in states)
    padded = [
        replace(s, encoder=s.encoder.grow(capacity), estimator=s.estimator.grow(slots))
        for s in states
    ]
    axes = batch_axes(states[0])

    def line_up(axis, *parts):  # copies, so that a donated batch takes nothing from the parts
        alone = axis < 0 or len(parts) == 1
        return jnp.copy(parts[0]) if alone else jnp.concatenate(parts, axis)

    return jax.tree.map(line_up, axes, *padded)


def select_streams(state: FlowState, rows: Sequence[int] | Int[Array, "R"]) -> FlowState:
    """Take some streams out of a batch, as a batch."""
    axes = batch_axes(state)
    rows = jnp.asarray(rows)

    def take(axis, part):
        return jnp.copy(part) if axis < 0 else jnp.take(part, rows, axis)

    return jax.tree.map(take, axes, state)

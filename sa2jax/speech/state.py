"""State of streaming synthesis: what streams carry between steps; batches of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from sa2jax.errors import ConfigError
from sa2jax.models.flow import FlowState
from sa2jax.models.flow import concat_streams as concat_flow_streams
from sa2jax.models.flow import select_streams as select_flow_streams
from sa2jax.models.vocoder import VocoderState


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["flow", "vocoder", "pending", "num_pending", "num_codes", "seed"],
    meta_fields=["parity"],
)
@dataclass(frozen=True)
class StreamState:
    """Everything that B streams carry from step to step, a pytree.

    Attributes:
        flow: caches of the flow.
        vocoder: overlap of the vocoder.
        pending: codes given and not spoken yet, on the host.
        num_pending: how many of them each row has.
        num_codes: codes of each row's prompt and those spoken.
        seed: of each row's noise.
        parity: whether this is the official streaming.
    """

    flow: FlowState
    vocoder: VocoderState
    pending: Int[np.ndarray, "B A"]
    num_pending: Int[np.ndarray, "B"]
    num_codes: Int[np.ndarray, "B"]
    seed: Int[np.ndarray, "B"]
    parity: bool


def concat_streams(states: Sequence[StreamState]) -> StreamState:
    """Concatenate batches of streams, in this order.

    Raises:
        ConfigError: if some stream as the official code does and some do not, or they look back on
            different numbers of frames: one program cannot advance both.
    """
    if len({(s.parity, s.flow.keep_frames) for s in states}) != 1:
        raise ConfigError(
            "expected streams started with the same `parity` and `keep_frames`, got several kinds: "
            "step them apart"
        )

    def lines(*parts):
        return np.concatenate([np.asarray(p) for p in parts])

    # One part alone would not be copied, and lost when the result is donated.
    def rows(*parts):
        return jnp.concatenate(parts) if len(parts) > 1 else jnp.copy(parts[0])

    return StreamState(
        flow=concat_flow_streams([s.flow for s in states]),
        vocoder=jax.tree.map(rows, *(s.vocoder for s in states)),
        pending=lines(*(s.pending for s in states)),
        num_pending=lines(*(s.num_pending for s in states)),
        num_codes=lines(*(s.num_codes for s in states)),
        seed=lines(*(s.seed for s in states)),
        parity=states[0].parity,
    )


def select_streams(state: StreamState, rows: Sequence[int]) -> StreamState:
    """Take some of the streams out, as a batch of their own."""
    chosen = np.asarray(rows)
    return StreamState(
        flow=select_flow_streams(state.flow, jnp.asarray(chosen)),
        vocoder=jax.tree.map(lambda x: x[chosen], state.vocoder),
        pending=np.asarray(state.pending)[chosen],
        num_pending=np.asarray(state.num_pending)[chosen],
        num_codes=np.asarray(state.num_codes)[chosen],
        seed=np.asarray(state.seed)[chosen],
        parity=state.parity,
    )

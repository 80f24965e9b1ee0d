"""What streams of speech carry from step to step, and how they are put into groups."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from sa2jax.errors import ConfigError
from sa2jax.models.flow import FlowState
from sa2jax.models.flow import join as join_flows
from sa2jax.models.flow import pick as pick_flows
from sa2jax.models.vocoder_stream import VocoderState


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["flow", "vocoder", "pending", "waiting", "seen", "seed"],
    meta_fields=["parity"],
)
@dataclass(frozen=True)
class StreamState:
    """Everything that B streams carry from step to step.

    Attributes:
        flow: what the flow remembers.
        vocoder: what the vocoder remembers.
        pending: codes given and not spoken yet, on the host.
        waiting: how many of them each row has.
        seen: codes of each row's prompt and those spoken.
        seed: of each row's noise.
        parity: whether this is the official streaming.
    """

    flow: FlowState
    vocoder: VocoderState
    pending: Int[np.ndarray, "B A"]
    waiting: Int[np.ndarray, "B"]
    seen: Int[np.ndarray, "B"]
    seed: Int[np.ndarray, "B"]
    parity: bool


def join(states: Sequence[StreamState]) -> StreamState:
    """Several groups of streams as one, in this order.

    Raises:
        ConfigError: if some stream as the official code does and some do not, or they look back on
            different numbers of frames: one program cannot advance both.
    """
    if len({(s.parity, s.flow.keep) for s in states}) != 1:
        raise ConfigError(
            "expected streams started with the same `parity` and `keep`, got several kinds: step "
            "them apart"
        )
    lines = lambda *parts: np.concatenate([np.asarray(p) for p in parts])
    # One part alone would not be copied, and lost when the result is donated.
    rows = lambda *parts: jnp.concatenate(parts) if len(parts) > 1 else jnp.copy(parts[0])
    return StreamState(
        flow=join_flows([s.flow for s in states]),
        vocoder=jax.tree.map(rows, *(s.vocoder for s in states)),
        pending=lines(*(s.pending for s in states)),
        waiting=lines(*(s.waiting for s in states)),
        seen=lines(*(s.seen for s in states)),
        seed=lines(*(s.seed for s in states)),
        parity=states[0].parity,
    )


def pick(state: StreamState, rows: Sequence[int]) -> StreamState:
    """Some of the streams, as a group of their own."""
    chosen = np.asarray(rows)
    return StreamState(
        flow=pick_flows(state.flow, jnp.asarray(chosen)),
        vocoder=jax.tree.map(lambda x: x[chosen], state.vocoder),
        pending=np.asarray(state.pending)[chosen],
        waiting=np.asarray(state.waiting)[chosen],
        seen=np.asarray(state.seen)[chosen],
        seed=np.asarray(state.seed)[chosen],
        parity=state.parity,
    )

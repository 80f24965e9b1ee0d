"""Speech codes and a voice to mel frames, whole or as a stream; see `flow_matching`."""

from sa2jax.models.flow.flow_matching import (
    Flow,
    FlowState,
    flow_model,
    join,
    pick,
    reserve,
    unstack_flow,
)

__all__ = ["Flow", "FlowState", "flow_model", "join", "pick", "reserve", "unstack_flow"]

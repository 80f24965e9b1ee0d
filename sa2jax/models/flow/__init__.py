"""Speech codes and a voice to mel frames, whole or as a stream; see `flow_matching`."""

from sa2jax.models.flow.flow_matching import KEEP, STEPS, Flow, flow_model, unstack_flow
from sa2jax.models.flow.state import FlowState, join, pick, reserve, rows_of

__all__ = [
    "KEEP", "STEPS", "Flow", "FlowState", "flow_model", "join", "pick", "reserve", "rows_of",
    "unstack_flow",
]  # fmt: skip

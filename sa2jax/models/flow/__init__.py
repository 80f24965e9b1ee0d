"""Speech codes and a voice to mel frames, offline or as a stream; see `flow_matching`."""

from sa2jax.models.flow.flow_matching import Flow, flow_model, unstack_flow
from sa2jax.models.flow.inputs import KEEP_FRAMES, STEPS, FlowOptions, VoicePrompt
from sa2jax.models.flow.state import (
    FlowState,
    batch_axes,
    concat_streams,
    grow_streams,
    select_streams,
)

__all__ = [
    "KEEP_FRAMES",
    "STEPS",
    "Flow",
    "FlowOptions",
    "FlowState",
    "VoicePrompt",
    "batch_axes",
    "concat_streams",
    "flow_model",
    "grow_streams",
    "select_streams",
    "unstack_flow",
]

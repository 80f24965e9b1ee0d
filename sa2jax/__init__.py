"""Step-Audio 2 in JAX/Flax: listen, think and speak on TPU, GPU and CPU.

import sa2jax
model = sa2jax.StepAudio2.from_pretrained("Step-Audio-2-mini")
model.transcribe("a.wav")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sa2jax.errors import Sa2jaxError

if TYPE_CHECKING:
    from sa2jax.audio import AudioSource
    from sa2jax.chat.template import Text
    from sa2jax.chat.tool_schema import Tool
    from sa2jax.chat.toolbox import ToolAnswer
    from sa2jax.pipeline import StepAudio2
    from sa2jax.pipeline.conversation import Chat
    from sa2jax.pipeline.reply import Reply, ReplyPiece, Segment
    from sa2jax.pipeline.stream import Stream
    from sa2jax.speech import Speech
    from sa2jax.speech.voices import Voice

__version__ = "0.1.0"
__all__ = [
    "AudioSource",
    "Chat",
    "Reply",
    "ReplyPiece",
    "Sa2jaxError",
    "Segment",
    "Speech",
    "StepAudio2",
    "Stream",
    "Text",
    "Tool",
    "ToolAnswer",
    "Voice",
    "__version__",
]

_HOMES = {
    "AudioSource": "audio",
    "Chat": "pipeline.conversation",
    "Reply": "pipeline.reply",
    "ReplyPiece": "pipeline.reply",
    "Segment": "pipeline.reply",
    "StepAudio2": "pipeline",
    "Speech": "speech",
    "Stream": "pipeline.stream",
    "Text": "chat.template",
    "Tool": "chat.tool_schema",
    "ToolAnswer": "chat.toolbox",
    "Voice": "speech.voices",
}


def __getattr__(name: str) -> Any:
    """Import what needs jax only when it is used: `sa2jax --help` stays quick."""
    if name in _HOMES:
        return getattr(import_module(f"sa2jax.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sa2jax' has no attribute {name!r}")

"""Step-Audio 2 in JAX/Flax: listen, think and speak on TPU, GPU and CPU.

import sa2jax
model = sa2jax.StepAudio2.from_pretrained("Step-Audio-2-mini")
model.transcribe("a.wav")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sa2jax.errors import Sa2jaxError

if TYPE_CHECKING:
    from sa2jax.inference.voices import Voice
    from sa2jax.pipeline import Chat, Reply, StepAudio2
    from sa2jax.speech import Speech

__version__ = "0.1.0"
__all__ = ["Chat", "Reply", "Sa2jaxError", "Speech", "StepAudio2", "Voice", "__version__"]

_HOMES = {
    "Chat": "pipeline",
    "Reply": "pipeline",
    "StepAudio2": "pipeline",
    "Speech": "speech",
    "Voice": "inference.voices",
}


def __getattr__(name: str) -> Any:
    """Import what needs jax only when it is used: `sa2jax --help` stays quick."""
    if name in _HOMES:
        return getattr(import_module(f"sa2jax.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sa2jax' has no attribute {name!r}")

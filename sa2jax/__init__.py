"""Step-Audio 2 in JAX/Flax: listen, think and speak on TPU, GPU and CPU.

import sa2jax
model = sa2jax.StepAudio2.from_pretrained("Step-Audio-2-mini")
model.transcribe("a.wav")
"""

from typing import TYPE_CHECKING, Any

from sa2jax.errors import Sa2jaxError

if TYPE_CHECKING:
    from sa2jax.pipeline import Chat, Reply, StepAudio2

__version__ = "0.1.0"
__all__ = ["Chat", "Reply", "Sa2jaxError", "StepAudio2", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the pipeline, and with it jax, only when it is used: `sa2jax --help` stays quick."""
    if name in ("Chat", "Reply", "StepAudio2"):
        from sa2jax import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'sa2jax' has no attribute {name!r}")

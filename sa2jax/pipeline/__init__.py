"""The public API: a model, its tasks and its conversations."""

from sa2jax.pipeline.model import StepAudio2

__all__ = ["StepAudio2"]

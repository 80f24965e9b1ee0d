"""Mel frames to a waveform, whole or as a stream: what a vocoder is, and the HiFT network."""

from sa2jax.models.vocoder.base import Vocoder, VocoderSizes, VocoderState
from sa2jax.models.vocoder.hift import HiFT, vocoder

__all__ = ["HiFT", "Vocoder", "VocoderSizes", "VocoderState", "vocoder"]

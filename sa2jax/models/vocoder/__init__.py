"""Mel frames to a waveform, offline or as a stream: the `Vocoder` protocol and HiFT."""

from sa2jax.models.vocoder.base import Vocoder, VocoderSizes, VocoderState
from sa2jax.models.vocoder.hift import HiFT, vocoder

__all__ = ["HiFT", "Vocoder", "VocoderSizes", "VocoderState", "vocoder"]

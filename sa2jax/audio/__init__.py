"""Audio: files in and out, and the four front-ends of the models."""

from sa2jax.audio.features import (
    CHUNK_SAMPLES,
    HOP,
    fbank,
    log_mel,
    mel_24k,
    num_frames,
    num_tokens,
    pad_mels,
    s3_log_mel,
)
from sa2jax.audio.io import Audio, load, pcm_16, read, resample, split, write
from sa2jax.audio.rates import SAMPLE_RATE

__all__ = [
    "CHUNK_SAMPLES",
    "HOP",
    "SAMPLE_RATE",
    "Audio",
    "fbank",
    "load",
    "log_mel",
    "mel_24k",
    "num_frames",
    "num_tokens",
    "pad_mels",
    "pcm_16",
    "read",
    "resample",
    "s3_log_mel",
    "split",
    "write",
]

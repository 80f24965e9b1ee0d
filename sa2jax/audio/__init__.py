"""Audio: files in and out, and the four front-ends of the models."""

from sa2jax.audio.chunks import split_chunks
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
from sa2jax.audio.io import Audio, load_audio, pcm_16, read_audio, resample, write_wav
from sa2jax.audio.rates import SAMPLE_RATE

__all__ = [
    "CHUNK_SAMPLES",
    "HOP",
    "SAMPLE_RATE",
    "Audio",
    "fbank",
    "load_audio",
    "log_mel",
    "mel_24k",
    "num_frames",
    "num_tokens",
    "pad_mels",
    "pcm_16",
    "read_audio",
    "resample",
    "s3_log_mel",
    "split_chunks",
    "write_wav",
]

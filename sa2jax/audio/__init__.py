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
from sa2jax.audio.io import load_audio, open_mono, pcm_16, read_audio, resample, write_wav
from sa2jax.audio.rates import SAMPLE_RATE
from sa2jax.audio.reader import MAX_SECONDS, SILENCE, Audio, AudioSource, Channel
from sa2jax.audio.recording import Recording

__all__ = [
    "CHUNK_SAMPLES",
    "HOP",
    "MAX_SECONDS",
    "SAMPLE_RATE",
    "SILENCE",
    "Audio",
    "AudioSource",
    "Channel",
    "Recording",
    "fbank",
    "load_audio",
    "log_mel",
    "mel_24k",
    "num_frames",
    "num_tokens",
    "open_mono",
    "pad_mels",
    "pcm_16",
    "read_audio",
    "resample",
    "s3_log_mel",
    "split_chunks",
    "write_wav",
]

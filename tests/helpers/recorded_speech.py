"""The recorded detokenizer as users run it, without what makes compilation slow."""

from pathlib import Path

import numpy as np

from sa2jax.convert.flow import load as load_flow
from sa2jax.convert.vocoder import load as load_vocoder
from sa2jax.convert.voice_analysis import (
    SPEAKER_ENCODER_FILE,
    SPEECH_TOKENIZER_FILE,
    read_speaker_encoder,
    read_speech_tokenizer,
)
from sa2jax.speech.voices import Voice
from sa2jax.speech_config import Token2WavConfig


def recorded_token2wav(golden: Path) -> tuple[Token2WavConfig, dict]:
    folder = golden / "token2wav"
    flow, flow_params = load_flow(folder)
    vocoder, vocoder_params = load_vocoder(folder / "hift.pt")
    tokenizer = read_speech_tokenizer(folder / SPEECH_TOKENIZER_FILE)
    speaker = read_speaker_encoder(folder / SPEAKER_ENCODER_FILE)
    cfg = Token2WavConfig(
        flow=flow,
        vocoder=vocoder,
        speech_tokenizer=tokenizer.config,
        speaker_encoder=speaker.config,
    )
    params = {
        "flow": flow_params,
        "vocoder": vocoder_params,
        "speech_tokenizer": tokenizer.params,
        "speaker_encoder": speaker.params,
    }
    return cfg, params


def recorded_voice(golden: Path) -> Voice:
    prompt = np.load(golden / "t2w_golden" / "prepare_prompt.npz")
    return Voice(
        "recorded",
        prompt["prompt_tokens"][0],
        prompt["spk_emb"][0],
        prompt["prompt_mel_padded"][0],
        audio_hash="",
        analysis_hash="",
    )


def other_voice(seed: int, codes: int, cfg: Token2WavConfig) -> Voice:
    """A voice that nobody has."""
    rng = np.random.default_rng(seed)
    mel = rng.normal(-5, 2, (2 * codes, cfg.flow.mels)).astype(np.float32)
    speaker = rng.normal(size=cfg.flow.speaker).astype(np.float32)
    line = rng.integers(0, cfg.flow.codes, codes).astype(np.int32)
    return Voice(f"voice{seed}", line, speaker, mel, audio_hash="", analysis_hash="")


def start_noise(golden: Path) -> np.ndarray:
    return np.load(golden / "t2w_golden" / "rand_noise.npz")["rand_noise"][0].T  # [S, M]


def draws(seed, samples: int, harmonics: int) -> np.ndarray:
    """The source's normal draws, in the order of the recordings; zeros without a seed."""
    if seed is None:
        return np.zeros((1, samples, harmonics), np.float32)
    rng = np.random.default_rng(seed)
    rng.random((1, harmonics), np.float32)
    return rng.standard_normal((1, samples, harmonics), np.float32)


def official_pcm(speech: np.ndarray) -> np.ndarray:
    """16-bit samples as the official code makes them: scaled by 32767 and cut, not rounded."""
    return (np.clip(speech, -1, 1) * np.float32(32767)).astype(np.int16)

"""The joined detokenizer against the official `Token2wav`, whole and streamed."""

import numpy as np
import pytest
from helpers.recorded_speech import (
    draws,
    official_pcm,
    recorded_token2wav,
    recorded_voice,
    start_noise,
)

from sa2jax.speech.token2wav import Token2Wav

SPEECH = 2e-3
COUNTS = 40  # of int16


@pytest.fixture(scope="module")
def recordings(golden):
    return np.load(golden / "t2w_golden" / "token2wav_e2e.npz")


@pytest.fixture(scope="module")
def chunks(golden):
    """Codes of each recorded call, look-ahead included."""
    stream = np.load(golden / "t2w_golden" / "flow_stream.npz")
    return [stream[f"chunk{i}_tokens"] for i in range(len(stream["chunk_lens"]))]


@pytest.fixture(scope="module")
def speak(golden):
    cfg, params = recorded_token2wav(golden)
    return Token2Wav(cfg, params, flow_noise=start_noise(golden))


def source_shape(speak, frames):
    """Samples of mel frames, and sines of each."""
    cfg = speak.cfg.vocoder
    return cfg.samples * frames, cfg.harmonics + 1


@pytest.mark.parametrize("name", ["call_wav", "call_wav_zero_noise"])
def test_whole_reply(golden, recordings, speak, name):
    seed = None if "zero" in name else recordings["call_rng_seed"].tolist()
    codes = recordings["call_tokens"]
    frames = speak.cfg.flow.encoder.upsample * len(codes)
    noise = draws(seed, *source_shape(speak, frames))
    wave = speak(codes, recorded_voice(golden), source_noise=noise)
    expected = recordings[name][0]
    assert wave.shape == expected.shape
    assert np.abs(expected).max() > 0.05
    # Measured: 6e-5, with draws and without.
    assert np.abs(wave - expected).max() < SPEECH


@pytest.mark.parametrize("zero", [False, True], ids=["draws", "zero noise"])
@pytest.mark.slow
def test_every_chunk_of_a_stream(golden, recordings, speak, chunks, zero):
    """The third chunk is the first whose attention cache was trimmed, the fourth the last."""
    state = speak.start([recorded_voice(golden)], parity=True)
    encoder, held = speak.cfg.flow.encoder, 0
    for i, codes in enumerate(chunks):
        last = i == len(chunks) - 1
        fresh = codes if i == 0 else codes[encoder.lookahead :]  # the state holds the others
        frames = held + encoder.upsample * (len(codes) - (0 if last else encoder.lookahead))
        held = min(speak.cfg.vocoder.carry, frames)
        seed = None if zero else recordings[f"stream{i}_rng_seed"].tolist()
        noise = draws(seed, *source_shape(speak, frames))
        state, (piece,) = speak.step(state, [fresh], last, source_noise=noise)
        expected = recordings[f"stream{i}_pcm" + ("_zero_noise" if zero else "")]
        pcm = official_pcm(np.asarray(piece)).astype(np.int32)
        assert pcm.shape == expected.shape, f"chunk {i}"
        # Measured: at most 3 counts in every chunk.
        assert np.abs(pcm - expected).max() <= COUNTS, f"chunk {i}"

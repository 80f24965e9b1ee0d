"""A voice from a recording against the official `Token2wav._prepare_prompt`."""

import numpy as np
import pytest
import soundfile
from helpers.recorded_speech import recorded_token2wav

from sa2jax.checkpoint import content_hash
from sa2jax.speech.layout import ANALYSIS
from sa2jax.speech.voices import Voice, VoiceAnalyzer


@pytest.fixture(scope="module")
def analyzer(golden):
    cfg, params = recorded_token2wav(golden)
    params = {name: params[name] for name in ANALYSIS}
    return VoiceAnalyzer(cfg, params, content_hash(params))


def test_recorded_voice(golden, analyzer):
    folder = golden / "t2w_golden"
    expected = np.load(folder / "prepare_prompt.npz")
    voice = Voice.from_wav(folder / "prompt.wav", analyzer)
    assert voice.name == "prompt"
    np.testing.assert_array_equal(voice.codes, expected["prompt_tokens"][0])
    # Measured: speaker vector 8.6e-6, mel 1.4e-6.
    np.testing.assert_allclose(voice.speaker, expected["spk_emb"][0], atol=1e-4)
    np.testing.assert_allclose(voice.mel, expected["prompt_mel_padded"][0], atol=1e-3)


def test_codes_of_recordings_in_one_batch(golden, analyzer):
    recorded = np.load(golden / "t2w_golden" / "s3tokenizer.npz")
    clips = [(recorded[f"wav{i}_i16"].astype(np.float32) / 32768, 16_000) for i in (1, 0)]
    longer, shorter = analyzer.codes(clips)
    np.testing.assert_array_equal(longer, recorded["codes1"][0])
    np.testing.assert_array_equal(shorter, recorded["codes0"][0])
    np.testing.assert_array_equal(analyzer.codes(clips[1:2])[0], shorter)


def test_any_rate_and_channels(golden, analyzer, tmp_path):
    """The same voice as a 48 kHz stereo file: other samples, nearly the same numbers."""
    samples, rate = soundfile.read(golden / "t2w_golden" / "prompt.wav", dtype="float32")
    plain = Voice.from_wav((samples if samples.ndim == 1 else samples.T, rate), analyzer)
    stereo = np.stack([samples, samples] if samples.ndim == 1 else samples.T[:2], axis=1)
    soundfile.write(tmp_path / "stereo.flac", np.repeat(stereo, 2, axis=0), 2 * rate)
    voice = Voice.from_wav(tmp_path / "stereo.flac", analyzer)
    assert abs(len(voice.codes) - len(plain.codes)) <= 1
    cosine = voice.speaker @ plain.speaker
    cosine /= np.linalg.norm(voice.speaker) * np.linalg.norm(plain.speaker)
    assert cosine > 0.8

"""A vocoder that is not HiFT, at half the sample rate, in the place of the config's network."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.recorded_speech import other_voice
from helpers.small_speech import SPEAKER, small_networks

from sa2jax.models.vocoder import HiFT, Vocoder
from sa2jax.nn import Functional, Policy, functional, length_mask, param
from sa2jax.speech.token2wav import Token2Wav


@dataclass(frozen=True)
class Sizes:
    mels: int = 80
    sample_rate: int = 12_000
    samples: int = 240
    carry: int = 0


class Loudness(nnx.Module):
    """A waveform that is each frame's mean; of its stream it only counts the frames."""

    def __init__(self, rngs: nnx.Rngs):
        self.cfg = Sizes()
        self.gain = param(rngs, (1,), (None,), constant=1.0)

    def __call__(self, mel, frames=None, *, noise=None, key=None):
        wave = jnp.repeat(jnp.tanh(self.gain[...] * mel.mean(-1)), self.cfg.samples, axis=1)
        if frames is not None:
            wave = jnp.where(length_mask(self.cfg.samples * frames, wave.shape[1]), wave, 0)
        return wave, None

    def start(self, rows, key):
        return {"frames": jnp.zeros(rows, jnp.int32)}

    def step(self, state, mel, frames, *, last, noise=None, equal_gain=False):
        wave, _ = self(mel, frames)
        return {"frames": state["frames"] + frames}, wave, self.cfg.samples * frames


@pytest.fixture(scope="module")
def speak():
    structure: Functional[Vocoder] = functional(lambda: Loudness(nnx.Rngs(0)))
    params = small_networks() | {"vocoder": {"gain": np.full(1, 2, np.float32)}}
    return Token2Wav(SPEAKER, params, vocoder=structure)


def test_whole_replies(speak):
    codes, voice = np.arange(20), other_voice(0, 31, SPEAKER)
    wave = speak(codes, voice)
    assert (speak.sample_rate, wave.shape) == (12_000, (20 * 480,))
    steps = wave.reshape(-1, 240)
    assert (steps == steps[:, :1]).all()
    assert np.abs(wave).max() > 0


def test_streams(speak):
    state = speak.start([other_voice(0, 31, SPEAKER)])
    for codes, last, spoken in (([1, 2, 3, 4, 5], False, 2), ([], True, 3)):  # look-ahead of three
        state, (piece,) = speak.step(state, [codes], last)
        assert piece.shape == (480 * spoken,)
    assert state.vocoder["frames"].tolist() == [10]


def test_hift_is_a_vocoder():
    structure: Functional[Vocoder] = functional(
        lambda: HiFT(SPEAKER.vocoder, policy=Policy(), rngs=nnx.Rngs(0))
    )
    sizes = structure.bind(structure.abstract).cfg
    assert (sizes.mels, sizes.sample_rate, sizes.samples) == (80, 24_000, 480)

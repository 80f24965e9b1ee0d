"""The audio encoder learns to spell, and is then what a whole model listens with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_speech import TEXTS, assert_padding_is_not_heard, learn, losses_of, tones
from jax import jit

from sa2jax import testing
from sa2jax.audio.features import log_mel, num_frames
from sa2jax.config import AudioEncoderConfig
from sa2jax.models.audio_encoder import encoder_length
from sa2jax.models.step_audio import step_audio2
from sa2jax.train.networks.audio_encoder import (
    FROZEN,
    AudioEncoderLossConfig,
    audio_encoder_forward,
    audio_encoder_loss,
    audio_encoder_with_heads,
    init_audio_encoder,
    sinusoids,
)
from sa2jax.train.networks.augmentation import Augmentation
from sa2jax.train.networks.recognition import SYMBOLS, letters_to_text, network_params
from sa2jax.train.networks.step import make_loss_evaluation, place_network_batch

CFG = AudioEncoderConfig(mels=16, layers=1, embed=32, heads=2, max_positions=100, mlp_ratio=2)
MODEL = audio_encoder_with_heads(CFG)
PLAIN = AudioEncoderLossConfig(augmentation=None)
losses = losses_of(audio_encoder_loss, MODEL)


@pytest.fixture(scope="module")
def params():
    return init_audio_encoder(CFG)


def test_positions_are_sines_and_cosines_of_slower_and_slower_waves():
    table = np.asarray(sinusoids(50, 8))
    np.testing.assert_allclose(table[:, 0], np.sin(np.arange(50)), atol=1e-5)
    np.testing.assert_allclose(table[:, 4], np.cos(np.arange(50)), atol=1e-5)
    np.testing.assert_allclose(table[:, 7], np.cos(np.arange(50) / 10_000), atol=1e-5)
    np.testing.assert_allclose(table[:, 1], np.sin(np.arange(50) * 10_000 ** (-1 / 3)), atol=1e-4)
    assert sinusoids(3, 5).shape == (3, 5)


@pytest.mark.slow
def test_padding_and_empty_rows_change_nothing(params):
    padded = tones(room=800, rows=1)
    (_, report), gradient = assert_padding_is_not_heard(losses, params, PLAIN, tones(), padded)
    assert float(report["letters"]) == sum(map(len, TEXTS))
    assert np.abs(gradient["model"]["conv1"]["kernel"]).max() > 1e-4


def test_a_seed_is_a_run(params):
    config = AudioEncoderLossConfig()
    loss = [
        float(losses(params, tones(), jax.random.key(seed), config)[0][0]) for seed in (0, 0, 1)
    ]
    assert loss[0] == loss[1] != loss[2]


@pytest.mark.slow
def test_an_encoder_learns_to_spell_and_keeps_its_positions(params):
    mild = AudioEncoderLossConfig(augmentation=Augmentation(time_masks=0, freq_masks=0))
    batch = place_network_batch(tones(), None)
    rates = {"learning_rate": 5e-3, "warmup_steps": 10, "learning_rate_overrides": FROZEN}
    state, reports = learn(audio_encoder_loss, MODEL, mild, params, batch, steps=250, **rates)
    assert reports[-1]["loss"] < 0.1 < 1 < reports[0]["loss"]
    heard = make_loss_evaluation(audio_encoder_forward, MODEL)(state.params, batch)
    assert [letters_to_text(row) for row in np.asarray(heard.letters)] == list(TEXTS)
    table = np.asarray(network_params(state.params)["positions"])
    np.testing.assert_array_equal(table, sinusoids(CFG.max_positions, CFG.embed))


@pytest.mark.slow
def test_what_is_taught_is_what_the_adapter_gets():
    """The encoder fits into a whole model, and the head reads that model's features."""
    whole = testing.tiny_config(layers=1)
    cfg = whole.audio_encoder
    params, batch = init_audio_encoder(cfg, seed=1), place_network_batch(tones(), None)
    structure = step_audio2(whole)
    like = structure.abstract["audio_encoder"]

    def shapes(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert shapes(network_params(params)) == shapes(like)
    heard = make_loss_evaluation(audio_encoder_forward, audio_encoder_with_heads(cfg))(
        params, batch
    )

    @jit
    def features(encoder):
        others = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), structure.abstract)
        net = structure.bind(others | {"audio_encoder": encoder})
        mels = log_mel(batch.sound, batch.lengths, n_mels=cfg.mels)
        return net.audio_encoder(mels, num_frames(batch.lengths))

    head = params["heads"]["letters"]
    x = np.asarray(features(network_params(params)))
    logits = np.einsum("bsd,pvd->bspv", x, head["kernel"]) + head["bias"]
    logits = logits.reshape(len(x), -1, SYMBOLS)  # two of each frame
    for row, size in enumerate(2 * encoder_length(num_frames(np.asarray(batch.lengths)))):
        best = logits[row, :size].argmax(-1)
        spelled = [s for i, s in enumerate(best) if s and (i == 0 or s != best[i - 1])]
        assert letters_to_text(np.asarray(heard.letters)[row]) == letters_to_text(spelled)
        assert spelled

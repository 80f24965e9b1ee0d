"""The audio encoder learns to spell, and is then what a whole model listens with."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_speech import TEXTS, learn, losses_of, tones
from jax import jit

from sa2jax import testing
from sa2jax.audio.features import log_mel, num_frames
from sa2jax.config import AudioEncoderConfig
from sa2jax.models.audio_encoder import encoder_length
from sa2jax.models.step_audio import step_audio2
from sa2jax.train.networks.audio_encoder import (
    FROZEN,
    EncoderTeaching,
    encoder_heard,
    encoder_loss,
    encoder_teacher,
    init_encoder,
    sinusoids,
)
from sa2jax.train.networks.recognition import SYMBOLS, Disturbance, network, text_of
from sa2jax.train.networks.step import make_loss_evaluation, place_rows
from sa2jax.train.optimizer import OptimizerConfig, make_optimizer

CFG = AudioEncoderConfig(mels=16, layers=1, embed=32, heads=2, max_positions=100, mlp_ratio=2)
MODEL = encoder_teacher(CFG)
PLAIN = EncoderTeaching(disturbance=None)
STEPS = 250


@pytest.fixture(scope="module")
def params():
    return init_encoder(CFG)


@pytest.fixture(scope="module")
def losses():
    return losses_of(encoder_loss, MODEL)


def test_positions_are_sines_and_cosines_of_slower_and_slower_waves():
    table = np.asarray(sinusoids(50, 8))
    np.testing.assert_allclose(table[:, 0], np.sin(np.arange(50)), atol=1e-5)
    np.testing.assert_allclose(table[:, 4], np.cos(np.arange(50)), atol=1e-5)
    np.testing.assert_allclose(table[:, 7], np.cos(np.arange(50) / 10_000), atol=1e-5)
    np.testing.assert_allclose(table[:, 1], np.sin(np.arange(50) * 10_000 ** (-1 / 3)), atol=1e-4)
    assert sinusoids(3, 5).shape == (3, 5)


def test_padding_and_empty_rows_change_nothing(params, losses):
    (loss, report), gradient = losses(params, tones(), None, PLAIN)
    (wide, also), same = losses(params, tones(room=800, rows=1), None, PLAIN)
    assert float(wide) == pytest.approx(float(loss), rel=1e-5)
    assert float(also["letters"]) == float(report["letters"]) == sum(map(len, TEXTS))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-3), same, gradient)
    assert np.abs(gradient["model"]["conv1"]["kernel"]).max() > 1e-4


def test_a_seed_is_a_run(params, losses):
    config = EncoderTeaching()
    loss = [
        float(losses(params, tones(), jax.random.key(seed), config)[0][0]) for seed in (0, 0, 1)
    ]
    assert loss[0] == loss[1] != loss[2]


@pytest.mark.slow
def test_an_encoder_learns_to_spell_and_keeps_its_positions(params):
    optimizer = make_optimizer(
        OptimizerConfig(rate=5e-3, warmup=10, steps=STEPS, decay=0.0, rates=FROZEN)
    )
    mild = EncoderTeaching(disturbance=Disturbance(time_masks=0, band_masks=0))
    batch = place_rows(tones(), None)
    state, reports = learn(encoder_loss, MODEL, optimizer, mild, params, batch, STEPS)
    assert reports[-1]["loss"] < 0.1 < 1 < reports[0]["loss"]
    heard = make_loss_evaluation(encoder_heard, MODEL)(state.params, batch)
    assert [text_of(row) for row in np.asarray(heard.letters)] == list(TEXTS)
    table = np.asarray(network(state.params)["positions"])
    np.testing.assert_array_equal(table, sinusoids(CFG.max_positions, CFG.embed))


@pytest.mark.slow
def test_what_is_taught_is_what_the_adapter_gets():
    """The encoder fits into a whole model, and the head reads that model's features."""
    whole = testing.tiny_config(layers=1)
    cfg = whole.audio_encoder
    params, batch = init_encoder(cfg, seed=1), place_rows(tones(), None)
    structure = step_audio2(whole)
    like = structure.abstract["audio_encoder"]
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(network(params)) == shapes(like)
    heard = make_loss_evaluation(encoder_heard, encoder_teacher(cfg))(params, batch)

    @jit
    def features(encoder):
        others = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), structure.abstract)
        net = structure.bind(others | {"audio_encoder": encoder})
        mels = log_mel(batch.sound, batch.lengths, n_mels=cfg.mels)
        return net.audio_encoder(mels, num_frames(batch.lengths))

    head = params["heads"]["letters"]
    x = np.asarray(features(network(params)))
    logits = np.einsum("bsd,pvd->bspv", x, head["kernel"]) + head["bias"]
    logits = logits.reshape(len(x), -1, SYMBOLS)  # two of each frame
    for row, size in enumerate(2 * encoder_length(num_frames(np.asarray(batch.lengths)))):
        best = logits[row, :size].argmax(-1)
        spelled = [s for i, s in enumerate(best) if s and (i == 0 or s != best[i - 1])]
        assert text_of(np.asarray(heard.letters)[row]) == text_of(spelled)
        assert spelled

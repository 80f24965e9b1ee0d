"""The speaker encoder learns to tell voices apart, clip by clip."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_speech import SMALL, assert_padding_is_not_heard, learn, losses_of
from jax import jit

from sa2jax.audio.features import fbank
from sa2jax.errors import TrainError
from sa2jax.models.speaker_encoder import speaker_encoder
from sa2jax.train.networks.augmentation import Augmentation
from sa2jax.train.networks.batches import SoundBatch
from sa2jax.train.networks.recognition import network_params
from sa2jax.train.networks.speaker_encoder import (
    FROZEN,
    SpeakerEncoderLossConfig,
    am_softmax_loss,
    init_speaker_encoder,
    speaker_encoder_forward,
    speaker_encoder_loss,
    speaker_encoder_with_heads,
    speaker_similarity,
)
from sa2jax.train.networks.step import make_loss_evaluation, place_network_batch
from sa2jax.train.optimizer import param_name

CFG = SMALL.speaker_encoder
VOICES = 3
MODEL = speaker_encoder_with_heads(CFG, speakers=VOICES)
PLAIN = SpeakerEncoderLossConfig(augmentation=None)
losses = losses_of(speaker_encoder_loss, MODEL)


def voices(seed: int = 0, *, each: int = 3, room: int = 0, rows: int = 0) -> SoundBatch:
    """Noise of each voice's own colour, right-padded with noise that must not be heard."""
    rng = np.random.default_rng(seed)
    speaker = np.repeat(np.arange(VOICES), each)
    lengths = rng.integers(3000, 8000, len(speaker))
    lengths[0] = 8000
    sound = np.random.default_rng(9).normal(size=(len(speaker) + rows, 8000 + room))
    for row, voice in enumerate(speaker):
        white, hum = 0.02 * rng.normal(size=8001), np.sin(np.arange(8000) * (0.1 + 0.3 * voice))
        coloured = white[1:] + (voice - 1) * 0.8 * white[:-1] + 0.02 * hum * rng.uniform(0.5, 2)
        sound[row, : lengths[row]] = coloured[: lengths[row]]

    def more(x):
        return np.pad(x, (0, rows)).astype(np.int32)

    return SoundBatch(
        sound=sound.astype(np.float32),
        lengths=more(lengths),
        speaker=more(speaker),
        letters=more(0 * speaker)[:, None],
        letter_counts=more(0 * speaker),
    )


@pytest.fixture(scope="module")
def params():
    return init_speaker_encoder(CFG, speakers=VOICES)


def test_the_margin_is_taken_from_the_own_voice():
    cosines = jnp.array([[0.9, 0.2, -0.4], [0.1, 0.3, 0.3]])
    own = jnp.array([0, 2])
    for margin in (0.0, 0.3):
        logits = 10 * np.array([[0.9 - margin, 0.2, -0.4], [0.1, 0.3, 0.3 - margin]])
        expected = np.log(np.exp(logits).sum(1)) - logits[[0, 1], [0, 2]]
        np.testing.assert_allclose(am_softmax_loss(cosines, own, margin, 10.0), expected, rtol=1e-3)


def test_likeness_is_over_pairs_of_different_real_clips():
    vectors = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [1.0, 0.0]])
    speaker, real = jnp.array([0, 0, 1, 1]), jnp.array([True, True, True, False])
    same, other = speaker_similarity(vectors, speaker, real)
    assert float(same) == pytest.approx(0.6)
    assert float(other) == pytest.approx((0.0 + 0.8) / 2)
    alone = speaker_similarity(vectors, jnp.arange(4), real)
    assert float(alone.same) == 0


@pytest.mark.slow
def test_padding_and_empty_rows_change_nothing(params):
    padded = voices(room=900, rows=2)
    (_, report), gradient = assert_padding_is_not_heard(
        losses, params, PLAIN, voices(), padded, rtol=1e-4
    )
    assert float(report["rows"]) == 3 * VOICES
    assert np.abs(gradient["model"]["conv_in"]["kernel"]).max() > 1e-4


@pytest.mark.slow
def test_a_part_of_a_long_clip_is_heard(params):
    """Without a key its beginning, with one another part for another key."""
    short = replace(PLAIN, max_seconds=0.25)
    batch = voices()
    first = replace(batch, sound=batch.sound[:, :4000], lengths=np.minimum(batch.lengths, 4000))

    def loss(batch, config, seed=None):
        return float(
            losses(params, batch, None if seed is None else jax.random.key(seed), config)[0][0]
        )

    assert loss(batch, short) == pytest.approx(loss(first, PLAIN), rel=1e-5)
    assert loss(batch, short, 0) == loss(batch, short, 0) != loss(batch, short, 1)
    assert loss(batch, SpeakerEncoderLossConfig(), 0) != loss(batch, SpeakerEncoderLossConfig(), 1)


def test_vectors_are_those_of_the_encoder_in_use(params):
    batch = place_network_batch(voices(), None)
    heard = make_loss_evaluation(speaker_encoder_forward, MODEL, PLAIN)(params, batch)

    @jit
    def vectors(params):
        energies = fbank(batch.sound, batch.lengths, n_mels=CFG.mels, subtract_mean=True)
        return speaker_encoder(CFG).bind(params)(energies, 1 + (batch.lengths - 400) // 160)

    expected = np.asarray(vectors(network_params(params)))
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(heard.vectors, expected, atol=1e-4)


@pytest.mark.slow
def test_an_encoder_learns_voices_and_keeps_given_statistics(params):
    mild = SpeakerEncoderLossConfig(augmentation=Augmentation(freq_masks=0, snr_db=(30, 40)))
    batch = place_network_batch(voices(), None)
    rates = {"learning_rate": 1e-2, "warmup_steps": 5, "learning_rate_overrides": FROZEN}
    state, reports = learn(speaker_encoder_loss, MODEL, mild, params, batch, steps=100, **rates)
    assert reports[-1]["loss"] < 0.3 * reports[0]["loss"]
    others = place_network_batch(voices(5), None)
    new = make_loss_evaluation(speaker_encoder_forward, MODEL, PLAIN)(state.params, others)
    assert float(new.report["accuracy"]) > 0.8
    assert float(new.report["same_speaker"]) > float(new.report["other_speaker"]) + 0.25

    moved = {
        param_name(path): bool((np.asarray(new) != np.asarray(old)).any())
        for (path, new), old in zip(
            jax.tree.leaves_with_path(state.params), jax.tree.leaves(params), strict=True
        )
    }
    given = {name for name in moved if name.endswith(("norm.mean", "norm.variance"))}
    given -= {"model.norm.mean"}
    assert len(given) == 5  # of the layers, of the block and of the vector
    assert {name for name, has in moved.items() if not has} == given


def test_matrices_begin_with_the_gain_that_rectifiers_take(params):
    def plain(width):
        return width**-0.5

    model = network_params(params)

    def deviation(x):
        return float(np.std(np.asarray(x)))

    # Stacked, in a head's stage, and not followed by a rectifier.
    layers = model["blocks"]["block1"]["layers"]
    assert deviation(model["tdnn"]) == pytest.approx(2**0.5 * plain(5 * 4 * 4), rel=0.1)
    assert deviation(layers["squeeze"]["kernel"]) == pytest.approx(2**0.5 * plain(24), rel=0.2)
    assert deviation(model["project"]["kernel"]) == pytest.approx(plain(32), rel=0.2)


@pytest.mark.parametrize(
    ("field", "value"), [("margin", -0.1), ("margin", 2.0), ("max_seconds", 0.01), ("scale", 0.5)]
)
def test_settings_that_cannot_be_are_refused(field, value):
    with pytest.raises(TrainError, match=f"{field}=.*expected"):
        SpeakerEncoderLossConfig(**{field: value})

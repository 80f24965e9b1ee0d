"""The speech tokenizer learns to spell through its rounding, and its codes are those of use."""

from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_speech import (
    SMALL,
    TEXTS,
    assert_padding_is_not_heard,
    learn,
    losses_of,
    tones,
)
from jax import jit

from sa2jax.audio.features import s3_log_mel
from sa2jax.errors import TrainError
from sa2jax.models.speech_tokenizer import FSQ_SCALE, speech_tokenizer
from sa2jax.train.networks.augmentation import Augmentation
from sa2jax.train.networks.recognition import letters_to_text, network_params
from sa2jax.train.networks.speech_tokenizer import (
    SpeechTokenizerLossConfig,
    codebook_balance_loss,
    codebook_usage,
    init_speech_tokenizer,
    saturation_loss,
    speech_tokenizer_forward,
    speech_tokenizer_loss,
    speech_tokenizer_with_heads,
    straight_through_digits,
)
from sa2jax.train.networks.step import make_loss_evaluation, place_network_batch

CFG = SMALL.speech_tokenizer
MODEL = speech_tokenizer_with_heads(CFG)
PLAIN = SpeechTokenizerLossConfig(augmentation=None)
losses = losses_of(speech_tokenizer_loss, MODEL)


@pytest.fixture(scope="module")
def params():
    return init_speech_tokenizer(CFG)


def test_codes_are_those_of_the_tokenizer_in_use(params):
    batch = place_network_batch(tones(), None)
    heard = make_loss_evaluation(speech_tokenizer_forward, MODEL)(params, batch)
    frames = batch.lengths // 160

    @jit
    def codes(params):
        mels = s3_log_mel(batch.sound, batch.lengths, n_mels=CFG.mels)
        return speech_tokenizer(CFG).bind(params)(mels, frames)

    expected = np.asarray(codes(network_params(params)))
    np.testing.assert_array_equal(heard.codes, expected)
    assert len(np.unique(expected)) > 3
    used = len(np.unique(expected[np.arange(expected.shape[1]) < -(-frames // 4)[:, None]]))
    assert float(heard.report["codebook_usage"]) == pytest.approx(used / CFG.codebook)


def test_digits_are_whole_and_their_gradient_passes_the_rounding(params):
    net = speech_tokenizer(CFG).bind(network_params(params))
    hidden = jax.random.normal(jax.random.key(0), (1, 6, CFG.embed))
    raw = net.digits(hidden)
    digits = np.asarray(straight_through_digits(raw))
    np.testing.assert_allclose(digits, np.round(digits), atol=1e-6)
    assert set(np.round(digits).ravel()) == {-1, 0, 1}

    def soft(x):
        return jnp.tanh(x) * FSQ_SCALE

    gradients = [jax.grad(lambda x, f=f: f(x).sum())(raw) for f in (soft, straight_through_digits)]
    np.testing.assert_allclose(*gradients, rtol=1e-5)


def test_the_first_convolution_learns_through_the_codes_alone(params):
    """Without what is read before the rounding, and without mel frames."""
    config = replace(PLAIN, intermediate_ctc_weight=0.0, mel_weight=0.0, codebook_weight=0.0)
    (loss, report), gradient = losses(params, tones(), None, config)
    assert float(loss) == float(report["ctc"])
    assert np.abs(gradient["model"]["conv1"]["kernel"]).max() > 1e-4
    assert np.abs(gradient["model"]["digits"]["kernel"]).max() > 1e-4
    assert np.abs(gradient["heads"]["mels"]["kernel"]).max() == 0
    assert np.abs(gradient["heads"]["early"]["letters"]["kernel"]).max() == 0


@pytest.mark.slow
def test_padding_and_empty_rows_change_nothing(params):
    padded = tones(room=800, rows=1)
    (loss, report), _ = assert_padding_is_not_heard(losses, params, PLAIN, tones(), padded)
    parts = [
        report[name]
        for name in ("ctc", "intermediate_ctc", "mel_error", "codebook_balance", "saturation")
    ]
    assert float(loss) == pytest.approx(float(sum(parts)), rel=1e-6)


@pytest.mark.slow
def test_a_tokenizer_learns_to_spell(params):
    """Letters are read from the codes of clips it has seen, and mel frames get nearer."""
    mild = SpeechTokenizerLossConfig(augmentation=Augmentation(time_masks=0, freq_masks=0))
    batch = place_network_batch(tones(), None)
    rates = {"learning_rate": 1e-2, "warmup_steps": 10, "steps": 400}
    state, reports = learn(speech_tokenizer_loss, MODEL, mild, params, batch, **rates)
    assert reports[-1]["ctc"] < 0.1 < 1 < reports[0]["ctc"]
    assert reports[-1]["mel_error"] < 0.6 * reports[0]["mel_error"]
    heard = make_loss_evaluation(speech_tokenizer_forward, MODEL)(state.params, batch)
    assert [letters_to_text(row) for row in np.asarray(heard.letters)] == list(TEXTS)


@pytest.mark.slow
def test_a_seed_is_a_run(params):
    def key(seed):
        return jax.random.key(seed)

    config = SpeechTokenizerLossConfig()
    loss = [float(losses(params, tones(), key(seed), config)[0][0]) for seed in (0, 0, 1)]
    assert loss[0] == loss[1] != loss[2]


def test_digits_are_even_where_all_codes_are_equally_frequent():
    every = np.array(list(product((-1, 0, 1), repeat=3)), np.float32)[None]  # [1, 27, 3]
    length = jnp.array([27])
    assert float(codebook_balance_loss(every, length)) == pytest.approx(0, abs=1e-6)
    padded = np.pad(every, ((0, 1), (0, 4), (0, 0)), constant_values=1)
    assert float(codebook_balance_loss(padded, jnp.array([27, 0]))) == pytest.approx(0, abs=1e-6)
    assert float(codebook_balance_loss(0 * every, length)) == pytest.approx((2 / 3) ** 2)
    alike = np.repeat(every[..., :1], 3, -1)  # each knows the others
    assert float(codebook_balance_loss(alike, length)) == pytest.approx(2 * (2 / 3) ** 2)
    one = 0 * every + 1
    assert float(codebook_balance_loss(one, length)) == pytest.approx(1 + (2 / 3) ** 2)


def test_what_is_far_from_the_levels_is_pulled_back():
    raw = jnp.array([[[0.5, -1.0], [3.0, 0.0], [9.0, 9.0]]])
    length = jnp.array([2])  # the last is padding
    assert float(saturation_loss(raw, length)) == pytest.approx(2.0**2 / 4)
    pull = jax.grad(saturation_loss)(raw, length)
    np.testing.assert_allclose(pull, [[[0, 0], [1, 0], [0, 0]]])
    assert float(saturation_loss(raw, jnp.array([0]))) == 0


def test_how_codes_are_used():
    assert codebook_usage(np.array([5, 5, 7, 7])) == {"codes": 2, "perplexity": pytest.approx(2)}
    assert codebook_usage(np.array([80])) == {"codes": 1, "perplexity": 1}
    uneven_use = codebook_usage(np.array([1, 1, 1, 2]))["perplexity"]
    assert uneven_use == pytest.approx(4 / 3**0.75)


@pytest.mark.parametrize("field", ["intermediate_ctc_weight", "mel_weight", "codebook_weight"])
@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_weights_are_not_negative(field, value):
    with pytest.raises(TrainError, match=f"{field}=.*expected a number of 0 or more"):
        SpeechTokenizerLossConfig(**{field: value})

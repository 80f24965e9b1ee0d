"""What all that hear share: letters, CTC, disturbances that a row draws alone, and batches."""

from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit

from sa2jax.errors import TrainError
from sa2jax.train.networks.augmentation import Augmentation, augment_waveform, spec_augment
from sa2jax.train.networks.batches import SoundBatch, abstract_sound_batch
from sa2jax.train.networks.recognition import (
    LETTERS,
    SYMBOLS,
    ctc_greedy_decode,
    ctc_loss,
    letter_ids,
    letters_to_text,
    network_params,
)
from sa2jax.train.networks.step import place_network_batch

SECOND = 16_000


# --- letters ------------------------------------------------------------------------------------


def test_letters_are_numbered_from_1_in_the_order_of_the_alphabet():
    assert SYMBOLS == 29
    assert letter_ids(" az'") == [2, 27, 28]
    assert letter_ids("a z") == [2, 1, 27]
    assert letters_to_text(range(SYMBOLS)) == LETTERS


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("It's on, now!", "it's on now"),
        ("  Two\n  words ", "two words"),
        ("rock’n’roll", "rock'n'roll"),
        ("A-b 3 你好 c", "a b c"),
        ("...", ""),
    ],
)
def test_a_text_keeps_what_can_be_spelled(text, clean):
    assert letters_to_text(letter_ids(text)) == clean


def test_the_best_letters_drop_repetitions_and_blanks():
    symbols = [*letter_ids("aab"), 0, *letter_ids("b"), 0, 2, 2]
    logits = jax.nn.one_hot(jnp.array([symbols]), SYMBOLS)
    assert letters_to_text(ctc_greedy_decode(logits, jnp.array([8]))[0]) == "abba"
    assert letters_to_text(ctc_greedy_decode(logits, jnp.array([5]))[0]) == "abb"


# --- CTC ----------------------------------------------------------------------------------------


def by_hand(logits, letters) -> float:
    """Minus the logarithm of the sum over every path that spells the letters."""
    logs = np.asarray(jax.nn.log_softmax(logits))
    total = 0.0
    for path in product(range(logs.shape[1]), repeat=len(logs)):
        kept = [s for i, s in enumerate(path) if i == 0 or s != path[i - 1]]
        if [s for s in kept if s] == list(letters):
            total += np.exp(logs[np.arange(len(path)), path].sum())
    return -np.log(total)


@pytest.mark.parametrize("letters", [[1, 2], [2, 2], [1]])
def test_ctc_is_the_sum_over_all_alignments(rng, letters):
    logits = rng.normal(size=(1, 5, 3)).astype(np.float32)
    padded = jnp.array([[*letters, 0, 0]])
    loss, report = jit(ctc_loss)(logits, jnp.array([4]), padded, jnp.array([len(letters)]))
    assert float(loss) == pytest.approx(by_hand(logits[0, :4], letters) / len(letters), rel=1e-5)
    assert (float(report["letters"]), float(report["skipped"])) == (len(letters), 0)


def test_letters_that_fit_no_frames_are_left_out(rng):
    logits = jnp.asarray(rng.normal(size=(4, 6, 5)), jnp.float32)
    letters = jnp.array([[1, 2, 3], [1, 2, 3], [1, 1, 2], [0, 0, 0]])
    frames, counts = jnp.array([3, 2, 3, 6]), jnp.array([3, 3, 3, 0])
    run = jit(jax.value_and_grad(lambda x: ctc_loss(x, frames, letters, counts), has_aux=True))
    (loss, report), gradient = run(logits)
    assert (float(report["letters"]), float(report["skipped"])) == (3, 2)
    assert float(loss) == pytest.approx(by_hand(logits[0, :3], [1, 2, 3]) / 3, rel=1e-5)
    assert np.abs(gradient[0, :3]).max() > 0.01
    assert np.abs(gradient[1:]).max() == 0
    assert np.abs(gradient[0, 3:]).max() < 1e-6


# --- disturbances -------------------------------------------------------------------------------


def clips(rng, seconds=(1.0, 0.5), room: float | None = None) -> SoundBatch:
    total = int((room or max(seconds)) * SECOND)
    lengths = np.array([int(s * SECOND) for s in seconds], np.int32)
    sound = 0.1 * rng.standard_normal((len(seconds), total))
    sound[np.arange(total) >= lengths[:, None]] = 0
    zeros = np.zeros(len(seconds), np.int32)
    return SoundBatch(
        sound=sound.astype(np.float32),
        lengths=lengths,
        letters=zeros[:, None],
        letter_counts=zeros,
        speaker=zeros,
    )


def wider(batch: SoundBatch, samples: int, rows: int = 0) -> SoundBatch:
    sound = np.pad(batch.sound, ((0, rows), (0, samples)))

    def more(x):
        return np.pad(x, [(0, rows)] + [(0, 0)] * (x.ndim - 1))

    others = {name: more(getattr(batch, name)) for name in vars(batch) if name != "sound"}
    return SoundBatch(sound=sound, **others)


def test_what_is_drawn_for_a_clip_is_its_own(rng):
    """Neither longer clips nor further rows beside it change how a clip is disturbed."""
    batch, key = clips(rng), jax.random.key(3)
    config = Augmentation(noise_prob=1.0, snr_db=(0, 0))
    run = jax.jit(lambda batch: augment_waveform(batch, key, config))
    wide = run(wider(batch, 1000, rows=2))
    np.testing.assert_allclose(wide[:2, :SECOND], run(batch), rtol=1e-4, atol=1e-6)
    assert np.abs(wide[:, SECOND:]).max() == np.abs(wide[1, SECOND // 2 :]).max() == 0
    mels, frames = rng.normal(size=(2, 20, 100)).astype(np.float32), np.array([100, 50])
    run = jax.jit(lambda mels, frames: spec_augment(mels, frames, key, config))
    mels[1, :, 50:] = 0
    wide = run(np.pad(mels, ((0, 1), (0, 0), (0, 30))), np.array([100, 50, 0]))
    np.testing.assert_allclose(wide[:2, :, :100], run(mels, frames), rtol=1e-4, atol=1e-6)
    assert np.abs(wide[2]).max() == 0


def test_a_key_is_a_disturbance_and_none_is_none(rng):
    batch, config = clips(rng), Augmentation(noise_prob=1.0)

    def draw(seed):
        return np.asarray(augment_waveform(batch, jax.random.key(seed), config))

    assert (draw(0) == draw(0)).all()
    assert np.abs(draw(0) - draw(1)).max() > 0.01
    assert np.abs(draw(0)[0] - draw(0)[1])[: SECOND // 2].max() > 0.01
    nothing = Augmentation(gain_db=0, noise_prob=0, time_masks=0, freq_masks=0)
    for key, how in ((None, config), (jax.random.key(0), None), (jax.random.key(0), nothing)):
        assert (np.asarray(augment_waveform(batch, key, how)) == batch.sound).all()
        mels = batch.sound[:, None, :100]
        assert (np.asarray(spec_augment(mels, np.array([100, 100]), key, how)) == mels).all()


def test_noise_is_as_loud_and_gain_as_large_as_asked(rng):
    batch = clips(rng, (1.0,) * 24)

    def power(x):
        return np.square(np.asarray(x)).mean(1)

    only = Augmentation(gain_db=0, noise_prob=1.0, snr_db=(6, 6))
    noise = augment_waveform(batch, jax.random.key(0), only) - batch.sound
    ratio = 10 * np.log10(power(batch.sound) / power(noise))
    np.testing.assert_allclose(ratio, 6, atol=0.7)
    # Of different colours: neighbours of white noise are not alike, those of brown noise are.
    alike = (noise[:, 1:] * noise[:, :-1]).mean(1) / power(noise)
    assert alike.min() < 0.2
    assert alike.max() > 0.7
    gain = augment_waveform(batch, jax.random.key(0), Augmentation(gain_db=6, noise_prob=0))
    change = 10 * np.log10(power(gain) / power(batch.sound))
    assert np.abs(change).max() <= 6
    assert change.min() < -3
    assert change.max() > 3
    some = augment_waveform(batch, jax.random.key(0), Augmentation(gain_db=0, noise_prob=0.5))
    touched = (np.abs(some - batch.sound).max(1) > 0).sum()
    assert 4 < touched < 20


def test_masks_are_as_wide_as_allowed_and_hold_the_mean(rng):
    mels = rng.normal(size=(40, 16, 200)).astype(np.float32)
    frames = np.full(40, 200)
    config = Augmentation(
        time_masks=1, time_mask_width=30, time_mask_fraction=0.1, freq_masks=1, freq_mask_width=4
    )
    out = np.asarray(spec_augment(mels, frames, jax.random.key(0), config))
    changed = out != mels
    moments, bands = changed.all(1).sum(1), changed.all(2).sum(1)  # [B]
    assert moments.max() in (19, 20)  # a tenth of the clip
    assert bands.max() == 4
    assert moments.min() < 5
    assert bands.min() == 0
    edges = np.diff(changed.all(1).astype(int), axis=1)
    assert ((edges == 1).sum(1) <= 1).all()
    means = np.broadcast_to(mels.mean((1, 2))[:, None, None], mels.shape)
    np.testing.assert_allclose(out[changed], means[changed], atol=1e-6)
    starts = {int(row.argmax()) for row in changed.all(1)}
    assert len(starts) > 15


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gain_db", -1.0),
        ("noise_prob", 1.5),
        ("time_mask_fraction", float("nan")),
        ("snr_db", (9.0, 3.0)),
        ("freq_masks", -1),
        ("noise_prob", -0.5),
    ],
)
def test_a_disturbance_that_cannot_be_is_refused(field, value):
    with pytest.raises(TrainError, match=f"{field}=.*expected"):
        Augmentation(**{field: value})


def test_a_disturbance_may_come_from_a_file():
    assert hash(Augmentation(**{"snr_db": [3.0, 9.0]})) == hash(Augmentation(snr_db=(3.0, 9.0)))


# --- batches ------------------------------------------------------------------------------------


def test_an_abstract_batch_is_like_a_placed_one(rng):
    batch = clips(rng, (0.2, 0.1, 0.1))
    like = abstract_sound_batch(None, 3, 3200, 1)
    found = place_network_batch(batch, None)

    def shapes(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert shapes(found) == shapes(like)
    spoilt = replace(batch, lengths=batch.lengths.astype(np.int64))
    assert shapes(place_network_batch(spoilt, None)) == shapes(like)


def test_a_network_goes_without_its_heads():
    assert network_params({"model": {"conv": 1}, "heads": {"letters": 2}}) == {"conv": 1}

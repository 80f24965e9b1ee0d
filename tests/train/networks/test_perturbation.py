"""Speech as another mouth might have said it: what moves, and what stays."""

import shutil

import numpy as np
import pytest
import soundfile

from sa2jax import audio
from sa2jax.audio.features import slaney_edges
from sa2jax.errors import DataError
from sa2jax.train.networks.flow_data import FlowData, FlowDataConfig, prepare_flow
from sa2jax.train.networks.perturbation import MAX_FREQUENCY_FACTOR, MAX_TILT, perturb, warp

RATE, BANDS = 16000, 80
HZ = slaney_edges(RATE / 2, BANDS)[1:-1]


def tone(pitch: float, seconds: float = 1.0) -> np.ndarray:
    """A tone that begins in the middle."""
    time = np.arange(int(seconds * RATE)) / RATE
    return (0.3 * np.sin(2 * np.pi * pitch * time) * (time > seconds / 2)).astype(np.float32)


@pytest.mark.parametrize(("pitch", "factor"), [(1000, 1.25), (1500, 0.8), (600, 1.1)])
def test_a_tone_is_moved_and_begins_when_it_did(pitch, factor):
    mel = audio.s3_log_mel(tone(pitch), n_mels=BANDS)
    found = warp(mel, factor, 0.0)
    other = audio.s3_log_mel(tone(pitch * factor), n_mels=BANDS)
    assert found.shape == mel.shape
    assert found.dtype == np.float32
    assert abs(int(found[:, 75].argmax()) - int(other[:, 75].argmax())) <= 1
    np.testing.assert_array_equal(found.max(0) > 0.5, mel.max(0) > 0.5)


def test_nothing_moved_is_nothing_changed():
    mel = audio.s3_log_mel(tone(700), n_mels=BANDS)
    np.testing.assert_allclose(warp(mel, 1.0, 0.0), mel, atol=1e-6)


def test_a_tilt_is_in_decibels_per_octave():
    mel = np.zeros((BANDS, 3), np.float32)
    found = warp(mel, 1.0, 4.0)[:, 0] * 40  # a fourth of log10 of power
    at = [int(abs(HZ - f).argmin()) for f in (1000, 2000, 4000)]
    np.testing.assert_allclose(found[at], 4 * np.log2(HZ[at] / 1000), atol=1e-5)


def test_the_generator_decides_within_bounds():
    mel = np.random.default_rng(1).random((BANDS, 9), np.float32)
    first, again, other = (perturb(mel, np.random.default_rng(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01
    peak = np.zeros((BANDS, 1), np.float32)
    peak[40] = 9
    moved = [HZ[perturb(peak, np.random.default_rng(n)).argmax()] / HZ[40] for n in range(200)]
    assert 1 / MAX_FREQUENCY_FACTOR * 0.94 < min(moved) < 0.9
    assert 1.1 < max(moved) < MAX_FREQUENCY_FACTOR * 1.06
    flat = np.zeros((BANDS, 1), np.float32)
    ends = [perturb(flat, np.random.default_rng(n))[-1, 0] * 40 for n in range(200)]
    most = MAX_TILT * np.log2(HZ[-1] / 1000)
    assert -most <= min(ends) < -0.8 * most
    assert 0.8 * most < max(ends) <= most


@pytest.fixture(scope="module")
def speech(golden):
    return golden / "token2wav"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sweeps")
    time = np.arange(int(1.6 * 24000)) / 24000
    for number in range(3):
        sweep = 0.3 * np.sin(2 * np.pi * (200 + 300 * number) * time * (1 + time))
        soundfile.write(root / f"{number}.wav", sweep, 24000)
    return root


def batches(folder) -> list:
    config = FlowDataConfig(folder=folder, rows=1, buckets=(75,), shuffle=False, epochs=1)
    return list(FlowData(config, seed=0))


def test_bent_recordings_have_other_codes_and_their_own_voice(run, speech, sources, tmp_path):
    about = prepare_flow([sources], tmp_path / "ready", speech, perturbations=2)
    assert (about["samples"], about["perturbations"]) == (9, 2)
    plain = prepare_flow([sources], tmp_path / "plain", speech)
    assert plain["samples"] == 3
    assert "perturbations" not in plain
    assert about["seconds"] == plain["seconds"]
    assert "3 times, 2 with codes of another mouth" in run("data", "show", tmp_path / "ready")[1]
    assert "another mouth" not in run("data", "show", tmp_path / "plain")[1]
    bent_ones, ones = batches(tmp_path / "ready"), batches(tmp_path / "plain")
    for number, one in enumerate(ones):
        same, first, second = bent_ones[number::3]
        np.testing.assert_array_equal(same.codes, one.codes)
        assert (first.codes != one.codes).any()
        assert (second.codes != first.codes).any()
        for found in (same, first, second):
            np.testing.assert_array_equal(found.mels, one.mels)
            np.testing.assert_array_equal(found.speaker, one.speaker)
            np.testing.assert_array_equal(found.lengths, one.lengths)


def test_the_same_recordings_are_bent_the_same_way(speech, sources, tmp_path):
    both = prepare_flow([sources], tmp_path / "a", speech, perturbations=1)
    again = prepare_flow([sources], tmp_path / "b", speech, perturbations=1)
    assert both["fingerprint"] == again["fingerprint"]
    (tmp_path / "one").mkdir()
    shutil.copy(sources / "1.wav", tmp_path / "one")
    prepare_flow([tmp_path / "one"], tmp_path / "c", speech, perturbations=1)
    alone, among = batches(tmp_path / "c"), batches(tmp_path / "a")[1::3]
    for one, other in zip(alone, among, strict=True):  # heard as it is, then bent
        np.testing.assert_array_equal(one.codes, other.codes)


def test_fewer_than_no_bends(speech, sources, tmp_path):
    with pytest.raises(DataError, match="perturbations=-1: expected 0 or more"):
        prepare_flow([sources], tmp_path / "none", speech, perturbations=-1)

"""Distances of spectra: what they are of known sounds, and what they do not see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit

from sa2jax.train.networks.stft_loss import (
    FLOOR,
    multi_resolution_stft_loss,
    power_spectrum,
    windows_inside,
)

RESOLUTIONS = ((128, 32), (512, 128))
N = 4000


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, N)).astype(np.float32)


@jit
def distance(made, true, first, last):
    return multi_resolution_stft_loss(made, true, first, last, RESOLUTIONS)


def whole(made, true):
    rows = len(made)
    found = distance(made, true, np.zeros(rows, np.int32), np.full(rows, made.shape[1]))
    return tuple(map(float, found))


@pytest.mark.parametrize(("size", "hop"), RESOLUTIONS)
def test_a_window_is_a_scaled_hann_window(noise, size, hop):
    got = np.asarray(power_spectrum(jnp.asarray(noise), size, hop))
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    hann /= np.sqrt(np.sum(hann**2))
    starts = range(0, N - N % hop - size + 1, hop)
    want = [np.abs(np.fft.rfft(noise[:, s : s + size] * hann)) ** 2 for s in starts]
    np.testing.assert_allclose(got, np.stack(want, 1), rtol=1e-3, atol=1e-4)
    assert got[..., 1:-1].mean() == pytest.approx(1, abs=0.05)


def test_windows_lie_between_first_and_last():
    keep = np.asarray(windows_inside(np.array([0, 40]), np.array([320, 300]), 320, 64, 32))[..., 0]
    starts = np.arange(keep.shape[1]) * 32
    assert starts[-1] == 256
    np.testing.assert_array_equal(starts[keep[0]], starts)
    np.testing.assert_array_equal(starts[keep[1]], np.arange(64, 237, 32))


def test_a_sound_is_no_distance_from_itself(noise):
    assert whole(noise, noise) == (pytest.approx(1e-5, rel=1e-2), 0)


def test_twice_as_loud_is_a_distance_of_log_two(noise):
    convergence, magnitude = whole(2 * noise, noise)
    assert convergence == pytest.approx(1, rel=1e-3)
    assert magnitude == pytest.approx(np.log(2), rel=1e-3)


def test_a_turned_sound_is_near_and_another_is_far(noise):
    assert whole(-noise, noise)[1] == pytest.approx(0, abs=1e-4)
    assert whole(noise[::-1].copy(), noise)[1] > 0.5


def test_nothing_is_told_apart_below_the_floor(noise):
    assert whole(noise * FLOOR / 100, 0 * noise)[1] < 1e-2
    assert whole(noise * FLOOR * 100, 0 * noise)[1] > 1


def test_only_what_lies_inside_counts(noise):
    other = noise[::-1].copy()
    first, last = np.array([0, 256]), np.array([3000, 2048])
    found = np.stack(distance(noise, other, first, last))
    spoilt = noise.copy()
    spoilt[0, 3000:], spoilt[1, :256], spoilt[1, 2048:] = 5, -5, 7
    np.testing.assert_array_equal(np.stack(distance(spoilt, other, first, last)), found)

    def pad(x):
        return np.pad(x, ((0, 1), (0, 500)), constant_values=3)

    wide = distance(pad(noise), pad(other), np.append(first, 0), np.append(last, 0))
    np.testing.assert_allclose(np.stack(wide), found, rtol=1e-5)
    assert float(distance(noise, other, first, last + 256)[1]) != pytest.approx(float(found[1]))


def test_rows_without_a_window_are_no_distance(noise):
    none = np.zeros(2, np.int32)
    assert tuple(map(float, distance(noise, -2 * noise, none, none)))[1] == 0
    short = multi_resolution_stft_loss(noise[:, :100], noise[:, :100], none, none, RESOLUTIONS)
    assert tuple(map(float, short)) == (0, 0)


@pytest.mark.parametrize("kind", ["same", "silent", "loud"])
def test_gradients_are_finite(noise, kind):
    made = {"same": noise, "silent": 0 * noise, "loud": 1e3 * noise}[kind]
    last = np.array([N, 0])

    @jit
    def gradient(made):
        def both(made):
            return multi_resolution_stft_loss(made, noise, 0 * last, last, RESOLUTIONS)

        return jax.grad(lambda made: sum(both(made)))(made)

    found = np.asarray(gradient(made))
    assert np.isfinite(found).all()
    assert not found[1].any()

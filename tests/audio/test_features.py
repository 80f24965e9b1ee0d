from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa2jax import audio
from sa2jax.audio import features
from sa2jax.errors import AudioError

# name: the function, frames of n samples, least samples, axis of the frames
FRONT_ENDS = {
    "log_mel": (audio.log_mel, audio.num_frames, 0, -1),
    "s3_log_mel": (audio.s3_log_mel, lambda n: n // 160, 201, -1),
    "mel_24k": (audio.mel_24k, lambda n: n // 480, 721, -1),
    "fbank": (audio.fbank, lambda n: (n - 400) // 160 + 1, 400, -2),
    "fbank_mean": (
        partial(audio.fbank, subtract_mean=True),
        lambda n: (n - 400) // 160 + 1,
        400,
        -2,
    ),
}


# Between NumPy and JAX, measured: 2e-6, but 5e-4 in quiet fbank bands, where the rounding of the
# loud bands shows.
TOLERANCE = dict.fromkeys(FRONT_ENDS, 2e-5) | {"fbank": 2e-3, "fbank_mean": 2e-3}


def on_host(function, *args, **options):
    return function(*args, **options)


def on_device(function, *args, **options):
    return np.asarray(function(*map(jnp.asarray, args), **options))


@pytest.fixture(params=[on_host, on_device])
def run(request):
    """Call a front-end on NumPy arrays, then on JAX arrays."""
    return request.param


def wave(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) / 32768


def noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Coloured noise, louder towards the end."""
    x = rng.standard_normal(shape) + np.sin(np.arange(shape[-1]) / 9)
    return (0.1 * x * np.linspace(0.01, 1, shape[-1])).astype(np.float32)


# ---- against the official front-ends -------------------------------------------------------------


def test_log_mel_equals_official(golden, run):
    """Measured, numpy and jnp: 8.3e-6 at most (wav1), 3e-6 elsewhere."""
    arrays = np.load(golden / "frontend/step_log_mel.npz")
    close = partial(np.testing.assert_allclose, atol=1e-4, rtol=0)
    compared = 0
    for name in sorted(key for key in arrays if key.endswith("_i16")):
        stem = name.removesuffix("_i16")
        for i, chunk in enumerate(audio.split_chunks(wave(arrays[name]))):
            key = f"{stem}_chunk{i}"
            got = run(audio.log_mel, chunk)
            assert got.dtype == np.float32
            assert got.shape[-1] == audio.num_frames(len(chunk)) == arrays[f"{key}_frames"].item()
            assert audio.num_tokens(got.shape[-1]) == arrays[f"{key}_ntok"].item()
            if f"{key}_mel" in arrays:
                close(got, arrays[f"{key}_mel"])
            else:
                first, last = arrays[f"{key}_mel_first40"], arrays[f"{key}_mel_last40"]
                close(got[:, : first.shape[1]], first)
                close(got[:, -last.shape[1] :], last)
                close(got[:, ::7], arrays[f"{key}_mel_every7"])
            compared += 1
    chunks = [key for key in arrays if key.endswith("_frames")]
    assert compared == len(chunks) > 0


def test_filters_and_power_equal_official(golden):
    arrays = np.load(golden / "frontend/step_log_mel.npz")
    filters, power = arrays["mel_filters_128"], arrays["wav1_stft_power_first8"]
    bank = features.slaney(16_000, 400, len(filters))
    np.testing.assert_allclose(bank, filters, atol=1e-8)  # measured: 4e-9, of 0.03
    x = np.pad(wave(arrays["wav1_i16"]), (200, 0), mode="reflect")
    frames = features._frame(np, x, power.shape[1], 400, 160)
    got = features._rfft_power(np, frames, features.hann(400), 400).T
    np.testing.assert_allclose(got, power, atol=1e-5 * power.max())


def test_other_front_ends_equal_official(golden, run):
    arrays = np.load(golden / "frontend/other_features.npz")
    x16, x24 = wave(arrays["wav16_i16"]), wave(arrays["wav24_i16"])
    close = partial(np.testing.assert_allclose, rtol=0)
    close(run(audio.s3_log_mel, x16), arrays["s3_log_mel"], atol=2e-5)  # measured: 3e-6
    close(run(audio.mel_24k, x24), arrays["mel24k"], atol=1e-5)  # measured: 1e-6
    # Quiet bands: the official array is 8e-5 off a float64 run, NumPy's 4e-5, and XLA's FFT rounds
    # in its own way. Measured: 5e-5 and 1.1e-4 between them, on average 1.2e-6.
    atol = 1e-4 if run is on_host else 2e-4
    for mean, key in ((False, "fbank80"), (True, "fbank80_meansub")):
        got = run(audio.fbank, x16, subtract_mean=mean)
        close(got, arrays[key], atol=atol)
        assert np.abs(got - arrays[key]).mean() < 5e-6


def test_token_numbers_equal_official(golden):
    arrays = np.load(golden / "frontend/token_num.npz")
    frames, want = arrays["mel_frames"], arrays["token_num"]
    np.testing.assert_array_equal(audio.num_tokens(frames), want)
    np.testing.assert_array_equal(audio.num_tokens(jnp.asarray(frames)), want)
    assert [audio.num_tokens(int(n)) for n in frames] == want.tolist()


def test_pad_mels_equals_official(golden):
    arrays = np.load(golden / "frontend/padding_mels.npz")
    padded, frames = arrays["padded"], arrays["frames"]
    got, counts = audio.pad_mels([mel[:, :n] for mel, n in zip(padded, frames, strict=True)])
    np.testing.assert_array_equal(got, padded)
    np.testing.assert_array_equal(counts, frames)
    np.testing.assert_array_equal(counts - 2, arrays["lens"])


# ---- lengths -------------------------------------------------------------------------------------


def test_known_lengths():
    assert audio.num_frames(audio.CHUNK_SAMPLES) == 2502
    assert audio.num_tokens(audio.num_frames(audio.CHUNK_SAMPLES)) == 313
    assert audio.num_tokens(audio.num_frames(160_000)) == 125
    assert audio.num_tokens(audio.num_frames(1)) == 0
    assert audio.num_tokens(0) == 0
    assert audio.num_tokens(-9) == 0


def test_every_short_clip_has_its_frames():
    for n in (1, 2, 160, 161, 199, 200, 201, 321):
        assert audio.log_mel(np.ones(n, np.float32)).shape == (128, audio.num_frames(n))


def test_silence_is_the_floor():
    np.testing.assert_allclose(audio.log_mel(np.zeros(1000, np.float32)), -1.5, atol=1e-6)


# ---- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_a_row_does_not_depend_on_its_batch(rng, run, name):
    function, frames_of, least, axis = FRONT_ENDS[name]
    lengths = np.array([least + 1, 5000, 4999, 3207, 4160])
    rows = noise(rng, len(lengths), 5000)
    rows[np.arange(5000) >= lengths[:, None]] = 7.0  # whatever lies in the padding is ignored
    got = run(function, rows, lengths)
    for row, n, mel in zip(rows, lengths, got, strict=True):
        own = frames_of(int(n))
        alone = function(row[:n])
        inside, beyond = np.split(mel, [own], axis=axis)
        assert alone.shape == inside.shape
        np.testing.assert_allclose(inside, alone, atol=TOLERANCE[name])
        assert not beyond.any()


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_full_rows_need_no_lengths(rng, name):
    function = FRONT_ENDS[name][0]
    rows = noise(rng, 2, 3, 2500)
    got = function(rows)
    assert got.shape[:2] == (2, 3)
    np.testing.assert_allclose(got[1, 2], function(rows[1, 2]), atol=1e-5)
    full = function(rows, np.full((2, 3), 2500))
    np.testing.assert_allclose(got, full, atol=1e-5)


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_numpy_and_jit_agree(rng, name):
    function = FRONT_ENDS[name][0]
    x = noise(rng, 30_000)  # more frames than NumPy takes at once
    host = function(x)
    device = jax.jit(function)(jnp.asarray(x))
    assert isinstance(host, np.ndarray)
    assert isinstance(device, jax.Array)
    assert host.dtype == device.dtype == np.float32
    np.testing.assert_allclose(host, device, atol=TOLERANCE[name])


def test_lengths_do_not_retrace():
    traces = 0

    @jax.jit
    def jitted(x, lengths):
        nonlocal traces
        traces += 1
        return audio.log_mel(x, lengths)

    x = jnp.ones((2, 800))
    results = [jitted(x, jnp.array(n)) for n in ([800, 1], [3, 800], [0, 0])]
    assert traces == 1
    assert len({float(r.sum()) for r in results}) == 3


def test_long_numpy_clip_is_cut_into_blocks_without_a_seam(rng, monkeypatch):
    x = noise(rng, 20_000)
    want = audio.s3_log_mel(x)
    monkeypatch.setattr(features, "_BLOCK", 7)
    np.testing.assert_allclose(audio.s3_log_mel(x), want, atol=1e-5)


# ---- the TPU's path ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "fft", "bins"), [(400, 400, 201), (400, 512, 256), (1920, 1920, 641)]
)
def test_product_equals_fft(rng, size, fft, bins):
    x = rng.standard_normal((5, size)).astype(np.float32)
    window = features.hann(size)
    want = features._rfft_power(np, x, window, fft)[:, :bins]
    got = features._dft_power(jnp.asarray(x), window, fft, bins)
    np.testing.assert_allclose(got, want, atol=3e-6 * want.max())


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_tpu_multiplies_and_others_transform(name):
    function = FRONT_ENDS[name][0]
    traced = jax.jit(function).trace(jax.ShapeDtypeStruct((2, 2400), jnp.float32))
    for platform, has_fft in (("tpu", False), ("cpu", True), ("cuda", True)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.fft" in text) == has_fft, platform


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_refusals(name):
    function, _, least, _ = FRONT_ENDS[name]
    good = np.zeros((2, 2000), np.float32)
    with pytest.raises(AudioError, match="divide int16"):
        function(np.zeros(2000, np.int16))
    with pytest.raises(AudioError, match="float samples"):
        function(np.array(0.5))
    with pytest.raises(AudioError, match=f"lengths of {least}..2000"):
        function(good, np.array([2000, 2001]))
    with pytest.raises(AudioError, match=f"lengths of {least}..2000"):
        function(good, np.array([2000, least - 1]))
    with pytest.raises(AudioError, match="one per row"):
        function(good, np.array([2000]))
    if least:
        with pytest.raises(AudioError, match=f"{least} samples or more"):
            function(good[:, : least - 1])
        assert np.isfinite(function(good[:, :least])).all()


def test_pad_mels_refusals_and_bucket():
    mel = np.ones((4, 5), np.float32)
    with pytest.raises(AudioError, match="clips"):
        audio.pad_mels([])
    with pytest.raises(AudioError, match="at most 4 frames"):
        audio.pad_mels([mel], 4)
    padded, counts = audio.pad_mels([mel, mel[:, :2]], 8)
    assert padded.shape == (2, 4, 8)
    assert counts.tolist() == [5, 2]
    assert padded.sum() == mel.sum() + mel[:, :2].sum()

"""The vocoder against the official code, stage by stage; batches and streams against single runs.

Errors in the comments: largest difference measured on the recorded arrays.
"""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.recorded import first_difference
from helpers.recorded_speech import official_pcm

from sa2jax.convert.vocoder import load
from sa2jax.models.vocoder import HiFT, vocoder
from sa2jax.models.vocoder.signal import sine_squared
from sa2jax.models.vocoder.stream import crossfade_weights, vocoder_state
from sa2jax.nn import Policy, functional
from sa2jax.speech_config import VocoderConfig

ATOL = 2e-3  # what the issue asks for
TIGHT = 2e-6  # measured: 2e-7
PCM = 40  # counts of 16 bits, what the issue asks for; measured: 2
ATOL_SINE = 3e-6  # measured: 3e-7
BATCH = 2e-6  # measured: 2e-7
PITCH = 2e-6  # of a pitch, relative to the highest; measured: 4e-7, depending on the CPU


@pytest.fixture(scope="module")
def recording(golden):
    return np.load(golden / "t2w_golden" / "hift.npz")


@pytest.fixture(scope="module")
def whole(golden):
    """Recordings of mels and of the waveforms that the whole pipeline made of them."""
    folder = golden / "t2w_golden"
    return {
        n: np.load(folder / f"{n}.npz") for n in ("flow_offline", "flow_stream", "token2wav_e2e")
    }


@pytest.fixture(scope="module")
def cfg(golden):
    sizes = json.loads((golden / "token2wav" / "tiny_dims.json").read_text())
    return VocoderConfig.from_official(sizes["HiFTGenerator"], sizes["ConvRNNF0Predictor"])


@pytest.fixture(scope="module")
def model(golden, cfg):
    _, params = load(golden / "token2wav" / "hift.pt", cfg)
    return vocoder(cfg), params


class WholePitches(HiFT):
    """A vocoder whose pitches are whole Hz.

    In another batch a pitch is rounded otherwise on some CPUs, and the phases of the harmonics add
    that up over time. Nothing else may differ, which shows where pitches are the same numbers.
    """

    def f0(self, mel, frames=None):
        return jnp.round(super().f0(mel, frames))


@pytest.fixture(scope="module")
def steady(model, cfg):
    """The same parameters, pitches in whole Hz."""
    net = functional(lambda: WholePitches(cfg, policy=Policy(), rngs=nnx.Rngs(0)))
    return net, model[1]


class CompiledVocoder:
    """A vocoder on rows padded to the recorded sizes: each call compiled once for a batch size."""

    def __init__(self, model, cfg, whole, recording):
        self.cfg, (net, self.params) = cfg, model
        sizes = [recording[name].shape[-1] for name in ("mel", "c_mel")]
        stream = whole["flow_stream"]
        chunks = [stream[f"chunk{i}_mel"].shape[-1] for i in range(len(stream["chunk_lens"]))]
        self.whole_size = max(whole["flow_offline"]["feat"].shape[-1], *sizes)
        self.chunk_size = max(*chunks, *sizes)

        @jax.jit
        def stages(params, mel, frames, noise, cache, cached):
            trace = {}
            more = {"noise": noise, "cache_source": cache, "cached": cached}
            speech, _ = net.bind(params)(mel, frames, **more, trace=trace)
            return trace | {"speech": speech}

        @jax.jit
        def step(params, state, mel, frames, last, noise):
            return net.bind(params).step(state, mel, frames, last=last, noise=noise)

        self._stages, self._step = stages, step

    def run(self, mel, noise, cache=None):
        """The whole vocoder on one row: every stage."""
        size, frames = self.whole_size, mel.shape[1]
        cache = np.zeros((1, 0), np.float32) if cache is None else cache
        mel = pad_rows(mel, size, 9)
        noise = pad_rows(noise, size * self.cfg.samples)
        cached = cache.shape[1]
        cache = pad_rows(cache, size * self.cfg.samples)
        return self._stages(self.params, mel, np.array([frames]), noise, cache, np.array([cached]))

    def advance(self, state, mel, frames, last, noise):
        """One step of some streams."""
        mel = pad_rows(mel, self.chunk_size, 9)
        noise = pad_rows(noise, (self.cfg.carry + self.chunk_size) * self.cfg.samples)
        return self._step(self.params, state, mel, np.array(frames), np.array(last), noise)


def pad_rows(x, size, value=0):
    """Rows padded on the right along the second axis."""
    widths = [(0, 0), (0, size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]
    return np.pad(x, widths, constant_values=value)


@pytest.fixture(scope="module")
def compiled(model, cfg, whole, recording):
    return CompiledVocoder(model, cfg, whole, recording)


@pytest.fixture(scope="module")
def steady_compiled(steady, cfg, whole, recording):
    return CompiledVocoder(steady, cfg, whole, recording)


def draws(seed, frames, cfg):
    """The official code's random draws, made again as the recording's README says."""
    generator = np.random.default_rng(seed)
    generator.random((1, cfg.harmonics + 1), np.float32)  # an initial phase without effect
    return generator.standard_normal((1, frames * cfg.samples, cfg.harmonics + 1), np.float32)


def channels_first(trace):
    return {name: x.swapaxes(1, 2) if x.ndim == 3 else x for name, x in trace.items()}


def test_every_stage(compiled, cfg, recording):
    noise = draws(recording["draw_rng_seed"], recording["mel"].shape[-1], cfg)
    np.testing.assert_allclose(noise.sum(dtype=float), recording["draw_sine_noise_sum"][0])
    ours = channels_first(compiled.run(recording["mel"].swapaxes(1, 2), noise))
    bins = cfg.n_fft // 2 + 1
    ours["stft_real"], ours["stft_imag"] = ours["stft"][:, :bins], ours["stft"][:, bins:]
    order = ["f0", "source", "stft_real", "stft_imag", "conv_pre"]
    parts = ["up", "source_down", "source_resblock", "resblock"]
    order += [f"{part}{i}" for i in range(len(cfg.rates)) for part in parts]
    order += ["conv_post", "speech"]
    reference = {}
    for name in order:
        known = [k for k in (name, f"i_{name}") if k in recording]
        known += [k for k in recording if k.removeprefix("i_").startswith(f"{name}_first")]
        if known:
            reference[name] = recording[known[0]]
            ours[name] = ours[name][..., : reference[name].shape[-1]]  # the rest is padding
    reference["source"] = reference["source"][:, 0]
    assert len(reference) >= 10
    # measured: f0 5e-5 Hz, source 3e-5, resblock0 2e-4, conv_post 2e-5, speech 3e-5
    assert first_difference(ours, reference, ATOL) is None


def test_decode_of_a_given_source(compiled, cfg, recording):
    source = recording["source"][:, 0]
    noise = np.zeros((*source.shape, cfg.harmonics + 1), np.float32)
    ours = compiled.run(recording["mel"].swapaxes(1, 2), noise, source)
    end = source.shape[1]
    np.testing.assert_array_equal(ours["source"][:, :end], source)
    np.testing.assert_allclose(ours["speech"][:, :end], recording["decode_only"], atol=TIGHT)


def test_sines(model, recording):
    net, params = model
    sines = jax.jit(lambda params, f0: net.bind(params).harmonics(f0))(params, recording["i_f0"])
    first, last = recording["sines_first960"], recording["sines_last480"]
    np.testing.assert_allclose(sines[:, : first.shape[1]], first, atol=ATOL)  # measured: 2e-6
    np.testing.assert_allclose(sines[:, -last.shape[1] :], last, atol=ATOL)  # 2e-4: theirs drifts


def test_phase_stays_exact_for_a_minute(model, cfg):
    """Against float64; the official float32 sum is off by a radian there."""
    net, params = model
    f0 = np.full((1, 50 * 60), 233.1, np.float32)
    f0[:, ::3] += 7.7
    end = 10 * cfg.samples
    sines = jax.jit(lambda params, f0: net.bind(params).harmonics(f0)[0, -end:])(params, f0)
    ratio = np.asarray(jax.jit(lambda params, f0: net.bind(params).phase_increment(f0))(params, f0))
    place = (np.arange(f0.shape[1] * cfg.samples) + 0.5) / cfg.samples - 0.5
    place = np.clip(place, 0, f0.shape[1] - 1)[-end:]

    def sines_in(dtype):
        turns = np.cumsum(ratio[0], axis=0, dtype=dtype).T.astype(float) * cfg.samples
        phase = [np.interp(place, np.arange(f0.shape[1]), column) for column in turns]
        return np.sin(2 * np.pi * np.stack(phase, -1))

    np.testing.assert_allclose(sines, sines_in(np.float64), atol=ATOL_SINE)
    assert np.abs(sines_in(np.float32) - sines_in(np.float64)).max() > 1e3 * ATOL_SINE


@pytest.mark.parametrize("size", [1, 100, 1e4])
def test_square_of_sine(rng, size):
    x = (size * rng.normal(size=10_000)).astype(np.float32)
    error = np.abs(jax.jit(sine_squared)(x) - np.sin(x.astype(float)) ** 2).max()
    assert error < 1e-6  # measured: 5e-7 at 1e4, else 3e-7


def test_second_chunk_with_cached_source(compiled, cfg, recording):
    mel, cache = recording["c_mel"].swapaxes(1, 2), recording["c_cache_source"][:, 0]
    ours = compiled.run(mel, draws(recording["c_draw_rng_seed"], mel.shape[1], cfg), cache)
    end = mel.shape[1] * cfg.samples
    source, speech = recording["c_source"][:, 0], recording["c_speech"]
    np.testing.assert_allclose(ours["source"][:, :end], source, atol=ATOL)  # measured: 7e-6
    np.testing.assert_allclose(ours["speech"][:, :end], speech, atol=ATOL)  # measured: 5e-6


def test_crossfade(cfg, recording):
    size = cfg.carry * cfg.samples
    rise, fall = crossfade_weights(jnp.array([size]), size)
    window = np.concatenate([rise, fall], axis=1)[0]
    np.testing.assert_allclose(window, recording["speech_window"], atol=1e-6)
    rise, fall = crossfade_weights(jnp.array([size, 100]), size, equal_gain=True)
    np.testing.assert_allclose(rise + fall, 1, atol=1e-6)
    assert float(rise[0, 0]) < 1e-6
    assert np.all(np.diff(rise[1, :100]) > 0)


def test_pitch_of_a_row_does_not_feel_its_batch(model, recording):
    net, params = model
    pitches = jax.jit(lambda params, mel, frames=None: net.bind(params).f0(mel, frames))
    mel = recording["mel"].swapaxes(1, 2)
    lengths = np.array([mel.shape[1], 1, 1 + mel.shape[1] // 3])
    batch = np.random.default_rng(0).normal(size=(3, mel.shape[1] + 3, mel.shape[2]))
    for row, n in enumerate(lengths):
        batch[row, :n] = mel[0, :n]
    together = np.asarray(pitches(params, batch.astype(np.float32), lengths))
    for row, n in enumerate(lengths):
        alone = np.asarray(pitches(params, mel[:, :n]))[0]
        np.testing.assert_allclose(together[row, :n], alone, rtol=0, atol=PITCH * alone.max())


def test_a_row_does_not_feel_its_batch(steady, steady_compiled, cfg, recording):
    """Rows of any length, padded with anything: each is what it would be alone."""
    net, params = steady
    call = jax.jit(lambda params, mel, **more: net.bind(params)(mel, **more))
    mel = recording["mel"].swapaxes(1, 2)
    lengths = np.array([mel.shape[1], 1, 1 + mel.shape[1] // 3])
    rng = np.random.default_rng(0)
    batch = rng.normal(size=(len(lengths), mel.shape[1] + 3, cfg.mels)).astype(np.float32)
    for row, n in enumerate(lengths):
        batch[row, :n] = mel[0, :n]
    shape = len(lengths), batch.shape[1] * cfg.samples, cfg.harmonics + 1
    noise = rng.normal(size=shape).astype(np.float32)
    speech, source = call(params, batch, frames=lengths, noise=noise)
    for row, n in enumerate(lengths):
        end = n * cfg.samples
        own, draw = mel[:, :n], noise[row : row + 1, :end]
        results = [steady_compiled.run(own, draw)]
        if n == lengths[-1]:  # and without any padding and masks
            alone = call(params, own, noise=draw)
            results.append(dict(zip(("speech", "source"), alone, strict=True)))
        for alone in results:
            np.testing.assert_allclose(source[row, :end], alone["source"][0, :end], atol=BATCH)
            np.testing.assert_allclose(speech[row, :end], alone["speech"][0, :end], atol=BATCH)
        assert not np.any(speech[row, end:])


def test_draws_do_not_depend_on_the_batch(model, cfg):
    net, params = model
    source = jax.jit(lambda params, f0, frames, key: net.bind(params).source(f0, frames, key=key))
    f0 = jnp.full((3, 9), 100.0)
    keys = jax.random.split(jax.random.key(3), 3)
    together = source(params, f0, jnp.array([9, 4, 1]), keys)
    assert np.abs(together[0, : cfg.samples] - together[1, : cfg.samples]).max() > 1e-3
    alone = source(params, f0[1:2, :4], None, keys[1:2])
    np.testing.assert_allclose(together[1, : 4 * cfg.samples], alone[0], atol=1e-6)
    np.testing.assert_array_equal(
        together, source(params, f0, jnp.array([9, 4, 1]), jax.random.key(3))
    )


def test_default_noise_has_the_spread_of_the_official_draws(model, cfg, recording):
    """One draw of the joint size instead of one for each harmonic."""
    net, params = model
    f0 = jnp.zeros((1, 200))  # unvoiced: noise only
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(1, 200 * cfg.samples, cfg.harmonics + 1)).astype(np.float32)
    source = jax.jit(lambda params, **more: net.bind(params).source(f0, **more))
    default, official = source(params), source(params, noise=noise)
    np.testing.assert_allclose(default.std(), official.std(), rtol=0.02)
    np.testing.assert_allclose(default.mean(), official.mean(), atol=1e-3)
    np.testing.assert_array_equal(default, source(params, key=jax.random.key(0)))


@pytest.mark.parametrize("variant", ["", "_zero_noise"])
def test_offline_waveform_of_the_whole_pipeline(compiled, cfg, whole, variant):
    mel, e2e = whole["flow_offline"]["feat"].swapaxes(1, 2), whole["token2wav_e2e"]
    noise = draws(e2e["call_rng_seed"], mel.shape[1], cfg) * (not variant)
    speech = compiled.run(mel, noise)["speech"][:, : mel.shape[1] * cfg.samples]
    np.testing.assert_allclose(speech, e2e[f"call_wav{variant}"], atol=ATOL)  # measured: 5e-5


@pytest.mark.parametrize("variant", ["", "_zero_noise"])
def test_stream_of_the_whole_pipeline(compiled, cfg, whole, variant):
    """Every chunk that the official `stream` gave out, from the mels that its flow made."""
    flow, e2e = whole["flow_stream"], whole["token2wav_e2e"]
    state, chunks = vocoder_state(cfg), len(flow["chunk_lens"])
    for i in range(chunks):
        mel = flow[f"chunk{i}_mel"].swapaxes(1, 2)
        frames, last = mel.shape[1], i == chunks - 1
        carried = int(state.frames[0])
        noise = draws(e2e[f"stream{i}_rng_seed"], carried + frames, cfg) * (not variant)
        state, speech, count = compiled.advance(state, mel, [frames], [last], noise)
        pcm = official_pcm(np.asarray(speech[0, : count[0]])).astype(int)
        expected = e2e[f"stream{i}_pcm{variant}"].astype(int)
        assert pcm.shape == expected.shape
        assert np.abs(pcm - expected).max() <= PCM
        if f"stream{i}_hift_cache_source" in e2e and not variant:
            source, held = e2e[f"stream{i}_hift_cache_source"], e2e[f"stream{i}_hift_cache_speech"]
            np.testing.assert_allclose(state.source, source[:, 0], atol=ATOL)
            np.testing.assert_allclose(state.speech, held, atol=ATOL)
    assert int(state.frames[0]) == 0


def test_stream_repeats_the_recorded_second_chunk(compiled, cfg, recording):
    """`hift.npz` holds a mel, another with its source carried on, and their cross-fade."""
    mels = [recording[name].swapaxes(1, 2) for name in ("mel", "c_mel")]
    state, span = vocoder_state(cfg), cfg.carry * cfg.samples
    noise = draws(recording["draw_rng_seed"], mels[0].shape[1], cfg)
    state, speech, count = compiled.advance(state, mels[0], [mels[0].shape[1]], [False], noise)
    expected = recording["speech"][0, :-span]
    np.testing.assert_allclose(speech[0, : count[0]], expected, atol=ATOL)  # measured: 3e-5
    state = replace(state, mel=mels[1][:, : cfg.carry])  # the second mel is of another clip
    chunk = mels[1][:, cfg.carry :]
    noise = draws(recording["c_draw_rng_seed"], mels[1].shape[1], cfg)
    _, speech, count = compiled.advance(state, chunk, [chunk.shape[1]], [True], noise)
    expected = recording["fade_out"][0]
    np.testing.assert_allclose(speech[0, : count[0]], expected, atol=ATOL)  # measured: 1e-5


# Where a recording of n frames is cut; a vocoder carries c of them on.
PARTITIONS = {
    "whole": lambda n, c: [],
    "two": lambda n, c: [n // 4],
    "single frames": lambda n, c: [1, 2, 3, 3 + n // 2, n - 1 - n // 5],
    "as many as are carried": lambda n, c: range(c, n, c),
    "none of them": lambda n, c: [2 * n // 3] * 2,
}


@pytest.mark.parametrize("name", PARTITIONS)
def test_any_partition_gives_all_samples(steady_compiled, cfg, recording, name):
    """Every sample once; a single chunk is the offline run."""
    mel = recording["mel"].swapaxes(1, 2)
    cuts = np.clip(PARTITIONS[name](mel.shape[1], cfg.carry), 0, mel.shape[1]).astype(int)
    partition = np.diff([0, *np.sort(cuts), mel.shape[1]]).tolist()
    state, done, given = vocoder_state(cfg), 0, []
    noise = np.zeros((1, mel.shape[1] * cfg.samples, cfg.harmonics + 1), np.float32)
    for i, size in enumerate(partition):
        chunk = mel[:, done : done + size]
        done += size
        last = i == len(partition) - 1
        state, speech, count = steady_compiled.advance(state, chunk, [size], [last], noise)
        given.append(np.asarray(speech[0, : count[0]]))
        held = 0 if last else min(cfg.carry, done)
        assert sum(map(len, given)) == (done - held) * cfg.samples
    if len(partition) == 1:
        offline = steady_compiled.run(mel, noise)["speech"][0, : done * cfg.samples]
        np.testing.assert_allclose(given[0], offline, atol=BATCH)


def test_streams_do_not_feel_each_other(steady_compiled, cfg, recording):
    """Streams that begin and end at different calls, batched, equal each alone."""
    mel = recording["mel"][0].T
    third, half, most = len(mel) // 3, len(mel) // 2, len(mel)
    # Frames per call; the third replies twice.
    plans = [[third, third, third + 1, 0], [0, half, third - 2, third], [most, 0, third - 1, 0]]
    ends = [[0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 1, 0]]
    keys = jax.random.split(jax.random.key(1), len(plans))
    together = vocoder_state(cfg, len(plans), keys)
    alone = [vocoder_state(cfg, 1, keys[i : i + 1]) for i in range(len(plans))]
    room = (cfg.carry + len(mel)) * cfg.samples
    noise = np.random.default_rng(0).normal(size=(4, len(plans), room, cfg.harmonics + 1))
    noise = noise.astype(np.float32)
    for call in range(4):
        chunk = np.zeros((len(plans), len(mel), cfg.mels), np.float32)
        for row, plan in enumerate(plans):
            places = sum(plan[:call]) + np.arange(plan[call])
            chunk[row, : plan[call]] = mel[places % len(mel)]
        sizes = np.array([plan[call] for plan in plans])
        last = np.array([end[call] for end in ends], bool)
        together, speech, count = steady_compiled.advance(together, chunk, sizes, last, noise[call])
        for row in range(len(plans)):
            mine = slice(row, row + 1)
            alone[row], own, own_count = steady_compiled.advance(
                alone[row], chunk[mine], sizes[mine], last[mine], noise[call, mine]
            )
            assert int(own_count[0]) == int(count[row])
            np.testing.assert_allclose(speech[row], own[0], atol=BATCH)
            assert alone[row].key[0] == together.key[row]

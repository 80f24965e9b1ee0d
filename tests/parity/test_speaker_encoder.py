"""CAM++ speaker encoder against onnxruntime's results for the official graph."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa2jax import checkpoint
from sa2jax.convert.voice_analysis import SPEAKER_ENCODER_FILE, read_speaker_encoder
from sa2jax.models.speaker_encoder import BatchNorm, speaker_encoder
from sa2jax.nn import Policy, functional

ATOL = 1e-4  # measured: 7e-6, of values up to 19


@pytest.fixture(scope="module")
def recording(golden):
    return np.load(golden / "t2w_golden" / "campplus.npz")


@pytest.fixture(scope="module")
def room(golden, recording):
    """Frames that hold every recorded clip, and some more."""
    prompt = np.load(golden / "t2w_golden" / "prepare_prompt.npz")
    clips = recording["fbank0"], recording["fbank1"], prompt["fbank_meansub"]
    return max(map(len, clips)) + 72


@pytest.fixture(scope="module")
def net(golden):
    return read_speaker_encoder(golden / "token2wav" / SPEAKER_ENCODER_FILE)


@pytest.fixture(scope="module")
def run(net):
    model = speaker_encoder(net.config)
    return jax.jit(lambda params, fbank, frames: model.bind(params)(fbank, frames))


def alone(run, net, clip, room):
    """One clip in a buffer of a fixed size (one compilation), with noise behind it."""
    buffer = np.full((1, room, clip.shape[1]), 5.0, np.float32)
    buffer[0, : len(clip)] = clip
    return np.asarray(run(net.params, buffer, np.array([len(clip)])))[0]


def test_a_recorded_clip(recording, run, net):
    fbank = recording["fbank0"]
    ours = run(net.params, fbank[None], np.array([len(fbank)]))
    np.testing.assert_allclose(ours, recording["emb0"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("clip", [0, 1])
def test_recorded_clips_in_padding(recording, run, net, room, clip):
    ours = alone(run, net, recording[f"fbank{clip}"], room)
    np.testing.assert_allclose(ours, recording[f"emb{clip}"][0], atol=ATOL, rtol=0)


def test_recorded_prompt_in_padding(golden, run, net, room):
    prompt = np.load(golden / "t2w_golden" / "prepare_prompt.npz")
    ours = alone(run, net, prompt["fbank_meansub"], room)
    np.testing.assert_allclose(ours, prompt["spk_emb"][0], atol=ATOL, rtol=0)


def test_clips_of_a_batch_do_not_feel_each_other(recording, run, net, room):
    """Lengths around one and two segments of 100 frames at half rate, and very short ones."""
    whole, short = recording["fbank1"], len(recording["fbank0"])
    clips = [np.resize(whole, (n, whole.shape[1])) for n in (199, 200, 201, 202, 18, 4)]
    clips += [whole, whole[:short]]
    room = max(room, 202)
    batch = np.full((len(clips), room, clips[0].shape[1]), -3.0, np.float32)
    for row, clip in zip(batch, clips, strict=True):
        row[: len(clip)] = clip
    together = run(net.params, batch, np.array([len(clip) for clip in clips]))
    for ours, clip in zip(together, clips, strict=True):
        np.testing.assert_allclose(ours, alone(run, net, clip, room), atol=2e-5, rtol=0)


def test_a_clip_of_one_frame_and_of_none_are_numbers(recording, run, net, room):
    one = alone(run, net, recording["fbank0"][:1], room)
    none = alone(run, net, recording["fbank0"][:0], room)
    assert np.isfinite(one).all()
    assert np.isfinite(none).all()


def test_two_voices_differ(recording, run, net, room):
    first, second = (alone(run, net, recording[f"fbank{i}"], room) for i in (0, 1))
    assert np.abs(first - second).max() > 100 * ATOL


def test_padding_of_the_stacked_weights_is_never_read(recording, run, net):
    """Early layers of a block read fewer channels than the stack has room for."""
    leaves = {k: np.array(v) for k, v in checkpoint.flatten(net.params).items()}
    growth = net.config.growth
    for b, layers in enumerate(net.config.layers, 1):
        for leaf in ("norm.scale", "norm.bias", "norm.mean", "squeeze.kernel"):
            stacked = leaves[f"blocks.block{b}.layers.{leaf}"]
            for i in range(layers - 1):
                assert not stacked[i, ..., -growth * (layers - 1 - i) :].any()
                stacked[i, ..., -growth * (layers - 1 - i) :] = 9.0
    fbank = recording["fbank0"]
    ours = run(checkpoint.unflatten(leaves), fbank[None], np.array([len(fbank)]))
    np.testing.assert_allclose(ours, recording["emb0"], atol=ATOL, rtol=0)


def test_batch_norm_is_an_affine_map_of_the_statistics(rng):
    model = functional(lambda: BatchNorm(3, policy=Policy(), rngs=None))  # type: ignore[arg-type]
    params = {name: rng.random(3).astype(np.float32) for name in model.abstract}
    x = rng.standard_normal((2, 5, 3)).astype(np.float32)
    ours = model.bind(jax.tree.map(jnp.asarray, params))(x)
    deviation = np.sqrt(params["variance"] + np.float32(1e-5))
    expected = (x - params["mean"]) / deviation * params["scale"] + params["bias"]
    np.testing.assert_allclose(ours, expected, atol=1e-6)

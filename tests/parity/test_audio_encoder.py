"""Encoder and adapter against the official code, stage by stage."""

import jax
import numpy as np
import pytest
from helpers.recorded import first_difference

from sa2jax.models.audio_encoder import adapter_length, encoder_length

ATOL = 1e-3  # measured: below 1e-5


@pytest.fixture(scope="module")
def recording(recorded):
    return recorded.arrays("encoder")


def mels_of(recording, case):
    """Input batch of a recorded case and its mel frames."""
    if case == "single2":
        mels = recording["single_mel"][..., : int(recording["single2_mel_frames"][0])]
        return mels, recording["single2_len"] + 2
    if case == "mixed":
        frames = recording["mixed_frames"]
        mels = recording["batch_mel"][..., : frames[0]].copy()
        for row, count in enumerate(frames):
            mels[row, :, count:] = 0
        return mels, frames
    return recording[f"{case}_mel"], recording[f"{case}_len"] + 2


def stages_of(model, params, mels, frames, official_batch):
    """Everything the encoder and the adapter compute on the way, under the recording's names."""

    @jax.jit
    def run(params, mels, frames):
        net, trace = model.bind(params), {}
        enc = net.audio_encoder(mels, frames, official_batch=official_batch, trace=trace)
        return trace | {"enc": enc, "adapter": net.adapter(enc, trace=trace)}, trace

    out, trace = run(params, mels, frames)
    out = {
        "conv1_preact": trace["conv1"].swapaxes(1, 2),
        "conv2_preact": trace["conv2"].swapaxes(1, 2),
    } | out
    out |= {f"block{i}": layer for i, layer in enumerate(trace["layers"])}
    return out | {"adapter_conv_preact": trace["adapter_conv"].swapaxes(1, 2)}


def reference_of(recording, case):
    order = ["conv1_preact", "conv2_preact"]
    order += [f"block{i}" for i in range(100)] + ["enc", "adapter_conv_preact", "adapter"]
    return {name: recording[f"{case}_{name}"] for name in order if f"{case}_{name}" in recording}


@pytest.mark.parametrize("case", ["single", "single2", "batch", "mixed"])
def test_every_stage_of_the_official_batch(recording, float32, case):
    model, params = float32
    mels, frames = mels_of(recording, case)
    ours = stages_of(model, params, mels, frames, official_batch=True)
    assert first_difference(ours, reference_of(recording, case), ATOL) is None


@pytest.mark.parametrize("case", ["single", "single2"])
def test_a_clip_alone_needs_no_switch(recording, float32, case):
    model, params = float32
    mels, frames = mels_of(recording, case)
    ours = stages_of(model, params, mels, frames, official_batch=False)["adapter"]
    valid = int(recording[f"{case}_feat_len"][0])
    np.testing.assert_allclose(ours[:, :valid], recording[f"{case}_adapter"][:, :valid], atol=ATOL)


@pytest.mark.parametrize("case", ["single", "single2", "batch", "mixed"])
def test_lengths(recording, recorded, case):
    if f"{case}_enc_len" in recording:
        _, frames = mels_of(recording, case)
        lengths = encoder_length(frames)
        np.testing.assert_array_equal(lengths, recording[f"{case}_enc_len"])
        if f"{case}_feat_len" in recording:
            counts = adapter_length(lengths, recorded.cfg.adapter)
            np.testing.assert_array_equal(counts, recording[f"{case}_feat_len"])


@pytest.mark.parametrize("cut", range(4))  # all remainders that pooling and striding see
def test_a_clip_does_not_feel_its_batch(recording, float32, cut):
    """Next to any other clip, in any padded length: the result of the clip alone."""
    model, params = float32
    listen = jax.jit(lambda params, mels, frames: model.bind(params).encode_audio(mels, frames))
    own = recording["single_mel"][..., : recording["single_mel"].shape[2] - cut]
    frames = own.shape[2]
    alone = listen(params, own, np.array([frames]))
    valid = int(model.bind(params).feature_length(frames))
    for padding in (1, 2, 51):
        batch = np.zeros((2, own.shape[1], frames + padding), np.float32)
        batch[0, :, :frames] = own[0]
        batch[1] = np.sin(np.arange(batch[1].size)).reshape(batch[1].shape)
        both = listen(params, batch, np.array([frames, batch.shape[2]]))
        np.testing.assert_allclose(both[0, :valid], alone[0, :valid], atol=1e-5)


def test_bfloat16_is_as_close_as_the_official_bfloat16(recording, bfloat16):
    model, params = bfloat16
    mels, frames = mels_of(recording, "batch")
    ours = stages_of(model, params, mels, frames, official_batch=True)
    for name in ("enc", "adapter"):
        exact, theirs = recording[f"batch_{name}"], recording[f"batch_bf16_{name}"]
        distance = np.abs(np.asarray(ours[name], np.float32) - exact).max()
        assert distance <= 2 * np.abs(theirs - exact).max()

"""S3 speech tokenizer against the official code: hidden states, quantizer input, codes."""

from functools import partial

import jax
import numpy as np
import pytest
from helpers.recorded import first_difference

from sa2jax.convert.voice_analysis import SPEECH_TOKENIZER_FILE, read_speech_tokenizer
from sa2jax.models.speech_tokenizer import (
    OVERLAP_EDGE,
    STRIDE,
    WINDOW,
    code_length,
    speech_tokenizer,
    tokenize,
)

ATOL = 1e-4  # measured: hidden 7e-6, before rounding 4e-6, layers 6e-6


@pytest.fixture(scope="module")
def recording(golden):
    return np.load(golden / "t2w_golden" / "s3tokenizer.npz")


@pytest.fixture(scope="module")
def net(golden):
    return read_speech_tokenizer(golden / "token2wav" / SPEECH_TOKENIZER_FILE)


@pytest.fixture(scope="module")
def run(net):
    model = speech_tokenizer(net.config)

    @jax.jit
    def stages(params, mels, frames):
        trace = {}
        codes = model.bind(params)(mels, frames, trace=trace)
        return trace | {"codes": codes}

    return partial(stages, net.params)


def batch_of(clips, total=None, fill=0.0):
    """Clips [M, T] right-padded to one array, and their frames."""
    frames = np.array([clip.shape[1] for clip in clips])
    batch = np.full((len(clips), clips[0].shape[0], total or frames.max()), fill, np.float32)
    for row, clip in zip(batch, clips, strict=True):
        row[:, : clip.shape[1]] = clip
    return batch, frames


def reference_of(recording, clip):
    return {name: recording[f"{name}{clip}"] for name in ("hidden", "pre_round")}


def test_every_stage_of_one_clip(recording, run):
    ours = run(*batch_of([recording["mel0"]]))
    assert first_difference(ours, reference_of(recording, 0), ATOL) is None
    np.testing.assert_array_equal(ours["codes"], recording["codes0"])


def test_every_stage_of_a_batch(recording, run, net):
    mels, frames = batch_of([recording["mel0"], recording["mel1"]])
    ours = run(mels, frames)
    names = [f"batch_block{i}" for i in range(net.config.layers)]
    layers = dict(zip(names, ours["layers"], strict=True))
    lengths = code_length(frames)
    np.testing.assert_array_equal(frames, recording["batch_lens"])
    np.testing.assert_array_equal(lengths, recording["batch_code_lens"])
    for row, length in enumerate(lengths):
        own = {name: layer[row, :length] for name, layer in layers.items()}
        reference = {name: recording[name][row, :length] for name in names}
        assert first_difference(own, reference, ATOL) is None
        own = {name: ours[name][row : row + 1, :length] for name in ("hidden", "pre_round")}
        assert first_difference(own, reference_of(recording, row), ATOL) is None
        expected = recording["batch_codes"][row, :length]
        np.testing.assert_array_equal(ours["codes"][row, :length], expected)
        assert not np.any(ours["codes"][row, length:])


def test_codes_of_the_recorded_prompt(golden, recording, run):
    prompt = np.load(golden / "t2w_golden" / "prepare_prompt.npz")
    total = max(prompt["s3_mel"].shape[1], recording["mel0"].shape[1])  # mostly a known program
    ours = run(*batch_of([prompt["s3_mel"]], total))
    expected = prompt["prompt_tokens"][0]
    np.testing.assert_array_equal(ours["codes"][0, : len(expected)], expected)


@pytest.mark.parametrize("padding", [1, 62])
def test_a_clip_does_not_feel_its_batch(recording, run, padding):
    """Not its neighbours, not the length of the padding, not what lies in it."""
    clip = recording["mel0"]
    total = clip.shape[1] + padding
    for cut in range(4):  # all remainders of the length that two strides see
        own = clip[:, : clip.shape[1] - cut]
        alone = run(*batch_of([own], clip.shape[1]))
        together = run(*batch_of([own, recording["mel1"][:, :total]], total, fill=7.0))
        length = code_length(own.shape[1])
        np.testing.assert_array_equal(together["codes"][0, :length], alone["codes"][0, :length])
        np.testing.assert_allclose(
            together["hidden"][0, :length], alone["hidden"][0, :length], atol=1e-5
        )


def test_an_empty_row_has_no_codes(recording, run):
    clip = recording["mel0"]
    mels, _ = batch_of([clip, clip], clip.shape[1] + 1)
    codes = run(mels, np.array([clip.shape[1], 0]))["codes"]
    np.testing.assert_array_equal(codes[0, : code_length(clip.shape[1])], recording["codes0"][0])
    assert not np.any(codes[1])


def stretched(seed: np.ndarray, frames: int) -> np.ndarray:
    """Linear interpolation over time as the recording was made, at half the level."""
    place = np.maximum((np.arange(frames) + 0.5) * seed.shape[1] / frames - 0.5, 0)
    known = np.arange(seed.shape[1])
    return 0.5 * np.stack([np.interp(place, known, band) for band in seed]).astype(np.float32)


def test_long_recording(recording, net):
    model, expected = speech_tokenizer(net.config), recording["long_codes"]
    mel = stretched(recording["long_mel_seed40"][0], 3333)[None]
    run = jax.jit(lambda params, mels, frames: tokenize(model.bind(params), mels, frames))
    codes, lengths = run(net.params, mel, np.array([mel.shape[2]]))
    np.testing.assert_array_equal(lengths, recording["long_code_lens"])
    np.testing.assert_array_equal(codes, expected)


def merged_by_hand(run, mel, official):
    """One clip, window after window, joined as lists."""
    total, shared = mel.shape[1], 0 if official else WINDOW - STRIDE
    starts = [0] if total <= WINDOW else range(0, total - shared, STRIDE)
    parts = []
    for start in starts:
        mels, frames = batch_of([mel[:, start : start + WINDOW]], total=WINDOW)
        parts.append(list(np.asarray(run(mels, frames)["codes"])[0, : code_length(frames[0])]))
    middle = [p[OVERLAP_EDGE:-OVERLAP_EDGE] for p in parts[1:-1]]
    if len(parts) == 1:
        return parts[0]
    return sum(middle, parts[0][:-OVERLAP_EDGE]) + parts[-1][OVERLAP_EDGE:]


@pytest.mark.parametrize("official", [False, True])
def test_windows_of_a_batch_join_as_those_of_single_clips(recording, net, run, official):
    """5300 frames: the released code opens a third window within the second, and loses 2 s."""
    model = speech_tokenizer(net.config)
    seed = recording["long_mel_seed40"][0]
    clips = [stretched(seed, n) for n in (5300, 5700, 3001, 3000, 70)]
    windows = jax.jit(
        lambda params, mels, frames: tokenize(
            model.bind(params), mels, frames, official_windows=official
        )
    )
    mels, frames = batch_of(clips, fill=3.0)
    codes, lengths = windows(net.params, mels, frames)
    for clip, row, length in zip(clips, np.asarray(codes), np.asarray(lengths), strict=True):
        expected = merged_by_hand(run, clip, official)
        assert length == len(expected)
        np.testing.assert_array_equal(row[:length], expected)
        assert not row[length:].any()
    lost = code_length(frames) - np.asarray(lengths)
    assert lost.tolist() == ([OVERLAP_EDGE, 0, 0, 0, 0] if official else [0] * 5)

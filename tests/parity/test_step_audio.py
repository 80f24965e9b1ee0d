"""Logits, hidden states and greedy tokens against the official code."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.recorded import audio_slots, clips_of, first_difference, forward

from sa2jax.inference.engine import Engine
from sa2jax.inference.requests import GenerationConfig, Request
from sa2jax.inference.sampling import SamplingParams
from sa2jax.models.audio_encoder import adapter_length, encoder_length
from sa2jax.nn import Policy
from sa2jax.pipeline import StepAudio2

pytestmark = pytest.mark.optimized

ATOL = 1e-3  # measured: below 2e-5
CASES = ["text_only", "audio_text", "two_clips", "batch_rpad"]


@pytest.fixture(scope="module")
def recording(recorded):
    return recorded.arrays("lalm_logits")


@pytest.fixture(scope="module")
def outputs(recording, recorded, float32):
    """Ours for every recorded case: logits and intermediate results."""
    return {c: forward(*float32, recorded.audio_start, recording, c) for c in CASES}


@pytest.mark.parametrize("case", CASES)
def test_every_stage(recording, recorded, outputs, case):
    logits, trace = outputs[case]
    ours = {"inputs_embeds": trace["embed"], "final_norm": trace["norm"]}
    ours |= {f"layer{i}": layer for i, layer in enumerate(trace["layers"])}
    ours["logits_f32"] = logits[..., recording["cols"]]
    order = ["inputs_embeds", *(f"layer{i}" for i in range(100)), "final_norm", "logits_f32"]
    mask = recording[f"{case}_mask"].astype(bool)
    names = [name for name in order if f"{case}_{name}" in recording]
    reference = {name: recording[f"{case}_{name}"][mask] for name in names}
    ours = {name: np.asarray(ours[name])[mask] for name in names}
    assert first_difference(ours, reference, ATOL) is None


@pytest.mark.parametrize("case", CASES)
def test_best_tokens_over_the_whole_vocabulary(recording, outputs, case):
    logits, mask = np.asarray(outputs[case][0]), recording[f"{case}_mask"].astype(bool)
    if f"{case}_last_logits_f32" in recording:
        np.testing.assert_allclose(logits[:, -1], recording[f"{case}_last_logits_f32"], atol=ATOL)
    if f"{case}_top20_val" in recording:
        ids, values = recording[f"{case}_top20_id"][mask], recording[f"{case}_top20_val"][mask]
        np.testing.assert_allclose(np.take_along_axis(logits[mask], ids, -1), values, atol=ATOL)
    np.testing.assert_array_equal(logits.argmax(-1)[mask], recording[f"{case}_argmax_f32"][mask])


def test_two_clips_are_heard_apart(recording, recorded, float32):
    """Swapping the clips must change the logits: a model that does not listen would not notice."""
    swapped = dict(recording)
    swapped["two_clips_wavs"] = recording["two_clips_wavs"][::-1].copy()
    logits, _ = forward(*float32, recorded.audio_start, swapped, "two_clips")
    reference = recording["two_clips_logits_f32"]
    assert np.abs(np.asarray(logits)[..., recording["cols"]] - reference).max() > 100 * ATOL


@pytest.mark.parametrize("case", ["text_only", "audio_text", "batch_rpad"])
def test_bfloat16_is_as_close_as_the_official_bfloat16(recording, recorded, bfloat16, case):
    if f"{case}_logits_bf16_bits" not in recording:
        pytest.fail(f"the recording lacks {case}_logits_bf16_bits")
    logits, _ = forward(*bfloat16, recorded.audio_start, recording, case)
    mask = recording[f"{case}_mask"].astype(bool)
    exact = recording[f"{case}_logits_f32"]
    bits = recording[f"{case}_logits_bf16_bits"].astype(np.uint32) << 16
    theirs = np.abs(bits.view(np.float32) - exact)[mask].max()
    ours = np.abs(np.asarray(logits)[..., recording["cols"]] - exact)[mask].max()
    assert ours <= 2 * theirs, f"bfloat16 is {ours:.2e} off, the official one {theirs:.2e}"


@pytest.fixture(scope="module")
def greedy(recorded):
    return recorded.arrays("greedy")


def request_of(recorded, greedy, recording, case) -> Request:
    ids = greedy[f"{case}_prompt"]
    if f"{case}_wavs" not in recording:
        return Request(ids)
    wavs, frames = clips_of(recording, case)
    counts = adapter_length(encoder_length(frames), recorded.cfg.adapter)
    slots = audio_slots(ids[None], counts, 10_000, recorded.audio_start)[0]
    starts = [int(np.flatnonzero(slots == clip * 10_000)[0]) for clip in range(len(frames))]
    mels = tuple(wav[:, :count] for wav, count in zip(wavs, frames, strict=True))
    return Request(ids, mels, tuple(starts), tuple(int(c) for c in counts))


ONE_CLIP = ["text_only", "audio_text"]  # where nobody pads a clip
GREEDY = [*ONE_CLIP, "two_clips"]


@pytest.fixture(scope="module")
def default(recorded, float32):
    """An engine to which each clip is alone."""
    return Engine(*float32, recorded.cfg)


@pytest.fixture(scope="module")
def official(recorded, float32):
    """An engine to which a prompt's clips are a batch."""
    return Engine(*float32, recorded.cfg, parity=True)


def official_pipeline(recorded, params) -> StepAudio2:
    """The whole pipeline; it needs no text here, and the recordings have no tokenizer."""
    return StepAudio2(recorded.cfg, params, no_tokenizer, policy=Policy(), parity=True)


def no_tokenizer():
    pytest.fail("nothing is written or read")


def said(tokens, **more):
    options = GenerationConfig(sampling=SamplingParams(temperature=0), max_new_tokens=len(tokens))
    return replace(options, **more)


def assert_says(engine, request, expected):
    """In a batch and in a conversation."""
    ((reply,),) = engine.generate([request], said(expected))
    assert list(reply.ids) == expected
    assert list(engine.submit(request, said(expected)).result().ids) == expected


@pytest.mark.parametrize("case", GREEDY)
def test_greedy_tokens_with_cache(official, recorded, recording, greedy, case):
    request = request_of(recorded, greedy, recording, case)
    assert_says(official, request, greedy[f"{case}_tokens"].tolist())


@pytest.mark.parametrize("case", ONE_CLIP)
def test_greedy_tokens_of_prompts_with_one_clip_need_no_switch(
    default, recorded, recording, greedy, case
):
    request = request_of(recorded, greedy, recording, case)
    assert_says(default, request, greedy[f"{case}_tokens"].tolist())


def test_logits_of_two_clips(official, recorded, recording, greedy):
    request = request_of(recorded, greedy, recording, "two_clips")
    request = replace(request, ids=recording["two_clips_ids"][0])
    ours = official.logits(request)[:, recording["cols"]]
    np.testing.assert_allclose(ours, recording["two_clips_logits_f32"][0], atol=ATOL)


def test_a_shorter_clip_feels_the_longer_one(
    default, official, recorded, recording, greedy, float32
):
    """Most where one has an odd and one an even number of frames, as the shorter one has here."""
    wavs, lens = recording["two_clips_wavs"].copy(), recording["two_clips_wav_lens"].copy()
    short = int(np.argmin(lens))
    lens[short] -= (lens[short] - lens.max()) % 2 == 0
    wavs[short, :, lens[short] + 2 :] = 0
    case = dict(recording) | {"two_clips_wavs": wavs, "two_clips_wav_lens": lens}
    request = request_of(recorded, greedy, case, "two_clips")
    request = replace(request, ids=case["two_clips_ids"][0])
    reference, _ = forward(*float32, recorded.audio_start, case, "two_clips")
    np.testing.assert_allclose(official.logits(request), reference[0], atol=ATOL)
    by_default = np.abs(default.logits(request) - reference[0]).max()
    assert by_default > 10 * ATOL  # measured: 0.8


def test_greedy_tokens_in_one_batch_of_different_lengths(official, recorded, recording, greedy):
    requests = [request_of(recorded, greedy, recording, case) for case in GREEDY]
    tokens = [greedy[f"{case}_tokens"].tolist() for case in GREEDY]
    replies = official.generate(requests, said(max(tokens, key=len)))
    for case, expected, (reply,) in zip(GREEDY, tokens, replies, strict=True):
        assert list(reply.ids[: len(expected)]) == expected, case


def test_greedy_tokens_of_the_official_pipeline(recorded, float32, recording, greedy):
    """It drops the last id, which it takes for the one that ends a reply, whatever it is."""
    pipeline = official_pipeline(recorded, float32[1])
    requests = [request_of(recorded, greedy, recording, case) for case in GREEDY]
    tokens = [greedy[f"{case}_tokens"].tolist() for case in GREEDY]
    for request, expected in zip(requests, tokens, strict=True):
        ((cut,),) = pipeline.generate([request], said(expected, stop_ids=(10**6,)))
        assert (list(cut.ids), cut.finish_reason) == (expected[:-1], "length")
    # A stop id that comes is dropped as ever, and nothing else.
    expected = tokens[-1]
    place = max(expected.index(i) for i in expected)
    ((ended,),) = pipeline.generate(requests[-1:], said(expected, stop_ids=(expected[place],)))
    assert (list(ended.ids), ended.finish_reason) == (expected[:place], "stop")


@pytest.mark.parametrize("case", GREEDY)
def test_step_logits_without_cache(recorded, float32, recording, greedy, case):
    """Re-running everything for every token, as the official code does, gives the same scores."""
    model, params = float32
    tokens = greedy[f"{case}_tokens"]
    whole = dict(recording) | {
        f"{case}_ids": np.concatenate([greedy[f"{case}_prompt"], tokens[:-1]])[None],
        f"{case}_mask": np.ones((1, len(greedy[f"{case}_prompt"]) + len(tokens) - 1), np.int32),
    }
    if recorded.audio_start in tokens:
        pytest.fail("a generated <audio_start> needs a prompt-only comparison")
    logits, _ = forward(model, params, recorded.audio_start, whole, case)
    steps = np.asarray(logits)[0, -len(tokens) :]
    np.testing.assert_allclose(steps[:, greedy["cols"]], greedy[f"{case}_step_logits"], atol=ATOL)
    np.testing.assert_array_equal(steps.argmax(-1), tokens)

"""The gradient of the whole training loss against torch, for every tensor of a checkpoint.

What torch found is recorded as fingerprints (tests/golden/make_gradients.py), so this runs without
it; where torch is, every number is compared.
"""

import json

import jax
import numpy as np
import pytest
from golden.make_gradients import features_of, fingerprint, make_case, torch_gradients
from helpers.recorded import Recorded

from sa2jax import checkpoint
from sa2jax.convert.rules import expand
from sa2jax.convert.step_audio2 import llm_rules
from sa2jax.train.language.step import LanguageBatch, language_loss

ATOL = 1e-4  # of each tensor, relative to its norm; measured: below 4e-6
CHUNK = 10  # does not divide the rows


@pytest.fixture(scope="module")
def micro(golden) -> Recorded:
    return Recorded(golden / "micro")


@pytest.fixture(scope="module")
def recording(golden):
    path = golden / "gradients.npz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return np.load(path)


def alone(case) -> LanguageBatch:
    """Each sequence in a row of its own, each clip too; the deaf row's mel row is empty."""
    ids, starts = case["ids"], case["starts"]
    clips = [case[f"mel_{row}"] if start >= 0 else None for row, start in enumerate(starts)]
    frames = np.array([0 if clip is None else clip.shape[1] for clip in clips], np.int32)
    room = int(frames.max()) + 11  # more than any clip needs
    mels = np.zeros((len(ids), case["mel_0"].shape[0], room), np.float32)
    slots = np.full((len(ids), ids.shape[1] - 1), -1, np.int32)
    stride = ((room + 1) // 2 // 2 - 1) // 2 + 1
    for row, (clip, start) in enumerate(zip(clips, starts, strict=True)):
        if clip is not None:
            mels[row, :, : clip.shape[1]] = clip
            count = features_of(clip.shape[1])
            slots[row, start : start + count] = row * stride + np.arange(count)
    return LanguageBatch(
        ids=ids[:, :-1],
        targets=ids[:, 1:],
        weights=case["weights"],
        mels=mels,
        frames=frames[:, None],
        starts=np.zeros_like(frames)[:, None],
        feature_index=slots,
        metric_masks={"heard": slots >= 0},
    )


def packed(case) -> LanguageBatch:
    """All sequences behind one another in one row, and both clips in one mel row."""
    apart = alone(case)
    lengths = [int(np.flatnonzero(row)[-1]) + 1 for row in np.asarray(case["weights"])]
    room = sum(lengths) + 5

    def line(rows, padding=0):
        flat = np.concatenate([row[:n] for row, n in zip(rows, lengths, strict=True)])
        return np.pad(flat, (0, room - len(flat)), constant_values=padding)[None]

    frames, starts, slots = [], [], np.full(apart.feature_index.shape, -1, np.int32)
    begin = 0
    for row in np.flatnonzero(case["starts"] >= 0):
        clip, start = case[f"mel_{row}"], case["starts"][row]
        count = features_of(clip.shape[1])
        slots[row, start : start + count] = begin // 8 + np.arange(count)
        frames.append(clip.shape[1])
        starts.append(begin)
        begin += 8 * ((clip.shape[1] + 11) // 8)
    mels = np.zeros((1, case["mel_0"].shape[0], begin + 16), np.float32)
    for row, start, count in zip(np.flatnonzero(case["starts"] >= 0), starts, frames, strict=True):
        mels[0, :, start : start + count] = case[f"mel_{row}"]
    return LanguageBatch(
        ids=line(apart.ids),
        targets=line(apart.targets),
        weights=line(apart.weights),
        mels=mels,
        frames=np.array([[*frames, 0]], np.int32),
        starts=np.array([[*starts, begin]], np.int32),
        feature_index=line(slots, -1),
        segments=line([np.full(n, i + 1, np.int32) for i, n in enumerate(lengths)]),
        positions=line([np.arange(n, dtype=np.int32) for n in lengths]),
    )


def gradients(model, params, cfg, batch, remat):
    """The loss, and its gradient under the released names."""

    def loss(params):
        return language_loss(model, params, batch, remat=remat, loss_chunk=CHUNK)

    (value, _), tree = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    leaves = {name: np.asarray(leaf) for name, leaf in checkpoint.flatten(tree).items()}
    found = {}
    for place in expand(llm_rules(cfg), {name: leaf.shape for name, leaf in leaves.items()}):
        leaf = leaves[place.leaf] if place.layer is None else leaves[place.leaf][place.layer]
        found |= zip(place.sources, place.rule.inverse(leaf), strict=True)
    return float(value), found


@pytest.mark.parametrize(("form", "remat"), [(alone, None), (packed, "full")])
def test_every_tensor_has_the_recorded_gradient(micro, recording, form, remat):
    loss, found = gradients(*micro.model("float32"), micro.cfg, form(recording), remat)
    assert loss == pytest.approx(float(recording["loss"]), rel=1e-5)
    assert sorted(found) == recording["names"].tolist()
    off = {}
    for name, (norm, *products) in zip(recording["names"], recording["prints"], strict=True):
        ours = fingerprint(found[name])
        assert norm > 0, f"{name} is not learnt in this case: it tests nothing"
        distance = np.sqrt(np.mean((ours[1:] - products) ** 2))
        error = max(distance, abs(ours[0] - norm)) / norm
        if error > ATOL:
            off[str(name)] = float(error)
    assert not off


def test_a_fingerprint_tells_how_far_a_gradient_is_off(rng):
    gradient, noise = rng.standard_normal((2, 40, 30))
    distance = fingerprint(gradient + 1e-3 * noise)[1:] - fingerprint(gradient)[1:]
    expected = 1e-3 * np.linalg.norm(noise)
    assert np.sqrt(np.mean(distance**2)) == pytest.approx(expected, rel=0.3)
    assert fingerprint(gradient)[0] == pytest.approx(np.linalg.norm(gradient))
    assert np.abs(fingerprint(gradient[::-1])[1:] - fingerprint(gradient)[1:]).max() > 1


@pytest.mark.oracle
@pytest.mark.parametrize("remat", [None, "full", "dots"])
@pytest.mark.parametrize("form", [alone, packed])
def test_every_number_equals_torch(micro, form, remat):
    pytest.importorskip("torch", reason="compares with torch: install sa2jax[parity]")
    folder = micro.folder / "llm"
    config = json.loads((folder / "config.json").read_text())
    case = make_case(config, micro.audio_start, seed=1)
    expected_loss, expected = torch_gradients(folder, case)
    loss, found = gradients(*micro.model("float32"), micro.cfg, form(case), remat)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert sorted(found) == sorted(expected)
    norm = np.linalg.norm
    error = {name: norm(found[name] - expected[name]) / norm(expected[name]) for name in expected}
    assert {name: float(e) for name, e in error.items() if not e <= ATOL} == {}

"""What trainers save around a network is taken apart; what is no weight is told."""

import numpy as np
import pytest

from sa2jax.convert import flow, torch_file, vocoder
from sa2jax.convert.official import OfficialDetokenizer
from sa2jax.convert.transfer import find_state_dict, left_out_note
from sa2jax.errors import CheckpointError

COUNT, FREQUENCIES = np.array(5), np.ones(4, np.float32)
SAVED = {
    "as it is": (lambda t: t, []),
    "beside numbers": (lambda t: {**t, "epoch": 3, "step": 1200}, ["epoch", "step"]),
    "data parallel": (lambda t: {f"module.{n}": x for n, x in t.items()}, []),
    "compiled": (lambda t: {f"_orig_mod.{n}": x for n, x in t.items()}, []),
    "both": (lambda t: {f"module._orig_mod.{n}": x for n, x in t.items()}, []),
    "averaged": (
        lambda t: {"n_averaged": COUNT} | {f"module.{n}": x for n, x in t.items()},
        ["n_averaged"],
    ),
    "deeper": (
        lambda t: {"model": t, "optimizer": {"lr": 1e-4, "state": {}}, "epoch": 1},
        ["epoch", "optimizer.lr"],
    ),
    "deeper still": (lambda t: {"state_dict": {"module": t}}, []),
    "buffers": (
        lambda t: t | {"a.norm.num_batches_tracked": COUNT, "a.rotary_emb.inv_freq": FREQUENCIES},
        ["a.norm.num_batches_tracked", "a.rotary_emb.inv_freq"],
    ),
}


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("network", [flow, vocoder])
def test_the_weights_are_found(golden, monkeypatch, network, kind):
    path = golden / "token2wav" / network.WEIGHTS
    plain, saved = network.open_file(path), torch_file.read(path)
    save, left_out = SAVED[kind]
    monkeypatch.setattr(torch_file, "read", lambda path: save(saved))
    found = network.open_file(path)
    assert (found.config, list(found.left_out)) == (plain.config, left_out)
    assert found.plan.leaves == plain.plan.leaves
    for name in plain.plan.tensors:
        np.testing.assert_array_equal(found.plan.weights.get(name), saved[name])


def test_what_was_left_out_is_told(golden, monkeypatch):
    read = torch_file.read
    monkeypatch.setattr(torch_file, "read", lambda path: read(path) | {"epoch": 3, "lr": 0.1})
    folder = golden / "token2wav"
    expected = [f"left out of {folder / name}: epoch, lr" for name in ("flow.pt", "hift.pt")]
    assert OfficialDetokenizer(folder).notes == expected


def test_many_names_make_a_short_note():
    names = [f"layers.{i}.inv_freq" for i in range(99)] + [f"x{i}" * 90 for i in range(20)]
    (note,) = left_out_note(names, "flow.pt")
    assert note.startswith("left out of flow.pt: layers.{0-98}.inv_freq, x0x0")
    assert note.endswith(" and 15 more")
    assert len(note) < 500
    assert left_out_note([], "flow.pt") == []


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda t: {"model": t, "ema": t}, r"several networks \(model, ema\)"),
        (lambda t: t | {"module.w.weight": t["w.weight"]}, r"two tensors w\.weight"),
    ],
)
def test_which_network_is_meant_must_be_clear(save, message):
    with pytest.raises(CheckpointError, match=message):
        find_state_dict(save({"w.weight": FREQUENCIES}), "w.weight", "x.pt")


def test_another_models_file_says_what_is_missing(golden, monkeypatch):
    monkeypatch.setattr(torch_file, "read", lambda path: {"epoch": 3, 1: COUNT, "w": FREQUENCIES})
    with pytest.raises(CheckpointError, match=r"expected 2 of encoder\.encoders\.\{layer\}"):
        flow.open_file(golden / "token2wav" / "flow.pt")

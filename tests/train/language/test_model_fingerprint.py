"""Fingerprints of models: of the numbers, not of the files."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from sa2jax import checkpoint
from sa2jax.errors import CheckpointError
from sa2jax.train.language.model_fingerprint import PIECE_BYTES, _pieces, weights_fingerprint

LARGE = np.random.default_rng(0).standard_normal((3, 500, 400)).astype(np.float32)  # 2.4 MB
SMALL = np.arange(5, dtype=np.float32)


@pytest.fixture(params=["safetensors", "leaves", "single"])
def save(request):
    """Writes tensors in one of the forms that a model folder may have."""

    def save(folder, large=LARGE, small=SMALL):
        folder.mkdir()
        if request.param == "safetensors":
            save_file({"a.large": large, "b.small": small}, folder / "model.safetensors")
            return folder
        (folder / checkpoint.INFO).write_text(json.dumps({"format": checkpoint.FORMAT}))
        params = {"a": {"large": large}, "b": {"small": small}}
        if request.param == "single":
            checkpoint.save_single(folder, params)
        else:
            checkpoint.save_params(folder / checkpoint.PARAMS, params)
        return folder

    return save


def test_equal_numbers_are_the_same_model(save, tmp_path):
    one, two = (save(tmp_path / name) for name in "ab")
    found = weights_fingerprint(one)
    assert found == weights_fingerprint(two)
    assert found == weights_fingerprint(shutil.copytree(one, tmp_path / "copy"))
    (two / "voices").mkdir()
    save_file({"codes": SMALL}, two / "voices" / "anna.safetensors")
    assert found == weights_fingerprint(two)


def test_other_numbers_are_another_model(save, tmp_path):
    small = SMALL.copy()
    small[3] += 1
    other = [
        weights_fingerprint(save(tmp_path / str(n), **change))
        for n, change in enumerate(
            [
                {},
                {"small": small},
                {"large": LARGE * 1.001},
                {"large": LARGE.reshape(3, 400, 500)},
                {"small": SMALL.astype(np.float16)},
                {"large": np.concatenate([LARGE[:2], LARGE[2:] + 1])},  # one layer of several
            ]
        )
    ]
    assert len(set(other)) == len(other)


def test_shards_are_the_same_as_one_file(tmp_path):
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    whole.mkdir()
    shards.mkdir()
    save_file({"a.large": LARGE, "b.small": SMALL}, whole / "model.safetensors")
    files = {"b.small": "model-00001-of-00002.safetensors"}
    files["a.large"] = "model-00002-of-00002.safetensors"
    for name, array in (("a.large", LARGE), ("b.small", SMALL)):
        save_file({name: array}, shards / files[name])
    index = {"metadata": {}, "weight_map": files}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights_fingerprint(shards) == weights_fingerprint(whole)


def test_a_damaged_folder_is_an_error(save, tmp_path):
    folder = save(tmp_path / "a")
    for path in folder.rglob("*"):
        if path.is_file() and path.name != checkpoint.INFO:
            path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(CheckpointError):
        weights_fingerprint(folder)


def test_pieces_reach_both_ends():
    assert _pieces(0) == [(0, 0)]
    assert _pieces(1 << 20) == [(0, 1 << 20)]
    pieces = _pieces(10_000_000)
    assert (pieces[0][0], pieces[-1][1]) == (0, 10_000_000)
    assert {stop - start for start, stop in pieces} == {PIECE_BYTES}

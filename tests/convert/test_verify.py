import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from sa2jax.convert import hf, weights
from sa2jax.convert.verify import compare_logits, inspect, print_inspection, verify
from sa2jax.errors import CheckpointError


class Arrays:
    """Named arrays as weights that can be written."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays
        self.tensors = {n: weights.TensorInfo(a.shape, a.dtype) for n, a in arrays.items()}

    def get(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def drop(self, name: str) -> None:
        pass

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        weights.write_safetensors(folder, self.tensors, self, 10**9, lambda done, total: None)
        return folder


def read(folder: Path) -> dict[str, np.ndarray]:
    found = weights.SafetensorsFolder(folder)
    return {name: np.array(found.get(name)) for name in found.tensors}


def test_a_folder_equals_itself_and_its_conversion(source, tmp_path):
    hf.convert(source, tmp_path / "ours")
    for a, b in [(source, source), (source, tmp_path / "ours"), (tmp_path / "ours", source)]:
        result = verify(a, b)
        assert result.same
        assert (result.compared, result.casts) == (len(read(source)), 0)
        assert result.max_abs_diff == 0


def test_a_wider_dtype_is_rounded_before_comparing(source, tmp_path):
    hf.convert(source, tmp_path / "wide", dtype="float32")
    result = verify(source, tmp_path / "wide")
    assert result.same
    assert result.casts == result.compared
    assert "rounding to the coarser" in result.summary()


@pytest.mark.parametrize("change", ["one bit", "nan", "minus zero"])
def test_one_changed_number_is_found(source, tmp_path, change):
    arrays = read(source)
    name = "model.layers.1.mlp.down_proj.weight"
    before = float(arrays[name][3, 5])
    if change == "minus zero":
        arrays[name][3, 5] = 0.0
        first = Arrays(arrays).write(tmp_path / "a")
        arrays[name][3, 5] = -0.0
    else:
        first = source
        arrays[name][3, 5] = before * 1.01 if change == "one bit" else np.nan
    after = float(arrays[name][3, 5])
    result = verify(first, Arrays(arrays).write(tmp_path / "b"))
    assert result.differing == (name,)
    assert not result.same
    expected = {"one bit": abs(after - before), "nan": np.inf, "minus zero": 0.0}[change]
    assert result.max_abs_diff == pytest.approx(expected)
    assert f"1 differing, largest difference {expected:.3g}\ndiffering: {name}" in result.summary()


def test_names_and_shapes_that_differ_are_listed(source, tmp_path):
    arrays = read(source)
    arrays["extra"] = arrays.pop("lm_head.weight")
    arrays["model.norm.weight"] = arrays["model.norm.weight"][:-1]
    result = verify(source, Arrays(arrays).write(tmp_path / "b"))
    assert result.only_a == ("lm_head.weight",)
    assert result.only_b == ("extra",)
    (shapes,) = result.shapes
    assert shapes.startswith("model.norm.weight: [")
    assert not result.differing
    assert not result.same


def test_many_differences_are_counted_and_ten_named(source, tmp_path):
    arrays = {name: -array for name, array in read(source).items()}
    summary = verify(source, Arrays(arrays).write(tmp_path / "b")).summary()
    assert f"{len(arrays)} differing" in summary
    assert f"and {len(arrays) - 10} more" in summary


def test_blocks_do_not_change_the_answer(source, tmp_path, monkeypatch):
    arrays = read(source)
    arrays["lm_head.weight"][-1, -1] += 1
    other = Arrays(arrays).write(tmp_path / "b")
    monkeypatch.setattr(weights, "BLOCK_BYTES", 500)
    assert verify(source, other).differing == ("lm_head.weight",)


def test_what_is_no_checkpoint_is_refused(source, tmp_path):
    with pytest.raises(CheckpointError, match="expected"):
        verify(source, tmp_path)


# --- logits ---


def test_equal_logits(rng):
    logits = rng.standard_normal((2, 3, 7)).astype(np.float32)
    result = compare_logits(logits, logits)
    assert (result.positions, result.max_abs_error, result.top1_agreement) == (6, 0, 1)
    assert result.kl == pytest.approx(0, abs=1e-12)


def test_logits_against_numbers_worked_out_by_hand():
    a = np.log(np.array([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]))
    b = np.log(np.array([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]])) + 3  # a shift changes no odds
    result = compare_logits(a, b)
    assert result.kl == pytest.approx((0.5 * np.log(2) - 0.25 * np.log(2)) / 2)
    assert result.top1_agreement == 0.5
    assert result.max_abs_error == pytest.approx(3 + np.log(2))


def test_masked_positions_do_not_count(rng):
    a = rng.standard_normal((1, 4, 5))
    b = a.copy()
    b[0, 3] += 100
    assert compare_logits(a, b, np.array([[True, True, True, False]])).max_abs_error == 0
    with pytest.raises(CheckpointError, match="no position"):
        compare_logits(a, b, np.zeros((1, 4), bool))


def test_logits_of_other_vocabularies_are_refused():
    with pytest.raises(CheckpointError, match=r"\[1, 3\] and \[1, 4\]"):
        compare_logits(np.zeros((1, 3)), np.zeros((1, 4)))


# --- inspect ---


@pytest.mark.parametrize("kind", ["huggingface", "sa2jax"])
def test_inspect_counts_without_reading(source, tmp_path, kind):
    arrays, folder = read(source), source
    if kind == "sa2jax":
        folder = tmp_path / "ours"
        hf.convert(source, folder)
        for leaf in (folder / "params").iterdir():  # metadata must be enough
            for chunk in leaf.glob("[0-9]*") if leaf.is_dir() else []:
                chunk.unlink()
    found = inspect(folder)
    total = sum(a.size for a in arrays.values())
    assert found.kind == kind
    assert [part.name for part in found.parts] == ["adapter", "audio_encoder", "decoder", "total"]
    assert found.parts[-1].parameters == total
    assert found.parts[-1].bytes == 2 * total
    assert sum(row.parameters for row in found.groups) == total
    assert found.memory == {"float32": 4 * total, "bfloat16": 2 * total}
    decoder = sum(a.size for n, a in arrays.items() if n.startswith(("model.", "lm_head.")))
    assert found.parts[2].parameters == decoder
    json.dumps(dataclasses.asdict(found))


def test_inspect_folds_layers_and_prints(source):
    found = inspect(source)
    names = {row.name: row for row in found.groups}
    assert names["model.layers.{0-1}.self_attn.q_proj.weight"].count == 2
    console = Console(width=200, record=True, file=io.StringIO())
    print_inspection(found, console)
    text = console.export_text()
    assert "model.layers.{0-1}.mlp.up_proj.weight" in text
    assert "bfloat16" in text
    assert f"{found.parts[-1].parameters:,}" in text


def test_inspect_refuses_a_damaged_folder(source, tmp_path):
    shutil.copytree(source, tmp_path / "x")
    (tmp_path / "x" / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of 2 shards"):
        inspect(tmp_path / "x")

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from sa2jax.convert import hf, weights
from sa2jax.errors import CheckpointError


def entries(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# --- damaged folders: one clear line, nothing left behind ---


def cut_last_byte(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)


def cut_to_four_bytes(folder: Path) -> None:
    os.truncate(folder / "model-00001-of-00002.safetensors", 4)


def make_pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
    (folder / "model-00001-of-00002.safetensors").write_text(text)


def spoil_header(folder: Path) -> None:
    with (folder / "model-00001-of-00002.safetensors").open("r+b") as file:
        file.seek(8)
        file.write(b"!!")


def quantize(folder: Path) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b'"BF16"', b'"I16" ', 1))


def edit_index(folder: Path, change) -> None:
    path = folder / weights.INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def add_a_byte(folder: Path) -> None:
    with (folder / "model-00001-of-00002.safetensors").open("ab") as file:
        file.write(b"x")


def hold_twice(folder: Path) -> None:
    tensors = {"adapter.conv.bias": np.zeros(3, np.float32)}
    safetensors.numpy.save_file(tensors, folder / "copy.safetensors")
    edit_index(folder, lambda m: m.update({"adapter.conv.bias": "copy.safetensors"}))


def list_too_much(folder: Path) -> None:
    edit_index(folder, lambda m: m.update({"model.extra": "model-00001-of-00002.safetensors"}))


def list_too_little(folder: Path) -> None:
    edit_index(folder, lambda m: m.pop("lm_head.weight"))


def leave_the_folder(folder: Path) -> None:
    edit_index(folder, lambda m: m.update({"lm_head.weight": "../other.safetensors"}))


def pickled_only(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / weights.INDEX]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
            "lacks 1 of 2 shards: model-",
        ),
        (cut_last_byte, "model-00002-of-00002.safetensors: truncated: expected"),
        (add_a_byte, "model-00001-of-00002.safetensors: too long: expected"),
        (hold_twice, "adapter.conv.bias is in both copy.safetensors and model-00002"),
        (cut_to_four_bytes, "truncated or no safetensors file (4 bytes)"),
        (make_pointer, "git lfs pull"),
        (spoil_header, "model-00001-of-00002.safetensors: a damaged header"),
        (quantize, "has dtype I16: expected F32, F16, BF16"),
        (list_too_much, "lacks model.extra, which the index lists"),
        (list_too_little, "holds lm_head.weight, unknown to the index"),
        (leave_the_folder, "is damaged (shard name '../other.safetensors')"),
        (
            lambda f: (f / weights.INDEX).write_text("{"),
            "is damaged (not valid JSON (Expecting",
        ),
        (lambda f: (f / weights.INDEX).unlink(), "found 2 shards but not model.safetensors.index"),
        (pickled_only, "save them as safetensors first"),
    ],
)
def test_damaged_folder_is_refused(broken, tmp_path, damage, message):
    damage(broken)
    with pytest.raises(CheckpointError) as error:
        hf.convert(broken, tmp_path / "out")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert entries(tmp_path) == ["broken"]
    with pytest.raises(CheckpointError) as error:
        hf.load_hf(broken)
    assert message in str(error.value)


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no folder at .*nowhere"):
        weights.SafetensorsFolder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([[0, 4], [0, 4]], r"offsets of 'b'"),
        ([[0, 4], [8, 12]], r"offsets of 'b'"),
        ([[0, 4], [4, 9]], r"offsets of 'b'"),
    ],
)
def test_header_that_contradicts_itself_is_refused(tmp_path, spans, message):
    names = zip("ab", spans, strict=True)
    header = {n: {"dtype": "F32", "shape": [1], "data_offsets": span} for n, span in names}
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(spans[1][1])
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        weights.SafetensorsFolder(tmp_path)


def test_several_damaged_shards_are_named_together(broken, tmp_path):
    cut_last_byte(broken)
    cut_to_four_bytes(broken)
    with pytest.raises(CheckpointError, match=r"model-00001.*model-00002"):
        hf.convert(broken, tmp_path / "out")


# --- parts ---


@pytest.mark.parametrize("size", ["5 apples", "0", "-1GB", "", "GB"])
def test_shard_size_must_be_a_size(size):
    with pytest.raises(CheckpointError, match="expected such as '5GB'"):
        weights.parse_size(size)


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), (7, 7), ("2k", None)]
)
def test_shard_size_units(text, size):
    if size is None:
        with pytest.raises(CheckpointError):
            weights.parse_size(text)
    else:
        assert weights.parse_size(text) == size


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("row_major", [False, True])
def test_blocks_cover_everything_once(monkeypatch, transposed, row_major):
    monkeypatch.setattr(weights, "BLOCK_BYTES", 100)
    array = np.zeros((12, 20), np.float32)
    array = array.T if transposed else array
    cuts = list(weights.blocks(array, (4, 4), row_major=row_major))
    for index in cuts:
        array[index] += 1
    assert (array == 1).all()
    assert len(cuts) > 2
    along = 0 if row_major or not transposed else 1
    assert all(index[1 - along] == slice(None) for index in cuts)
    assert all(index[along].start % 4 == 0 for index in cuts)


def test_dropped_pages_read_the_same_again(source):
    folder = weights.SafetensorsFolder(source)
    for name in folder.tensors:
        before = folder.get(name).tobytes()
        folder.drop(name)
        assert folder.get(name).tobytes() == before


def test_progress_bar_keeps_stdout_clean(capfd):
    with weights.progress_bar("convert") as tick:
        tick(1, 2)
        tick(2, 2)
    assert capfd.readouterr().out == ""


def test_peak_memory_grows_with_what_is_held():
    before = weights.peak_memory()
    held = np.ones(before // 8 + (10 << 20))
    assert weights.peak_memory() > before
    del held
    assert weights.peak_memory() > before

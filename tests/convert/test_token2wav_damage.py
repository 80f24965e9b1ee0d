"""Detokenizers that are damaged, mixed up or malicious: one clear line, nothing left behind."""

import errno
import json
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers.detokenizers import WEIGHTS, change_tensor, entries

from sa2jax.convert import hf
from sa2jax.convert.verify import inspect, verify
from sa2jax.errors import CheckpointError, ConfigError


def refused(model: Path, message: str, kind=CheckpointError) -> str:
    """The error of a conversion; whole and alone it is the same, and leaves nothing."""
    before = entries(model.parent)
    errors = []
    for source in (model, model / "token2wav"):
        with pytest.raises(kind, match=message) as error:
            hf.convert(source, model.parent / "out")
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    assert entries(model.parent) == before
    assert "config.json" not in errors[0]
    return errors[0]


@pytest.mark.parametrize("file", WEIGHTS)
def test_a_missing_file_is_named_with_its_place(model, file):
    (model / "token2wav" / file).unlink()
    error = refused(model, "lacks 1 of the 5 files of a detokenizer")
    assert f"{model / 'token2wav'} lacks" in error
    assert file in error


def test_without_flow_yaml_there_is_no_detokenizer(model, tmp_path):
    (model / "token2wav" / "flow.yaml").unlink()
    report = hf.convert(model, tmp_path / "ours")
    assert set(report.left_out) == {f"token2wav/{file}" for file in WEIGHTS}
    assert any("token2wav has no flow.yaml" in note for note in report.notes)
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors|config"):
        verify(model / "token2wav", tmp_path / "ours")


@pytest.mark.parametrize("file", WEIGHTS)
@pytest.mark.parametrize("part", [0.0, 0.9])
def test_a_truncated_file(model, file, part):
    path = model / "token2wav" / file
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    assert str(path) in refused(model, r"truncated|is no \.pt file")


@pytest.mark.parametrize("file", ["flow.pt", "hift.pt"])
def test_a_pickle_that_would_run_code(model, file, tmp_path):
    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harmed",)

    path = model / "token2wav" / file
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"w": Attack()}, 2))
    error = refused(model, "refused: it asks for")
    assert str(path) in error
    assert not (tmp_path / "harmed").exists()


def test_two_swapped_graphs(model):
    a, b = (model / "token2wav" / file for file in WEIGHTS[2:])
    a.rename(a.with_suffix(".tmp"))
    b.rename(a)
    a.with_suffix(".tmp").rename(b)
    error = refused(model, "another model's graph")
    assert str(b) in error


def test_two_swapped_state_dicts(model):
    folder = model / "token2wav"
    shutil.copy(folder / "flow.pt", folder / "hift.pt")
    error = refused(model, "does not hold the tensors of a HiFT vocoder")
    assert str(folder / "hift.pt") in error


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_blocks: 2", "num_blocks: 3", r"missing tensors: encoder\.encoders\.2\."),
        ("depth: 2", "depth: 1", r"unknown tensors: decoder\.estimator\.blocks\.1\."),
        ("vocab_size: 6561", "vocab_size: 729", r"expected \[729, 32\], got \[6561, 32\]"),
    ],
)
def test_flow_yaml_of_other_sizes(model, old, new, message):
    path = model / "token2wav" / "flow.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    error = refused(model, message)
    assert f"{path.with_name('flow.pt')} does not fit its flow.yaml" in error


def test_flow_yaml_of_another_model(model):
    path = model / "token2wav" / "flow.yaml"
    path.write_text(path.read_text().replace("depth", "deep"))
    assert str(path) in refused(model, "unknown key estimator.deep", ConfigError)


@pytest.mark.parametrize(
    ("key", "size", "tensor", "message"),
    [
        (
            "vocab_size: 6561",
            729,
            "input_embedding.weight",
            r"flow\.yaml has 729 codes, speech_tokenizer_v2_25hz\.onnx 6561",
        ),
        (
            "spk_embed_dim: 192",
            64,
            "spk_embed_affine_layer.weight",
            r"flow\.yaml has 64 numbers in a speaker vector, campplus\.onnx 192",
        ),
    ],
)
def test_files_of_different_detokenizers(model, key, size, tensor, message):
    path = model / "token2wav" / "flow.yaml"
    path.write_text(path.read_text().replace(key, f"{key.split()[0]} {size}"))

    def smaller(a):
        return a[:size] if len(a) > 192 else a[:, :size]

    change_tensor(path.with_name("flow.pt"), smaller, lambda name, _: name == tensor)
    error = refused(model, message)
    assert f"{model / 'token2wav'} holds files of different detokenizers" in error


def test_a_tensor_of_integers(model):
    path = model / "token2wav" / "hift.pt"
    name = change_tensor(path, lambda array: array.astype(np.int32))
    assert f"{name} (int32)" in refused(model, "expected float32, float16, bfloat16")


def test_direction_mistakes(official, ours, tmp_path):
    with pytest.raises(CheckpointError, match="converted already"):
        hf.convert(ours, tmp_path / "out")
    with pytest.raises(CheckpointError, match="expected a folder made by `sa2jax convert`"):
        hf.export(official, tmp_path / "out")
    with pytest.raises(CheckpointError, match="--overwrite"):
        hf.convert(official, ours)
    assert entries(tmp_path) == ["official", "ours"]


def test_a_model_around_a_converted_detokenizer(model, ours, tmp_path):
    shutil.rmtree(model / "token2wav")
    ours.rename(model / "token2wav")
    with pytest.raises(CheckpointError, match="token2wav is converted already"):
        hf.convert(model, tmp_path / "out")


CTRL_C, FULL = KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("action", "alone", "interruption"),
    [
        (hf.convert, False, CTRL_C),
        (hf.convert, True, FULL),
        (hf.export, False, FULL),
        (hf.export, True, CTRL_C),
    ],
)
def test_interrupted_in_the_middle_nothing_is_left(
    model, whole, tmp_path, alone, action, interruption
):
    source = model if action is hf.convert else whole
    source = source / "token2wav" if alone else source
    before = entries(tmp_path)

    def interrupt(done: int, total: int) -> None:
        if done > 0.6 * total:
            raise interruption

    raised, message = (
        (CheckpointError, "disk is full") if interruption is FULL else (KeyboardInterrupt, None)
    )
    with pytest.raises(raised, match=message):
        action(source, tmp_path / "out", progress=interrupt)
    assert entries(tmp_path) == before
    left = tmp_path / ".out.sa2jax-partial"  # of a run that was killed
    (left / "token2wav" / "params").mkdir(parents=True)
    (left / "token2wav" / "flow.pt").write_text("half")
    action(source, tmp_path / "out")
    assert verify(source, tmp_path / "out").same
    assert entries(tmp_path) == sorted([*before, "out"])


@pytest.mark.parametrize("action", [hf.convert, hf.export])
def test_the_disk_must_hold_both_parts(model, whole, tmp_path, monkeypatch, action):
    source = model if action is hf.convert else whole
    free = shutil._ntuple_diskusage(10**9, 0, 3 * 10**6)  # the language model alone would fit
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(CheckpointError, match="the disk is full"):
        action(source, tmp_path / "out")
    assert entries(tmp_path) == ["model", "whole"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("speech_tokenizer.graph", r"cannot read .*speech_tokenizer\.graph .*convert it again"),
        ("params/flow.table/0.0", r"token2wav\.flow\.table|input_embedding\.weight cannot be read"),
        ("params/vocoder.pre.bias/.zarray", "is damaged"),
        ("params/_METADATA", "is no Orbax checkpoint"),
    ],
)
def test_a_damaged_folder_is_not_exported(ours, tmp_path, name, message):
    (ours / name).unlink()
    with pytest.raises(CheckpointError, match=message):
        hf.export(ours, tmp_path / "out")
    assert entries(tmp_path) == ["ours"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["source"], None, "is damaged"),
        (["source", "form", "vocoder"], {"prefix": ""}, r"is damaged \(KeyError\('spelling'\)"),
        (["source", "form", "flow", "dtypes"], {"all": "int4", "but": {}}, "is damaged"),
        (["config", "flow", "mels"], 81, "flow and vocoder must have the same mel bands"),
        (["config", "flow", "estimator", "layers"], 1, r"flow\.estimator\.blocks.*expected \[1, "),
        (["config", "vocoder"], {}, r"token2wav\.vocoder: unknown or missing"),
    ],
)
def test_damaged_info(ours, tmp_path, path, value, message):
    file = ours / "sa2jax.json"
    info = json.loads(file.read_text())
    node = info
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    file.write_text(json.dumps(info))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        hf.export(ours, tmp_path / "out")
    assert entries(tmp_path) == ["ours"]


def test_only_files_in_onnx_need_its_package(official, ours, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert verify(ours, ours).same
    assert inspect(ours).parts
    for action, source in ((hf.convert, official), (hf.export, ours)):
        with pytest.raises(CheckpointError, match=r'pip install "sa2jax\[convert\]"'):
            action(source, tmp_path / "out")
    assert entries(tmp_path) == ["official", "ours"]

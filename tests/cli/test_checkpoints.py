"""Checkpoints converted, exported, compared and shown, as a user types it."""

import errno
import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from sa2jax import cli, testing
from sa2jax.cli import common
from sa2jax.convert.weights import SafetensorsFolder

pytestmark = pytest.mark.usefixtures("leave_no_traces")


def entries(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- conversion ---


@pytest.mark.both_pairs
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_there_and_back_bit_for_bit(run, recorded_checkpoint, tmp_path, dtype):
    source = recorded_checkpoint / "llm"
    extra = [] if dtype is None else ["--dtype", dtype]
    code, out, _ = run("convert", source, tmp_path / "ours", *extra)
    assert code == 0
    assert "peak memory" in out
    assert run("export", tmp_path / "ours", tmp_path / "back", "--max-shard-size", "1MB")[0] == 0
    code, out, err = run("verify", source, tmp_path / "back")
    assert (code, err) == (0, "")
    before, after = SafetensorsFolder(source), SafetensorsFolder(tmp_path / "back")
    assert out == f"{len(before.tensors)} tensors compared, 0 differing, largest difference 0\n"
    assert before.tensors.keys() == after.tensors.keys()
    for name in before.tensors:
        assert before.get(name).tobytes() == after.get(name).tobytes(), name


def test_reports_as_json(run, source, tmp_path):
    code, out, err = run("convert", source, tmp_path / "out", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["tensors"] == len(SafetensorsFolder(source).tensors)
    assert report["bytes"] == 2 * report["parameters"]
    assert report["peak_bytes"] > 10**7


def test_verify_finds_a_difference(run, ours, broken):
    testing.save_tiny_checkpoint(broken, dtype="bfloat16", seed=1)
    code, out, _ = run("verify", ours, broken)
    assert code == 1
    assert "differing: " in out
    code, out, _ = run("verify", ours, broken, "--json")
    assert code == 1
    assert len(json.loads(out)["differing"]) == json.loads(out)["compared"]


@pytest.mark.both_pairs
def test_verify_compares_answers(run, source, ours, recordings):
    code, out, err = run("verify", source, ours, "--text", "hi", "--wav", recordings[0])
    assert (code, err) == (0, "")
    assert "same best token in 100.0%" in out.splitlines()[-1]


@pytest.mark.both_pairs
@pytest.mark.parametrize("form", ["source", "ours"])
def test_inspect(run, source, form, request):
    folder = request.getfixturevalue(form)
    code, out, err = run("inspect", folder)
    assert (code, err) == (0, "")
    assert "…" not in out  # names are whole though this is no terminal
    code, out, _ = run("inspect", folder, "--json")
    assert code == 0
    found = json.loads(out)
    infos = SafetensorsFolder(source).tensors.values()
    assert found["parts"][-1]["parameters"] == sum(info.size for info in infos)
    assert {part["name"] for part in found["parts"]} == {
        "adapter",
        "audio_encoder",
        "decoder",
        "total",
    }


# --- checkpoints that cannot be converted ---


def edit_tensors(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def edit_config(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def misshape(tensors) -> None:
    for name in ("model.norm.weight", "lm_head.weight", "encoder.conv1.bias"):
        tensors[name] = tensors[name][:-1].copy()


DAMAGE = {
    "missing shard": (
        lambda f: (f / "model-00002-of-00003.safetensors").unlink(),
        ["lacks 1 of 3 shards: model-00002-of-00003.safetensors"],
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors"]),
    "truncated": (truncate, ["model.safetensors: truncated: expected"]),
    "unknown tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({"visual.proj": np.ones(3, np.float32)})),
        ["1 unknown tensors: visual.proj"],
    ),
    "missing tensors": (
        lambda f: edit_tensors(f, lambda t: [t.pop("model.norm.weight"), t.pop("lm_head.weight")]),
        ["2 missing tensors: model.norm.weight, lm_head.weight"],
    ),
    "wrong shapes": (
        lambda f: edit_tensors(f, misshape),
        ["got [31]): model.norm.weight", "lm_head.weight", "got [15]): encoder.conv1.bias"],
    ),
    "architecture": (
        lambda f: edit_config(f, lambda c: c.update(architectures=["LlamaForCausalLM"])),
        ["['LlamaForCausalLM']: this is another model's checkpoint"],
    ),
    "another function": (
        lambda f: edit_config(f, lambda c: c["text_config"].update(num_experts=8)),
        ["num_experts=8 is not supported"],
    ),
    "wrong type": (
        lambda f: edit_config(f, lambda c: c["text_config"].update(hidden_size="32")),
        ["text_config.hidden_size must be a whole number above 0, at most 16777216, got '32'"],
    ),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json: not valid JSON"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["no config.json"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint(refused, tmp_path, damage):
    sharded = {"shard_bytes": 300_000} if damage == "missing shard" else {}
    broken = testing.save_tiny_checkpoint(tmp_path / "broken", **sharded)
    apply, parts = DAMAGE[damage]
    apply(broken)
    line = refused("convert", broken, tmp_path / "out")
    for part in parts:
        assert part in line
    assert os.listdir(tmp_path) == ["broken"]


def test_damaged_checkpoint_is_not_run(refused, broken, recordings):
    truncate(broken)
    assert "truncated" in refused("asr", recordings[0], "--model", broken)
    assert "truncated" in refused("inspect", broken)
    assert "truncated" in refused("verify", broken, broken)


@pytest.mark.parametrize("command", ["convert", "export"])
def test_output_that_holds_something_else(refused, source, ours, tmp_path, command):
    folder = {"convert": source, "export": ours}[command]
    (tmp_path / "notes.txt").write_text("mine")
    for extra in ([], ["--overwrite"]):
        assert "already holds something else" in refused(command, folder, tmp_path, *extra)
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_output_that_holds_a_checkpoint(run, refused, source, tmp_path):
    out = tmp_path / "out"
    assert run("convert", source, out)[0] == 0
    before = entries(tmp_path)
    assert "choose another folder or --overwrite" in refused("convert", source, out)
    assert run("convert", source, out, "--overwrite")[0] == 0
    assert entries(tmp_path) == before


def test_wrong_direction(refused, source, ours, tmp_path):
    assert "is converted already" in refused("convert", ours, tmp_path / "out")
    assert "expected a folder made by `sa2jax convert`" in refused(
        "export", source, tmp_path / "out"
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", ["convert", "export"])
def test_full_disk(run, refused, source, ours, tmp_path, monkeypatch, command):
    """Noticed before, when the numbers tell, or in the middle: nothing stays behind."""
    folder, out = {"convert": source, "export": ours}[command], tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
        assert "the disk is full" in refused(command, folder, out)
    assert os.listdir(tmp_path) == []

    @contextmanager
    def bar(title, unit="bytes"):
        def tick(done, total):
            if done > total / 2:
                raise OSError(errno.ENOSPC, "No space left on device")

        yield tick

    with monkeypatch.context() as patch:
        patch.setattr(common, "progress_bar", bar)
        assert "the disk is full" in refused(command, folder, out)
    assert os.listdir(tmp_path) == []
    assert run(command, folder, out)[0] == 0


# --- what it is made from, and what lies outside of it ---


@pytest.mark.parametrize("command", ["convert", "export"])
def test_a_source_is_not_replaced(refused, source, ours, tmp_path, command):
    folder = {"convert": source, "export": ours}[command]
    kept = entries(folder)
    (tmp_path / "link").symlink_to(folder)
    for out, verb in (
        (folder, "is"),
        (folder / ".." / folder.name, "is"),
        (tmp_path / "link", "is"),
        (tmp_path / "link" / "new", "lies in"),
    ):
        said = refused(command, folder, out, "--overwrite")
        assert f"{out} {verb} {folder}, which it would be made from: choose another" in said
    assert entries(folder) == kept
    assert os.listdir(tmp_path) == ["link"]


def test_a_model_is_not_replaced_by_what_is_made_of_it(refused, ours, converted_detokenizer):
    for command, other in (("assemble", converted_detokenizer), ("merge", ours)):
        kept = entries(ours)
        said = refused(command, ours, other, ours, "--overwrite")
        assert f"{ours} is {ours}, which it would be made from" in said
        assert entries(ours) == kept
    said = refused("assemble", ours, converted_detokenizer, converted_detokenizer, "--overwrite")
    assert "which it would be made from" in said


def test_a_link_out_of_the_folder_is_not_copied(refused, run, broken, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (broken / "notes.txt").symlink_to(secret)
    said = refused("convert", broken, tmp_path / "out")
    assert f"notes.txt is a link to {secret}, outside of its folder: remove it" in said
    assert sorted(os.listdir(tmp_path)) == ["broken", "secret"]
    (broken / "notes.txt").unlink()
    (broken / "notes.txt").symlink_to("config.json")
    assert run("convert", broken, tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "notes.txt").read_bytes() == (broken / "config.json").read_bytes()


def test_output_to_a_full_disk(ours, monkeypatch, capsys):
    with Path("/dev/full").open("w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as end:
            cli.main(["inspect", str(ours)])
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: the disk is full: cannot write the output\n"

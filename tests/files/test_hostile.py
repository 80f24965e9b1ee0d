"""Small files that once ate the machine or ended in a traceback: one line each, at once."""

import json
import os
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sa2jax.config import StepAudio2Config
from sa2jax.convert import torch_file
from sa2jax.convert.weights import INDEX, SafetensorsFolder
from sa2jax.errors import CheckpointError, ConfigError, FileError, Sa2jaxError, shorten
from sa2jax.files import raw
from sa2jax.files.archives import Archive, parse_npz
from sa2jax.files.json_files import parse_json, read_json
from sa2jax.files.limits import JSON, Limits
from sa2jax.files.safetensors_files import read_safetensors
from sa2jax.files.yaml_files import parse_yaml
from sa2jax.flow_yaml import read_flow_yaml

HOSTILE = Path(__file__).parent / "hostile"


def read(path, folder):
    """As a command would come to it."""
    if path.suffix == ".yaml":
        return read_flow_yaml(path)
    if path.suffix == ".pt":
        return torch_file.read(path)
    if path.name.startswith("config"):
        return StepAudio2Config.from_hf(path)
    shutil.copy(path, folder / (INDEX if path.suffix == ".json" else "model.safetensors"))
    return SafetensorsFolder(folder)


REASONS = {
    "broken-deflate.pt": (CheckpointError, "is compressed"),
    "config-1e9-layers.json": (
        ConfigError,
        "num_hidden_layers must be a whole number",
    ),
    "config-5000-digits.json": (ConfigError, "a number of 5001 digits"),
    "flow-bad-date.yaml": (ConfigError, "unknown key a"),
    "flow-deep.yaml": (ConfigError, "nested more than 40 deep"),
    "flow-laughs.yaml": (ConfigError, "more than 20000 values"),
    "flow-ref-int.yaml": (ConfigError, "!ref 5: expected <key>"),
    "flow-self-alias.yaml": (ConfigError, "*f stands for nothing, or inside itself"),
    "header-deep.safetensors": (CheckpointError, "nested"),
    "index-surrogate.json": (CheckpointError, "surrogates not allowed"),
    "int-key.pt": (CheckpointError, "got 1 as a name"),
    "laughs-repr.pt": (CheckpointError, "refused: its pickle calls a tuple"),
    "shape-inf.safetensors": (CheckpointError, "1e999 is too large"),
}


def test_every_hostile_file_has_its_line():
    assert sorted(path.name for path in HOSTILE.iterdir()) == sorted(REASONS)


@pytest.mark.parametrize("name", REASONS)
def test_hostile_file(name, tmp_path):
    kind, reason = REASONS[name]
    started = time.process_time()
    with pytest.raises(kind) as caught:
        read(HOSTILE / name, tmp_path)
    assert time.process_time() - started < 2
    assert reason in str(caught.value)
    assert len(f"error: {caught.value}") < 500


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1e999", "1e999 is too large"),
        ("-1e999", "too large"),
        ("NaN", "NaN is not JSON"),
        ("-Infinity", "-Infinity is not JSON"),
        (str(2**63), "a number of 19 digits"),
        ("9" * 4000, "a number of 4000 digits"),
        ("[" * 5000, "not valid JSON"),
        ("[" * 101 + "]" * 101, "nested more than 100 deep"),
        ('{"a":' * 101 + "1" + "}" * 101, "nested more than 100 deep"),
        (r'"\ud800"', "not UTF-8"),
        (r'{"\uDC00": 1}', "not UTF-8"),
        ('"\ud800"', "not UTF-8"),
        (b"\xff", "not UTF-8"),
        ("{}".encode("utf-16"), "UTF-16: save it as UTF-8"),
        ("[1] 2", "Extra data"),
        ("", "Expecting value"),
    ],
)
def test_json_that_is_refused(text, why):
    with pytest.raises(FileError, match=why):
        parse_json(text)


def test_json_that_is_taken():
    value = {"a": [2**63 - 1, 1.5, None, True, "é\u2028😀"]}
    text = '{"a": [9223372036854775807, 1.5, null, true, "é\u2028\\ud83d\\ude00"]}'
    for given in (text, text.encode(), "\ufeff" + text, text.encode("utf-8-sig")):
        assert parse_json(given, dict) == value
    assert np.isnan(parse_json("NaN", finite=False))
    assert parse_json("[" * 100 + "]" * 100) is not None
    with pytest.raises(FileError, match="expected a JSON object, got list"):
        parse_json("[]", dict)


def test_more_values_than_any_file_has():
    few = Limits(bytes=100, nodes=3, depth=3)
    assert parse_json('["a,b,c,d", 1, 2]', limits=few) == ["a,b,c,d", 1, 2]
    with pytest.raises(FileError, match="expected at most 3 values"):
        parse_json("[1, 2, 3, 4]", limits=few)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: 0x_", "cannot be made"),
        ("a: !!int x", "cannot be made"),
        ("a: !!bool maybe", "cannot be made"),
        ("a: !!float z", "cannot be made"),
        ("a: !!timestamp 2001-99-99", "timestamp"),
        ("a: !!binary x", "binary"),
        ("a: !!set {x}", "set"),
        ("1: 2", "expected text as a key, got int"),
        ("? [a]\n: b", "unhashable key"),
        ("a: .inf", "not finite"),
        ("a: 99999999999999999999", "64 bits"),
        ("a: !!python/object/apply:os.system [true]", "python/object"),
        ("- &a [*a]", r"\*a stands for nothing, or inside itself"),
        ("[" * 3000, "nested more than 40 deep"),
        ("- " * 25_000, "more than|nested more"),
        ("a\0b", "special characters"),
    ],
)
def test_yaml_that_is_refused(text, why):
    with pytest.raises(FileError, match=why):
        parse_yaml(text)


def test_aliases_that_stay_within_the_limits():
    text = "a: &a [1, 2]\nb: &b {c: *a, d: *a}\ne: {<<: *b, f: 3}"
    assert parse_yaml(text)["e"] == {"c": [1, 2], "d": [1, 2], "f": 3}
    nested = "\n".join(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 60))
    with pytest.raises(FileError, match="nested more than 40 deep"):
        parse_yaml("a0: &a0 []\n" + nested)
    with pytest.raises(FileError, match="stands for nothing"):
        parse_yaml("a: *b")


def test_dates_are_text():
    assert parse_yaml("a: 2001-12-14t21:59:43.10+99:99\nb: 2024-99-99") == {
        "a": "2001-12-14t21:59:43.10+99:99",
        "b": "2024-99-99",
    }


@pytest.fixture
def pipe(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


def test_what_is_no_file(tmp_path, pipe):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path, why in (
        (pipe, "expected a file, got a pipe"),
        (Path("/dev/zero"), "expected a file, got a device"),
        (tmp_path, "expected a file, got a folder"),
        (loop, "cannot be opened"),
        (tmp_path / ("x" * 5000), "cannot be opened"),
        (tmp_path / "a\0b", "cannot be opened"),
        (tmp_path / "none", "No such file"),
    ):
        with pytest.raises(FileError, match=why) as caught:
            read_json(path)
        assert len(str(caught.value)) < 490
        with pytest.raises(FileError, match=why):
            read_safetensors(path)
        with pytest.raises(Sa2jaxError):
            torch_file.read(path)


def test_a_shard_with_a_name_that_no_file_can_have(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "x" * 5000}}))
    with pytest.raises(CheckpointError, match="lacks 1 of 1 shards"):
        SafetensorsFolder(tmp_path)


def test_a_file_that_is_too_large_is_not_read_whole(tmp_path):
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(FileError, match="expected at most"):
        read_json(path)


def zipped(path, **entries) -> bytes:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return path.read_bytes()


def test_an_archive_that_unpacks_to_more_than_may_be(tmp_path):
    data = zipped(tmp_path / "a.npz", **{"a.npy": bytes(1 << 20)})
    with pytest.raises(FileError, match="more numbers than are read"):
        parse_npz(data, "a.npz", Limits(bytes=1 << 19, nodes=9, depth=1))
    with pytest.raises(FileError, match="at most 0 entries"):
        parse_npz(data, "a.npz", Limits(bytes=1 << 30, nodes=0, depth=1))
    with pytest.raises(FileError, match="no array of numpy"):
        parse_npz(data, "a.npz")


def test_broken_and_encrypted_streams(tmp_path):
    data = bytearray(zipped(tmp_path / "a.zip", a=bytes(range(256)) * 40))
    start = data.find(b"a", 30) + 1
    data[start : start + 8] = b"\xff" * 8
    (tmp_path / "b.zip").write_bytes(data)
    with (tmp_path / "b.zip").open("rb") as file, pytest.raises(FileError, match="is damaged"):
        Archive(file, bytes(data), "b.zip").unpack("a")
    data[6] |= 1
    data[data.find(b"PK\1\2") + 8] |= 1
    (tmp_path / "b.zip").write_bytes(data)
    with (tmp_path / "b.zip").open("rb") as file, pytest.raises(FileError, match="is encrypted"):
        Archive(file, bytes(data), "b.zip").unpack("a")


def test_only_a_line_feed_ends_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    text = "one\u2028two\u0085three\u2029four"
    one = f'{{"text": "{text}"}}'
    path.write_bytes(f"\ufeff{one}\r\n\n  \n{{}}".encode())
    lines = list(raw.read_jsonl_lines(path))
    assert [number for number, _ in lines] == [1, 4]
    assert parse_json(lines[0][1]) == {"text": text}


def test_long_messages_keep_their_ends():
    assert shorten("short") == "short"
    text = "name " * 2000 + "download it again"
    assert len(shorten(text)) <= 480
    assert shorten(text).endswith("download it again")
    error = FileError("x" * 5000, "y" * 5000)
    assert len(str(error)) <= 480
    assert "y" in str(error)
    assert JSON.bytes < 1 << 30

"""Reading `.pt` files as data: real ones, hostile ones and damaged ones."""

import builtins
import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from sa2jax.convert.torch_file import read, write
from sa2jax.convert.weights import TensorInfo
from sa2jax.errors import CheckpointError
from sa2jax.files import torch_pickle

ARRAYS = {
    "f32": np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4),
    "f64": np.array([1e300, -0.0]),
    "f16": np.array([0.5, 65504], np.float16),
    "bf16": np.array([0.1, 3e38], ml_dtypes.bfloat16),
    "i64": np.array([-(2**62), 2**40]),
    "i32": np.arange(5, dtype=np.int32),
    "i16": np.arange(-3, 3, dtype=np.int16),
    "i8": np.array([-128, 127], np.int8),
    "u8": np.arange(7, dtype=np.uint8),
    "bool": np.array([[True], [False]]),
    "c64": np.array([1 + 2j], np.complex64),
    "scalar": np.array(3.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "deep.name/ü": np.arange(12, dtype=np.float32).reshape(3, 4).T,  # not contiguous
}
ONE = {"data/0": np.arange(6, dtype=np.float32).tobytes(), "version": b"3\n"}


class Call:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def archive(path, program, entries=ONE, root="model/", compression=zipfile.ZIP_STORED):
    """A zip archive laid out as torch.save does it."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in ({"data.pkl": program} | dict(entries)).items():
            file.writestr(root + name, data)
    return path


def program(offset=0, shape=(2, 3), strides=(3, 1), elements=6, kind="FloatStorage", wrap=""):
    """The pickle of `{"w": tensor}`, written by hand from torch's layout."""
    tensor = (
        f"ctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\n{kind}\nX\1\0\0\0"
        f"0X\3\0\0\0cpuK{chr(elements)}tQK{chr(offset)}({''.join('K' + chr(n) for n in shape)}t"
        f"({''.join('K' + chr(n) for n in strides)}t\x89ccollections\nOrderedDict\n)RtR"
    ).replace("(ctorch._utils", "ctorch._utils", 1)
    return ("\x80\2}X\1\0\0\0w" + wrap + tensor + ("\x89)tR" if wrap else "") + "s.").encode(
        "latin1"
    )


def test_round_trip(tmp_path):
    write(tmp_path / "a.pt", ARRAYS)
    got = read(tmp_path / "a.pt")
    assert list(got) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array, strict=True)
        assert not got[name].flags.writeable
        assert got[name].size == 0 or got[name].ctypes.data % 64 == 0
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_same_tensors_make_the_same_file(tmp_path):
    (tmp_path / "b").mkdir()
    for folder in (tmp_path, tmp_path / "b"):
        write(folder / "a.pt", ARRAYS)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b" / "a.pt").read_bytes()


def test_tensors_can_be_read_when_their_turn_comes(tmp_path):
    asked = []

    def get(name: str) -> np.ndarray:
        asked.append(name)
        return ARRAYS[name].astype(np.float64)

    floats = {n: a for n, a in ARRAYS.items() if a.dtype in (np.float32, np.float16)}
    infos = {n: TensorInfo(a.shape, a.dtype) for n, a in floats.items()}
    write(tmp_path / "a.pt", infos, get)
    assert asked == list(floats)
    for name, array in read(tmp_path / "a.pt").items():
        np.testing.assert_array_equal(array, floats[name], strict=True)


def test_a_full_disk_leaves_nothing(tmp_path):
    def get(name: str) -> np.ndarray:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="the disk is full"):
        write(tmp_path / "a.pt", ARRAYS, get)
    assert not list(tmp_path.iterdir())


def test_unknown_dtype_is_not_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"no storage for.*uint16"):
        write(tmp_path / "a.pt", {"a": np.zeros(2, np.uint16)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["flow.pt", "hift.pt"])
def test_recorded_files(golden, tmp_path, name):
    """Files that torch 2.13 wrote; the copy that we write holds the same."""
    tensors = read(golden / "token2wav" / name)
    assert tensors
    assert all(np.isfinite(a).all() for a in tensors.values())
    write(tmp_path / name, tensors)
    for key, again in read(tmp_path / name).items():
        np.testing.assert_array_equal(again, tensors[key], strict=True)


@pytest.mark.oracle
def test_torch_reads_what_we_write_and_back(tmp_path):
    torch = pytest.importorskip("torch", reason="compares with torch: install sa2jax[parity]")
    write(tmp_path / "ours.pt", ARRAYS)
    theirs = torch.load(tmp_path / "ours.pt", weights_only=True)
    torch.save(theirs, tmp_path / "theirs.pt")
    again = read(tmp_path / "theirs.pt")
    for name, array in ARRAYS.items():
        assert theirs[name].shape == array.shape
        np.testing.assert_array_equal(again[name], array, strict=True)


def test_strides_and_offset(tmp_path):
    values = np.arange(6, dtype=np.float32)
    path = archive(tmp_path / "a.pt", program())
    np.testing.assert_array_equal(read(path)["w"], values.reshape(2, 3))
    turned = archive(tmp_path / "b.pt", program(shape=(3, 2), strides=(1, 3)))
    np.testing.assert_array_equal(read(turned)["w"], values.reshape(2, 3).T)
    part = archive(tmp_path / "c.pt", program(offset=1, shape=(2,), strides=(4,)))
    np.testing.assert_array_equal(read(part)["w"], [1, 5])
    wide = archive(tmp_path / "d.pt", program(shape=(4, 2), strides=(0, 1)))
    np.testing.assert_array_equal(read(wide)["w"], [[0, 1]] * 4)
    parameter = program(wrap="ctorch._utils\n_rebuild_parameter\n(")
    np.testing.assert_array_equal(read(archive(tmp_path / "e.pt", parameter))["w"].shape, (2, 3))


def test_what_torch_never_compresses_is_refused_compressed(tmp_path):
    path = archive(tmp_path / "a.pt", program(), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"data\.pkl' is compressed"):
        read(path)


def test_a_tensor_that_repeats_a_few_numbers_without_end_is_refused(tmp_path):
    path = archive(tmp_path / "a.pt", program(shape=(255, 255, 255, 2), strides=(0, 0, 0, 1)))
    with pytest.raises(CheckpointError, match="repeats its storage"):
        read(path)


def test_plain_values_and_nested_dictionaries_stay(tmp_path):
    value = {
        "generator": {"k": 3, "f": -2.5, "t": "s"},
        "n": None,
        "l": [1, (2, True)],
        "b": 1 << 40,
    }
    for protocol in (2, 4):
        path = archive(tmp_path / "a.pt", pickle.dumps(value, protocol))
        assert read(path) == value


def test_a_pair_of_numbers_may_be_shared_and_a_container_may_not(tmp_path):
    betas, table = (0.9, 0.999), {"lr": 1}
    value = {"groups": [{"betas": betas}, {"betas": betas}]}
    assert read(archive(tmp_path / "a.pt", pickle.dumps(value, 2))) == value
    for shared in (table, (table, 1), [1]):
        path = archive(tmp_path / "b.pt", pickle.dumps({"a": shared, "b": shared}, 2))
        with pytest.raises(CheckpointError, match="appears twice"):
            read(path)


HOSTILE = {
    "os.system": Call(os.system, "touch ran"),
    "builtins.eval": Call(eval, "open('ran', 'w')"),
    "builtins.exec": Call(exec, "open('ran', 'w')"),
    "builtins.getattr": Call(getattr, "", "join"),
    "nested": {"a": {"b": [Call(Call, Call(os.system, "touch ran"))]}},
    "numpy": np.zeros(3),
    "class": {"w": builtins.open},
}


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", HOSTILE)
def test_foreign_names_are_refused_and_named(tmp_path, monkeypatch, name, protocol):
    monkeypatch.chdir(tmp_path)
    path = archive(tmp_path / "a.pt", pickle.dumps({"w": HOSTILE[name]}, protocol))
    with pytest.raises(CheckpointError, match="refused") as error:
        read(path)
    if protocol:
        named = {"os.system": os.system.__module__ + ".system", "class": "io.open"}
        named |= {"nested": "Call", "numpy": "numpy"}
        assert named.get(name, name).removeprefix("builtins.") in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text",
    [
        b"\x80\2ccollections\nOrderedDict\n)R}X\1\0\0\0aK\1s}\x86b.",  # state that is no dictionary
        b"\x80\2ctorch\nFloatStorage\n)R.",  # a storage type called
        b"\x80\2ctorch\nFloatStorage\n)\x81.",  # an object made
        b"\x80\2}X\1\0\0\0actorch\nFloatStorage\ns.",  # a type as a value
        b"\x80\2}q\0X\1\0\0\0ah\0s.",  # a dictionary that holds itself
        b"\x80\2}X\1\0\0\0aX\1\0\0\0xQs.",  # a reference to no storage
        b"\x80\2(S'touch ran'\nios\nsystem\n.",
        b"\x80\2ctorch._utils\n_rebuild_tensor_v2\n}b.",
    ],
)
def test_programs_that_are_no_data(tmp_path, text):
    with pytest.raises(CheckpointError, match=r"refused"):
        read(archive(tmp_path / "a.pt", text))


@pytest.mark.parametrize(
    ("pickled", "entries", "message"),
    [
        (program()[:-9], ONE, "damaged"),
        (b"", ONE, "damaged"),
        (b"\x80\2.", ONE, "damaged"),
        (b"\x80\2(ttt.", ONE, "damaged"),
        (program(), {"version": b"3\n"}, "data/0' is missing"),
        (program(elements=7), ONE, "24 bytes, expected 7 x 4"),
        (program(kind="DoubleStorage"), ONE, "24 bytes, expected 6 x 8"),
        (program(shape=(3, 3)), ONE, "larger than its storage"),
        (program(offset=1), ONE, "larger than its storage"),
        (program(shape=(6,)), ONE, "damaged"),
        (pickle.dumps([1, 2], 2), ONE, "expected a dictionary of tensors.*got list"),
        (program(), ONE | {"byteorder": b"big"}, "big-endian"),
    ],
)
def test_damaged_contents(tmp_path, pickled, entries, message):
    with pytest.raises(CheckpointError, match=message):
        read(archive(tmp_path / "a.pt", pickled, entries))


def test_damaged_files(tmp_path):
    write(tmp_path / "whole.pt", ARRAYS)
    whole = (tmp_path / "whole.pt").read_bytes()
    moved = bytearray(whole)
    place = moved.rfind(b"PK\1\2")  # the last entry of the directory claims to lie at the end
    moved[place + 42 : place + 46] = struct.pack("<I", len(whole) - 10)
    cases = {
        "truncated or damaged": whole[:-40],
        "truncated": whole[:100],
        "no .pt file": b"",
        "another zip": None,
        "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "legacy format": pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"\x80\2}.",
        "download it again": b"RIFF" + bytes(100),
    }
    for message, data in cases.items():
        path = tmp_path / "a.pt"
        if data is None:
            archive(path, b"", {"x": b""}, root="a/b/")
        else:
            path.write_bytes(data)
        with pytest.raises(CheckpointError, match=message) as error:
            read(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="no such file"):
        read(tmp_path / "none.pt")
    (tmp_path / "a.pt").write_bytes(moved)
    assert "version" in whole[place:].decode("latin1")  # an entry that reading tensors never needs
    assert set(read(tmp_path / "a.pt")) == set(ARRAYS)


def test_no_call_reaches_beyond_the_table():
    """The audit: everything that the machine can call is listed here."""
    assert set(torch_pickle._CALLS) == {
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_parameter",
        "collections.OrderedDict",
    }

"""Lists of recordings, and the folders that are made of them."""

import json

import numpy as np
import pytest

from sa2jax.errors import DataError
from sa2jax.train.data.recordings import (
    SampleFile,
    list_recordings,
    read_samples_info,
    write_samples,
)
from sa2jax.train.data.samples import Reject


@pytest.fixture
def made(tmp_path):
    found = [(b"one", 3), Reject("b.wav", "silence"), (b"other", 5)]
    about = write_samples(
        tmp_path / "made", found, lambda lengths: {"format": "test 1", "sum": sum(lengths)}
    )
    return tmp_path / "made", about


def read(folder, form="test 1", keys=("sum",)):
    return read_samples_info(folder, form, keys, "tests", "sa2jax make")


def test_samples_come_back(made):
    folder, about = made
    assert (about["samples"], about["sum"], about["rejected"]) == (2, 8, 1)
    again, lengths = read(folder)
    assert again == about
    np.testing.assert_array_equal(lengths, [3, 5])
    samples = SampleFile(folder, 2, bytes)
    assert [samples[0], samples[1]] == [b"one", b"other"]
    row = json.loads((folder / "rejects.jsonl").read_text())
    assert row["where"] == "b.wav"


def test_what_is_no_folder_of_samples(made, tmp_path):
    folder, _ = made
    for changed in ({"form": "test 2"}, {"keys": ("mean",)}):
        with pytest.raises(DataError, match=r"is no folder of tests .* make it with `sa2jax make`"):
            read(folder, **changed)
    with pytest.raises(DataError, match="is no folder of tests"):
        read(tmp_path)
    path = folder / "samples.array_record"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="cut off"):
        read(folder)


def test_damage_inside_is_told(made):
    folder, _ = made
    path = folder / "samples.array_record"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DataError, match=r"is damaged .*: prepare it again"):
        SampleFile(folder, 2, bytes)[0]


@pytest.mark.parametrize("decode", [int, json.loads, lambda blob: {}[blob]])
def test_a_sample_that_cannot_be_decoded_is_told(made, decode):
    with pytest.raises(DataError, match=r"is damaged .*: prepare it again"):
        SampleFile(made[0], 2, decode)[0]


def test_nothing_usable_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match=r"none of 1 recordings can be used; a: why"):
        write_samples(tmp_path / "made", [Reject("a", "why")], lambda lengths: {})
    assert not (tmp_path / "made").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter.txt").write_text("mine")
    with pytest.raises(DataError, match="is no prepared folder, it is not replaced"):
        write_samples(tmp_path / "taken", [], lambda lengths: {}, overwrite=True)
    assert (tmp_path / "taken" / "letter.txt").exists()


def test_lists(tmp_path):
    lines = ['{"audio": "a.wav", "text": "hello", "voice": "v/b.wav"}', "", "no json", '{"a": 1}']
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    first, second, third = list_recordings([tmp_path / "list.jsonl"])
    assert first.path == str(tmp_path / "a.wav")
    assert first.path_of("voice") == str(tmp_path / "v/b.wav")
    assert first.path_of("room") == first.path
    assert first.values["text"] == "hello"
    assert second.where == "list.jsonl:3"
    assert "expected" in second.problem
    assert third.problem
    (tmp_path / "odd.jsonl").write_text('{"audio": "a.wav", "voice": 3}')
    with pytest.raises(DataError, match='expected "voice" to be a path, got 3'):
        list_recordings([tmp_path / "odd.jsonl"])[0].path_of("voice")
    with pytest.raises(DataError, match="is given twice"):
        list_recordings([tmp_path / "list.jsonl"] * 2)
    with pytest.raises(DataError, match="cannot be read"):
        list_recordings([tmp_path / "gone.jsonl"])

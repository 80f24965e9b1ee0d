"""Folders and files that are written whole or not at all, and nothing beside them."""

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest

from sa2jax import atomic_io
from sa2jax.atomic_io import copy_file, disk_errors, keep_sources, new_file, new_folder
from sa2jax.errors import CheckpointError


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def treasure(tmp_path) -> Path:
    """A folder elsewhere that nothing may touch."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "treasure").write_text("precious")
    yield folder
    assert (folder / "treasure").read_text() == "precious"
    assert entries(folder) == ["treasure"]


def checkpoint(folder: Path, text: str = "old") -> Path:
    folder.mkdir(parents=True)
    (folder / "sa2jax.json").write_text(text)
    return folder


# --- links ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sa2jax-partial", "sa2jax-replaced", "sa2jax-lock"])
def test_a_link_in_wait_is_refused_and_its_target_kept(tmp_path, treasure, name):
    (tmp_path / f".out.{name}").symlink_to(treasure)
    checkpoint(tmp_path / "out")
    with (
        pytest.raises(CheckpointError, match=rf"\.out\.{name} is a link.*remove it$"),
        new_folder(tmp_path / "out", overwrite=True),
    ):
        raise AssertionError("it was let in")
    assert (tmp_path / "out" / "sa2jax.json").read_text() == "old"
    assert entries(tmp_path) == [f".out.{name}", "elsewhere", "out"]


def test_a_link_in_what_a_killed_run_left_is_not_followed(tmp_path, treasure):
    left = tmp_path / ".out.sa2jax-partial"
    left.mkdir()
    (left / "inside").symlink_to(treasure)
    with new_folder(tmp_path / "out") as folder:
        assert entries(folder) == []
    assert entries(tmp_path) == ["elsewhere", "out"]


def test_a_file_in_the_way_is_not_removed(tmp_path):
    (tmp_path / ".out.sa2jax-partial").write_text("mine")
    with (
        pytest.raises(CheckpointError, match="is no folder, expected nothing there"),
        new_folder(tmp_path / "out"),
    ):
        raise AssertionError("it was let in")
    assert (tmp_path / ".out.sa2jax-partial").read_text() == "mine"


def test_a_new_file_writes_through_no_link(tmp_path, treasure):
    """One at its own name is replaced, one at any name that it might take first is none of its."""
    path = tmp_path / "a.txt"
    path.symlink_to(treasure / "treasure")
    for name in (".a.txt.partial", f".a.txt.{os.getpid()}.tmp", ".a.txt.part"):
        (tmp_path / name).symlink_to(treasure / "treasure")
    with new_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert not path.is_symlink()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("name", ["/dev/full", "/dev/null"])
def test_a_device_is_not_replaced(name):
    with pytest.raises(FileExistsError, match="something else than a file"):
        atomic_io.write_text(name, "text")
    assert not Path(name).is_file()


def test_a_file_that_fails_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        atomic_io.write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert entries(tmp_path) == ["a.txt"]


def test_files_of_a_folder_are_copied_and_what_lies_outside_is_not(tmp_path, treasure):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "real").write_text("text")
    (folder / "sub" / "link").symlink_to("../real")
    copy_file(folder / "sub" / "link", tmp_path / "copy", folder)
    assert (tmp_path / "copy").read_text() == "text"
    (folder / "out").symlink_to(treasure / "treasure")
    (folder / "outer").symlink_to(treasure)
    for name in ("out", "outer/treasure"):
        with pytest.raises(CheckpointError, match="outside of its folder: remove it, or copy"):
            copy_file(folder / name, tmp_path / "stolen", folder)
    assert not (tmp_path / "stolen").exists()


def test_the_cache_of_hugging_face_is_links(tmp_path):
    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "0a1b").write_text("{}")
    snapshot = repository / "snapshots" / "f00d"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/0a1b")
    copy_file(snapshot / "config.json", tmp_path / "config.json", snapshot)
    assert (tmp_path / "config.json").read_text() == "{}"


# --- sources --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "verb"),
    [
        ("source", "is"),
        ("./source/../source", "is"),
        ("other/../source", "is"),
        ("link", "is"),
        ("link/new", "lies in"),
        ("source/deep/new", "lies in"),
        ("above", "holds"),
    ],
)
def test_a_source_is_not_replaced(tmp_path, monkeypatch, out, verb):
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "above" / "source")
    checkpoint(tmp_path / "other")
    Path("source").symlink_to("above/source")
    Path("link").symlink_to("source")
    (tmp_path / "above" / "sa2jax.json").write_text("{}")
    sources = [None, "other", Path("source")]
    if "other" in out:
        sources.remove("other")
    with (
        pytest.raises(CheckpointError, match=f"^{out} {verb} .*choose another folder"),
        new_folder(out, overwrite=True, sources=sources),
    ):
        raise AssertionError("it was let in")
    assert (tmp_path / "above" / "source" / "sa2jax.json").read_text() == "old"
    assert entries(tmp_path / "above") == ["sa2jax.json", "source"]


def test_a_folder_beside_its_source_is_fine(tmp_path):
    source = checkpoint(tmp_path / "source")
    with new_folder(tmp_path / "source2", sources=[source]) as folder:
        (folder / "a").write_text("a")
    keep_sources(source / "ready", [source], inside=True)
    with pytest.raises(CheckpointError, match=r"is .*source, which it would be made from"):
        keep_sources(source, [source], inside=True)


# --- the end --------------------------------------------------------------------------------------


def test_the_old_checkpoint_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    out, rename = checkpoint(tmp_path / "out"), Path.rename

    def fail(self, target):
        if self.name.endswith("partial"):
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with (
        pytest.raises(CheckpointError, match=r"cannot write .*broken"),
        new_folder(out, overwrite=True) as folder,
    ):
        (folder / "sa2jax.json").write_text("new")
    assert (out / "sa2jax.json").read_text() == "old"
    assert entries(tmp_path) == ["out"]


def test_a_folder_that_is_removed_while_it_is_written(tmp_path):
    with (
        pytest.raises(CheckpointError, match=r"cannot write .*No such file") as caught,
        new_folder(tmp_path / "out") as folder,
    ):
        (folder / "a").write_text(f"{shutil.rmtree(folder)}")
    assert len(str(caught.value)) < 500
    assert entries(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_in_one_line(number):
    said = "the disk is full: cannot write x; free some space"
    with pytest.raises(CheckpointError, match=said), disk_errors(Path("x")):
        raise OSError(number, os.strerror(number))


def test_what_tensorstore_cannot_write_in_one_line():
    text = 'NOT_FOUND: Error writing "a/0" in OCDBT database at local file "x"\n' + "more " * 200
    said = "cannot write x: NOT_FOUND: Error"
    with pytest.raises(CheckpointError, match=said) as caught, disk_errors(Path("x")):
        raise ValueError(text)
    assert len(str(caught.value)) < 300
    with pytest.raises(ValueError, match=r"^a bug$"), disk_errors(Path("x")):
        raise ValueError("a bug")

"""Atomic writes of folders and files: whole, or not at all, and nothing beside them."""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sa2jax.errors import CheckpointError
from sa2jax.locks import exclusive

FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows has no quota's own
# One of these names at its top makes a folder a checkpoint, which may be replaced when asked.
MARKS = ("sa2jax.json", "*.safetensors", "flow.yaml", "dataset.json")


@contextmanager
def new_folder(
    out: str | Path,
    *,
    overwrite: bool = False,
    sources: Iterable[str | os.PathLike[str] | None] = (),
) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well and vanishes when it fails.

    What a killed run left behind is removed first. With `overwrite`, a checkpoint at `out` (of
    this library or of Hugging Face) is replaced at the very end; anything else is never touched.

    Args:
        out: where the folder shall be.
        overwrite: replace a checkpoint that is already there.
        sources: what it is made from, see `keep_sources`.

    Raises:
        CheckpointError: if `out` is taken or overlaps a source, another run is writing it, a link
            lies where the temporary folder shall be, or the disk is full.
    """
    keep_sources(out, sources)
    out = Path(os.path.realpath(out))
    _refuse(out, overwrite)
    temp, old = partial_of(out), out.with_name(f".{out.name}.sa2jax-replaced")
    with ExitStack() as stack:
        with disk_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive(out.with_name(f".{out.name}.sa2jax-lock"), out))
        _require_folder(temp)
        _require_folder(old)
        try:
            with disk_errors(out):
                shutil.rmtree(temp, ignore_errors=True)
                temp.mkdir()
                yield temp
                _refuse(out, overwrite)
                _replace(temp, out, old)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """A temporary file that becomes `path` when the block ends well and vanishes when it fails.

    A link at `path` is replaced itself.

    Args:
        path: where the file shall be, in a folder that exists.

    Raises:
        OSError: if it cannot be written; `disk_errors` makes it one of this library's.
    """
    temp = make_temporary(path)
    try:
        yield temp
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)


def make_temporary(path: str | Path) -> Path:
    """An empty file beside `path`, to be renamed to it.

    It is new and its name a random one: a link that lies in wait is not written through, and runs
    do not write into each other's.

    Raises:
        OSError: if it cannot be made, or `path` is there and no file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # renaming would replace a device
        raise FileExistsError(errno.EEXIST, "there is something else than a file", str(path))
    temp = path.with_name(f".{path.name[:48]}.{secrets.token_hex(4)}.partial")
    temp.open("xb").close()
    return temp


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all, see `new_file`."""
    with new_file(path) as temp:
        temp.write_text(text, encoding="utf-8")


def keep_sources(
    out: str | os.PathLike[str],
    sources: Iterable[str | os.PathLike[str] | None],
    *,
    inside: bool = False,
) -> None:
    """Refuse to make a folder that is, holds or lies in what it is made from.

    Files tell, not names: links, other spellings and second mounts are seen through.

    Args:
        out: the folder to make.
        sources: files and folders; None for what was not given.
        inside: whether the folder may lie in a source.

    Raises:
        CheckpointError: if they overlap.
    """
    target, *above = _with_parents(Path(os.path.realpath(out)))
    for source in sources:
        if source is None:
            continue
        own, *outer = _with_parents(Path(os.path.realpath(source)))
        if own == target or target in outer:
            verb = "is" if own == target else "holds"
        elif own in above and not inside:
            verb = "lies in"
        else:
            continue
        raise CheckpointError(
            f"{out} {verb} {source}, which it would be made from: choose another folder"
        )


def copy_file(source: str | Path, target: str | Path, folder: str | Path) -> None:
    """Copy a file that comes with a folder.

    Args:
        source: the file.
        target: where to.
        folder: what the file belongs to; the cache of Hugging Face, whose files are links to
            `blobs/`, counts as inside.

    Raises:
        CheckpointError: if it is, or lies behind, a link that leads out of the folder.
    """
    require_inside(source, folder)
    shutil.copyfile(source, target)


def require_inside(path: str | Path, folder: str | Path) -> None:
    """Refuse a link that leads out of its folder; see `copy_file`."""
    real = Path(os.path.realpath(path))
    blobs, repository = real.parent.name, real.parent.parent.name
    if blobs == "blobs" and repository.startswith(("models--", "datasets--")):
        return
    if not real.is_relative_to(os.path.realpath(folder)):
        raise CheckpointError(
            f"{path} is a link to {real}, outside of its folder: remove it, or copy the folder "
            "with `cp -rL` first"
        )


def partial_of(out: str | Path) -> Path:
    """The temporary folder that `new_folder` gives for `out`."""
    out = Path(os.path.realpath(out))
    return out.with_name(f".{out.name}.sa2jax-partial")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the file system (or tensorstore, for it) complains about into one clear error."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if getattr(error, "errno", None) in FULL or re.search("No space left|quota", text):
            raise CheckpointError(
                f"the disk is full: cannot write {path}; free some space"
            ) from None
        if isinstance(error, OSError) or re.match(r"[A-Z_]+: Error ", text):
            raise CheckpointError(f"cannot write {path}: {text[:200]}") from None
        raise


def need_space(path: Path, size: int) -> None:
    """Fail early when a file system cannot hold what is about to be written.

    Args:
        path: a folder that exists.
        size: bytes to be written.

    Raises:
        CheckpointError: if fewer bytes are free.
    """
    free = shutil.disk_usage(path).free
    if free < size:
        raise CheckpointError(
            f"the disk is full: {path.parent} has {free / 1e9:.2f} GB free, "
            f"{size / 1e9:.2f} GB are needed; free some space or write elsewhere"
        )


def holds_checkpoint(folder: Path) -> bool:
    """Whether a folder has one of the `MARKS`, of a checkpoint or of prepared recordings."""
    return folder.is_dir() and any(any(folder.glob(mark)) for mark in MARKS)


def _refuse(out: Path, overwrite: bool) -> None:
    """Raise unless `out` may be made: it does not exist, is empty, or may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not holds_checkpoint(out):
        raise CheckpointError(f"{out} already holds something else: choose another folder")
    if not overwrite:
        raise CheckpointError(
            f"{out} already holds a checkpoint: choose another folder or --overwrite"
        )


def _require_folder(path: Path) -> None:
    """Refuse what is no folder of ours: a link there would have its target emptied."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        kind = "a link" if path.is_symlink() else "no folder"
        raise CheckpointError(f"{path} is {kind}, expected nothing there: remove it")


def _replace(temp: Path, out: Path, old: Path) -> None:
    """Give the temporary folder its name; what had it until then goes, or comes back."""
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    try:
        temp.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _with_parents(path: Path) -> list[tuple[int, int] | str]:
    """What tells a path from others, and its parents after it; those that are not there by name."""

    def identity(each: Path) -> tuple[int, int] | str:
        try:
            found = each.stat()
        except OSError:
            return os.path.normcase(each)
        return found.st_dev, found.st_ino

    return [identity(each) for each in (path, *path.parents)]

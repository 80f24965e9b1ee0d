"""Writing folders and files whole or not at all."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sa2jax.errors import CheckpointError

# One of these names at its top makes a folder a checkpoint, which may be replaced when asked.
MARKS = ("sa2jax.json", "*.safetensors", "flow.yaml", "dataset.json")


@contextmanager
def new_folder(out: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well and vanishes when it fails.

    What a killed run left behind is removed first. With `overwrite`, a checkpoint at `out` (of
    this library or of Hugging Face) is replaced at the very end; anything else is never touched.

    Args:
        out: where the folder shall be.
        overwrite: replace a checkpoint that is already there.

    Raises:
        CheckpointError: if `out` is taken, another run is writing it, or the disk is full.
    """
    out = Path(os.path.realpath(out))
    _refuse(out, overwrite)
    temp, old = partial_of(out), out.with_name(f".{out.name}.sa2jax-replaced")
    with disk_errors(out):
        temp.mkdir(parents=True, exist_ok=True)
    lock = os.open(temp, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = temp.exists() and os.path.samestat(os.fstat(lock), temp.stat())
        except BlockingIOError:
            alone = False
        if not alone:
            raise CheckpointError(f"another run is writing {out}: wait for it, or stop it")
        try:
            with disk_errors(out):
                _empty(temp)
                yield temp
                _refuse(out, overwrite)
                shutil.rmtree(old, ignore_errors=True)
                if out.exists():
                    out.rename(old)
                temp.rename(out)
                shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise
    finally:
        os.close(lock)


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
        text = str(error)
        if getattr(error, "errno", None) in (28, 122) or "No space left" in text or "quota" in text:
            raise CheckpointError(
                f"the disk is full: cannot write {path}; free some space"
            ) from None
        if isinstance(error, OSError):
            raise CheckpointError(f"cannot write {path}: {error}") from None
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


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

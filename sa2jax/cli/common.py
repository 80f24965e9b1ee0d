"""Shared by all commands: argument types, printing, progress bars."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

Files = tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE ...")]]
Source = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SOURCE")]]
Out = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]]
Dtype = Literal["float32", "bfloat16", "float16"]
ModelDtype = Literal["float32", "bfloat16", "float16", "int8"]
Attention = Literal["cudnn", "decode", "per_head", "splash", "xla"]


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What a command runs on."""

    mesh: str | None = None
    """Devices to spread over, such as `tensor=4` or `data=2,tensor=4`; by default one."""
    distributed: bool = False
    """Join the other hosts of a multi-host machine first; all of them run the same command."""

    def join_hosts(self) -> None:
        """Start the multi-host run, if this is one; only the first host prints."""
        if not self.distributed:
            return
        from sa2jax.runtime import start_distributed

        # Libraries that carry messages between hosts print, too: that is not our result.
        results = os.dup(1)
        os.dup2(2, 1)
        first = start_distributed() == 0
        sys.stdout = open(results if first else os.devnull, "w")  # noqa: SIM115


def model_or_default(model: Path | None) -> Path:
    """The model that the user named, or the one that comes along, with a note."""
    if model is not None:
        return model
    from sa2jax.assets import SHIPPED
    from sa2jax.errors import ConfigError

    if not SHIPPED.is_dir():
        raise ConfigError("expected --model FOLDER: no model comes with this installation")
    log("note: no --model is given: this is nano, a demonstration model of a few hundred words")
    return SHIPPED


def use_cpu() -> None:
    """Do not start an accelerator for work that does not compute; to be called before jax is."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def require_file(path: str | Path) -> None:
    """Fail before the model is loaded if a recording is not there."""
    from sa2jax.errors import AudioError

    if os.path.isfile(path):  # which, unlike a Path, never raises
        return
    if os.path.isdir(path):
        raise AudioError(f"expected a recording, but {path} is a folder: name the files in it")
    if os.path.exists(path):
        raise AudioError(f"expected a recording, but {path} is a pipe or a device: save it first")
    raise AudioError(f"no such file: {path}")


def require_writable(path: Path) -> None:
    """Fail before anything is computed if a file cannot be written in the end.

    Raises:
        CheckpointError: if its folder is missing, or something else than a file is there.
    """
    from sa2jax.errors import CheckpointError

    if not os.path.isdir(path.absolute().parent):
        raise CheckpointError(f"cannot write {path}: no folder {path.parent}, make it first")
    if os.path.exists(path) and not os.path.isfile(path):
        raise CheckpointError(f"cannot write {path}: expected the name of a file, it is none")


def require_files(files: Sequence[Path]) -> dict[Path, Exception]:
    """The recordings that are not there, so that the others can be answered.

    Raises:
        AudioError: if no file is named, or the only one is not there.
    """
    from sa2jax.errors import AudioError

    if not files:
        raise AudioError("no recordings: expected at least one wav, flac, mp3 or ogg file")
    errors: dict[Path, Exception] = {}
    for path in files:
        try:
            require_file(path)
        except AudioError as error:
            errors[path] = error
    exit_if_none(errors, files)
    return errors


def exit_if_none(errors: Mapping[Path, Exception], files: Sequence[Path]) -> None:
    """End with exit code 2 if no file could be read; if there was but one, by its error."""
    if len(errors) == len(set(files)) == 1:
        raise next(iter(errors.values()))
    if len(errors) == len(set(files)):
        exit_for_errors(errors, 2)


def exit_for_errors(errors: Mapping[Path, Exception], code: int = 1) -> None:
    """Name the files that could not be read, if any, and end with an exit code."""
    for path, error in errors.items():
        text = str(error)
        log_error(error if str(path) in text else type(error)(f"{path}: {text}"))
    if errors:
        sys.exit(code)


def log_notes(path: Path | None, notes: Sequence[str]) -> None:
    """Print what was noticed of a recording, or of an answer, to stderr."""
    for note in notes:
        log(note if path is None else f"{path}: {note}")


def print_json(value: Any) -> None:
    """Print as JSON, any language as it is written."""
    print(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def wide_console() -> Console:
    """Standard output for tables: a file or a pipe has no width that names must be cut to."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def log(text: str) -> None:
    """Print to stderr."""
    print(text, file=sys.stderr, flush=True)


def log_error(error: Exception) -> None:
    """Print an error to stderr, as one line."""
    log(f"error: {' '.join(str(error).split())}")


@contextmanager
def progress_bar(title: str, unit: str = "bytes") -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr that disappears when its work is done."""
    from rich.progress import DownloadColumn

    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = "[progress.description]{task.description}", BarColumn(), count, TimeElapsedColumn()
    console = Console(stderr=True)
    # Where nobody watches, even a bar that disappears would leave an empty line.
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

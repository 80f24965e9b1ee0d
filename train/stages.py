"""Stages: several commands run as one, from the first recording to the last checkpoint.

A recipe of the kind `stages` names commands of `sa2jax` in their order:

    kind: stages
    seed: 0
    stages:
      corpus: data synthesize --seed {seed} {out}/corpus
      listen: train --config nano/encoder --data {out}/corpus --out {out}/listen --set seed={seed}

Each is run as it stands, in a process of its own, and can be run by hand as well. The folder's
stages.json says which are done; an interrupted run goes on where it stopped.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa2jax.atomic_io import disk_errors, write_text
from sa2jax.errors import ConfigError, FileError, TrainError
from sa2jax.files.json_files import read_json
from sa2jax.locks import LOCK, exclusive

DONE = "stages.json"
INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class StagesRecipe:
    """Commands that are run one after the other.

    Attributes:
        stages: each command by the name of its stage, without `sa2jax` before it; {out} and {seed}
            are put in.
        seed: for the stages that name it.
    """

    stages: Mapping[str, str]
    seed: int = 0

    def __post_init__(self):
        for name, command in self.stages.items():
            try:
                words = shlex.split(command.format(out="out", seed=self.seed))
            except (KeyError, ValueError, IndexError, AttributeError) as error:
                raise ConfigError(
                    f"stages.{name}: expected a command with {{out}} and {{seed}} at most, got "
                    f"{error!r}"
                ) from None
            if not words:
                raise ConfigError(f"stages.{name}: expected a command, got nothing")


@dataclass(frozen=True)
class StagesResult:
    """How a run ended.

    Attributes:
        done: seconds that each finished stage took.
        finished: whether these are all; if not, the same run goes on.
    """

    done: Mapping[str, float]
    finished: bool

    @property
    def progress(self) -> str:
        """How many stages are done."""
        return f"{len(self.done)} stage{'s' * (len(self.done) != 1)}"

    @property
    def results(self) -> Mapping[str, Path]:
        """Nothing: what was written, each stage has said itself."""
        return {}


def _print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run_stages(
    recipe: StagesRecipe,
    out: str | Path,
    *,
    fresh: bool = False,
    say: Callable[[str], None] = _print_line,
) -> StagesResult:
    """Run all stages that are not done.

    Args:
        recipe: which.
        out: folder of all that they make.
        fresh: forget what is done.
        say: called with a line about each stage; by default prints to stderr.

    Raises:
        TrainError: if a stage fails, or was done with another command.
        CheckpointError: if `out` cannot be written.
    """
    out = Path(out)
    with ExitStack() as stack:
        with disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive(out / LOCK, out))
        return _run_stages(recipe, out, fresh, say)


def _run_stages(
    recipe: StagesRecipe, out: Path, fresh: bool, say: Callable[[str], None]
) -> StagesResult:
    done = {} if fresh else _read_done(out / DONE)
    for number, (name, command) in enumerate(recipe.stages.items(), 1):
        words = shlex.split(command)
        words = [word.format(out=out, seed=recipe.seed) for word in words]
        line, title = shlex.join(words), f"stage {number} of {len(recipe.stages)}, {name}"
        same = command.format(out="{out}", seed=recipe.seed)  # wherever the folder lies now
        if name in done:
            if done[name]["command"] != same:
                raise TrainError(
                    f"{title} was done as `sa2jax {done[name]['command']}`, now it is `sa2jax "
                    f"{same}`: take another --out, or begin anew with --fresh"
                )
            continue
        say(f"{title}: sa2jax {line}")
        started = time.monotonic()
        code = _run_command([sys.executable, "-m", "sa2jax.cli", *words])
        if code == INTERRUPTED:
            return StagesResult(_seconds(done), False)
        if code:
            raise TrainError(f"{title} failed (exit code {code}); the same command tries it again")
        done[name] = {"command": same, "seconds": round(time.monotonic() - started, 1)}
        with disk_errors(out / DONE):
            write_text(out / DONE, json.dumps(done, indent=2) + "\n")
        say(f"{title}: {done[name]['seconds']:.0f} s")
    return StagesResult(_seconds(done), True)


def _run_command(words: list[str]) -> int:
    """Run a command; an interrupt is its own matter first."""
    process = subprocess.Popen(words)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the terminal has told it, too; a second one ends it at once
            continue


def _read_done(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        found = read_json(path, dict)
        for stage in found.values():
            stage["command"], float(stage["seconds"])
    except (FileError, ValueError, KeyError, TypeError):
        raise TrainError(f"{path} is damaged: --fresh does all stages again") from None
    return found


def _seconds(done: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {name: float(stage["seconds"]) for name, stage in done.items()}

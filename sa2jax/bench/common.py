"""Shared by both benchmarks: rows, interleaved rounds, tables."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from sa2jax.speech_config import Token2WavConfig

OURS, REFERENCE = "ours", "reference"
TURN = 48  # tokens of a conversation's next question

Times = dict[tuple[str, str], list[float]]  # side and part -> seconds, one for each round


@dataclass(frozen=True, kw_only=True)
class SpeechWork:
    """What both sides of the benchmark of speech are given to do.

    Attributes:
        cfg: sizes.
        codes: codes of the recording, and of the reply.
        prompt: codes of the voice that streams speak with.
        chunk: codes of a chunk.
    """

    cfg: Token2WavConfig
    codes: int
    prompt: int
    chunk: int


@dataclass(frozen=True)
class Row:
    """One thing that was timed.

    Attributes:
        name: what.
        unit: of the figures; more is better unless it says otherwise.
        ours: this library, median over the rounds.
        reference: the official code's libraries, None where they were not timed.
        ratio: ours / reference, median over the rounds.
        note: how it was measured.
    """

    name: str
    unit: str
    ours: float
    reference: float | None = None
    ratio: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Bench:
    """All rows of one run and what they were measured on."""

    machine: dict[str, str]
    size: str
    rows: tuple[Row, ...] = field(default_factory=tuple)


def timed(run: Callable[[], Any]) -> float:
    """Seconds of wall time that a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def take_turns(
    sides: Mapping[str, Mapping[str, Callable[[], Any]]],
    repeats: int,
    progress: Callable[[int, int], None] | None = None,
) -> Times:
    """Time every part of every side in each round, one side right after the other.

    So a machine that slows down slows both. One more round comes first: it compiles and warms up,
    and is not counted.

    Args:
        sides: by name, the parts of each; what a part needs from another comes after it.
        repeats: rounds that count.
        progress: called with (rounds done, rounds in all).
    """
    times: Times = {}
    for round_ in range(repeats + 1):
        for part in sides[OURS]:
            for side, parts in sides.items():
                if part in parts:
                    times.setdefault((side, part), []).append(timed(parts[part]))
        if progress is not None:
            progress(round_ + 1, repeats + 1)
    return {key: seconds[1:] for key, seconds in times.items()}


def language_parts(side: Any, steps: int) -> dict[str, Callable[[], Any]]:
    """What is timed of a side of the language benchmark, in this order.

    Args:
        side: has a method for each part; `decode` takes `steps`.
        steps: tokens to decode.
    """
    return {
        "encode": side.encode,
        "prefill": side.prefill,
        "decode": partial(side.decode, steps),
        "turn": side.turn,
    }


def stream_parts(side: Any, streams: Sequence[int]) -> dict[str, Callable[[], Any]]:
    """What is timed of a side's streams, in this order.

    Args:
        side: has the methods `start`, `first`, and `step`, which takes a number of streams.
        streams: numbers of streams; none for no parts.
    """
    begin = {"start": side.start, "first": side.first} if streams else {}
    return begin | {f"chunk {n}": partial(side.step, n) for n in streams}


def row(
    name: str, unit: str, part: str, times: Times, figure: Callable[[float], float], note: str
) -> Row:
    """A row from the seconds of one part.

    Args:
        name: of the row.
        unit: of its figures.
        part: whose seconds.
        times: of all rounds.
        figure: from seconds to what is shown.
        note: how it was measured.
    """
    ours = [figure(t) for t in times[OURS, part]]
    if (REFERENCE, part) not in times:
        return Row(name, unit, statistics.median(ours), note=note)
    theirs = [figure(t) for t in times[REFERENCE, part]]
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return Row(name, unit, statistics.median(ours), statistics.median(theirs), ratio, note)


def copy_bandwidth(size: int = 1 << 30) -> float:
    """GB/s that copying a large array moves, reads and writes together; the best of five."""
    source = jnp.ones(size // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    copy(source).block_until_ready()
    best = min(timed(lambda: copy(source).block_until_ready()) for _ in range(5))
    return 2 * source.nbytes / best / 1e9


def machine(reference: Sequence[str] = ()) -> dict[str, str]:
    """What this is measured on: hardware and versions.

    Args:
        reference: packages that were timed beside this library.
    """
    device = jax.devices()[0]
    versions = {name: f"{name} {metadata.version(name)}" for name in ("jax", *reference)}
    return {
        "device": f"{jax.device_count()} x {device.device_kind}",
        "processor": f"{platform.machine()} with {os.cpu_count()} cores",
        "python": f"Python {platform.python_version()}",
        **versions,
    }


def print_bench(result: Bench, console: Console) -> None:
    """Print the table."""
    table = Table(title=f"{result.size}: " + ", ".join(result.machine.values()))
    for name in ("", "unit", "sa2jax", "reference", "ratio", ""):
        table.add_column(name, justify="left" if not name or name == "unit" else "right")
    for line in result.rows:
        figures = (line.ours, line.reference, line.ratio)
        table.add_row(line.name, line.unit, *map(_shown, figures), line.note)
    console.print(table)


def _shown(figure: float | None) -> str:
    """Two decimals, or two significant digits of a small number."""
    if figure is None:
        return ""
    return f"{figure:.2f}" if figure >= 0.1 else f"{figure:.2g}"

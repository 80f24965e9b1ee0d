"""How fast is this machine: encoder, prefill and decode with random weights.

Ours and the reference (transformers on torch, where installed) take turns in every round, so that
a machine that slows down slows both; medians over the rounds are compared.
"""

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from sa2jax import audio
from sa2jax.config import StepAudio2Config
from sa2jax.errors import ConfigError
from sa2jax.inference.generate import Generator, Options, Request
from sa2jax.models.step_audio import StepAudio2Model, step_audio2, unstack_decoder
from sa2jax.nn import Policy, init_params
from sa2jax.pipeline import default_dtype, enable_compilation_cache


@dataclass(frozen=True)
class Row:
    """One thing that was timed.

    Attributes:
        name: what.
        unit: of the figures; more is better.
        ours: this library, median over the rounds.
        reference: transformers, None where it was not timed.
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


def bench(
    size: str,
    *,
    prompt: int = 512,
    tokens: int = 300,
    seconds: float = 25.0,
    repeats: int = 3,
    dtype: str | None = None,
    reference: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Bench:
    """Time a named size.

    Args:
        size: preset from configs/models.
        prompt: tokens of the prompt that is prefilled.
        tokens: length of the reply that the official loop without a cache is charged for.
        seconds: length of the recording that is encoded, at most 25.
        repeats: rounds.
        dtype: dtype of weights and computation; by default bfloat16, float32 on a CPU.
        reference: time transformers as well, if torch is installed.
        progress: told about rounds done and rounds in all.

    Raises:
        ConfigError: for an unknown size, or lengths that cannot be timed.
    """
    if repeats < 1 or tokens < 2 or prompt < 1 or not 0.1 <= seconds <= 25:
        raise ConfigError("expected repeats >= 1, tokens >= 2, prompt >= 1, seconds in 0.1..25")
    enable_compilation_cache()
    cfg = StepAudio2Config.preset(size)
    kind = default_dtype() if dtype is None else jnp.dtype(dtype)
    ours = Ours(cfg, kind, prompt, seconds)
    theirs = _reference(cfg, kind.name, prompt, seconds) if reference else None
    steps = min(tokens, 32)
    times: dict[str, list[float]] = {}
    for round_ in range(repeats + 1):  # the first round compiles and warms up
        for side, runner in (("ours", ours), ("reference", theirs)):
            if runner is None:
                continue
            for part in ("encode", "prefill"):
                times.setdefault(f"{side}.{part}", []).append(timed(getattr(runner, part)))
            times.setdefault(f"{side}.decode", []).append(timed(lambda r=runner: r.decode(steps)))
        if theirs is not None and round_ < 2:
            times.setdefault("loop", []).append(theirs.loop_without_cache(tokens))
        if progress is not None:
            progress(round_ + 1, repeats + 1)
    times = {name: values[1:] for name, values in times.items()}
    bandwidth = copy_bandwidth()
    rows = [
        _row("encode", "x real time", times, seconds, f"one clip of {seconds:g} s"),
        _row("prefill", "tokens/s", times, prompt, f"one prompt of {prompt} tokens"),
        _row("decode", "tokens/s", times, steps, f"{steps} tokens after it, greedy"),
    ]
    speed = rows[-1].ours
    if "loop" in times:
        loop = tokens / times["loop"][0]
        rows.append(
            Row("decode, no cache", "tokens/s", speed, loop, speed / loop,
                f"the official loop over {tokens} tokens, integrated from 5 lengths")
        )  # fmt: skip
    weights = ours.decoder_bytes / 1e9
    rows += [
        Row("weights read in decode", "GB/s", weights * speed, note=f"{weights:.2f} GB per token"),
        Row("copy bandwidth", "GB/s", bandwidth, note="read and written, all threads"),
    ]
    return Bench(_machine(theirs is not None), size, tuple(rows))


class Ours:
    """This library with random weights."""

    def __init__(self, cfg: StepAudio2Config, dtype: Any, prompt: int, seconds: float):
        stacked = jax.default_backend() != "cpu"
        policy = Policy(param=dtype, compute=dtype)
        params = init_params(lambda: StepAudio2Model(cfg, policy=policy, rngs=nnx.Rngs(0)))
        decoder = params["decoder"]
        # Of the embedding table a step reads one row; everything else it reads whole.
        read = [decoder["layers"], decoder["head"]]
        self.decoder_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(read))
        params = params if stacked else unstack_decoder(params)
        self.generator = Generator(step_audio2(cfg, policy, stacked=stacked), params, cfg)
        rng = np.random.default_rng(0)
        self.request = Request(rng.integers(0, cfg.decoder.vocab, prompt).astype(np.int32))
        frames = int(audio.num_frames(int(seconds * audio.SAMPLE_RATE)))
        self.mel = rng.standard_normal((cfg.audio_encoder.mels, frames), np.float32)
        self.options = Options(max_new_tokens=256)
        self.state: Any = None

    def encode(self) -> None:
        """One clip through encoder and adapter."""
        jax.block_until_ready(self.generator.listen([self.mel])[0])

    def prefill(self) -> None:
        """One prompt; the state it leaves is what `decode` goes on from."""
        self.state = self.generator.start([self.request], self.options)
        jax.block_until_ready(self.state)

    def decode(self, steps: int) -> None:
        """`steps` tokens in one compiled program."""
        self.state, tokens = self.generator.run(self.state, self.options, steps)
        jax.block_until_ready(tokens)


def copy_bandwidth(size: int = 1 << 30) -> float:
    """GB/s that copying a large array moves, reads and writes together; the best of five."""
    source = jnp.ones(size // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    copy(source).block_until_ready()
    best = min(timed(lambda: copy(source).block_until_ready()) for _ in range(5))
    return 2 * source.nbytes / best / 1e9


def timed(run: Callable[[], Any]) -> float:
    """Seconds of wall time that a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def print_bench(result: Bench, console: Console) -> None:
    """A table for people."""
    table = Table(title=f"{result.size}: " + ", ".join(result.machine.values()))
    for name in ("", "unit", "sa2jax", "reference", "ratio", ""):
        table.add_column(name, justify="left" if not name or name == "unit" else "right")
    for row in result.rows:
        reference = "" if row.reference is None else f"{row.reference:.2f}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        table.add_row(row.name, row.unit, f"{row.ours:.2f}", reference, ratio, row.note)
    console.print(table)


def _row(part: str, unit: str, times: dict[str, list[float]], work: float, note: str) -> Row:
    ours = times[f"ours.{part}"]
    theirs = times.get(f"reference.{part}")
    speed = work / statistics.median(ours)
    if theirs is None:
        return Row(part, unit, speed, note=note)
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    return Row(part, unit, speed, work / statistics.median(theirs), ratio, note)


def _reference(cfg: StepAudio2Config, dtype: str, prompt: int, seconds: float) -> Any:
    try:
        from sa2jax.bench.reference import Reference
    except ImportError:
        return None
    return Reference(cfg, dtype, prompt, seconds)


def _machine(with_reference: bool) -> dict[str, str]:
    device = jax.devices()[0]
    packages = ["jax", *(["torch", "transformers"] if with_reference else [])]
    versions = {name: f"{name} {metadata.version(name)}" for name in packages}
    cores = f"{jax.device_count()} x {device.device_kind}"
    python = f"Python {platform.python_version()}"
    return {"device": cores, "processor": _processor(), "python": python, **versions}


def _processor() -> str:
    import os

    return f"{platform.machine()} with {os.cpu_count()} cores"

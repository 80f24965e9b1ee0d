"""Training logs: console, metrics.jsonl, TensorBoard, curves."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sa2jax.atomic_io import disk_errors, new_file, write_text
from sa2jax.audio.rates import MEL_RATE
from sa2jax.chips import CHIPS
from sa2jax.config import StepAudio2Config
from sa2jax.errors import CheckpointError, FileError, TrainError
from sa2jax.files.json_files import parse_json
from sa2jax.files.raw import read_jsonl_lines

METRICS, CURVES = "metrics.jsonl", "loss.png"
BOARD_SECONDS = 30.0
# How devices call themselves, and their names here.
DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "H100": "h100",
    "H200": "h200",
    "A100": "a100-80gb",
    "L4": "l4",
    "T4": "t4",
    "B200": "b200",
}
# What a line on the screen has; the files have all.
CONSOLE_METRICS = (
    "loss",
    "text/loss",
    "audio/loss",
    "accuracy",
    "grad_norm",
    "learning_rate",
    "evaluate/loss",
    "evaluate/accuracy",
    "step_seconds",
    "tokens_per_second",
    "token_utilization",
    "audio_utilization",
    "mfu",
    "data_wait_fraction",
)


class TrainingLog:
    """Metrics of a run, on one host; the others keep silent.

    Args:
        folder: the run's folder.
        steps: of the whole run.
        start: steps done already; what was noted of later ones is forgotten.
        quiet: write files only.
    """

    def __init__(self, folder: Path, *, steps: int, start: int = 0, quiet: bool = False):
        self._mine, self._folder = jax.process_index() == 0, folder
        self._file = None
        self._board: Any = None
        console = Console(stderr=True)
        self._live = self._mine and not quiet
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (self._live and console.is_terminal),
        )
        self._task = self._progress.add_task("training", total=steps, completed=start)
        self.steps = steps
        if not self._mine:
            return
        path = folder / METRICS
        with disk_errors(path):
            kept = [line for line in read_metrics(path) if line["step"] <= start]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
            self._file = path.open("a", encoding="utf-8")
        if find_spec("tensorboardX") is not None:
            with disk_errors(folder / "tensorboard"):
                self._board = _TensorBoard(folder / "tensorboard", first_step=start + 1)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
        for each in (self._file, self._board):
            if each is not None:  # what failed before fails again, which need not be said
                with disk_errors(self._folder) if error is None else suppress(OSError):
                    each.close()

    def print(self, text: str) -> None:
        """A line on the screen."""
        if self._live:
            self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self._progress.update(self._task, completed=step)

    def write_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Note metrics after a step, and show them."""
        if self._file is None:
            return
        values = {name: values[name] for name in (*CONSOLE_METRICS, *values) if name in values}
        path = self._folder / METRICS
        with disk_errors(path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            if self._board is not None:
                self._board.write(step, values)
        if not path.exists():
            raise CheckpointError(f"{path} was removed while the run wrote it: begin the run again")
        shown = "  ".join(
            f"{name} {_format(value)}" for name, value in values.items() if name in CONSOLE_METRICS
        )
        self.print(f"step {step}/{self.steps}  {shown}")


class _TensorBoard:
    """Metrics as TensorBoard reads them, without the thread that would fail unheard.

    Args:
        folder: made if need be.
        first_step: what there is of this step and later ones is forgotten.
    """

    def __init__(self, folder: Path, *, first_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self._writer, self._flushed = EventsWriter(str(folder / "events")), 0.0
        self._add(first_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the metrics of a step; they may stay in memory for half a minute."""
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add(step, summary=Summary(value=scalars))
        if time.monotonic() - self._flushed > BOARD_SECONDS:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))


class RunCounts(NamedTuple):
    """What a run has done so far.

    Attributes:
        steps: updates.
        tokens: learnt from, of all hosts.
        audio_seconds: of sound, of all hosts.
        data_wait_seconds: that this host has waited for data.
    """

    steps: int
    tokens: int
    audio_seconds: float
    data_wait_seconds: float


class Meter:
    """How fast a run is, and how full its rows are, between two lines of its log.

    Args:
        flops: of a token and of a second of sound, see `training_flops`.
        peak: FLOP/s of all devices together; 0 if unknown.
        room: tokens and seconds of sound that the rows of a step have room for; 0 if unknown.
    """

    def __init__(
        self, flops: tuple[float, float], peak: float, room: tuple[float, float] = (0.0, 0.0)
    ):
        self._flops, self._peak, self._room = flops, peak, room
        self._mark: tuple[float, RunCounts] | None = None

    def skip(self, now: RunCounts) -> None:
        """Begin anew here: what was done since the last reading is in no rate."""
        self._mark = time.perf_counter(), now

    def measure(self, now: RunCounts) -> dict[str, float]:
        """Rates since the last reading, or the last `skip`; none at the first."""
        mark = self._mark
        self._mark = time.perf_counter(), now
        if mark is None:
            return {}
        began, before = mark
        seconds = self._mark[0] - began
        done = RunCounts(
            now.steps - before.steps,
            now.tokens - before.tokens,
            now.audio_seconds - before.audio_seconds,
            now.data_wait_seconds - before.data_wait_seconds,
        )
        if seconds <= 0 or not done.steps:
            return {}
        rates = {
            "step_seconds": seconds / done.steps,
            "tokens_per_second": done.tokens / seconds,
            "audio_hours_per_second": done.audio_seconds / 3600 / seconds,
            "data_wait_fraction": done.data_wait_seconds / seconds,
        }
        used = ("token_utilization", done.tokens), ("audio_utilization", done.audio_seconds)
        for (name, amount), room in zip(used, self._room, strict=True):
            if room:
                rates[name] = amount / done.steps / room
        if self._peak:
            work = self._flops[0] * done.tokens + self._flops[1] * done.audio_seconds
            rates["mfu"] = work / seconds / self._peak
        return rates


def training_flops(
    cfg: StepAudio2Config, *, base_trained: bool, encoder_trained: bool
) -> tuple[float, float]:
    """Useful FLOPs of matrix products of a step: for each token, and for each second of sound.

    Two for each weight forward, four backward where it is trained, two where it only passes
    gradients on. Attention's own products and what is computed again do not count.

    Args:
        cfg: the model's sizes.
        base_trained: whether the decoder's matrices are trained themselves.
        encoder_trained: whether gradients go through the audio encoder.
    """
    d, e = cfg.decoder, cfg.audio_encoder
    heads = (2 * d.heads + 2 * d.kv_heads) * d.head_dim
    decoder = d.layers * d.embed * (heads + 3 * d.mlp) + d.vocab * d.embed
    encoder = e.layers * e.embed * e.embed * (4 + 2 * e.mlp_ratio)
    per_token = (6 if base_trained else 4) * decoder
    return per_token, (
        6 if encoder_trained else 2
    ) * encoder * MEL_RATE // 2  # two frames are one inside it


def peak_flops() -> float:
    """FLOP/s in bfloat16 of all devices; 0 if they are not known."""
    kind = jax.devices()[0].device_kind
    exact = DEVICE_KINDS.get(kind)
    name = exact or next(
        (name for key, name in DEVICE_KINDS.items() if f" {key}" in f" {kind}"), None
    )
    return CHIPS[name].bf16 * jax.device_count() if name in CHIPS else 0.0


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last one cut by a kill does not count."""
    path = Path(path)
    found = []
    try:
        for _, line in read_jsonl_lines(path) if path.is_file() else ():
            found.append(parse_json(line, dict, finite=False))
    except FileError:
        pass
    return found


def plot_curves(folder: str | Path) -> Path:
    """Draw the curves of a run: losses, accuracies, learning rate, speed.

    Args:
        folder: the run's folder, with a metrics.jsonl.

    Returns:
        The PNG.

    Raises:
        TrainError: if matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise TrainError("curves need matplotlib: pip install 'sa2jax[train]'")
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    folder = Path(folder)
    lines = read_metrics(folder / METRICS)
    panels = {
        "loss (nats)": lambda name: name.endswith("loss"),
        "accuracy": lambda name: name.endswith("accuracy"),
        "learning rate": lambda name: name == "learning_rate",
        "tokens per second": lambda name: name == "tokens_per_second",
    }
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    for axis, (title, wanted) in zip(axes.flat, panels.items(), strict=True):
        names = sorted({name for line in lines for name in line if wanted(name)})
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize="small")
    with disk_errors(folder / CURVES), new_file(folder / CURVES) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)
    return folder / CURVES


def _format(value: float) -> str:
    return f"{value:.3e}" if value and not 1e-3 <= abs(value) < 1e5 else f"{value:.4g}"

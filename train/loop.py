"""The training loop: update, log, evaluate, checkpoint, stop, resume.

What is trained is a `TrainingTask`: the language model's is made in `language/task.py`, a single
network's in `networks/task.py`. A run's folder has

    run.json         the recipe, and what it began with
    checkpoints/     states; the same run goes on from the last one
    metrics.jsonl    also in tensorboard/, and as curves in loss.png
    rejects.jsonl    samples that could not be used, and why
    model/, adapter/ what was learnt
"""

import json
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sa2jax.atomic_io import disk_errors, keep_sources, write_text
from sa2jax.errors import FileError, Sa2jaxError, TrainError
from sa2jax.files.json_files import read_json
from sa2jax.locks import LOCK, exclusive
from sa2jax.nn import Params
from sa2jax.sharding import batch_axis_size, default_axis, make_mesh
from sa2jax.train.checkpoints import Checkpoints
from sa2jax.train.log import Meter, RunCounts, TrainingLog, plot_curves
from sa2jax.train.optimizer import Optimizer
from sa2jax.train.recipe import Intervals, differences, moves
from sa2jax.train.state import TrainState

RUN, CHECKPOINTS, REJECTS = "run.json", "checkpoints", "rejects.jsonl"


class DataIterator(Protocol):
    """Where batches come from: an iterator that can tell and find its place."""

    fingerprint: str
    tokens: int
    audio_seconds: float
    data_wait_seconds: float

    def __next__(self) -> Any: ...
    def empty_batch(self) -> Any:
        """A batch of which nothing is learnt."""
        ...

    def state(self) -> dict[str, Any]:
        """Where the next batch stands, as JSON can hold it."""
        ...

    def restore(self, state: Any) -> None:
        """Go to where a state was taken."""
        ...

    def close(self) -> None:
        """Stop what works in the background."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """What is trained, and how; the loop knows no more of it.

    Attributes:
        title: a line for the screen.
        metadata: what a run must have in common with the one it goes on from: `recipe` (nested
            values), and fingerprints by name.
        data: of training.
        data_shards: how many shares the data is split into.
        finite: whether the data ends.
        optimizer: what is trained.
        abstract_state: shapes and places of the state.
        load_params: the numbers that it begins with.
        init_state: the state before the first step, from those numbers.
        step: one update.
        place_batch: puts a batch on its devices.
        evaluate: metrics of a state on data that is not learnt from, if there is such data.
        write_results: writes the results into the run's folder; gives their paths by name.
        meter: how fast it is.
        sources: folders that are read, which the run's own may not overlap.
    """

    title: str
    metadata: Mapping[str, Any]
    data: DataIterator
    data_shards: int = 1
    finite: bool = False
    optimizer: Optimizer
    abstract_state: TrainState
    load_params: Callable[[], Params]
    init_state: Callable[[Params], TrainState]
    step: Callable[[TrainState, Any], tuple[TrainState, Mapping[str, Any]]]
    place_batch: Callable[[Any], Any]
    evaluate: Callable[[TrainState], dict[str, float]] | None = None
    write_results: Callable[[TrainState, Path, TrainingLog], dict[str, Path]]
    meter: Meter
    sources: Sequence[str | Path] = ()


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        step: updates done.
        finished: whether these are all; if not, the same run goes on.
        metrics: the last lines of the log.
        results: what was written, by name: `model`, `adapter`, `curves`.
    """

    step: int
    finished: bool
    metrics: dict[str, float]
    results: dict[str, Path] = field(default_factory=dict)

    @property
    def progress(self) -> str:
        """What is done."""
        return f"step {self.step}"


def run_training(
    task: TrainingTask,
    intervals: Intervals,
    out: str | Path,
    *,
    steps: int,
    fresh: bool = False,
    profile: int = 0,
    quiet: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> TrainResult:
    """Do all steps of a task, from the last checkpoint on if there is one.

    An interrupt or SIGTERM ends the run after the step at hand, with a checkpoint.

    Args:
        task: what is trained.
        intervals: how often is logged, evaluated and saved.
        out: the run's folder, made if need be.
        steps: updates in all.
        fresh: forget checkpoints that are there.
        profile: steps to record for a profiler, in `out`/profile, once all is compiled.
        quiet: show nothing.
        on_step: called with the number of each finished step.

    Raises:
        DataError: if too much of the data cannot be used.
        TrainError: if the folder holds another run, or checkpoints do not fit.
        CheckpointError: if something cannot be read or written, or another run writes there.
    """
    out = Path(out)
    with ExitStack() as held:
        saved = _open_checkpoints(task, intervals, out, fresh, held)
        try:
            return _train(task, intervals, out, saved, steps, profile, quiet, on_step)
        except Exception:
            saved.abandon()
            raise


def _train(
    task: TrainingTask,
    intervals: Intervals,
    out: Path,
    saved: Checkpoints,
    steps: int,
    profile: int,
    quiet: bool,
    on_step: Callable[[int], None] | None,
) -> TrainResult:
    """`run_training` in a folder that is the run's."""
    # --- begin, or go on ----------------------------------------------------------------------
    data = task.data
    done = saved.latest() or 0
    params = task.load_params()
    if done:
        state, place = saved.restore(done, task.optimizer, task.abstract_state, params)
        data.restore(place)
    else:
        state = task.init_state(params)
    del params

    # --- steps --------------------------------------------------------------------------------
    last, metrics, halt = done, {}, False
    with TrainingLog(out, steps=steps, start=done, quiet=quiet) as log, _stop_requests() as stop:
        log.print(f"{task.title}, going on after step {done}" if done else task.title)
        window: list[Mapping[str, Any]] = []
        for now in range(done + 1, steps + 1):
            batch = next(data, None)
            if task.finite and any_host(batch is None):
                log.print(f"the data ends after step {last}")
                break
            with _profiled(out, profile, now - done):
                state, report = task.step(state, task.place_batch(batch or data.empty_batch()))
                # The step before has to be done, so that batches do not pile up on the devices.
                window = [*jax.device_get(window), report]
                if profile and now - done <= PROFILE_WARMUP_STEPS + profile:
                    jax.block_until_ready(report)
            last = now
            log.advance(now)
            if on_step is not None:
                on_step(now)

            # Hosts ask each other at the steps that are logged.
            logged = now % intervals.log_every == 0 or now == steps
            halt = any_host(stop()) if logged or jax.process_count() == 1 else False
            if logged or halt:
                metrics, window = _mean_metrics(window), []
                log.write_metrics(now, metrics | task.meter.measure(_run_counts(task, now)))
            every = intervals.evaluate_every or steps
            if task.evaluate is not None and now % every == 0 and now < steps:
                log.write_metrics(now, task.evaluate(state))
                task.meter.skip(_run_counts(task, now))  # what this took is not training's
            if now % intervals.save_every == 0 or halt:
                saved.save(now, task.optimizer, state, data.state())
            if halt:
                break

        # --- end ----------------------------------------------------------------------------------
        # What all hosts know, not what one was told since: they end alike.
        finished = not halt
        if window:  # the data ended between two lines
            metrics = _mean_metrics(window)
            log.write_metrics(last, metrics | task.meter.measure(_run_counts(task, last)))
        if finished:
            if task.evaluate is not None and last > done:
                found = task.evaluate(state)
                log.write_metrics(last, found)
                metrics |= found
            if last > (saved.latest() or 0):
                saved.save(last, task.optimizer, state, data.state())
        saved.close()
        data.close()
        outcome = TrainResult(last, finished, metrics)
        if not finished:
            return outcome
        results = task.write_results(state, out, log)
    if jax.process_index() == 0 and find_spec("matplotlib") is not None:
        results["curves"] = plot_curves(out)
    return replace(outcome, results=results)


def mesh_from_spec(spec: str | None) -> Mesh | None:
    """The devices of a run: those that are named, or all.

    Raises:
        ShardingError: for a mesh that does not fit the devices.
    """
    if spec is None:
        count = jax.device_count()
        return make_mesh({default_axis(training=True): count}) if count > 1 else None
    return make_mesh(spec)


def micro_batch_rows(rows: int, parts: int, mesh: Mesh | None) -> int:
    """Rows that are computed at once: of an update, or of one of its parts.

    Raises:
        TrainError: if the mesh cannot split them evenly.
    """
    rows //= max(parts, 1)
    if rows % batch_axis_size(mesh):
        raise TrainError(
            f"{rows} rows at a time do not divide by the {batch_axis_size(mesh)} devices of the "
            "mesh's data and fsdp axes: change the rows of an update, or of a part of it, or the "
            "mesh"
        )
    return rows


def describe_training(name: str, like: TrainState, optimizer: Optimizer, mesh: Mesh | None) -> str:
    """A line that says how much is trained, and where."""
    trained, frozen = optimizer.partition(like.params)

    def count(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6

    return (
        f"{name}: {count(trained):.4g} M parameters trained, {count(frozen):.4g} M frozen, on "
        f"{describe_mesh(mesh)}"
    )


def describe_mesh(mesh: Mesh | None) -> str:
    """A mesh in words."""
    return "one device" if mesh is None else ", ".join(f"{k}={v}" for k, v in mesh.shape.items())


def gather_to_host(tree: Any) -> Any:
    """Arrays on the host, brought together from all hosts."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


# --- parts of a run -----------------------------------------------------------------------------


def _open_checkpoints(
    task: TrainingTask, intervals: Intervals, out: Path, fresh: bool, held: ExitStack
) -> Checkpoints:
    """The checkpoints of this run; those of another one are refused. `held` keeps others away."""
    problem = None
    if jax.process_index() == 0:  # the others must not see the folder half made
        try:
            keep_sources(out, task.sources)
            _claim_run_folder(out, task.metadata, fresh, held)
        except Sa2jaxError as error:
            problem = error
    if jax.process_count() > 1:
        fine = multihost_utils.broadcast_one_to_all(np.array(problem is None))
        if not fine and problem is None:
            problem = TrainError(f"the first host cannot use {out}: it says why")
    if problem is not None:
        raise problem
    return Checkpoints(out / CHECKPOINTS, keep=intervals.keep, keep_every=intervals.keep_every)


def _claim_run_folder(out: Path, metadata: Mapping[str, Any], fresh: bool, held: ExitStack) -> None:
    """Make a run's folder, or see that it is this run's and no other one writes there."""
    path, states = out / RUN, out / CHECKPOINTS
    known = path.is_file() or (out / REJECTS).is_file()
    if out.is_dir() and not known and any(not e.name.startswith(LOCK) for e in out.iterdir()):
        raise TrainError(f"{out} holds something else than a training run: choose another --out")
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        held.enter_context(exclusive(out / LOCK, out))
        if fresh and states.is_symlink():
            raise TrainError(f"{states} is a link, --fresh does not follow it: remove it")
        if fresh:
            shutil.rmtree(states, ignore_errors=True)
    if states.is_dir() and any(step.name.isdigit() for step in states.iterdir()):
        _require_same_run(path, metadata)
    with disk_errors(path):
        write_text(path, json.dumps(metadata, indent=2, ensure_ascii=False))


def _require_same_run(path: Path, metadata: Mapping[str, Any]) -> None:
    """Refuse to go on with other data, another model or other numbers, wherever they lie."""
    try:
        was, recipe = read_json(path, dict), metadata["recipe"]
        found = differences(was["recipe"], recipe)
        moved = {what: moves(was["recipe"], recipe, what) for what in ("model", "data")}
    except (FileError, ValueError, KeyError, TypeError, AttributeError):
        raise TrainError(
            f"{path} is damaged: --fresh begins anew and forgets the checkpoints"
        ) from None
    known = metadata.get("recordings")
    if was.get("model") != metadata["model"]:
        found.append(f"the model that it began with{moved['model']}")
    if was.get("data") != metadata["data"] and not found:
        found.append(f"the contents of the data or the tokenizer{moved['data']}")
    if not found and was.get("recordings", known) != known:  # older runs do not say
        found.append(f"the recordings that the data names{moved['data']}")
    if found:
        raise TrainError(
            f"{path.parent} has checkpoints of another run, which differs in: {'; '.join(found)}. "
            "Choose another --out, take the old values, or begin anew with --fresh"
        )


def _run_counts(task: TrainingTask, steps: int) -> RunCounts:
    data = task.data
    return RunCounts(
        steps,
        data.tokens * task.data_shards,
        data.audio_seconds * task.data_shards,
        data.data_wait_seconds,
    )


def _mean_metrics(reports: list[Mapping[str, Any]]) -> dict[str, float]:
    """One line of the log from the reports of several steps; of the learning rate, the last."""
    reports = jax.device_get(reports)
    kept = {key: float(np.mean([report[key] for report in reports])) for key in reports[-1]}
    return kept | {"learning_rate": float(reports[-1]["learning_rate"])}


# --- stopping -----------------------------------------------------------------------------------

PROFILE_WARMUP_STEPS = 3  # steps until everything is compiled and warm


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Whether somebody asked to stop: a first Ctrl-C or SIGTERM waits for the step at hand."""
    asked: list[int] = []
    before = {}

    def ask(number: int, frame: Any) -> None:
        del frame
        asked.append(number)
        for kind, handler in before.items():  # a second one ends it at once
            signal.signal(kind, handler)

    try:
        for kind in (signal.SIGINT, signal.SIGTERM):
            before[kind] = signal.signal(kind, ask)
    except ValueError:  # not the main thread: there is nothing to catch
        pass
    try:
        yield lambda: bool(asked)
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def any_host(value: bool) -> bool:
    """Whether it is so on any host."""
    if jax.process_count() == 1:
        return value
    return bool(np.any(multihost_utils.process_allgather(np.array(value))))


@contextmanager
def _profiled(out: Path, steps: int, now: int) -> Iterator[None]:
    """Record `steps` steps once the first ones are done."""
    folder = out / "profile"
    if steps and now == PROFILE_WARMUP_STEPS + 1:
        with disk_errors(folder):
            jax.profiler.start_trace(str(folder))
    yield
    if steps and now == PROFILE_WARMUP_STEPS + steps:
        with disk_errors(folder):
            jax.profiler.stop_trace()

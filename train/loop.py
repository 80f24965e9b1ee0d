"""One training run, from a recipe to a model folder: input, model, update, checkpoint, log.

outcome = train(read_recipe("sft", {"model.folder": "mini"}), "runs/talk")

runs/talk/run.json         the recipe, and what it began with
checkpoints/     states; the same command goes on from the last one
metrics.jsonl    also in tensorboard/, and as curves in loss.png
rejects.jsonl    samples that could not be used, and why
model/           what was learnt, for `StepAudio2.from_pretrained`
adapter/         low-rank matrices alone, in PEFT's format
"""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sa2jax.errors import DataError, TrainError
from sa2jax.folders import disk_errors
from sa2jax.sharding import batch_ways, make_mesh
from sa2jax.train import log as logs
from sa2jax.train.base import Base, open_base
from sa2jax.train.checkpoints import Checkpoints
from sa2jax.train.data import Data, DataConfig, make_data
from sa2jax.train.log import Log, Meter
from sa2jax.train.lora import LORA, split_lora
from sa2jax.train.objective import Sums
from sa2jax.train.optimizer import Optimizer, OptimizerConfig, make_optimizer
from sa2jax.train.peft import save_adapter
from sa2jax.train.recipe import Recipe, differences
from sa2jax.train.step import (
    TrainState,
    abstract_state,
    host_part,
    init_state,
    make_evaluation,
    make_step,
    place_batch,
)

RUN, STATES, REJECTS, MODEL, ADAPTER = (
    "run.json", "checkpoints", "rejects.jsonl", "model", "adapter",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: updates done.
        finished: whether these are all; if not, the same command goes on.
        metrics: the last line of the log.
        model: the folder of the trained model, if it was written.
        adapter: the folder of its low-rank matrices, if there are any.
        curves: the PNG of its losses, if matplotlib is there.
    """

    step: int
    finished: bool
    metrics: dict[str, float]
    model: Path | None = None
    adapter: Path | None = None
    curves: Path | None = None


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    fresh: bool = False,
    profile: int = 0,
    quiet: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> Outcome:
    """Train as a recipe says; goes on from the last checkpoint if there is one.

    An interrupt or SIGTERM ends the run after the step at hand with a checkpoint.

    Args:
        recipe: everything that the run depends on.
        out: the run's folder, made if need be.
        fresh: forget checkpoints that are there.
        profile: steps to record for a profiler, in `out`/profile, once all is compiled.
        quiet: show nothing.
        on_step: told about each step that was done.

    Raises:
        ConfigError: if the model's config is not understood.
        DataError: if the data cannot be used, or too much of it cannot.
        TrainError: if the folder holds another run, or checkpoints do not fit.
        ShardingError: for a mesh that does not fit the devices.
        CheckpointError: if the model cannot be read or something not be written.
    """
    out = Path(out)
    mesh = mesh_of(recipe)

    # --- input --------------------------------------------------------------------------------
    base = open_base(recipe.model, recipe.lora)
    tokenizer = base.tokenizer()
    if recipe.data.length > base.cfg.decoder.max_positions:
        raise TrainError(
            f"data.length {recipe.data.length}: the model has {base.cfg.decoder.max_positions} "
            "positions, a row can have no more"
        )
    part, parts = host_part(mesh, rows_of_step(recipe, mesh))

    def open_data(config: DataConfig, rejects: Path | None) -> Data:
        return make_data(
            config, tokenizer, base.cfg, seed=recipe.seed, host=part, hosts=parts, rejects=rejects
        )

    data = open_data(recipe.data, out / REJECTS)
    held_out = _held_out(recipe)

    # --- update -------------------------------------------------------------------------------
    optimizer = make_optimizer(optimizer_config(recipe))
    step = make_step(
        base.model, optimizer, mesh, remat=recipe.remat, chunk=recipe.chunk,
        gradients=recipe.gradients,
    )  # fmt: skip
    evaluate = make_evaluation(base.model, mesh, chunk=recipe.chunk)
    like = abstract_state(base.model, optimizer, mesh)

    # --- checkpoints --------------------------------------------------------------------------
    facts = {"recipe": recipe.plain(), "model": base.fingerprint(), "data": data.fingerprint}
    saved = _open_checkpoints(recipe, out, facts, fresh)
    done = saved.latest() or 0

    # --- model --------------------------------------------------------------------------------
    params = base.load(mesh, recipe.seed)
    if done:
        state, place = saved.restore(done, optimizer, like, params)
        data.restore(place)
    else:
        state = init_state(base.model, optimizer, mesh, params)
    del params

    # --- loop ---------------------------------------------------------------------------------
    last, steps = done, recipe.optimizer.steps
    metrics: dict[str, float] = {}
    meter = Meter(_flops(base, optimizer), logs.peak_flops())
    with Log(out, steps=steps, start=done, quiet=quiet) as log, _stopping() as stop:
        log.say(
            f"{_described(base, optimizer, mesh)}{f', going on after step {done}' * bool(done)}"
        )
        window: list[dict[str, Any]] = []
        for now in range(done + 1, steps + 1):
            batch = next(data, None)
            if recipe.data.epochs is not None and _everywhere(batch is None):
                log.say(f"the data ends after step {last}")
                break
            with _profiled(out, profile, now - done):
                state, report = step(state, place_batch(batch or data.empty(), mesh))
                # The step before has to be done, so that batches do not pile up on the devices.
                window = [*jax.device_get(window), report]
                if profile and now - done <= PROFILE_AFTER + profile:
                    jax.block_until_ready(report)
            last = now
            log.advance(now)
            if on_step is not None:
                on_step(now)
            halt = _any_host(stop(), now, recipe)
            if now % recipe.log_every == 0 or now == steps or halt:
                metrics = _mean(jax.device_get(window))
                window = []
                rates = meter.read(
                    now, data.tokens * parts, data.seconds_heard * parts, data.waited
                )
                log.write(now, metrics | rates)
            if held_out is not None and recipe.evaluate.every and now % recipe.evaluate.every == 0:
                found = _evaluate(evaluate, state, open_data(held_out, None), recipe, mesh)
                log.write(now, found)
                metrics |= found
                meter.read(now, data.tokens * parts, data.seconds_heard * parts, data.waited)
            if now % recipe.save_every == 0 or halt:
                saved.save(now, optimizer, state, data.state())
            if halt:
                break
        finished = not stop()
        if finished and held_out is not None and "evaluate/loss" not in metrics:
            found = _evaluate(evaluate, state, open_data(held_out, None), recipe, mesh)
            log.write(last, found)
            metrics |= found
        if finished and last > (saved.latest() or 0):
            saved.save(last, optimizer, state, data.state())
        saved.close()
        data.close()
        outcome = Outcome(last, finished, metrics)
        return _write_results(outcome, base, state, out, recipe, log) if finished else outcome


def mesh_of(recipe: Recipe) -> Mesh | None:
    """The devices of a run: those that the recipe names, or all.

    Raises:
        ShardingError: for a mesh that does not fit the devices.
    """
    if recipe.mesh is None:
        return make_mesh({"fsdp": jax.device_count()}) if jax.device_count() > 1 else None
    return make_mesh(recipe.mesh)


def rows_of_step(recipe: Recipe, mesh: Mesh | None) -> int:
    """Rows that are computed at once: of an update, or of one of its parts.

    Raises:
        TrainError: if the mesh cannot split them evenly.
    """
    rows = recipe.data.rows // max(recipe.data.parts, 1)
    if rows % batch_ways(mesh):
        raise TrainError(
            f"{rows} rows at a time do not divide by the {batch_ways(mesh)} devices of the mesh's "
            "data and fsdp axes: change data.rows, data.parts or the mesh"
        )
    return rows


def optimizer_config(recipe: Recipe) -> OptimizerConfig:
    """The recipe's, of which LoRA trains nothing but itself unless `rates` names more."""
    if recipe.lora is None:
        return recipe.optimizer
    rates = {LORA: recipe.lora.rate, **recipe.optimizer.rates, "": 0.0}
    return replace(recipe.optimizer, rate=recipe.lora.rate, rates=rates)


# --- parts of a run -----------------------------------------------------------------------------


def _open_checkpoints(recipe: Recipe, out: Path, facts: dict[str, Any], fresh: bool) -> Checkpoints:
    """The checkpoints of this run; those of another one are refused."""
    path = out / RUN
    if out.is_dir() and any(out.iterdir()) and not (path.is_file() or (out / REJECTS).is_file()):
        raise TrainError(f"{out} holds something else than a training run: choose another --out")
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    saved = Checkpoints(out / STATES, keep=recipe.keep, keep_every=recipe.keep_every)
    if fresh:
        saved.clear()
        saved = Checkpoints(out / STATES, keep=recipe.keep, keep_every=recipe.keep_every)
    elif saved.latest() is not None:
        try:
            was = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise TrainError(
                f"{path} is damaged: --fresh begins anew and forgets the checkpoints"
            ) from None
        found = differences(was["recipe"], facts["recipe"])
        if was["model"] != facts["model"]:
            found.append(f"the model in {recipe.model.folder or recipe.model.preset}")
        if was["data"] != facts["data"] and not found:
            found.append("the contents of the data or the tokenizer")
        if found:
            raise TrainError(
                f"{out} has checkpoints of another run, which differs in: {'; '.join(found)}. "
                "Choose another --out, take the old values, or begin anew with --fresh"
            )
    if jax.process_index() == 0:
        with disk_errors(path):
            path.write_text(json.dumps(facts, indent=2, ensure_ascii=False), encoding="utf-8")
    return saved


def _write_results(
    outcome: Outcome, base: Base, state: TrainState, out: Path, recipe: Recipe, log: Log
) -> Outcome:
    """The model, the adapter and the curves of a run that is done."""
    first = jax.process_index() == 0
    adapter = model = curves = None
    if base.lora is not None:
        adapter = out / ADAPTER
        lora = _whole(split_lora(state.params)[1])
        if first:
            save_adapter(
                adapter, lora, base.cfg, rank=base.lora.rank, alpha=base.lora.alpha,
                base=str(recipe.model.folder or recipe.model.preset), overwrite=True,
            )  # fmt: skip
    if base.keeps_whole_numbers:
        log.say("int8 matrices cannot take in what was learnt: the adapter is the result")
    else:
        model = out / MODEL
        base.save(state.params, model, overwrite=True)
    if first and logs.find_spec("matplotlib") is not None:
        curves = logs.plot(out)
    return replace(outcome, model=model, adapter=adapter, curves=curves)


def _held_out(recipe: Recipe) -> DataConfig | None:
    """The data of evaluation, in an order that never changes."""
    if recipe.evaluate is None:
        return None
    return replace(recipe.data, sources=recipe.evaluate.sources, shuffle=False, epochs=1, workers=0)


def _evaluate(
    run: Callable[..., dict[str, Sums]], state: TrainState, data: Data, recipe: Recipe,
    mesh: Mesh | None,
) -> dict[str, float]:  # fmt: skip
    """Means over the held-out batches; parts of an update are single batches here."""
    total: dict[str, Sums] = {}
    for _ in range(recipe.evaluate.batches if recipe.evaluate else 0):
        batch = next(data, None)
        if _everywhere(batch is None):
            break
        for piece in _pieces(batch or data.empty()):
            found = run(state.params, place_batch(piece, mesh))
            total = {name: sums + total[name] if total else sums for name, sums in found.items()}
    data.close()
    if not total:
        raise DataError("nothing to evaluate: the held-out data makes no batch")
    named = {name: sums.means() for name, sums in jax.device_get(total).items()}
    return {
        f"evaluate/{'' if name == 'all' else f'{name}/'}{key}": float(value)
        for name, means in named.items() for key, value in means.items()
    }  # fmt: skip


def _pieces(batch: Any) -> Iterator[Any]:
    """A batch, or its parts one after the other."""
    if batch.ids.ndim == 2:
        yield batch
    else:
        for n in range(batch.ids.shape[0]):
            yield jax.tree.map(lambda leaf, n=n: leaf[n], batch)


def _mean(reports: list[dict[str, Any]]) -> dict[str, float]:
    """One line of the log from the reports of several steps; of the rate, the last."""
    kept = {key: float(np.mean([report[key] for report in reports])) for key in reports[-1]}
    return kept | {"rate": float(reports[-1]["rate"])}


def _flops(base: Base, optimizer: Optimizer) -> tuple[float, float]:
    trains = lambda part: optimizer.trains(f"{part}.kernel")  # noqa: E731
    return logs.flops_of(
        base.cfg,
        base_trained=trains("decoder.layers.mlp.up"),
        encoder_trained=trains("audio_encoder.layers.mlp.up"),
    )


def _described(base: Base, optimizer: Optimizer, mesh: Mesh | None) -> str:
    trained, frozen = optimizer.split(base.model.abstract)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6  # noqa: E731
    devices = "one device" if mesh is None else ", ".join(f"{k}={v}" for k, v in mesh.shape.items())
    return f"{count(trained):.4g} M parameters trained, {count(frozen):.4g} M frozen, on {devices}"


def _whole(tree: Any) -> Any:
    """Arrays on the host, brought together from all hosts."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


# --- stopping -----------------------------------------------------------------------------------

PROFILE_AFTER = 3  # steps until everything is compiled and warm


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
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


def _any_host(value: bool, step: int, recipe: Recipe) -> bool:
    """Whether any host says so; hosts ask each other at the steps that are logged."""
    if jax.process_count() == 1:
        return value
    return step % recipe.log_every == 0 and _everywhere(value)


def _everywhere(value: bool) -> bool:
    if jax.process_count() == 1:
        return value
    return bool(np.any(multihost_utils.process_allgather(np.array(value))))


@contextmanager
def _profiled(out: Path, steps: int, now: int) -> Iterator[None]:
    """Record `steps` steps once the first ones are done."""
    if steps and now == PROFILE_AFTER + 1:
        jax.profiler.start_trace(str(out / "profile"))
    yield
    if steps and now == PROFILE_AFTER + steps:
        jax.profiler.stop_trace()

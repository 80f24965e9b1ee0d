"""A kind of training in a few lines: two numbers that are brought near another one."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from sa2jax.nn import functional, init_params, param
from sa2jax.train import loop
from sa2jax.train.dry_run import DryRun, memory_per_device, parameter_groups
from sa2jax.train.kinds import LOOP_OPTIONS, TrainingKind
from sa2jax.train.log import Meter
from sa2jax.train.networks.step import make_loss_step
from sa2jax.train.optimizer import OptimizerConfig, make_optimizer
from sa2jax.train.recipe import Intervals
from sa2jax.train.state import abstract_state, init_state


@dataclass(frozen=True, kw_only=True)
class ToyRecipe:
    target: float
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: str | None = None
    intervals: Intervals = field(default_factory=Intervals)

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))


class Toy(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.kernel = param(rngs, (2,), ("embed",), constant=0.0)


class ToyData:
    """One number again and again."""

    fingerprint, tokens, audio_seconds, data_wait_seconds = "one", 0, 0.0, 0.0

    def __init__(self, target: float):
        self._batch = {"target": jnp.asarray(target)}

    def __next__(self) -> Any:
        self.tokens += 1
        return self._batch

    def empty_batch(self) -> Any:
        return self._batch

    def state(self) -> dict[str, Any]:
        return {"tokens": self.tokens}

    def restore(self, state: Any) -> None:
        self.tokens = state["tokens"]

    def close(self) -> None:
        pass


MODEL = functional(lambda: Toy(nnx.Rngs(0)))


def toy_loss(model, params, batch, key, config):
    error = params["kernel"] - batch["target"]
    return jnp.mean(jnp.square(error)), {}


def run_toy(
    recipe: ToyRecipe, out: str | Path, sources: Sequence[Path] = (), **options: Any
) -> loop.TrainResult:
    optimizer = make_optimizer(recipe.optimizer)

    def write_results(state, out, log):
        (out / "toy.json").write_text(json.dumps(state.params["kernel"].tolist()))
        return {"toy": out / "toy.json"}

    task = loop.TrainingTask(
        title="toy",
        metadata={"recipe": recipe.to_dict(), "model": "toy", "data": "one"},
        data=ToyData(recipe.target),
        optimizer=optimizer,
        abstract_state=abstract_state(MODEL, optimizer),
        load_params=lambda: init_params(lambda: Toy(nnx.Rngs(0))),
        init_state=partial(init_state, MODEL, optimizer, None),
        step=make_loss_step(toy_loss, MODEL, optimizer),
        place_batch=lambda batch: batch,
        write_results=write_results,
        meter=Meter((0.0, 0.0), 0.0),
        sources=sources,
    )
    return loop.run_training(task, recipe.intervals, out, steps=recipe.optimizer.steps, **options)


def dry_run_toy(recipe: ToyRecipe) -> DryRun:
    optimizer = make_optimizer(recipe.optimizer)
    state = abstract_state(MODEL, optimizer)
    step = make_loss_step(toy_loss, MODEL, optimizer)
    memory = memory_per_device(step, state, {"target": jnp.asarray(0.0)})
    groups = parameter_groups(recipe.optimizer, state)
    return DryRun(groups, "one device", memory, 1, recipe.optimizer.steps, "numbers")


def toy_kind() -> TrainingKind[ToyRecipe]:
    options = {"data": lambda words: {"target": float(words[0])}, **LOOP_OPTIONS}
    return TrainingKind(recipe=ToyRecipe, run=run_toy, dry_run=dry_run_toy, options=options)


def train_toy(out: Path, steps: int = 6, *, log_every: int = 1, **options: Any) -> loop.TrainResult:
    """Some updates with a checkpoint at every second one."""
    rates = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.0, steps=steps)
    intervals = Intervals(log_every=log_every, save_every=2, keep=2)
    recipe = ToyRecipe(target=3.0, optimizer=rates, intervals=intervals)
    return run_toy(recipe, out, quiet=True, **options)

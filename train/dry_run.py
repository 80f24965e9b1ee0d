"""What a recipe would train, and what that takes of each device; nothing is loaded or run."""

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from sa2jax.train.data.examples import TOKEN_KINDS
from sa2jax.train.language.model_io import open_base_model
from sa2jax.train.language.recipe import LanguageRecipe
from sa2jax.train.language.step import abstract_language_batch, make_language_step
from sa2jax.train.language.task import optimizer_config
from sa2jax.train.loop import describe_mesh, mesh_from_spec, micro_batch_rows
from sa2jax.train.lora import LORA_PATTERN
from sa2jax.train.networks.recipes import NetworkRecipe
from sa2jax.train.networks.step import make_loss_step
from sa2jax.train.networks.task import TRAINERS
from sa2jax.train.optimizer import (
    MATRICES,
    OptimizerConfig,
    make_optimizer,
    param_name,
)
from sa2jax.train.state import TrainState, TrainStep, abstract_state

GIB = 2**30


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are treated alike.

    Attributes:
        name: of the part.
        dtypes: stored dtypes.
        parameters: how many numbers.
        learning_rate: learning rate after warm-up; 0 for frozen.
        weight_decayed: how many of them have weight decay.
        bytes_per_device: of each device.
    """

    name: str
    dtypes: str
    parameters: int
    learning_rate: float
    weight_decayed: int
    bytes_per_device: int


@dataclass(frozen=True)
class DryRun:
    """What a recipe amounts to.

    Attributes:
        groups: of parameters.
        devices: as the mesh names them.
        memory: bytes of each device by what they are for.
        units_per_step: positions of an update.
        steps: updates.
        unit: what these positions are.
    """

    groups: tuple[ParameterGroup, ...]
    devices: str
    memory: dict[str, int]
    units_per_step: int
    steps: int
    unit: str = "positions"

    def print(self, console: Console) -> None:
        """As tables."""
        table = Table(title="parameters", title_justify="left")
        for column in ("part", "dtype", "parameters", "rate", "decayed", "GiB a device"):
            table.add_column(column, justify="left" if column in ("part", "dtype") else "right")
        for group in self.groups:
            table.add_row(
                group.name,
                group.dtypes,
                f"{group.parameters:,}",
                f"{group.learning_rate:g}" if group.learning_rate else "frozen",
                f"{group.weight_decayed:,}" if group.learning_rate else "",
                _gib(group.bytes_per_device),
            )
        console.print(table)
        table = Table(title=f"memory of each device ({self.devices})", title_justify="left")
        table.add_column("what")
        table.add_column("GiB", justify="right")
        for name, size in self.memory.items():
            table.add_row(name, _gib(size))
        console.print(table)
        console.print(
            f"{self.steps} updates of {self.units_per_step:,} {self.unit}", highlight=False
        )


def dry_run_language(recipe: LanguageRecipe) -> DryRun:
    """Compile the step of a recipe for the devices at hand, and count.

    Raises:
        ConfigError: if the model's config is not understood.
        ShardingError: for a mesh that does not fit the devices.
        TrainError: if nothing would be trained, or rows do not divide by the mesh.
    """
    mesh, base = mesh_from_spec(recipe.mesh), open_base_model(recipe.model, recipe.lora)
    config = optimizer_config(recipe)
    optimizer = make_optimizer(config)
    state = abstract_state(base.model, optimizer, mesh)
    accumulation = recipe.data.accumulation_steps
    rows = micro_batch_rows(recipe.data.rows, recipe.data.accumulation_steps, mesh)
    batch = abstract_language_batch(
        base.cfg,
        mesh,
        rows,
        recipe.data.length,
        clips=rows * recipe.data.mel_rows,
        frames=recipe.data.mel_frames,
        packed=recipe.data.clips,
        accumulation_steps=accumulation,
        metric_masks=TOKEN_KINDS,
    )
    step = make_language_step(
        base.model,
        optimizer,
        mesh,
        remat=recipe.remat,
        loss_chunk=recipe.loss_chunk,
        grad_dtype=recipe.grad_dtype,
        unroll=recipe.unroll,
    )
    trained, _ = optimizer.partition(state.params)
    added_up = sum(map(_size, jax.tree.leaves(trained))) * jnp.dtype(recipe.grad_dtype).itemsize
    memory = _memory_per_device(step, state, batch, added_up * bool(accumulation))
    tokens = rows * max(accumulation, 1) * recipe.data.length
    return DryRun(
        _parameter_groups(config, state), describe_mesh(mesh), memory, tokens, config.steps
    )


def dry_run_network(recipe: NetworkRecipe) -> DryRun:
    """The same for a single network, with a batch of the longest rows.

    Raises:
        CheckpointError: if the folder has no such network.
        DataError: if the data cannot be read, where sizes depend on it.
        ShardingError: for a mesh that does not fit the devices.
        TrainError: if nothing would be trained, the detokenizer is not converted, or rows do not
            divide by the mesh.
    """
    mesh, subject = mesh_from_spec(recipe.mesh), TRAINERS[recipe.kind]
    network = subject.open(recipe.network.folder, recipe.network.compute_dtype)
    optimizer, model = make_optimizer(recipe.optimizer), subject.model(network, recipe.data)
    state = abstract_state(model, optimizer, mesh)
    rows = micro_batch_rows(recipe.data.rows, 0, mesh)
    step = make_loss_step(
        subject.loss, model, optimizer, recipe.loss, mesh, seed=recipe.seed,
        unroll=recipe.unroll,
    )  # fmt: skip
    memory = _memory_per_device(step, state, subject.batch(network, recipe, mesh, rows))
    units, unit = rows * subject.longest(recipe.data), f"{subject.unit} at most"
    groups = _parameter_groups(recipe.optimizer, state)
    return DryRun(groups, describe_mesh(mesh), memory, units, recipe.optimizer.steps, unit)


def _memory_per_device(
    step: TrainStep, state: TrainState, batch: Any, gradients: int = 0
) -> dict[str, int]:
    """Bytes of each device; `gradients` are those that are added up over parts of a batch."""
    found = step.lower(state, batch).compile().memory_analysis()
    memory = {
        "parameters": _bytes(state.params),
        "optimizer": _bytes(state.opt_state),
        "batch": _bytes(batch),
        "gradients": gradients,
    }
    if found is not None:
        # XLA counts the sums of accumulated gradients among its temporaries.
        memory["gradients and temporaries"] = int(found.temp_size_in_bytes)
        del memory["gradients"]
    return memory | {"in all": sum(memory.values())}


def _parameter_groups(config: OptimizerConfig, state: TrainState) -> tuple[ParameterGroup, ...]:
    found: dict[tuple[str, float], list[tuple[str, Any]]] = {}
    for path, leaf in jax.tree.leaves_with_path(state.params):
        name = param_name(path)
        key = (_part_of(name), config.learning_rate_of(name))
        found.setdefault(key, []).append((name, leaf))
    return tuple(
        ParameterGroup(
            part, ", ".join(sorted({leaf.dtype.name for _, leaf in leaves})),
            sum(leaf.size for _, leaf in leaves), rate,
            sum(leaf.size for name, leaf in leaves if name.rsplit(".", 1)[-1] in MATRICES),
            sum(_bytes(leaf) for _, leaf in leaves),
        )
        for (part, rate), leaves in sorted(found.items())
    )  # fmt: skip


def _part_of(name: str) -> str:
    if re.match(LORA_PATTERN, name):
        return "lora"
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "decoder" else parts[0]


def _bytes(tree: Any) -> int:
    return sum(_size(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _size(leaf: Any) -> int:
    """Numbers of an abstract array on each device."""
    place = getattr(leaf, "sharding", None)
    return int(np.prod(leaf.shape if place is None else place.shard_shape(leaf.shape)))


def _gib(size: int) -> str:
    return f"{size / GIB:.3g}" if size >= GIB / 100 else f"{size / 2**20:.3g} Mi"

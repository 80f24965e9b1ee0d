"""What a recipe would train, and what that takes of each device; nothing is loaded or run."""

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from sa2jax.train.data.examples import KINDS
from sa2jax.train.language.model_io import open_base
from sa2jax.train.language.recipe import Recipe
from sa2jax.train.language.step import abstract_batch, make_step
from sa2jax.train.language.task import optimizer_config
from sa2jax.train.loop import devices_of, mesh_of, rows_at_once
from sa2jax.train.lora import LORA
from sa2jax.train.networks.recipes import NetworkRecipe
from sa2jax.train.networks.step import make_loss_step
from sa2jax.train.networks.task import SUBJECTS
from sa2jax.train.optimizer import (
    MATRICES,
    OptimizerConfig,
    make_optimizer,
    name_of,
)
from sa2jax.train.state import Step, TrainState, abstract_state

GIB = 2**30


@dataclass(frozen=True)
class Group:
    """Parameters that are treated alike.

    Attributes:
        name: of the part.
        dtypes: stored dtypes.
        parameters: how many numbers.
        rate: learning rate after warm-up; 0 for frozen.
        decayed: how many of them have weight decay.
        bytes: of each device.
    """

    name: str
    dtypes: str
    parameters: int
    rate: float
    decayed: int
    bytes: int


@dataclass(frozen=True)
class DryRun:
    """What a recipe amounts to.

    Attributes:
        groups: of parameters.
        devices: as the mesh names them.
        memory: bytes of each device by what they are for.
        tokens: positions of an update.
        steps: updates.
        unit: what these positions are.
    """

    groups: tuple[Group, ...]
    devices: str
    memory: dict[str, int]
    tokens: int
    steps: int
    unit: str = "positions"

    def print(self, console: Console) -> None:
        """As tables."""
        table = Table(title="parameters", title_justify="left")
        for column in ("part", "dtype", "parameters", "rate", "decayed", "GiB a device"):
            table.add_column(column, justify="left" if column in ("part", "dtype") else "right")
        for group in self.groups:
            table.add_row(
                group.name, group.dtypes, f"{group.parameters:,}", f"{group.rate:g}" if group.rate
                else "frozen", f"{group.decayed:,}" if group.rate else "", _gib(group.bytes),
            )  # fmt: skip
        console.print(table)
        table = Table(title=f"memory of each device ({self.devices})", title_justify="left")
        table.add_column("what")
        table.add_column("GiB", justify="right")
        for name, size in self.memory.items():
            table.add_row(name, _gib(size))
        console.print(table)
        console.print(f"{self.steps} updates of {self.tokens:,} {self.unit}", highlight=False)


def dry_run(recipe: Recipe) -> DryRun:
    """Compile the step of a recipe for the devices at hand, and count.

    Raises:
        ConfigError: if the model's config is not understood.
        ShardingError: for a mesh that does not fit the devices.
        TrainError: if nothing would be trained, or rows do not divide by the mesh.
    """
    mesh, base = mesh_of(recipe.mesh), open_base(recipe.model, recipe.lora)
    config = optimizer_config(recipe)
    optimizer = make_optimizer(config)
    state = abstract_state(base.model, optimizer, mesh)
    parts, rows = recipe.data.parts, rows_at_once(recipe.data.rows, recipe.data.parts, mesh)
    batch = abstract_batch(
        base.cfg, mesh, rows, recipe.data.length, clips=rows * recipe.data.mel_rows,
        frames=recipe.data.mel_frames, packed=recipe.data.clips, parts=parts, streams=KINDS,
    )  # fmt: skip
    step = make_step(
        base.model, optimizer, mesh, remat=recipe.remat, chunk=recipe.chunk,
        gradients=recipe.gradients, unroll=recipe.unroll,
    )  # fmt: skip
    trained, _ = optimizer.split(state.params)
    added_up = sum(map(_size, jax.tree.leaves(trained))) * jnp.dtype(recipe.gradients).itemsize
    memory = _memory(step, state, batch, added_up * bool(parts))
    tokens = rows * max(parts, 1) * recipe.data.length
    return DryRun(_groups(config, state), devices_of(mesh), memory, tokens, config.steps)


def dry_network_run(recipe: NetworkRecipe) -> DryRun:
    """The same for a single network, with a batch of the longest rows.

    Raises:
        CheckpointError: if the folder has no such network.
        DataError: if the data cannot be read, where sizes depend on it.
        ShardingError: for a mesh that does not fit the devices.
        TrainError: if nothing would be trained, the detokenizer is not converted, or rows do not
            divide by the mesh.
    """
    mesh, subject = mesh_of(recipe.mesh), SUBJECTS[recipe.kind]
    network = subject.open(recipe.network.folder, recipe.network.compute)
    optimizer, model = make_optimizer(recipe.optimizer), subject.model(network, recipe.data)
    state = abstract_state(model, optimizer, mesh)
    rows = rows_at_once(recipe.data.rows, 0, mesh)
    step = make_loss_step(
        subject.loss, model, optimizer, recipe.teaching, mesh, seed=recipe.seed,
        unroll=recipe.unroll,
    )  # fmt: skip
    memory = _memory(step, state, subject.batch(network, recipe, mesh, rows))
    units, unit = rows * subject.longest(recipe.data), f"{subject.unit} at most"
    groups = _groups(recipe.optimizer, state)
    return DryRun(groups, devices_of(mesh), memory, units, recipe.optimizer.steps, unit)


def _memory(step: Step, state: TrainState, batch: Any, gradients: int = 0) -> dict[str, int]:
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


def _groups(config: OptimizerConfig, state: TrainState) -> tuple[Group, ...]:
    found: dict[tuple[str, float], list[tuple[str, Any]]] = {}
    for path, leaf in jax.tree.leaves_with_path(state.params):
        name = name_of(path)
        key = (_part_of(name), config.rate_of(name))
        found.setdefault(key, []).append((name, leaf))
    return tuple(
        Group(
            part, ", ".join(sorted({leaf.dtype.name for _, leaf in leaves})),
            sum(leaf.size for _, leaf in leaves), rate,
            sum(leaf.size for name, leaf in leaves if name.rsplit(".", 1)[-1] in MATRICES),
            sum(_bytes(leaf) for _, leaf in leaves),
        )
        for (part, rate), leaves in sorted(found.items())
    )  # fmt: skip


def _part_of(name: str) -> str:
    if re.match(LORA, name):
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

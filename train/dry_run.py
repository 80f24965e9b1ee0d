"""Dry runs: trainable parameters and memory per device, of any kind of training.

Each kind has a `dry_run` of its own beside its task, which compiles its step for shapes alone and
makes a `DryRun` of what `parameter_groups` and `memory_per_device` find.
"""

import re
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from sa2jax.train.lora import LORA_PATTERN
from sa2jax.train.optimizer import MATRICES, OptimizerConfig, param_name
from sa2jax.train.state import TrainState, TrainStep

GIB = 2**30
BatchT = TypeVar("BatchT")


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


def memory_per_device(
    step: TrainStep[BatchT], state: TrainState, batch: BatchT, gradients: int = 0
) -> dict[str, int]:
    """Bytes of each device by what they are for; the step is compiled for it.

    Args:
        step: of the training.
        state: as `state.abstract_state` gives it.
        batch: shapes and places of one.
        gradients: bytes of those that are added up over parts of a batch.
    """
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


def parameter_groups(config: OptimizerConfig, state: TrainState) -> tuple[ParameterGroup, ...]:
    """Parameters of an abstract state by part and learning rate."""
    found: dict[tuple[str, float], list[tuple[str, Any]]] = {}
    for path, leaf in jax.tree.leaves_with_path(state.params):
        name = param_name(path)
        key = (_part_of(name), config.learning_rate_of(name))
        found.setdefault(key, []).append((name, leaf))
    return tuple(
        ParameterGroup(
            part,
            ", ".join(sorted({leaf.dtype.name for _, leaf in leaves})),
            sum(leaf.size for _, leaf in leaves),
            rate,
            sum(leaf.size for name, leaf in leaves if name.rsplit(".", 1)[-1] in MATRICES),
            sum(_bytes(leaf) for _, leaf in leaves),
        )
        for (part, rate), leaves in sorted(found.items())
    )


def _part_of(name: str) -> str:
    if re.match(LORA_PATTERN, name):
        return "lora"
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "decoder" else parts[0]


def _bytes(tree: Any) -> int:
    return sum(device_size(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def device_size(leaf: Any) -> int:
    """Numbers of an abstract array on each device."""
    place = getattr(leaf, "sharding", None)
    return int(np.prod(leaf.shape if place is None else place.shard_shape(leaf.shape)))


def _gib(size: int) -> str:
    return f"{size / GIB:.3g}" if size >= GIB / 100 else f"{size / 2**20:.3g} Mi"

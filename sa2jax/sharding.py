"""Logical axes to mesh axes: the one place that knows a device mesh.

Every parameter names its logical axes; `RULES` says on which mesh axis each is split. A dimension
that its mesh axis does not divide stays replicated, and that is logged once.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sa2jax.errors import ShardingError

log = logging.getLogger(__name__)

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axis or axes. Axes that are not listed are never split.
RULES: Mapping[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}


def make_mesh(spec: str | Mapping[str, int] | None = None, devices: Any = None) -> Mesh:
    """A mesh over `("data", "fsdp", "tensor")`.

    Args:
        spec: sizes such as `"data=2,tensor=4"` or a mapping; axes left out have size 1. With no
            spec all devices are on the tensor axis.
        devices: the devices to use, by default all. If the sizes need fewer, the first ones.

    Raises:
        ShardingError: if an axis is unknown or the sizes need more devices than there are.

    >>> make_mesh("tensor=1").shape["tensor"]
    1
    """
    devices = list(jax.devices() if devices is None else devices)
    if spec is None:
        sizes = {"tensor": len(devices)}
    elif isinstance(spec, str):
        sizes = _parse(spec)
    else:
        sizes = dict(spec)
    unknown = set(sizes) - set(MESH_AXES)
    if unknown or any(size < 1 for size in sizes.values()):
        raise ShardingError(
            f"mesh {spec!r}: expected sizes of at least 1 for {', '.join(MESH_AXES)}, "
            "such as 'data=2,tensor=4'"
        )
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    needed = math.prod(shape)
    if needed > len(devices):
        raise ShardingError(f"mesh {spec!r} needs {needed} devices, but there are {len(devices)}")
    # Explicit axes are the default of recent jax; this library places shardings by rule instead.
    auto = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=auto, devices=devices[:needed])


def spec_of(
    shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """How an array is split over a mesh.

    Args:
        shape: the array's dimensions.
        axes: the logical axis of each trailing dimension. Leading dimensions beyond these (the
            stack of layers) are not split.
        mesh: the mesh to split over.

    Returns:
        One entry per dimension; a dimension that does not divide is replicated.
    """
    lead = len(shape) - len(axes)
    entries: list[Any] = [None] * lead
    for size, axis in zip(shape[lead:], axes, strict=True):
        target = RULES.get(axis) if axis is not None else None
        ways = _ways(mesh, target)
        if target is not None and ways > 1 and size % ways:
            _say_once(str(axis), size, str(target), ways)
            target = None
        entries.append(target if ways > 1 else None)
    return PartitionSpec(*entries)


def sharding_of(shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh) -> NamedSharding:
    """`spec_of` as a sharding that `jax.device_put` and `jax.jit` take."""
    return NamedSharding(mesh, spec_of(shape, axes, mesh))


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain an activation to its rule on the mesh in use; without a mesh, nothing happens."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(x.shape, axes, mesh))


def _parse(spec: str) -> dict[str, int]:
    try:
        pairs = [item.split("=") for item in spec.replace(" ", "").split(",") if item]
        sizes = {name: int(size) for name, size in pairs}
        if len(sizes) < len(pairs):
            raise ValueError
        return sizes
    except ValueError:
        raise ShardingError(
            f"mesh {spec!r}: expected one axis=size pair per axis, such as 'data=2,tensor=4'"
        ) from None


def _ways(mesh: Mesh | AbstractMesh, target: str | tuple[str, ...] | None) -> int:
    if target is None:
        return 1
    names = (target,) if isinstance(target, str) else target
    if not set(names) <= set(mesh.shape):
        raise ShardingError(
            f"expected a mesh with the axes {', '.join(MESH_AXES)}, got "
            f"{', '.join(map(str, mesh.shape))}: make it with sa2jax.sharding.make_mesh"
        )
    return math.prod(mesh.shape[name] for name in names)


@lru_cache
def _say_once(axis: str, size: int, target: str, ways: int) -> None:
    log.warning("%s of size %d does not divide over %s=%d: replicated", axis, size, target, ways)

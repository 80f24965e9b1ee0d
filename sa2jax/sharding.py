"""Sharding rules, from logical axes to mesh axes: the one place that knows a device mesh.

Every parameter names its logical axes; `RULES` says on which mesh axis each is split. A dimension
that its mesh axis does not divide stays replicated, and that is logged once.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sa2jax.errors import ShardingError

log = logging.getLogger(__name__)

MESH_AXES = DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
MODEL_AXES = (FSDP, TENSOR)  # those that a parameter may be split over
ALL = -1  # the axis of the rows in what has none: each device has all of it

# Logical axis -> mesh axis or axes. Axes that are not listed are never split.
RULES: Mapping[str, str | tuple[str, ...]] = {
    "batch": (DATA, FSDP),
    "rows": DATA,  # a batch whose widths are split over fsdp, on their way
    "embed": FSDP,
    "vocab": TENSOR,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "mlp": TENSOR,
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
        sizes = {default_axis(training=False): len(devices)}
    elif isinstance(spec, str):
        sizes = parse_mesh(spec)
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
    # An axis may need a part of a physical one: tensor=4 on a grid of 8 x 8 chips.
    grid = mesh_utils.create_device_mesh(shape, devices[:needed], allow_split_physical_axes=True)
    return _mesh(grid)


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
        parts = _axis_size(mesh, target)
        if target is not None and parts > 1 and size % parts:
            if size > 1:  # a single row cannot be meant to be split
                _warn_once(str(axis), size, str(target), parts)
            target = None
        entries.append(target if parts > 1 else None)
    return PartitionSpec(*entries)


def sharding_of(shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh) -> NamedSharding:
    """`spec_of` as a sharding that `jax.device_put` and `jax.jit` take."""
    return NamedSharding(mesh, spec_of(shape, axes, mesh))


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain an activation to its rule on the mesh in use; without a mesh, nothing happens."""
    if not is_sharded():
        return x
    spec = spec_of(x.shape, axes, jax.sharding.get_abstract_mesh())
    return jax.lax.with_sharding_constraint(x, spec)


def is_sharded() -> bool:
    """Whether XLA spreads arrays over devices here: on a mesh, and not in one device's part."""
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1
    return not alone and AxisType.Manual not in mesh.axis_types


def axis_size(axis: str) -> int:
    """Parts that a logical axis, such as "batch", has on the mesh in use; 1 without a mesh."""
    if not is_sharded():
        return 1
    return _axis_size(jax.sharding.get_abstract_mesh(), RULES.get(axis))


def default_axis(*, training: bool) -> str:
    """The mesh axis that all devices are on if a user names none."""
    return FSDP if training else TENSOR


def use_mesh(mesh: Mesh | None) -> AbstractContextManager:
    """Run what is inside on a mesh, if there is one."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def tensor_axis_size(mesh: Mesh | AbstractMesh | None) -> int:
    """Shards of one matrix on a mesh."""
    return 1 if mesh is None else _axis_size(mesh, TENSOR)


def batch_axis_size(mesh: Mesh | AbstractMesh | None) -> int:
    """Parts of a batch on a mesh."""
    return 1 if mesh is None else _axis_size(mesh, RULES["batch"])


def model_axis_size(mesh: Mesh | AbstractMesh) -> int:
    """Parts of a parameter that is split over all of `MODEL_AXES`."""
    return _axis_size(mesh, MODEL_AXES)


def per_device(
    run: Callable[..., jax.Array],
    inputs: Sequence[Sequence[str | None]],
    output: Sequence[str | None],
) -> Callable[..., jax.Array]:
    """A kernel that runs on each device's own part; without a mesh, on all there is.

    Args:
        run: what XLA cannot split by itself.
        inputs: logical axes of each argument; arrays of one argument share them.
        output: logical axes of the result, which is split as the argument with the same axes.
    """
    if not is_sharded():
        return run
    mesh = jax.sharding.get_abstract_mesh()

    def split(*args):
        def of(axes):
            return lambda x: spec_of(x.shape, axes, mesh)

        specs = tuple(jax.tree.map(of(axes), arg) for axes, arg in zip(inputs, args, strict=True))
        out = specs[[tuple(axes) for axes in inputs].index(tuple(output))]
        return jax.shard_map(run, in_specs=specs, out_specs=out, check_vma=False)(*args)

    return split


def parse_mesh(spec: str) -> dict[str, int]:
    """Sizes of the axes that a spec such as `data=2,tensor=4` names."""
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


def shard_rows(
    run: Callable[..., Any], mesh: Mesh | None, in_axes: Sequence[Any], out_axes: Any
) -> Callable[..., Any]:
    """Deal out the rows of a batch to all devices; each computes its own, and nothing is sent.

    Args:
        run: what is computed for some rows as for all.
        mesh: the devices; rows that they do not divide are computed by each of them.
        in_axes: the axis of the rows in each argument, `ALL` for none, as `jax.vmap` takes it.
        out_axes: likewise of the results.
    """
    if mesh is None or mesh.size == 1:
        return run

    def dealt(*args: Any) -> Any:
        first = next(arg for axis, arg in zip(in_axes, args, strict=True) if axis == 0)
        spec = partial(_spec_of_rows, mesh, len(jax.tree.leaves(first)[0]))
        ins, outs = jax.tree.map(spec, tuple(in_axes)), jax.tree.map(spec, out_axes)
        return jax.shard_map(run, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)(*args)

    return dealt


def device_put_rows(tree: Any, mesh: Mesh | None, rows: int, axes: Any) -> Any:
    """Put arrays where `shard_rows` takes them from, and leaves them; nothing if they are there."""
    if mesh is None:
        return tree

    def place(axis, x):
        return jax.device_put(x, NamedSharding(mesh, _spec_of_rows(mesh, rows, axis)))

    return jax.tree.map(lambda axis, x: jax.tree.map(partial(place, axis), x), axes, tree)


def _spec_of_rows(mesh: Mesh, rows: int, axis: int) -> PartitionSpec:
    whole = axis < 0 or rows % mesh.size
    return PartitionSpec() if whole else PartitionSpec(*[None] * axis, MESH_AXES)


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Shapes and dtypes with the places where they go."""

    def place(leaf, where):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(place, abstract, shardings)


def replicas(mesh: Mesh | None) -> list[Mesh]:
    """One mesh for each index of the data axis that this host holds whole; none without others."""
    if mesh is None or mesh.shape[DATA] == 1:
        return []
    parts = [_mesh(devices[None]) for devices in mesh.devices]
    return [part for part in parts if _is_here(part)]


def local_mesh(mesh: Mesh | None) -> Mesh | None:
    """The mesh, or that of this host's own devices if it spans several hosts."""
    if mesh is None or _is_here(mesh):
        return mesh
    here = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    return _mesh(np.array(here).reshape(1, 1, -1))


def _mesh(devices: np.ndarray) -> Mesh:
    # Explicit axes are the default of recent jax; this library places shardings by rule instead.
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _is_here(mesh: Mesh) -> bool:
    return all(device.process_index == jax.process_index() for device in mesh.devices.flat)


def replica_of(tree: Any, mesh: Mesh) -> Any:
    """The copies of arrays that lie on a replica's devices already; nothing is moved.

    Args:
        tree: arrays on the whole mesh, replicated over its data axis.
        mesh: one of its `replicas`.
    """
    devices = {device.id for device in mesh.devices.flat}

    def take(x: jax.Array) -> jax.Array:
        assert isinstance(x.sharding, NamedSharding)
        here = NamedSharding(mesh, x.sharding.spec)
        own = [part.data for part in x.addressable_shards if part.device.id in devices]
        return jax.make_array_from_single_device_arrays(x.shape, here, own)

    return jax.tree.map(take, tree)


def _axis_size(mesh: Mesh | AbstractMesh, target: str | tuple[str, ...] | None) -> int:
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
def _warn_once(axis: str, size: int, target: str, parts: int) -> None:
    log.warning("%s of size %d does not divide over %s=%d: replicated", axis, size, target, parts)

"""Checkpoints on disk: Orbax's format, plain nested dicts only.

A model folder of this library:

    config.json  tokenizer.json …   as they came from the source, word for word
    sa2jax.json                     format version, stored dtype, dtypes of the source
    params/                         an Orbax checkpoint, one zarr array per leaf; a small model may
                                    have the file params.safetensors in its place

Leaves are stacked over layers, so one leaf can be larger than all that may be held in memory at
once. Orbax (also its v1 partial save) writes whole leaves. Its format is open, though: with
`use_ocdbt=False` a leaf is a plain zarr array beside a metadata file. `create` lets Orbax write
that metadata and gives back the empty arrays, to be filled slice by slice with tensorstore; any
Orbax restores the result. Chunks never span layers (unless tiny) and are split further, so that a
host that needs a part reads little else. `load_params` reads the same way: Orbax's restore takes
twice the model's memory on a CPU.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
import tensorstore as ts

from sa2jax.atomic_io import disk_errors
from sa2jax.errors import CheckpointError, FileError, MissingFileError, reason_of
from sa2jax.files.json_files import read_json
from sa2jax.files.safetensors_files import read_safetensors

FORMAT = 2  # 1: the output matrices of attention had their heads apart
INFO = "sa2jax.json"
SINGLE = "params.safetensors"  # in place of the folder `params`, for small models
PARAMS = "params"
CHUNK_BYTES = 16 << 20
PART_BYTES = 64 << 20  # read from disk at a time
SMALL_BYTES = 1 << 20  # leaves up to this size are one chunk, layers and all

Params = dict[str, Any]
Progress = Callable[[int, int], None]  # called with (done, total), such as bytes
LeafTransform = Callable[[str, jax.Array], dict[str, jax.Array]]  # one leaf to one or several


def is_checkpoint(folder: str | Path) -> bool:
    """Whether this is a model folder of this library."""
    return (Path(folder) / INFO).is_file()


def read_info(folder: str | Path) -> dict[str, Any]:
    """The contents of `sa2jax.json`.

    Raises:
        CheckpointError: if it is missing, damaged, or of a newer format.
    """
    path = Path(folder) / INFO
    try:
        info = read_json(path, dict)
        version = info["format"]
    except MissingFileError:
        raise CheckpointError(
            f"no {INFO} in {folder}: expected a folder made by `sa2jax convert`"
        ) from None
    except (FileError, KeyError) as error:
        raise CheckpointError(
            f"{path} is damaged ({reason_of(error)}): convert the model again"
        ) from None
    if version != FORMAT:
        newer = isinstance(version, int) and version > FORMAT
        cure = "update sa2jax" if newer else "convert the model again"
        raise CheckpointError(f"{path} has format {version}, expected {FORMAT}: {cure}")
    return info


def save_params(path: str | Path, params: Params, *, overwrite: bool = False) -> None:
    """Write parameters as an Orbax checkpoint; in a multi-host program all hosts call it.

    Args:
        path: the folder to make.
        params: plain nested dict of arrays, sharded or not.
        overwrite: replace a checkpoint that is already there.

    Raises:
        CheckpointError: if the path is taken or the disk is full.
    """
    path = Path(path).absolute()
    if path.exists() and not (overwrite and (path / "_METADATA").is_file()):
        raise CheckpointError(f"{path} exists already: choose another folder, or overwrite it")
    args = jax.tree.map(_save_args, params)
    with _quiet(), disk_errors(path), ocp.Checkpointer(_handler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(params, save_args=args), force=overwrite)


def load_params(
    path: str | Path,
    like: Params | None = None,
    dtype: Any = None,
    *,
    branch: str = "",
    transform: LeafTransform | None = None,
) -> Params:
    """Read parameters straight onto their devices; each host reads only what it holds.

    Args:
        path: an Orbax checkpoint, or a model folder of this library.
        like: the wanted tree, of `jax.ShapeDtypeStruct` (its shapes are checked, its shardings
            used) or of `jax.sharding.Sharding`. By default all leaves on the first device.
        dtype: cast floating leaves to this on the way; by default as `like` says, or as stored.
        branch: read only what lies under this dotted path.
        transform: what becomes of each leaf as soon as it is read.

    Raises:
        CheckpointError: if it is no checkpoint, is damaged, or does not fit `like`; all
            misfits are named at once.
    """
    leaves = open_leaves(path)
    if branch:
        start = f"{branch}."
        leaves = {n.removeprefix(start): leaf for n, leaf in leaves.items() if n.startswith(start)}
        if not leaves:
            raise CheckpointError(f"{path} has no {branch}: convert the model again")
    wanted = flatten(like) if like is not None else dict.fromkeys(leaves)
    shapes = {name: getattr(want, "shape", None) for name, want in wanted.items()}
    require_fit(Path(path), {name: tuple(leaf.shape) for name, leaf in leaves.items()}, shapes)
    params = {}
    for name, leaf in leaves.items():
        kind, place = form_of(wanted[name], leaf.dtype.numpy_dtype, dtype)
        try:
            array = assemble(tuple(leaf.shape), kind, place, partial(_read, leaf))
        except (ValueError, OSError) as error:
            raise _damaged(_params_folder(path) / branch / name, error) from None
        params |= {name: array} if transform is None else transform(name, array)
    return unflatten(params)


def form_of(
    want: Any, stored: np.dtype, dtype: Any = None
) -> tuple[Any, jax.sharding.Sharding | None]:
    """The dtype and the place of a leaf.

    Args:
        want: a `jax.ShapeDtypeStruct`, a `jax.sharding.Sharding`, or None.
        stored: the dtype on disk; what is not floating keeps it.
        dtype: the dtype asked for, if not that of `want`.
    """
    is_place = isinstance(want, jax.sharding.Sharding)
    place = want if is_place else getattr(want, "sharding", None)
    kind = dtype or (None if is_place else getattr(want, "dtype", None))
    keep = kind is None or not jnp.issubdtype(stored, jnp.floating)
    return stored if keep else kind, place


def assemble(
    shape: tuple[int, ...],
    dtype: Any,
    place: jax.sharding.Sharding | None,
    read: Callable[[tuple[slice, ...], np.ndarray], None],
) -> jax.Array:
    """A device array from a function that reads parts of it; the host holds one part at a time.

    Args:
        shape: of the whole.
        dtype: of the result; parts are cast to it.
        place: where it goes, by default the first device.
        read: fills an array with the part at an index. Asked for some rows of the first axis at a
            time, so that no part is larger than `PART_BYTES` unless a single row is.
    """
    place = place or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    dtype = np.dtype(dtype)

    def fetch(index: tuple[slice, ...] | None) -> np.ndarray:
        bounds = [s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True)]
        out = _aligned_empty(tuple(stop - start for start, stop in bounds), dtype)
        if not index:
            read((), out)
            return out
        first, last = bounds[0]
        for start, stop in _parts(first, last, out.nbytes):
            read((slice(start, stop), *index[1:]), out[start - first : stop - first])
        return out

    # On a CPU, `out` itself becomes the device's memory. Elsewhere a leaf that is not split along
    # its first axis is built up on the device, so that the host never holds all of it.
    size = math.prod(shape) * dtype.itemsize
    if _on_cpu(place) or size <= PART_BYTES or place.shard_shape(shape)[0] != shape[0]:
        return jax.make_array_from_callback(shape, place, fetch)
    whole = jnp.zeros(shape, dtype, device=place)
    for start, stop in _parts(0, shape[0], size):
        rows = slice(start, stop)
        part = jax.make_array_from_callback(
            (stop - start, *shape[1:]), place, lambda i, rows=rows: fetch((rows, *(i or ())[1:]))
        )
        whole = jax.block_until_ready(_put_rows(whole, part, start))
    return whole


def create(
    path: str | Path, leaves: Mapping[str, tuple[tuple[int, ...], np.dtype]]
) -> dict[str, ts.TensorStore]:
    """Start an Orbax checkpoint whose arrays are filled afterwards, slice by slice.

    Args:
        path: the folder to make; meant to be inside `new_folder`, which makes the whole atomic.
        leaves: shape and dtype of each leaf by dotted path.

    Returns:
        An open array per leaf: `arrays[name][3].write(layer).result()`.
    """
    path = Path(path).absolute()
    blank = {name: np.zeros(1, np.int8) for name in leaves}
    with _quiet(), ocp.Checkpointer(_handler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(unflatten(blank)))
    return {
        name: ts.open(
            {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": f"{path / name}/"},
                "metadata": {"compressor": None},
                "store_data_equal_to_fill_value": True,  # a missing chunk is then always damage
            },
            dtype=ts.dtype(dtype),
            shape=shape,
            chunk_layout=ts.ChunkLayout(chunk_shape=chunk_shape(shape, dtype.itemsize)),
            create=True,
            delete_existing=True,
        ).result()
        for name, (shape, dtype) in leaves.items()
    }


def open_leaves(path: str | Path) -> dict[str, ts.TensorStore]:
    """The leaves of a checkpoint as lazy arrays, by dotted path: nothing is read yet.

    Raises:
        CheckpointError: if it is no checkpoint or is damaged.
    """
    if (single := Path(path) / SINGLE).is_file():
        return _open_single(single)
    path = _params_folder(path)
    try:
        metadata = read_json(path / "_METADATA", dict)
        keys = [
            ".".join(str(k["key"]) for k in entry["key_metadata"])
            for entry in metadata["tree_metadata"].values()
        ]
        if odd := [key for key in keys if not _is_inside(key)]:
            raise ValueError(f"{odd[0]!r} is no name of a leaf")
        packed = (path / "manifest.ocdbt").exists()
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        base = {"driver": "ocdbt", "base": f"file://{path}"} if packed else {"driver": "file"}
        folder = "" if packed else f"{path}/"
        specs = {
            key: {
                "driver": driver,
                "kvstore": base | {"path": f"{folder}{key}/"},
                "fill_missing_data_reads": False,
            }
            for key in sorted(keys)
        }
        return {key: ts.open(spec, read=True).result() for key, spec in specs.items()}
    except (FileError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from None


def _is_inside(name: str) -> bool:
    """Whether a leaf's name is that of a folder beside the others, and of nothing elsewhere."""
    return name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)


def save_single(folder: str | Path, params: Params) -> None:
    """Write small parameters as one file of a model folder: what a package can hold.

    Args:
        folder: the model folder, inside `new_folder`.
        params: nested dict of arrays.
    """
    leaves = {n: np.ascontiguousarray(jax.device_get(leaf)) for n, leaf in flatten(params).items()}
    (Path(folder) / SINGLE).write_bytes(safetensors.numpy.save(leaves))


def _open_single(path: Path) -> dict[str, ts.TensorStore]:
    try:
        return {name: ts.array(leaf) for name, leaf in read_safetensors(path)[0].items()}
    except (FileError, ValueError) as error:
        raise _damaged(path, error) from None


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """How a leaf is cut on disk: all of a small one, else within a layer, in halves of its axes.

    >>> chunk_shape((28, 3584, 18944), 2)
    [1, 1792, 2368]
    """
    chunk = list(shape)
    if math.prod(chunk) * itemsize <= SMALL_BYTES:
        return chunk
    if len(shape) > 2:  # large leaves with more than two axes are stacks, or split as well as one
        chunk[0] = 1
    while math.prod(chunk) * itemsize > CHUNK_BYTES:
        widest = chunk.index(max(chunk))
        chunk[widest] = -(-chunk[widest] // 2)
    return chunk


def content_hash(params: Mapping[str, Any]) -> str:
    """SHA-256 of parameters, in hex: over name, shape, dtype and numbers of each leaf.

    Args:
        params: nested dict of arrays, on any device or open on disk; one at a time is held.
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(flatten(params).items()):
        array = np.asarray(leaf)
        digest.update(f"{name} {list(array.shape)} {array.dtype.name}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as `{"a.b.c": leaf}`, sorted."""
    flat: dict[str, Any] = {}
    for key in sorted(tree):
        value, path = tree[key], f"{prefix}{key}"
        flat |= flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The nested dict that `flatten` made flat."""
    tree: Params = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def _handler() -> ocp.PyTreeCheckpointHandler:
    # Weights shrink by a fifth under zstd but then load at half the speed.
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)


def _save_args(leaf: Any) -> ocp.SaveArgs:
    stacked = leaf.ndim > 2 and leaf.nbytes > SMALL_BYTES
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if stacked else ())


def _params_folder(path: str | Path) -> Path:
    path = Path(path).absolute()
    path = path / PARAMS if is_checkpoint(path) else path
    if not (path / "_METADATA").is_file():
        raise CheckpointError(f"{path} is no Orbax checkpoint: expected a _METADATA file in it")
    return path


def require_fit(
    path: Path, stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...] | None]
) -> None:
    """Compare the leaves of a checkpoint with those of a model; None stands for any shape.

    Raises:
        CheckpointError: naming everything that does not fit.
    """
    problems = [f"{name} is missing" for name in wanted if name not in stored]
    problems += [f"{name} is not expected" for name in stored if name not in wanted]
    for name in wanted.keys() & stored.keys():
        want, have = wanted[name], stored[name]
        if want is not None and tuple(want) != tuple(have):
            problems.append(f"{name}: expected {list(want)}, got {list(have)}")
    if problems:
        more = f" and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise CheckpointError(
            f"{path} does not fit this model: {'; '.join(sorted(problems)[:12])}{more}. "
            "Load it with the config.json it was made with"
        )


def _read(leaf: ts.TensorStore, index: tuple[slice, ...], out: np.ndarray) -> None:
    out[...] = leaf[index].read().result()


def _on_cpu(place: jax.sharding.Sharding) -> bool:
    return all(device.platform == "cpu" for device in place.device_set)


@partial(jax.jit, donate_argnums=0)
def _put_rows(whole: jax.Array, part: jax.Array, start: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, part, start, 0)


def _parts(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of at most `PART_BYTES`, where all of them take `size` bytes."""
    step = max(1, (last - first) * PART_BYTES // max(size, 1))
    for start in range(first, last, step):
        yield start, min(start + step, last)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array at an address that JAX takes over on a CPU without copying."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = (reason_of(error).splitlines() or [type(error).__name__])[0][:200]
    return CheckpointError(f"{path} is damaged ({reason}): convert the model again")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Orbax from warning about files that this layout does not have."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

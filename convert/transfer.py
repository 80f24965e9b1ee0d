"""Shared by all conversions: the transfer plan, streaming in blocks, and copying side files.

A `TransferPlan` says which tensors of a source fill which leaves. `write` streams them into a
checkpoint, `read` gives arrays, and `StoredTensors` presents the leaves of a checkpoint as tensors
again. Memory holds one block, not one model.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from sa2jax import checkpoint
from sa2jax.atomic_io import copy_file
from sa2jax.checkpoint import Progress
from sa2jax.convert.rules import CONFIG_MISMATCH, Placement, Rule, Shape, expand, fold, match
from sa2jax.convert.weights import DTYPES, TensorInfo, Weights, blocks, is_buffer, peak_memory
from sa2jax.errors import CheckpointError
from sa2jax.quantize import dequantize_block, quantize_block, quantized_leaves, scale_of

SIDE_FILE_BYTES = 64 << 20
# What torch puts around a network: data parallel, compile, FSDP, gradient checkpoints.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".gguf", ".h5", ".npz")

C = TypeVar("C")


@dataclass(frozen=True)
class Report:
    """Summary of a conversion.

    Attributes:
        tensors: tensors in the source's form.
        parameters: numbers in them.
        bytes: bytes of parameters written.
        seconds: wall time.
        peak_bytes: the most memory the process ever held.
        left_out: files of the source that were not taken along.
        notes: what the user should know.
    """

    tensors: int
    parameters: int
    bytes: int
    seconds: float
    peak_bytes: int
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def make_report(
    tensors: Mapping[str, TensorInfo],
    total: int,
    started: float,
    left_out: Sequence[str],
    notes: Sequence[str] = (),
) -> Report:
    """The report of a conversion that began at `started` and wrote `total` bytes."""
    return Report(
        tensors=len(tensors),
        parameters=sum(info.size for info in tensors.values()),
        bytes=total,
        seconds=time.perf_counter() - started,
        peak_bytes=peak_memory(),
        left_out=tuple(left_out),
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class TransferPlan:
    """Which tensors of a source fill which leaves.

    Attributes:
        weights: the source.
        placements: what fills what, in the order of the source.
        leaves: shape and dtype of every leaf.
    """

    weights: Weights
    placements: Sequence[Placement]
    leaves: Mapping[str, TensorInfo]

    @property
    def bytes(self) -> int:
        """Bytes of all leaves."""
        return sum(info.nbytes for info in self.leaves.values())

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every tensor that is used."""
        return {name: self.weights.tensors[name] for p in self.placements for name in p.sources}

    @cached_property
    def by_leaf(self) -> dict[str, dict[int | None, Placement]]:
        """The placements of each leaf, by layer."""
        result: dict[str, dict[int | None, Placement]] = {}
        for p in self.placements:
            result.setdefault(p.leaf, {})[p.layer] = p
        return result


@dataclass(frozen=True)
class Network(Generic[C]):
    """One network in a file, open for reading.

    Attributes:
        config: its sizes.
        plan: which tensors of the file fill which leaves.
        folded: leaves that a fold made of several tensors; they come back to within 1e-6.
        form: what only the file tells and writing it again needs, as JSON has it.
        left_out: what was in the file beside its weights.
        strip: for an ONNX file: gives the graph without its numbers, which are gone then.
    """

    config: C
    plan: TransferPlan
    folded: frozenset[str] = frozenset()
    form: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    strip: Callable[[], bytes] | None = None


def make_plan(
    rules: Sequence[Rule],
    weights: Weights,
    shapes: Mapping[str, Shape],
    where: str,
    *,
    cast: np.dtype | None = None,
    wording: str = CONFIG_MISMATCH,
    problems: Sequence[str] = (),
) -> TransferPlan:
    """Match a table with a source and a model.

    Args:
        rules: the table.
        weights: the source.
        shapes: of every leaf of the model.
        where: what to call the source in an error.
        cast: dtype of all leaves; by default the widest among the tensors of each.
        wording: see `rules.match`.
        problems: what is known to be wrong already.

    Raises:
        CheckpointError: naming everything that does not fit.
    """
    odd = [f"{n} ({t.dtype})" for n, t in weights.tensors.items() if t.dtype not in _DTYPE_NAMES]
    if odd:
        problems = [
            *problems,
            f"expected {', '.join(_DTYPE_NAMES.values())}, got {', '.join(odd[:8])}",
        ]
    tensors = {name: info.shape for name, info in weights.tensors.items()}
    placements = match(rules, tensors, shapes, where, wording=wording, problems=problems)
    order = {name: i for i, name in enumerate(weights.tensors)}
    placements.sort(key=lambda p: order[p.sources[0]])
    dtypes: dict[str, np.dtype] = {}
    for p in placements:
        for name in p.sources:
            dtype = weights.tensors[name].dtype
            dtypes[p.leaf] = np.dtype(jnp.promote_types(dtypes.get(p.leaf, dtype), dtype))
    leaves = {name: TensorInfo(shapes[name], cast or dtypes[name]) for name in shapes}
    return TransferPlan(weights, placements, leaves)


def find_state_dict(
    saved: Mapping[str, Any], anchor: str, where: str
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The weights of a network in what a trainer saved.

    They may lie deeper (`{"model": …, "optimizer": …}`), beside numbers of the run (`epoch`), and
    below wrappers (`module.`, `_orig_mod.`), which names lose.

    Args:
        saved: what the file holds.
        anchor: the end of a name that each such network has.
        where: what to call the file in an error.

    Returns:
        Tensors by name, and the names of all else.

    Raises:
        CheckpointError: if there are several such networks, or a name stands for two tensors.
    """
    found: list[tuple[str, Mapping[str, Any]]] = []
    left_out: list[str] = []
    todo: list[tuple[str, Mapping[str, Any]]] = [("", saved)]
    for path, table in todo:
        if any(str(n).endswith(anchor) and isinstance(x, np.ndarray) for n, x in table.items()):
            found.append((path, table))
            continue
        for name, value in table.items():
            if isinstance(value, Mapping):
                todo.append((f"{path}{name}.", value))
            else:
                left_out.append(f"{path}{name}")
    if not found:  # the table that it is held against will say what is missing
        found, left_out = [("", saved)], []
    if len(found) > 1:
        several = ", ".join(path.rstrip(".") or "the file itself" for path, _ in found[:4])
        raise CheckpointError(f"{where} holds several networks ({several}): save one of them alone")
    tensors: dict[str, np.ndarray] = {}
    ((path, table),) = found
    for name, value in table.items():
        plain = ".".join(part for part in str(name).split(".") if part not in WRAPPERS)
        if not isinstance(value, np.ndarray) or is_buffer(plain, value.dtype):
            left_out.append(f"{path}{name}")
        elif plain in tensors:
            raise CheckpointError(f"{where} has two tensors {plain}: save one of them alone")
        else:
            tensors[plain] = value
    return tensors, left_out


def left_out_note(names: Sequence[str], where: object) -> list[str]:
    """What a user should know of what was in a file beside its weights."""
    patterns = [name[:80] for name in fold(names)]
    more = f" and {len(patterns) - 6} more" if len(patterns) > 6 else ""
    return [f"left out of {where}: {', '.join(patterns[:6])}{more}"] if names else []


def write(plan: TransferPlan, arrays: Mapping[str, ts.TensorStore], progress: Progress) -> None:
    """Stream all leaves of a plan into a checkpoint.

    Args:
        plan: what goes where.
        arrays: the open leaves.
        progress: called with (bytes_done, bytes_total).
    """
    done, total = 0, plan.bytes
    for p in plan.placements:
        part = p.rule.forward([plan.weights.get(name) for name in p.sources])
        target, dtype = layer_of(arrays[p.leaf], p.layer), plan.leaves[p.leaf].dtype
        chunk = chunk_of(target)
        scales = None
        if dtype == np.int8:
            scales = layer_of(arrays[scale_of(p.leaf)], p.layer)
            chunk = (*chunk[:-1], part.shape[-1])  # a row has one scale
        for index in blocks(part, chunk, row_major=scales is not None):
            if scales is not None:
                block, scale = map(np.asarray, quantize_block(np.asarray(part[index])))
                scales[index[:-1]].write(scale).result()
                done += scale.nbytes
            else:
                block = np.asarray(part[index], dtype)
            target[index].write(block).result()
            for name in p.sources:
                plan.weights.drop(name)
            done += block.nbytes
            progress(done, total)


def with_int8(plan: TransferPlan, kernels: Iterable[str]) -> TransferPlan:
    """The plan with these leaves as int8 numbers and float32 scales."""
    leaves = dict(plan.leaves)
    for name in kernels:
        shape = leaves[name].shape
        leaves[name] = TensorInfo(shape, np.dtype(np.int8))
        leaves[scale_of(name)] = TensorInfo(shape[:-1], np.dtype(np.float32))
    return replace(plan, leaves=leaves)


def layer_of(leaf: ts.TensorStore, layer: int | None) -> ts.TensorStore:
    """One layer of a stacked leaf, or the leaf."""
    return leaf if layer is None else leaf[layer]


def read_part(plan: TransferPlan, leaf: str, index: tuple[slice, ...], out: np.ndarray) -> None:
    """Fill an array with some of a leaf; of a stacked one `index` begins with the layers."""
    placements = plan.by_leaf[leaf]
    if None in placements:
        parts = [(placements[None], index, out)]
    else:
        layers = range(index[0].start, index[0].stop)
        parts = [(placements[n], index[1:], out[i : i + 1]) for i, n in enumerate(layers)]
    for p, inner, room in parts:
        room[...] = p.rule.forward([plan.weights.get(name) for name in p.sources])[inner]
        for name in p.sources:
            plan.weights.drop(name)


def read_leaf(plan: TransferPlan, leaf: str) -> np.ndarray:
    """One leaf as an array of its own."""
    info = plan.leaves[leaf]
    out = np.empty(info.shape, info.dtype)
    read_part(plan, leaf, tuple(slice(0, n) for n in info.shape), out)
    return out


def read(plan: TransferPlan) -> checkpoint.Params:
    """All leaves as a plain nested dict of NumPy arrays."""
    return checkpoint.unflatten({leaf: read_leaf(plan, leaf) for leaf in plan.leaves})


class StoredTensors:
    """Leaves on disk under the names of the form they came from, read one tensor at a time.

    Args:
        leaves: the open leaves.
        rules: the table that made them.

    Attributes:
        tensors: shape and stored dtype by name.
        int8: leaves that are int8 numbers with scales.
    """

    def __init__(self, leaves: Mapping[str, ts.TensorStore], rules: Iterable[Rule]):
        self._leaves = leaves
        self.int8 = set(quantized_leaves(leaves))
        scales = {scale_of(name) for name in self.int8}
        shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items() if name not in scales}
        self.tensors: dict[str, TensorInfo] = {}
        self._found: dict[str, tuple[Placement, int]] = {}
        for p in expand(rules, shapes):
            for i, (name, shape) in enumerate(zip(p.sources, p.shapes, strict=True)):
                self.tensors[name] = TensorInfo(shape, leaves[p.leaf].dtype.numpy_dtype)
                self._found[name] = p, i
        self.tensors = dict(sorted(self.tensors.items(), key=lambda item: _natural(item[0])))

    def get(self, name: str) -> np.ndarray:
        """Read one tensor, in its stored dtype; of int8 ones the float32 numbers they stand for."""
        p, i = self._found[name]
        array = read_stored(layer_of(self._leaves[p.leaf], p.layer), name)
        if p.leaf in self.int8:
            scales = layer_of(self._leaves[scale_of(p.leaf)], p.layer)
            array = np.asarray(dequantize_block(array, read_stored(scales, name)))
        return p.rule.inverse(array)[i]

    def drop(self, name: str) -> None:
        """Nothing is kept."""


def read_stored(leaf: ts.TensorStore, name: str) -> np.ndarray:
    """The numbers of an open leaf, or of one layer of it.

    Raises:
        CheckpointError: if they are damaged; it calls them `name`.
    """
    try:
        array = np.empty(leaf.shape, leaf.dtype.numpy_dtype)
        for index in blocks(array, chunk_of(leaf)):
            array[index] = leaf[index].read().result()
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise CheckpointError(
            f"{name} cannot be read ({reason}): the folder is damaged, convert it again"
        ) from None
    return array


def chunk_of(array: ts.TensorStore) -> tuple[int, ...]:
    """Shape of an array's chunks (of one layer of a stacked leaf, where that is what is open)."""
    chunks = array.chunk_layout.write_chunk.shape or ()
    return tuple(n or size for n, size in zip(chunks, array.shape, strict=True))


def part_progress(progress: Progress | None, before: int, total: int) -> Progress:
    """Progress callback for one part of a job: `before` of `total` bytes are done before it."""
    if progress is None:
        return lambda done, total: None
    return lambda done, _: progress(before + done, total)


def copy_side_files(source: Path, out: Path, converted: Collection[str]) -> list[str]:
    """Copy the files that are not weights (tokenizer, config, notes, voices).

    Args:
        source: folder to copy from.
        out: folder to copy to.
        converted: files and folders in `source` that are converted and thus no side files.

    Returns:
        Files that were not taken along, relative to `source`.

    Raises:
        CheckpointError: for a link that leads out of the folder.
    """
    left_out = []
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if any(part.startswith(".") for part in relative.parts):
            continue
        if path.is_symlink() and path.is_dir() and relative.parts[0] not in converted:
            left_out.append(f"{relative}/")  # it is not looked into
        if not path.is_file():
            continue
        if relative.parts[0] in converted or path.name.endswith(".index.json"):
            continue
        if path.suffix in WEIGHT_SUFFIXES or path.stat().st_size > SIDE_FILE_BYTES:
            left_out.append(str(relative))
            continue
        (out / relative).parent.mkdir(parents=True, exist_ok=True)
        copy_file(path, out / relative, source)
    return left_out


def pack_dtypes(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The most common dtype, and by name those that differ, for `sa2jax.json`."""
    usual = usual_dtype(tensors)
    return {
        "all": usual.name,
        "but": {n: t.dtype.name for n, t in tensors.items() if t.dtype != usual},
    }


def unpack_dtypes(packed: Any, names: Iterable[str]) -> dict[str, np.dtype]:
    """What `pack_dtypes` packed.

    Raises:
        CheckpointError: if it is damaged.
    """
    known = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
    try:
        return {name: known[packed["but"].get(name, packed["all"])] for name in names}
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{checkpoint.INFO} is damaged: convert the model again") from None


def usual_dtype(tensors: Mapping[str, TensorInfo]) -> np.dtype:
    """The most common dtype."""
    return Counter(info.dtype for info in tensors.values()).most_common(1)[0][0]


def _natural(name: str) -> list[Any]:
    """Sort key with layer 2 before layer 10."""
    return [(int(s), "") if s.isdigit() else (-1, s) for s in name.split(".")]


_DTYPE_NAMES = {dtype: dtype.name for dtype in DTYPES.values()}

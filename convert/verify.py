"""Are two checkpoints the same, and what is in one?

verify(a, b)             tensor by tensor, streaming, whichever form each folder has
compare_logits(a, b)     how far apart two models' answers are
inspect(folder)          parts, shapes, dtypes and memory, from metadata alone
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from rich.console import Console
from rich.table import Table

from sa2jax import checkpoint
from sa2jax.chat.template import Audio, Message, Text, render, reply_turn
from sa2jax.config import StepAudio2Config
from sa2jax.convert.hf import open_weights
from sa2jax.convert.rules import fold
from sa2jax.convert.tokenizer import find
from sa2jax.convert.weights import SafetensorsFolder, TensorInfo, Tick, Weights, blocks
from sa2jax.errors import CheckpointError
from sa2jax.pipeline import StepAudio2

# First component of a released name -> the part it belongs to; our leaves start with the part.
PARTS = {"model": "decoder", "lm_head": "decoder", "encoder": "audio_encoder"}


@dataclass(frozen=True)
class Comparison:
    """How two checkpoints differ.

    Attributes:
        compared: tensors that both have, in one shape.
        differing: names of those whose numbers differ.
        max_abs_diff: largest difference among all numbers, inf where one is not a number.
        only_a: names that only the first has.
        only_b: names that only the second has.
        shapes: names with different shapes, as `name: [2, 3] and [3, 2]`.
        casts: how many tensors were compared after rounding to the coarser of two dtypes.
    """

    compared: int
    differing: tuple[str, ...]
    max_abs_diff: float
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shapes: tuple[str, ...]
    casts: int

    @property
    def same(self) -> bool:
        """Whether nothing at all differs."""
        return not (self.differing or self.only_a or self.only_b or self.shapes)

    def summary(self) -> str:
        """A few lines for people."""
        lines = [
            f"{self.compared} tensors compared, {len(self.differing)} differing, "
            f"largest difference {self.max_abs_diff:.3g}"
        ]
        if self.casts:
            lines.append(f"{self.casts} compared after rounding to the coarser of two dtypes")
        for title, names in (
            ("differing", self.differing),
            ("only in the first", self.only_a),
            ("only in the second", self.only_b),
            ("of different shape", self.shapes),
        ):
            if names:
                more = f" and {len(names) - 10} more" if len(names) > 10 else ""
                lines.append(f"{title}: {', '.join(names[:10])}{more}")
        return "\n".join(lines)


def verify(a: str | Path, b: str | Path, *, progress: Tick | None = None) -> Comparison:
    """Compare two checkpoints tensor by tensor, under released names.

    Tensors of one dtype are compared bit by bit. Where the dtypes differ, both are first rounded to
    the coarser one, which is what a conversion with `dtype` does.

    Args:
        a: a Hugging Face folder or a model folder of this library.
        b: another of either kind.
        progress: told about numbers done and numbers in all.

    Raises:
        CheckpointError: if a folder cannot be read.
    """
    first, second = open_weights(a), open_weights(b)
    both = [name for name in first.tensors if name in second.tensors]
    shapes = [name for name in both if first.tensors[name].shape != second.tensors[name].shape]
    compared = [name for name in both if name not in set(shapes)]
    total, done = sum(first.tensors[name].size for name in compared), 0
    differing, largest, casts = [], 0.0, 0
    for name in compared:
        casts += first.tensors[name].dtype != second.tensors[name].dtype
        equal, distance = _compare(name, first, second)
        if not equal:
            differing.append(name)
            largest = max(largest, distance)
        done += first.tensors[name].size
        if progress:
            progress(done, total)
    return Comparison(
        compared=len(compared),
        differing=tuple(differing),
        max_abs_diff=largest,
        only_a=tuple(name for name in first.tensors if name not in second.tensors),
        only_b=tuple(name for name in second.tensors if name not in first.tensors),
        shapes=tuple(
            f"{n}: {list(first.tensors[n].shape)} and {list(second.tensors[n].shape)}"
            for n in shapes
        ),
        casts=casts,
    )


def _compare(name: str, first: Weights, second: Weights) -> tuple[bool, float]:
    """Whether one tensor is equal bit by bit, and the largest difference."""
    x, y = np.atleast_1d(first.get(name)), np.atleast_1d(second.get(name))
    coarse = min(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)
    bits = np.dtype(f"u{coarse.itemsize}")
    equal, largest = True, 0.0
    for index in blocks(x, row_major=True):
        u, v = (np.ascontiguousarray(part[index], coarse) for part in (x, y))
        different = u.view(bits) != v.view(bits)
        if different.any():
            equal = False
            with np.errstate(invalid="ignore"):
                gap = np.abs(u[different].astype(np.float32) - v[different].astype(np.float32))
            largest = max(largest, float(np.where(np.isnan(gap), np.inf, gap).max()))
    first.drop(name)
    second.drop(name)
    return equal, largest


@dataclass(frozen=True)
class LogitsComparison:
    """How far apart the answers of two models are.

    Attributes:
        positions: predictions compared.
        max_abs_error: largest difference between two logits.
        kl: mean Kullback-Leibler divergence of the second from the first, in nats.
        top1_agreement: share of positions where both like the same token best.
    """

    positions: int
    max_abs_error: float
    kl: float
    top1_agreement: float

    def summary(self) -> str:
        """One line for people."""
        return (
            f"logits of {self.positions} positions: largest difference {self.max_abs_error:.3g}, "
            f"KL {self.kl:.3g}, same best token in {self.top1_agreement:.1%}"
        )


def compare_logits(
    a: Float[np.ndarray, "*B V"],
    b: Float[np.ndarray, "*B V"],
    mask: Bool[np.ndarray, "*B"] | None = None,
) -> LogitsComparison:
    """Compare the logits of two models on the same input.

    Args:
        a: logits of the reference.
        b: logits of the other.
        mask: positions that count, by default all.

    Raises:
        CheckpointError: if the shapes differ, or no position counts.
    """
    if a.shape != b.shape:
        raise CheckpointError(
            f"expected two models with the same logits, got shapes {list(a.shape)} and "
            f"{list(b.shape)}: compare models of one vocabulary"
        )
    rows_a, rows_b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    chosen = np.arange(len(rows_a)) if mask is None else np.flatnonzero(mask)
    if not len(chosen):
        raise CheckpointError("no position to compare: expected a prompt with at least one token")
    error, divergence, agree = 0.0, 0.0, 0
    for i in chosen:
        x, y = rows_a[i].astype(np.float64), rows_b[i].astype(np.float64)
        log_p, log_q = _log_softmax(x), _log_softmax(y)
        error = max(error, float(np.abs(x - y).max()))
        divergence += float(np.exp(log_p) @ (log_p - log_q))
        agree += int(x.argmax() == y.argmax())
    count = len(chosen)
    return LogitsComparison(count, error, divergence / count, agree / count)


def compare_prompt(
    a: str | Path, b: str | Path, text: str = "", wav: str | Path | None = None
) -> LogitsComparison:
    """Run two models on the same question, in float32 and one after the other.

    Args:
        a: folder of the reference, in either form.
        b: folder of the other model.
        text: the question, or its written part.
        wav: a recording in the question.

    Raises:
        TokenizerError: if neither folder has a tokenizer.
    """
    content = [*([Audio(wav)] if wav is not None else []), *([Text(text)] if text else [])]
    turns = [Message("human", content), reply_turn()]
    a, b = Path(a), Path(b)
    speaker = a if find(a, None, StepAudio2Config.from_hf(a)) else b
    logits = []
    for folder in (a, b):
        model = StepAudio2.from_pretrained(folder, dtype="float32", tokenizer=speaker)
        logits.append(model.generator.logits(model.request(render(turns))))
    return compare_logits(*logits)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


@dataclass(frozen=True)
class Part:
    """One part of a model, such as the decoder."""

    name: str
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Row:
    """Tensors that differ only in their layer."""

    name: str
    part: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    parameters: int


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds; `dataclasses.asdict` makes it JSON.

    Attributes:
        folder: where it is.
        kind: `sa2jax` or `huggingface`.
        parts: the model's parts, then `total`.
        rows: every tensor, layers folded together.
        memory: bytes that the parameters take when loaded in each dtype.
    """

    folder: str
    kind: str
    parts: tuple[Part, ...]
    rows: tuple[Row, ...]
    memory: Mapping[str, int]


def inspect(folder: str | Path) -> Inspection:
    """Describe a checkpoint of either kind from its metadata; no weights are read.

    Raises:
        CheckpointError: if the folder holds no checkpoint, or a damaged one.
    """
    ours = checkpoint.is_checkpoint(folder) or (Path(folder) / "_METADATA").exists()
    if ours:
        tensors = {
            name: TensorInfo(tuple(leaf.shape), leaf.dtype.numpy_dtype)
            for name, leaf in checkpoint.open_leaves(folder).items()
        }
    else:
        tensors = SafetensorsFolder(folder).tensors
    parts: dict[str, list[TensorInfo]] = {}
    alike: dict[tuple[tuple[int, ...], str], list[str]] = {}
    for name, info in tensors.items():
        parts.setdefault(_part(name), []).append(info)
        alike.setdefault((info.shape, info.dtype.name), []).append(name)
    rows = [
        Row(pattern, _part(names[0]), len(names), shape, dtype, sum(tensors[n].size for n in names))
        for (shape, dtype), group in alike.items()
        for pattern, names in fold(group).items()
    ]
    everything = list(tensors.values())
    described = [_describe(name, infos) for name, infos in sorted(parts.items())]
    total = _describe("total", everything)
    return Inspection(
        folder=str(folder),
        kind="sa2jax" if ours else "huggingface",
        parts=(*described, total),
        rows=tuple(sorted(rows, key=lambda row: (row.part, row.name))),
        memory={"float32": 4 * total.parameters, "bfloat16": 2 * total.parameters},
    )


def print_inspection(found: Inspection, console: Console) -> None:
    """Show an inspection as two tables."""
    rows = Table("part", "name", "count", "shape", "dtype", "parameters")
    for row in found.rows:
        shape = " × ".join(str(n) for n in row.shape)
        rows.add_row(row.part, row.name, str(row.count), shape, row.dtype, f"{row.parameters:,}")
    parts = Table(
        "part", "tensors", "parameters", "on disk", title=f"{found.folder} ({found.kind})"
    )
    for part in found.parts:
        size = f"{part.bytes / 1e9:.3f} GB"
        parts.add_row(part.name, str(part.tensors), f"{part.parameters:,}", size)
    console.print(rows, parts)
    memory = ", ".join(f"{size / 1e9:.3f} GB in {name}" for name, size in found.memory.items())
    console.print(f"parameters take {memory}")


def _part(name: str) -> str:
    first = name.split(".")[0]
    return PARTS.get(first, first)


def _describe(name: str, infos: Sequence[TensorInfo]) -> Part:
    sizes = sum(info.size for info in infos), sum(info.nbytes for info in infos)
    return Part(name, len(infos), *sizes)

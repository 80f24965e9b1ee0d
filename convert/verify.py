"""Compare two checkpoints, tensor by tensor or by their logits; inspect one from its metadata.

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

from sa2jax import audio, checkpoint
from sa2jax.chat.template import Audio, Message, Text, reply_turn
from sa2jax.checkpoint import Progress
from sa2jax.convert import token2wav
from sa2jax.convert.hf import ModelFolder
from sa2jax.convert.rules import fold
from sa2jax.convert.tokenizer import find_tokenizer
from sa2jax.convert.weights import SafetensorsFolder, TensorInfo, Weights, blocks
from sa2jax.errors import CheckpointError
from sa2jax.families import read_config
from sa2jax.pipeline import StepAudio2
from sa2jax.quantize import round_to_int8
from sa2jax.speech.layout import find as find_speech

# First component of a released name -> the part it belongs to; our leaves start with the part.
PARTS = {"model": "decoder", "lm_head": "decoder", "encoder": "audio_encoder"}
SPEECH = f"{token2wav.KIND}."  # what names in the detokenizer begin with
FOLD_TOLERANCE = 1e-6  # of the largest number in a leaf


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
        folded: how many differ by less than a fold of norms and its way back may change.
    """

    compared: int
    differing: tuple[str, ...]
    max_abs_diff: float
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shapes: tuple[str, ...]
    casts: int
    folded: int = 0

    @property
    def same(self) -> bool:
        """Whether nothing at all differs."""
        return not (self.differing or self.only_a or self.only_b or self.shapes)

    def summary(self) -> str:
        """A summary of a few lines."""
        lines = [
            f"{self.compared} tensors compared, {len(self.differing)} differing, "
            f"largest difference {self.max_abs_diff:.3g}"
        ]
        if self.casts:
            lines.append(f"{self.casts} compared after rounding to the coarser of two dtypes")
        if self.folded:
            lines.append(
                f"{self.folded} count as equal, to within {FOLD_TOLERANCE:g} of their largest "
                "number: a norm was folded into them"
            )
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


def verify(a: str | Path, b: str | Path, *, progress: Progress | None = None) -> Comparison:
    """Compare two checkpoints tensor by tensor.

    The language model goes by its released names, the detokenizer by ours under `token2wav.`.
    Tensors of one dtype are compared bit by bit. Where the dtypes differ, both are first rounded to
    the coarser one (int8 numbers with their scales, too), which is what a conversion with `dtype`
    does. Kernels with a norm folded into them may differ by `FOLD_TOLERANCE`.

    Args:
        a: a Hugging Face folder or a model folder of this library, or a detokenizer's.
        b: another of any kind.
        progress: called with (values_done, values_total).

    Raises:
        CheckpointError: if a folder cannot be read.
        ConfigError: if a config in it is not understood.
    """
    first, second = _Checkpoint(a), _Checkpoint(b)
    both = [name for name in first.tensors if name in second.tensors]
    shapes = [name for name in both if first.tensors[name].shape != second.tensors[name].shape]
    compared = [name for name in both if name not in set(shapes)]
    total, done = sum(first.tensors[name].size for name in compared), 0
    differing, largest, casts, folded = [], 0.0, 0, 0
    for name in compared:
        casts += first.tensors[name].dtype != second.tensors[name].dtype
        distance, size = _compare(name, first, second)
        if distance is not None:
            largest = max(largest, distance)
            from_fold = name in first.folded or name in second.folded
            if from_fold and np.isfinite(distance) and distance <= FOLD_TOLERANCE * size:
                folded += 1
            else:
                differing.append(name)
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
        folded=folded,
    )


class _Checkpoint:
    """All that a folder of any kind holds, by name.

    Attributes:
        tensors: shape and dtype of the language model's tensors and of the detokenizer's leaves.
        folded: names of what a fold made.
    """

    def __init__(self, folder: str | Path):
        speech = find_speech(folder)
        self._speech = token2wav.open_folder(speech) if speech else None
        self.tensors: dict[str, TensorInfo] = {}
        self.folded: set[str] = set()
        if not token2wav.is_standalone(folder):
            is_ours = checkpoint.is_checkpoint(folder)
            self._model: Weights = ModelFolder(folder) if is_ours else SafetensorsFolder(folder)
            self.tensors |= self._model.tensors
        if self._speech:
            self.tensors |= {SPEECH + name: info for name, info in self._speech.tensors.items()}
            self.folded = {SPEECH + name for name in self._speech.folded}

    def get(self, name: str) -> np.ndarray:
        """Read one tensor."""
        part, name = self._part(name)
        return part.get(name)

    def drop(self, name: str) -> None:
        """Give back the memory that reading this tensor took."""
        part, name = self._part(name)
        part.drop(name)

    def _part(self, name: str) -> tuple[Weights, str]:
        if self._speech and name.startswith(SPEECH):
            return self._speech, name.removeprefix(SPEECH)
        return self._model, name


def _compare(name: str, first: Weights, second: Weights) -> tuple[float | None, float]:
    """The largest difference of one tensor, None where all bits agree, and its largest number."""
    x, y = np.atleast_1d(first.get(name)), np.atleast_1d(second.get(name))
    kinds = [part.tensors[name].dtype == np.int8 for part in (first, second)]
    if any(kinds):  # rounded to whole numbers and back, as the other was
        x, y = (z if kind else round_to_int8(z) for z, kind in zip((x, y), kinds, strict=True))
    coarse = min(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)
    bits = np.dtype(f"u{coarse.itemsize}")
    distance, size = None, 0.0
    for index in blocks(x, row_major=True):
        u, v = (np.ascontiguousarray(part[index], coarse) for part in (x, y))
        different = u.view(bits) != v.view(bits)
        if different.any():
            with np.errstate(invalid="ignore"):
                gap = np.abs(u[different].astype(np.float32) - v[different].astype(np.float32))
            distance = max(distance or 0.0, float(np.where(np.isnan(gap), np.inf, gap).max()))
        size = max(size, float(np.abs(u).max(initial=0)))
    first.drop(name)
    second.drop(name)
    return distance, size


@dataclass(frozen=True)
class LogitsComparison:
    """Differences of the logits of two models.

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
        """A summary of one line."""
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
    a: str | Path,
    b: str | Path,
    text: str = "",
    wav: audio.Audio | audio.AudioSource | None = None,
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
    speaker = a if find_tokenizer(a, None, read_config(a)) else b
    logits = []
    for folder in (a, b):
        model = StepAudio2.from_pretrained(folder, dtype="float32", tokenizer=speaker)
        logits.append(model.engine.logits(model.request(model.family.chat_template(turns))))
    return compare_logits(*logits)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


@dataclass(frozen=True)
class PartSummary:
    """One part of a model, such as the decoder."""

    name: str
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class TensorGroup:
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
        kind: `sa2jax`, `huggingface`, or `token2wav` for a released detokenizer alone.
        parts: the model's parts, then `total`.
        groups: every tensor, layers folded together.
        memory: bytes that the parameters take when loaded in each dtype; a detokenizer keeps its
            own, and so do int8 matrices.
    """

    folder: str
    kind: str
    parts: tuple[PartSummary, ...]
    groups: tuple[TensorGroup, ...]
    memory: Mapping[str, int]


def inspect(folder: str | Path) -> Inspection:
    """Describe a checkpoint of any kind from its metadata; no weights are read.

    Only of a released detokenizer the .onnx files are read: their metadata lie between the numbers.

    Raises:
        CheckpointError: if the folder holds no checkpoint, or a damaged one.
        ConfigError: if the flow.yaml of a released detokenizer is not understood.
    """
    ours = checkpoint.is_checkpoint(folder) or (Path(folder) / "_METADATA").exists()
    alone, speech = token2wav.is_standalone(folder), find_speech(folder)
    kind = "sa2jax" if ours else "token2wav" if alone else "huggingface"
    tensors: dict[str, TensorInfo] = {}
    if not alone:
        tensors |= _leaves(folder) if ours else SafetensorsFolder(folder).tensors
    spoken: dict[str, TensorInfo] = {}
    if speech:
        official = token2wav.is_official(speech)
        sources = token2wav.OfficialDetokenizer(speech).sources if official else _leaves(speech)
        spoken = {SPEECH + name: info for name, info in sources.items()}
    tensors |= spoken
    parts: dict[str, list[TensorInfo]] = {}
    alike: dict[tuple[tuple[int, ...], str], list[str]] = {}
    for name, info in tensors.items():
        parts.setdefault(_part(name), []).append(info)
        alike.setdefault((info.shape, info.dtype.name), []).append(name)
    groups = [
        TensorGroup(
            pattern, _part(names[0]), len(names), shape, dtype, sum(tensors[n].size for n in names)
        )
        for (shape, dtype), group in alike.items()
        for pattern, names in fold(group).items()
    ]
    everything = list(tensors.values())
    described = [_describe(name, infos) for name, infos in sorted(parts.items())]
    total = _describe("total", everything)
    model = total.parameters - sum(info.size for info in spoken.values())
    fixed = sum(info.nbytes for info in spoken.values())
    memory = {"float32": 4 * model + fixed, "bfloat16": 2 * model + fixed}
    if any(info.dtype == np.int8 for info in everything):
        memory = {"int8": total.bytes}
    return Inspection(
        folder=str(folder),
        kind=kind,
        parts=(*described, total),
        groups=tuple(sorted(groups, key=lambda row: (row.part, row.name))),
        memory=memory,
    )


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Show an inspection as two tables."""
    rows = Table("part", "name", "count", "shape", "dtype", "parameters")
    for row in inspection.groups:
        shape = " × ".join(str(n) for n in row.shape)
        rows.add_row(row.part, row.name, str(row.count), shape, row.dtype, f"{row.parameters:,}")
    parts = Table(
        "part", "tensors", "parameters", "on disk", title=f"{inspection.folder} ({inspection.kind})"
    )
    for part in inspection.parts:
        size = f"{part.bytes / 1e9:.3f} GB"
        parts.add_row(part.name, str(part.tensors), f"{part.parameters:,}", size)
    console.print(rows, parts)
    memory = ", ".join(f"{size / 1e9:.3f} GB in {name}" for name, size in inspection.memory.items())
    console.print(f"parameters take {memory}")


def _leaves(folder: str | Path) -> dict[str, TensorInfo]:
    leaves = checkpoint.open_leaves(folder).items()
    return {name: TensorInfo(tuple(leaf.shape), leaf.dtype.numpy_dtype) for name, leaf in leaves}


def _part(name: str) -> str:
    first = name.removeprefix(SPEECH).split(".")[0]
    return first if name.startswith(SPEECH) else PARTS.get(first, first)


def _describe(name: str, infos: Sequence[TensorInfo]) -> PartSummary:
    sizes = sum(info.size for info in infos), sum(info.nbytes for info in infos)
    return PartSummary(name, len(infos), *sizes)

"""The two voice analysis networks, `.onnx` to ours and back: S3 speech tokenizer and CAM++.

Every tensor of a graph first gets the name it has in the official PyTorch code, from its place in
the structure (`voice_structure`); from there one table per model leads to our leaves and back.
Norms that follow a convolution are folded into it: an exporter usually has done that already, then
nothing is left to fold and the way back gives the same bits.

Beside the parameters, the graph without its numbers is kept (`ConvertedNetwork.graph`, a side file
of the checkpoint): writing an `.onnx` again needs it, as no two exporters draw the same graph.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from sa2jax import atomic_io, checkpoint
from sa2jax.convert import whisper
from sa2jax.convert.onnx_graph import OnnxGraph
from sa2jax.convert.rules import Join, Op, Rule, Shape, Split, Transpose, rule
from sa2jax.convert.transfer import Network, TransferPlan, make_plan, read
from sa2jax.convert.voice_structure import (
    NORM_PARTS,
    SEGMENT,
    NamedTensors,
    norm_after,
    speaker_encoder_names,
    speech_tokenizer_names,
)
from sa2jax.convert.weights import TensorInfo, Weights
from sa2jax.errors import CheckpointError, ConfigError
from sa2jax.models.speaker_encoder import NORM_EPS, speaker_encoder
from sa2jax.models.speech_tokenizer import speech_tokenizer
from sa2jax.nn import Functional
from sa2jax.speech_config import SpeakerEncoderConfig, SpeechTokenizerConfig

SPEECH_TOKENIZER_FILE = "speech_tokenizer_v2_25hz.onnx"
SPEAKER_ENCODER_FILE = "campplus.onnx"

NOT_IT = (
    "{where} is not the network it should be: {problems}. "
    "Use the file of the released token2wav folder"
)
_MISFIT = "{} does not hold the tensors of a {}: {}. Use the released token2wav folder's file"
SQUEEZE = Split(2, ())  # a kernel of one tap over time: [out, in, 1] is [out, in]

C = TypeVar("C", SpeechTokenizerConfig, SpeakerEncoderConfig)


@dataclass(frozen=True)
class ConvertedNetwork(Generic[C]):
    """One network.

    Attributes:
        config: its sizes.
        params: its parameters, a plain nested dict of NumPy arrays.
        graph: the ONNX graph without their numbers, for `write_*`.
    """

    config: C
    params: dict[str, Any]
    graph: bytes


class Stack(Join):
    """One array from those of all layers of a block; where a layer has fewer inputs, zeros follow.

    Args:
        shapes: of each layer's array; they may differ along one axis.
    """

    def __init__(self, shapes: Sequence[Shape]):
        self.shapes = [tuple(shape) for shape in shapes]
        self.widest = tuple(max(sizes) for sizes in zip(*self.shapes, strict=True))

    def forward(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """All layers, padded with zeros."""
        stacked = np.zeros((len(arrays), *self.widest), arrays[0].dtype)
        for layer, array in zip(stacked, arrays, strict=True):
            layer[tuple(map(slice, array.shape))] = array
        return stacked

    def inverse(self, array: np.ndarray) -> list[np.ndarray]:
        """Each layer without its padding."""
        return [a[tuple(map(slice, s))] for a, s in zip(array, self.shapes, strict=True)]

    def forward_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Layers first."""
        return (len(shapes), *self.widest)

    def inverse_shape(self, shape: Shape) -> list[Shape]:
        """The layers' own shapes."""
        return self.shapes


# ---- tables --------------------------------------------------------------------------------------


def speech_tokenizer_config(
    tensors: Mapping[str, Shape], where: str = "the checkpoint"
) -> SpeechTokenizerConfig:
    """Sizes of the speech tokenizer, from the shapes of its tensors under their official names.

    Args:
        tensors: shape by name.
        where: what to call their file in an error.

    Raises:
        CheckpointError: if they are not those of a speech tokenizer.
    """
    block = "encoder.blocks.0"
    try:
        return SpeechTokenizerConfig(
            mels=tensors["encoder.conv1.weight"][1],
            layers=_count(tensors, "encoder.blocks.", ".attn_ln.weight", 0),
            embed=tensors["encoder.conv1.weight"][0],
            mlp=tensors[f"{block}.mlp.0.weight"][0],
            memory=tensors[f"{block}.attn.fsmn_block.weight"][2],
            digits=tensors["quantizer._codebook.project_down.weight"][0],
        )
    except (LookupError, ValueError, ArithmeticError, ConfigError) as error:
        raise CheckpointError(_MISFIT.format(where, "speech tokenizer", error)) from None


def speech_tokenizer_rules(cfg: SpeechTokenizerConfig) -> list[Rule]:
    """The table of the speech tokenizer: official name, our leaf, what happens between."""
    block, layers = "encoder.blocks.{layer}", "layers"
    conv = Transpose(2, 1, 0)  # torch keeps [out, in, time]
    return [
        *whisper.conv_rules("encoder.", ""),
        *whisper.attention_rules(block, layers, (cfg.heads, cfg.head_dim)),
        rule(f"{block}.attn.fsmn_block.weight", f"{layers}.attn.memory", conv),
        *whisper.mlp_rules(block, layers, layers),
        rule("quantizer._codebook.project_down.weight", "digits.kernel"),
        rule("quantizer._codebook.project_down.bias", "digits.bias"),
    ]


def speaker_encoder_config(
    tensors: Mapping[str, Shape],
    dilations: Sequence[int] | None = None,
    segment: int = SEGMENT,
    where: str = "the checkpoint",
) -> SpeakerEncoderConfig:
    """Sizes of the speaker encoder, from the shapes of its tensors under their official names.

    Args:
        tensors: shape by name; norms may be folded or not.
        dilations: of each block, which no shape tells; by default 1 for the first and 2 after it.
        segment: frames of one local context.
        where: what to call their file in an error.

    Raises:
        CheckpointError: if they are not those of a speaker encoder.
    """
    try:
        head, layer = tensors["head.conv1.weight"][0], "xvector.block1.tdnnd1"
        stages = [
            _count(tensors, f"head.layer{s}.", ".conv1.weight", 0)
            for s in range(1, 1 + _count(tensors, "head.layer", ".0.conv1.weight", 1))
        ]
        layers = [
            _count(tensors, f"xvector.block{b}.tdnnd", ".linear1.weight", 1)
            for b in range(1, 1 + _count(tensors, "xvector.block", ".tdnnd1.linear1.weight", 1))
        ]
        channels, wide, kernel = tensors["xvector.tdnn.linear.weight"]
        local = tensors[f"{layer}.cam_layer.linear_local.weight"]
        return SpeakerEncoderConfig(
            mels=wide // head * 2 ** (len(stages) + 1),
            head=head,
            stages=tuple(stages),
            channels=channels,
            growth=local[0],
            bottleneck=local[1],
            mask=tensors[f"{layer}.cam_layer.linear1.weight"][0],
            layers=tuple(layers),
            dilations=tuple(dilations or [1 if b == 0 else 2 for b in range(len(layers))]),
            embed=tensors["xvector.dense.linear.weight"][0],
            kernel=kernel,
            taps=local[2],
            segment=segment,
        )
    except (LookupError, ValueError, ArithmeticError, ConfigError) as error:
        raise CheckpointError(_MISFIT.format(where, "speaker encoder", error)) from None


def speaker_encoder_rules(cfg: SpeakerEncoderConfig) -> list[Rule]:
    """The table of the speaker encoder, with the norms after convolutions folded (`Folded`)."""
    norm = ("scale", "bias", "mean", "variance")
    over_both = Transpose(3, 2, 1, 0)  # torch keeps [out, in, bands, time]
    bands = Split(1, (cfg.head, cfg.mels // cfg.shrink))
    rules: list[Rule] = []

    def add(source: str, target: str, step: Transpose | Split, bias: bool = True) -> None:
        rules.append(rule(f"{source}.weight", f"{target}.kernel", step))
        if bias:
            rules.append(rule(f"{source}.bias", f"{target}.bias"))

    add("head.conv1", "conv_in", over_both)
    for s, blocks in enumerate(cfg.stages, 1):
        for b in range(blocks):
            source, target = f"head.layer{s}.{b}", f"stages.stage{s}.block{b}"
            add(f"{source}.conv1", f"{target}.conv1", over_both)
            add(f"{source}.conv2", f"{target}.conv2", over_both)
            if b == 0:
                add(f"{source}.shortcut.0", f"{target}.shortcut", over_both)
    add("head.conv2", "conv_out", over_both)
    rules.append(rule("xvector.tdnn.linear.weight", "tdnn", bands, over_both))
    rules.append(rule("xvector.tdnn.linear.bias", "tdnn_bias"))
    inputs, narrow, new = cfg.channels, cfg.bottleneck, cfg.growth
    for b, layers in enumerate(cfg.layers, 1):
        source, target = f"xvector.block{b}.tdnnd", f"blocks.block{b}.layers"
        sizes = [inputs + i * new for i in range(layers)]

        def stack(part: str, leaf: str, shapes: Sequence[Shape], *steps: Op) -> None:
            names = [f"{source}{i}.{part}" for i in range(1, 1 + len(shapes))]  # noqa: B023
            rules.append(rule(names, f"{target}.{leaf}", Stack(shapes), *steps))  # noqa: B023

        for part, leaf in zip(NORM_PARTS, norm, strict=True):
            stack(f"nonlinear1.batchnorm.{part}", f"norm.{leaf}", [(size,) for size in sizes])
        stack(
            "linear1.weight", "squeeze.kernel", [(narrow, size, 1) for size in sizes], Split(3, ())
        )
        stack("linear1.bias", "squeeze.bias", [(narrow,)] * layers)
        local = [(new, narrow, cfg.taps)] * layers
        stack("cam_layer.linear_local.weight", "local.kernel", local, Transpose(0, 3, 2, 1))
        context = [(cfg.mask, narrow, 1)] * layers
        stack("cam_layer.linear1.weight", "context.kernel", context, Split(3, ()))
        stack("cam_layer.linear1.bias", "context.bias", [(cfg.mask,)] * layers)
        stack(
            "cam_layer.linear2.weight", "mask.kernel", [(new, cfg.mask, 1)] * layers, Split(3, ())
        )
        stack("cam_layer.linear2.bias", "mask.bias", [(new,)] * layers)
        source, target = f"xvector.transit{b}", f"blocks.block{b}"
        for part, leaf in zip(NORM_PARTS, norm, strict=True):
            rules.append(rule(f"{source}.nonlinear.batchnorm.{part}", f"{target}.norm.{leaf}"))
        add(f"{source}.linear", f"{target}.linear", SQUEEZE, bias=b == len(cfg.layers))
        inputs = (inputs + layers * new) // 2
    add("xvector.dense.linear", "project", SQUEEZE, bias=False)
    rules.append(rule("xvector.dense.nonlinear.batchnorm.running_mean", "norm.mean"))
    rules.append(rule("xvector.dense.nonlinear.batchnorm.running_var", "norm.variance"))
    return rules


class Folded:
    """The speaker encoder's tensors with the norms after convolutions folded into them.

    A group of a convolution without bias and its norm is presented as a convolution with bias; a
    group that is not complete stays as it is, for `match` to complain about. Counters of training
    steps are left out.

    Attributes:
        tensors: shape and dtype by name, afterwards.
        norms: the folded norm of each convolution.
    """

    def __init__(self, source: Weights):
        self.source = source
        steps = ".num_batches_tracked"
        self.tensors = {n: t for n, t in source.tensors.items() if not n.endswith(steps)}
        self.norms: dict[str, str] = {}
        blocks = _count(self.tensors, "xvector.transit", ".linear.weight", 1)
        for name, info in source.tensors.items():
            conv = name.removesuffix(".weight")
            norm = norm_after(conv, blocks) if conv != name else None
            parts = [f"{norm}.{part}" for part in NORM_PARTS]
            fits = all(p in self.tensors and self.tensors[p].shape == info.shape[:1] for p in parts)
            if norm is not None and fits and f"{conv}.bias" not in self.tensors:
                self.norms[conv] = norm
                for part in parts:
                    del self.tensors[part]
                self.tensors[f"{conv}.bias"] = TensorInfo(info.shape[:1], info.dtype)

    def get(self, name: str) -> np.ndarray:
        """The tensor, folded in float64 where it takes part in a fold."""
        conv, _, part = name.rpartition(".")
        if conv not in self.norms:
            return self.source.get(name)
        factor, mean = self._affine(conv)
        if part == "bias":
            shift = self.source.get(f"{self.norms[conv]}.bias")
            return (shift - mean * factor).astype(shift.dtype)
        weight = self.source.get(name)
        return (weight * _per_channel(factor, weight)).astype(weight.dtype)

    def drop(self, name: str) -> None:
        """Give back the memory that reading this tensor took."""
        self.source.drop(name)

    def unfold(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Folded tensors as the source has them; its scales, means and variances are kept."""
        arrays = dict(arrays)
        for conv, norm in self.norms.items():
            factor, mean = self._affine(conv)
            weight, bias = arrays[f"{conv}.weight"], arrays.pop(f"{conv}.bias")
            back = np.divide(1.0, factor, out=np.zeros_like(factor), where=factor != 0)
            arrays[f"{conv}.weight"] = (weight * _per_channel(back, weight)).astype(weight.dtype)
            arrays[f"{norm}.bias"] = (bias + mean * factor).astype(bias.dtype)
        return arrays

    def kept(self) -> set[str]:
        """Names of the tensors that `unfold` needs and does not give."""
        return {f"{n}.{p}" for n in self.norms.values() for p in NORM_PARTS if p != "bias"}

    def _affine(self, conv: str) -> tuple[np.ndarray, np.ndarray]:
        def get(part):
            return self.source.get(f"{self.norms[conv]}.{part}").astype(np.float64)

        factor = get("weight") / np.sqrt(get("running_var") + NORM_EPS)
        return factor, get("running_mean")


# ---- files ---------------------------------------------------------------------------------------


def open_speech_tokenizer(path: str | os.PathLike) -> Network[SpeechTokenizerConfig]:
    """A `speech_tokenizer_v2_25hz.onnx`, in memory and held against its table.

    Raises:
        CheckpointError: if the file is missing, damaged or another model's, or onnx is missing.
    """
    named = speech_tokenizer_names(OnnxGraph(path))
    cfg = speech_tokenizer_config(named.shapes, named.graph.where)
    plan = _plan(named, speech_tokenizer_rules(cfg), named, speech_tokenizer(cfg))
    return Network(cfg, plan, strip=lambda: named.graph.strip(named.places.values()))


def open_speaker_encoder(path: str | os.PathLike) -> Network[SpeakerEncoderConfig]:
    """A `campplus.onnx`, in memory and held against its table.

    Raises:
        CheckpointError: if the file is missing, damaged or another model's, or onnx is missing.
    """
    named, dilations, segment = speaker_encoder_names(OnnxGraph(path))
    cfg = speaker_encoder_config(named.shapes, dilations, segment, named.graph.where)
    weights = Folded(named)
    plan = _plan(named, speaker_encoder_rules(cfg), weights, speaker_encoder(cfg))
    changed = {f"{conv}.{part}" for conv in weights.norms for part in ("weight", "bias")}
    folded = frozenset(p.leaf for p in plan.placements if changed.intersection(p.sources))
    kept = weights.kept()
    numbers = [place for name, place in named.places.items() if name not in kept]
    return Network(cfg, plan, folded, strip=lambda: named.graph.strip(numbers))


def read_speech_tokenizer(path: str | os.PathLike) -> ConvertedNetwork[SpeechTokenizerConfig]:
    """Read `speech_tokenizer_v2_25hz.onnx`; errors as those of `open_speech_tokenizer`."""
    return _read(open_speech_tokenizer(path))


def read_speaker_encoder(path: str | os.PathLike) -> ConvertedNetwork[SpeakerEncoderConfig]:
    """Read `campplus.onnx`; errors as those of `open_speaker_encoder`."""
    return _read(open_speaker_encoder(path))


def _read(network: Network[C]) -> ConvertedNetwork[C]:
    assert network.strip is not None
    return ConvertedNetwork(network.config, read(network.plan), network.strip())


def write_speech_tokenizer(
    path: str | os.PathLike, model: ConvertedNetwork[SpeechTokenizerConfig]
) -> None:
    """Write `speech_tokenizer_v2_25hz.onnx`: the graph as it came, with these numbers.

    Raises:
        CheckpointError: if the parameters do not fit the graph, or onnx is missing.
    """
    named = speech_tokenizer_names(OnnxGraph(model.graph))
    cfg = model.config
    plan = _plan(named, speech_tokenizer_rules(cfg), named, speech_tokenizer(cfg))
    _write(Path(path), named.fill(_tensors(plan, model.params)))


def write_speaker_encoder(
    path: str | os.PathLike, model: ConvertedNetwork[SpeakerEncoderConfig]
) -> None:
    """Write `campplus.onnx`: the graph as it came, with these numbers.

    Raises:
        CheckpointError: if the parameters do not fit the graph, or onnx is missing.
    """
    named, _, _ = speaker_encoder_names(OnnxGraph(model.graph))
    folded, cfg = Folded(named), model.config
    plan = _plan(named, speaker_encoder_rules(cfg), folded, speaker_encoder(cfg))
    _write(Path(path), named.fill(folded.unfold(_tensors(plan, model.params))))


def _plan(
    named: NamedTensors, rules: Sequence[Rule], weights: Weights, model: Functional
) -> TransferPlan:
    """Hold a table against a graph; everything that is wrong comes in one error."""
    shapes = {n: tuple(leaf.shape) for n, leaf in checkpoint.flatten(model.abstract).items()}
    where, problems = named.graph.where, named.problems
    return make_plan(rules, weights, shapes, where, wording=NOT_IT, problems=problems)


def _tensors(plan: TransferPlan, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The way back: tensors under their official names."""
    leaves, tensors = checkpoint.flatten(params), {}
    missing = sorted(set(plan.leaves) - set(leaves))
    if missing:
        raise CheckpointError(
            f"the parameters lack {', '.join(missing)}: use those that came with this graph"
        )
    for p in plan.placements:
        leaf = np.asarray(leaves[p.leaf] if p.layer is None else leaves[p.leaf][p.layer])
        tensors |= dict(zip(p.sources, p.rule.inverse(leaf), strict=True))
    return tensors


def _write(path: Path, data: bytes) -> None:
    """Write a file that appears only when it is complete."""
    with atomic_io.disk_errors(path), atomic_io.new_file(path) as part:
        part.write_bytes(data)


def _count(tensors: Mapping[str, object], before: str, after: str, first: int) -> int:
    """How many of `before{n}after` there are, counting from `first`."""
    return next(n for n in itertools.count() if f"{before}{first + n}{after}" not in tensors)


def _per_channel(channels: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """One number per output channel, to multiply a weight [out, ...] with."""
    return channels.reshape(-1, *(1,) * (weight.ndim - 1))

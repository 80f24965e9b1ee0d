"""Names for the tensors of the two voice analysis graphs, inferred from the graphs' structure.

The official PyTorch code names them so (`encoder.blocks.0.attn.query.weight`,
`xvector.block1.tdnnd1.linear1.weight`); the `.onnx` files do not. Everything that is not as
expected is noted in `NamedTensors.problems` or refused at once.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from itertools import pairwise
from typing import Any, NoReturn, TypeVar

import numpy as np

from sa2jax.convert.onnx_graph import BATCH_NORM, CONV, LAYER_NORM, LINEAR, Layer, OnnxGraph
from sa2jax.convert.weights import TensorInfo
from sa2jax.errors import CheckpointError

T = TypeVar("T")
NORM_PARTS = ("weight", "bias", "running_mean", "running_var")  # of a batch norm, in its order
CONSTANT_NUMBERS = 8  # up to this size an initializer may be arithmetic, such as powers of three
EPSILON = 1e-5  # of every norm
SPEECH_TOKENIZER = "the S3 speech tokenizer (version 2, 25 Hz)"
SPEAKER_ENCODER = "the CAM++ speaker encoder"
SEGMENT = 100  # frames of one local context, where the graph does not say


class NamedTensors:
    """A graph's tensors under names inferred from its structure.

    Weights of linear maps are presented as torch has them, [out, in]. Initializers that are never
    named show under the names they have in the file, so that a table finds them unknown; only
    integers and up to `CONSTANT_NUMBERS` numbers may be arithmetic and stay in the graph.

    Attributes:
        graph: the graph.
        places: which of the graph's tensors has a name.
        problems: what in the structure is not as expected.
    """

    def __init__(self, graph: OnnxGraph):
        self.graph = graph
        self.places: dict[str, str] = {}
        self.problems: list[str] = []
        self._transposed: set[str] = set()
        self._fixed: set[str] = set()  # tensors that must have the value of their role

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Shape and dtype by name."""
        infos = {name: self._info(name) for name in self.places}
        used = {*self.places.values(), *self._fixed}
        for name, info in self.graph.tensors.items():
            constant = info.size <= CONSTANT_NUMBERS or not np.issubdtype(info.dtype, np.floating)
            if name not in used and not constant:
                infos[name] = info
        return infos

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name."""
        return {name: info.shape for name, info in self.tensors.items()}

    def get(self, name: str) -> np.ndarray:
        """A tensor's numbers."""
        array = self.graph.get(self.places[name])
        return array.T if name in self._transposed else array

    def drop(self, name: str) -> None:
        """Nothing to give back: the file is in memory as a whole."""

    def name_layer(self, name: str, layer: Layer) -> None:
        """Name a layer's tensors `name.weight` and `name.bias`."""
        for part, tensor in zip(("weight", "bias"), layer.tensors, strict=False):
            self._place(f"{name}.{part}", tensor)
        if layer.attributes.get("inputs_first"):
            self._transposed.add(f"{name}.weight")

    def name_norm(self, name: str, layer: Layer, *, affine: bool = True) -> None:
        """Name a batch norm's tensors; without `affine`, scale and bias must be ones and zeros."""
        for value, part, tensor in zip((1, 0, None, None), NORM_PARTS, layer.tensors, strict=True):
            if not affine and value is not None and np.all(self.graph.get(tensor) == value):
                self._fixed.add(tensor)
            else:
                self._place(f"{name}.{part}", tensor)
        self.expect(layer, epsilon=EPSILON)

    def expect(self, layer: Layer, **attributes: Any) -> None:
        """Note a problem where an attribute of a layer is there and is another."""
        for name, value in attributes.items():
            came = layer.attributes.get(name, value)
            number = not isinstance(came, str | bytes) and np.shape(came) == np.shape(value)
            if not number or not np.allclose(came, value):
                self.problems.append(f"{layer.node}: expected {name} {value}, got {came!r:.80}")

    def fill(self, arrays: Mapping[str, np.ndarray]) -> bytes:
        """The file with these numbers; see `OnnxGraph.fill`."""
        return self.graph.fill(
            {self.places[n]: a.T if n in self._transposed else a for n, a in arrays.items()}
        )

    def _place(self, name: str, tensor: str) -> None:
        taken = [n for n, place in self.places.items() if place == tensor]
        if name in self.places or taken:
            self.problems.append(f"{tensor} is both {name} and {', '.join(taken) or 'another'}")
        self.places[name] = tensor

    def _info(self, name: str) -> TensorInfo:
        info = self.graph.tensors[self.places[name]]
        return TensorInfo(info.shape[::-1], info.dtype) if name in self._transposed else info


def _structure_of(what: str) -> Callable[[Callable[[OnnxGraph], T]], Callable[[OnnxGraph], T]]:
    """Refuse a graph that has not even the layers by which a network is known."""

    def wrap(names: Callable[[OnnxGraph], T]) -> Callable[[OnnxGraph], T]:
        @wraps(names)
        def refusing(graph: OnnxGraph) -> T:
            try:
                return names(graph)
            except (LookupError, ValueError, TypeError, AttributeError, StopIteration):
                _refuse(graph, what)

        return refusing

    return wrap


@_structure_of(SPEECH_TOKENIZER)
def speech_tokenizer_names(graph: OnnxGraph) -> NamedTensors:
    """Official names by structure: two convolutions, then per block attention and MLP, then digits.

    Query, key and value read the same norm: the key has no bias, the value feeds the memory.
    """
    named = NamedTensors(graph)
    norms = [i for i, layer in enumerate(graph.layers) if layer.kind == LAYER_NORM]
    front = graph.layers[: norms[0]] if norms else []
    parts = [graph.layers[a:b] for a, b in pairwise([*norms, len(graph.layers)])]
    kinds = [LAYER_NORM, *4 * [LINEAR], CONV], [LAYER_NORM, LINEAR, LINEAR]
    shaped = len(parts) > 0 and len(parts) % 2 == 0 and [f.kind for f in front] == [CONV, CONV]
    if not shaped or len(parts[-1]) != 4:
        _refuse(graph, SPEECH_TOKENIZER)
    digits = parts[-1].pop()
    named.name_layer("quantizer._codebook.project_down", digits)
    for i, conv in enumerate(front, 1):
        named.name_layer(f"encoder.conv{i}", conv)
        named.expect(conv, strides=[2], pads=[1, 1], dilations=[1], group=1)
    for i, part in enumerate(parts):
        block = f"encoder.blocks.{i // 2}"
        if sorted(layer.kind for layer in part) != sorted(kinds[i % 2]):
            _refuse(graph, SPEECH_TOKENIZER)
        named.name_layer(f"{block}.{('attn_ln', 'mlp_ln')[i % 2]}", part[0])
        named.expect(part[0], axis=-1, epsilon=EPSILON)
        if i % 2:
            named.name_layer(f"{block}.mlp.0", part[1])
            named.name_layer(f"{block}.mlp.2", part[2])
            continue
        memory = next(layer for layer in part if layer.kind == CONV)
        fed = graph.upstream(memory.source)
        named.name_layer(f"{block}.attn.fsmn_block", memory)
        named.expect(memory, strides=[1], dilations=[1], group=memory.shape[0])
        for layer in part:
            if layer.kind == LINEAR:
                inward = part[0] in graph.upstream(layer.source)
                role = "value" if layer in fed else "key" if len(layer.tensors) == 1 else "query"
                named.name_layer(f"{block}.attn.{role if inward else 'out'}", layer)
    return named


@_structure_of(SPEAKER_ENCODER)
def speaker_encoder_names(graph: OnnxGraph) -> tuple[NamedTensors, list[int], int]:
    """Official names by structure, the dilation of each block, and the frames of a segment.

    Two-dimensional convolutions first: pairs of 3 × 3 make residual blocks, a 1 × 1 that reads what
    a block reads is its shortcut and opens a stage. Then each free-standing batch norm opens a
    densely connected layer (four convolutions, one of them with several taps) or a transit (one).
    """
    named, what = NamedTensors(graph), SPEAKER_ENCODER
    after = {}  # convolution -> the norm that alone reads it
    for layer in graph.layers:
        follower = graph.only_reader(layer.output)
        if layer.kind == CONV and follower is not None and follower.kind == BATCH_NORM:
            after[layer] = follower
    layers = [layer for layer in graph.layers if layer not in after.values()]
    head = [layer for layer in layers if layer.kind == CONV and len(layer.shape) == 4]
    rest = [layer for layer in layers if layer not in head]
    firsts = [i for i, layer in enumerate(rest) if layer.kind == BATCH_NORM]
    groups = [rest[a:b] for a, b in pairwise([*firsts, len(rest)])]
    wide = [conv for conv in head[1:-1] if conv.shape[2:] != (1, 1)]
    kinds = {layer.kind for layer in layers}
    if kinds != {CONV, BATCH_NORM} or firsts[0] != 1 or len(head) < 2 or len(wide) % 2:
        _refuse(graph, what)

    last, dilations, number, i = "xvector.dense.nonlinear.batchnorm", [], 1, 0

    def name_layer(name: str, layer: Layer, stride: int = 1, dilation: int = 1) -> None:
        named.name_layer(name, layer)
        norm = norm_after(name, number)
        if layer in after and norm is not None:
            named.name_norm(norm, after[layer])
        spatial = len(layer.shape) - 2
        pads = [dilation * (taps - 1) // 2 for taps in layer.shape[2:]]
        named.expect(
            layer,
            strides=[stride, 1][:spatial],
            dilations=[dilation] * spatial,
            pads=2 * pads,
            group=1,
        )

    name_layer("head.conv1", head[0])
    stage = block = 0
    for first, second in zip(wide[::2], wide[1::2], strict=True):
        short = [c for c in head[1:-1] if c.shape[2:] == (1, 1) and c.source == first.source]
        stage, block = (stage + 1, 0) if short else (stage, block + 1)
        name = f"head.layer{stage}.{block}"
        name_layer(f"{name}.conv1", first, stride=2 if short else 1)
        name_layer(f"{name}.conv2", second)
        if short:
            name_layer(f"{name}.shortcut.0", short[0], stride=2)
    name_layer("head.conv2", head[-1], stride=2)
    name_layer("xvector.tdnn.linear", rest[0], stride=2)
    for norm, *convs in groups:
        name, taps = f"xvector.block{number}", [c for c in convs if c.shape[2:] != (1,)]
        ones = [c for c in convs if c not in taps]
        if (len(ones), len(taps)) == (3, 1):
            i, dilation = i + 1, taps[0].attributes.get("dilations", [1])[0]
            dilations += [dilation] if i == 1 else []
            named.name_norm(f"{name}.tdnnd{i}.nonlinear1.batchnorm", norm)
            name_layer(f"{name}.tdnnd{i}.linear1", ones[0])
            name_layer(f"{name}.tdnnd{i}.cam_layer.linear_local", taps[0], dilation=dilations[-1])
            name_layer(f"{name}.tdnnd{i}.cam_layer.linear1", ones[1])
            name_layer(f"{name}.tdnnd{i}.cam_layer.linear2", ones[2])
        elif not taps and len(ones) in (1, 2):
            named.name_norm(f"xvector.transit{number}.nonlinear.batchnorm", norm)
            name_layer(f"xvector.transit{number}.linear", ones[0])
            if len(ones) == 2:
                name_layer("xvector.dense.linear", ones[1])
                if ones[1] in after:
                    named.name_norm(last, after[ones[1]], affine=False)
            number, i = number + 1, 0
        elif not convs:
            named.name_norm(last, norm, affine=False)
        else:
            _refuse(graph, what)
    pools = {tuple(a["kernel_shape"]) for a in graph.attributes("AveragePool")}
    return named, dilations, pools.pop()[0] if len(pools) == 1 else SEGMENT


def _refuse(graph: OnnxGraph, what: str) -> NoReturn:
    raise CheckpointError(
        f"{graph.where} is another model's graph: expected {what}, found {graph.contents()}. "
        "Use the file of the released token2wav folder"
    )


def norm_after(conv: str, blocks: int) -> str | None:
    """Official name of the norm that follows a convolution of the speaker encoder, if one does.

    Args:
        conv: official name of the convolution.
        blocks: how many blocks there are: only the last one's transit is followed by a norm.
    """
    head, _, last = conv.rpartition(".")
    if conv.startswith("head."):
        return f"{head}.{last.replace('conv', 'bn') if last != '0' else '1'}"
    if last == "linear1" and "cam_layer" not in conv:
        return f"{head}.nonlinear2.batchnorm"
    if conv == "xvector.tdnn.linear":
        return f"{head}.nonlinear.batchnorm"
    last_transit = conv == f"xvector.transit{blocks}.linear"
    return "xvector.out_nonlinear.batchnorm" if last_transit else None

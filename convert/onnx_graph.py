"""ONNX files read by structure: which operators carry learned numbers, and in which order.

The names inside the released `.onnx` files are an exporter's and say little, so nothing here looks
at a name. A graph is read as a list of layers (convolution, linear map, norm) in the order of
computation, each with its tensors and with the value it reads; what a layer *is* follows from that.

To write a file back, the graph itself has to be kept: `strip` gives it without the numbers of the
layers (a few hundred kilobytes), and `fill` puts numbers back into it.

Needs the `onnx` package: `pip install "sa2jax[convert]"`.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from sa2jax.convert.weights import TensorInfo
from sa2jax.errors import CheckpointError, FileError
from sa2jax.files.limits import MAX_AXES, ONNX
from sa2jax.files.raw import read_bytes

CONV, LINEAR, LAYER_NORM, BATCH_NORM = "convolution", "linear map", "layer norm", "batch norm"
_SEVERAL = {
    BATCH_NORM: "batch norms",
    LAYER_NORM: "layer norms",
    LINEAR: "linear maps",
    CONV: "convolutions",
}


# Where a tensor's numbers may lie, if not as raw bytes; and the dtypes that fill whole bytes.
_NUMBERS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
_WHOLE_BYTES = {"float64", "float32", "float16", "bfloat16", "bool"} | {
    f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)
}


@dataclass(frozen=True, eq=False)
class Layer:
    """One operator with learned numbers, together with the addition of its bias.

    Attributes:
        kind: `CONV`, `LINEAR`, `LAYER_NORM` or `BATCH_NORM`.
        node: the operator's name in the file, for messages.
        source: the value it reads.
        output: the value it makes.
        tensors: names of its tensors: weight, then bias where there is one; a batch norm has
            scale, bias, mean and variance.
        shape: the weight's shape.
        attributes: the operator's attributes. A linear map's `inputs_first` says how its weight
            lies: [in, out] or [out, in].
    """

    kind: str
    node: str
    source: str
    output: str
    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)


class OnnxGraph:
    """An ONNX file as layers and tensors.

    Args:
        source: the file, or what `strip` returned.
        where: what to call it in an error; by default its path.

    Attributes:
        tensors: shape and dtype of every initializer, and of every constant that a layer uses.
        layers: what carries learned numbers, in the order of computation.

    Raises:
        CheckpointError: if the onnx package or the file is missing, or the file is damaged.
    """

    def __init__(self, source: str | os.PathLike | bytes, where: str | None = None):
        self.onnx = _onnx()
        self.where = where or ("the ONNX graph" if isinstance(source, bytes) else str(source))
        self._model = self._parse(source if isinstance(source, bytes) else _read(Path(source)))
        try:
            self._read_graph(self._model.graph)
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self.where} holds a graph that no exporter writes ({type(error).__name__}: "
                f"{error}): copy it again from the released checkpoint"
            ) from None
        if not isinstance(source, bytes):  # what `strip` returned has no numbers
            self._require_numbers()

    def _read_graph(self, graph: Any) -> None:
        read = self.onnx.helper.get_attribute_value
        self._attributes = [(n, {a.name: read(a) for a in n.attribute}) for n in graph.node]
        self._nodes = {out: node for node in graph.node for out in node.output}
        self._readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._protos = {t.name: t for t in graph.initializer}
        self.tensors = {name: self._info(t) for name, t in self._protos.items()}
        self._constants = {n.output[0]: t for n in graph.node if (t := _constant(n)) is not None}
        found = (self._layer(node, attributes) for node, attributes in self._attributes)
        self.layers = [layer for layer in found if layer is not None]
        self._outputs = {layer.output: layer for layer in self.layers}
        for layer in self.layers:
            for name in layer.tensors:
                if name not in self.tensors:
                    self._protos[name] = self._constants[name]
                    self.tensors[name] = self._info(self._constants[name])

    def get(self, name: str) -> np.ndarray:
        """A tensor's numbers.

        Raises:
            CheckpointError: if it has others than its shape says.
        """
        try:
            return self.onnx.numpy_helper.to_array(self._protos[name])
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{self.where}: {name} is damaged ({error})") from None

    def upstream(self, value: str) -> list[Layer]:
        """The layers whose results a value is computed from, without another layer between."""
        nodes, seen, todo = [], set(), [value]
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in self._outputs:
                nodes.append(self._outputs[name])
            elif name in self._nodes and self._nodes[name].op_type != "Shape":
                todo += self._nodes[name].input
        return nodes

    def only_reader(self, value: str) -> Layer | None:
        """The layer that reads a value, if that is the only operator that does."""
        readers = self._readers.get(value, [])
        layer = self._outputs.get(readers[0].output[0]) if len(readers) == 1 else None
        return layer if layer is not None and layer.source == value else None

    def attributes(self, operator: str) -> list[dict[str, Any]]:
        """The attributes of every operator of one type, such as `AveragePool`."""
        return [values for node, values in self._attributes if node.op_type == operator]

    def contents(self) -> str:
        """What the graph is made of, in a few words."""
        counts = Counter(layer.kind for layer in self.layers)
        counts["two-dimensional"] = sum(
            layer.kind == CONV and len(layer.shape) == 4 for layer in self.layers
        )
        flat = counts.pop("two-dimensional")
        words = [f"{n} {_SEVERAL[kind]}" for kind, n in sorted(counts.items())]
        return (
            ", ".join(words) + (f" ({flat} of them two-dimensional)" if flat else "") or "nothing"
        )

    def strip(self, names: Iterable[str]) -> bytes:
        """The file without the numbers of these tensors, to be kept for `fill`.

        The numbers are gone from this object, too.
        """
        for name in names:
            tensor = self._protos[name]
            if tensor.HasField("raw_data"):
                tensor.raw_data = b""
            else:
                for kind in ("float_data", "double_data", "int32_data"):
                    tensor.ClearField(kind)
        return self._model.SerializeToString()

    def fill(self, arrays: Mapping[str, np.ndarray]) -> bytes:
        """The file with these numbers in the place of what `strip` took out.

        Raises:
            CheckpointError: if an array has another shape than its tensor.
        """
        for name, array in arrays.items():
            tensor, info = self._protos[name], self.tensors[name]
            if array.shape != info.shape:
                raise CheckpointError(
                    f"{self.where}: {name} has shape {list(info.shape)}, got {list(array.shape)}: "
                    "use the graph that was kept when this model was converted"
                )
            new = self.onnx.numpy_helper.from_array(np.ascontiguousarray(array, info.dtype))
            if tensor.HasField("raw_data") or tensor.data_type != self.onnx.TensorProto.FLOAT:
                tensor.raw_data = new.raw_data
            else:
                tensor.ClearField("float_data")
                tensor.float_data.extend(array.reshape(-1).tolist())
        return self._model.SerializeToString()

    def _parse(self, data: bytes) -> Any:
        try:
            model = self.onnx.load_model_from_string(data)
        except Exception as error:  # protobuf's own types, which differ between its versions
            raise CheckpointError(
                f"{self.where} is truncated or no ONNX file ({len(data)} bytes; {error}): "
                "copy it again from the released checkpoint"
            ) from None
        if not model.graph.node or not model.graph.output:
            raise CheckpointError(
                f"{self.where} is truncated or no ONNX file: it holds no complete graph "
                f"({len(data)} bytes); copy it again from the released checkpoint"
            )
        external = sum(t.data_location == t.EXTERNAL or bool(t.external_data) for t in _all(model))
        if external:
            raise CheckpointError(
                f"{self.where} keeps {external} tensors in another file: expected one file "
                "with everything, as released; save it with onnx.save(model, path)"
            )
        if any(not node.output or not node.output[0] for node in model.graph.node):
            raise CheckpointError(
                f"{self.where} is damaged: an operator has no output; copy it again from the "
                "released checkpoint"
            )
        return model

    def _require_numbers(self) -> None:
        """Every tensor of numbers holds as many as its shape says."""
        for name, info in self.tensors.items():
            proto = self._protos[name]
            data = len(proto.raw_data) or info.dtype.itemsize * sum(
                len(getattr(proto, field)) for field in _NUMBERS
            )
            if info.dtype.name in _WHOLE_BYTES and data != info.nbytes:
                raise CheckpointError(
                    f"{self.where} is damaged: {name} has {data} bytes, expected {info.nbytes}; "
                    "copy it again from the released checkpoint"
                )

    def _info(self, tensor: Any) -> TensorInfo:
        if len(tensor.dims) > MAX_AXES or any(n < 0 for n in tensor.dims):
            raise ValueError(f"a shape of {tensor.name!r} that no tensor has")
        dtype = self.onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return TensorInfo(tuple(tensor.dims), np.dtype(dtype))

    def _layer(self, node: Any, attributes: Mapping[str, Any]) -> Layer | None:
        """The layer that an operator is, or None for one without learned numbers."""

        def at(i):
            return node.input[i] if len(node.input) > i else ""

        out, name = node.output[0], node.name or node.output[0]
        kinds = {"Conv": CONV, "LayerNormalization": LAYER_NORM, "BatchNormalization": BATCH_NORM}
        if node.op_type in kinds and self._holds(at(1)):
            tensors = tuple(filter(None, node.input[1:]))
            if not all(self._holds(t) for t in tensors):
                return None
            shape = self._shape(at(1))
            return Layer(kinds[node.op_type], name, at(0), out, tensors, shape, attributes)
        if node.op_type == "Gemm" and self._holds(at(1)):
            tensors = tuple(filter(None, node.input[1:]))
            first = not attributes.get("transB", 0)
            return Layer(
                LINEAR, name, at(0), out, tensors, self._shape(at(1)), {"inputs_first": first}
            )
        if node.op_type == "MatMul" and self._holds(at(1)) and len(self._shape(at(1))) == 2:
            shape, tensors = self._shape(at(1)), (at(1),)
            readers = self._readers.get(out, [])
            if len(readers) == 1 and readers[0].op_type == "Add":
                bias = next(i for i in (0, 1) if readers[0].input[i] == out)
                bias = readers[0].input[1 - bias]
                if self._holds(bias) and self._shape(bias) == shape[1:]:
                    tensors, out = (*tensors, bias), readers[0].output[0]
            return Layer(LINEAR, name, at(0), out, tensors, shape, {"inputs_first": True})
        return None

    def _holds(self, value: str) -> bool:
        return value in self._protos or value in self._constants

    def _shape(self, value: str) -> tuple[int, ...]:
        return tuple((self._protos.get(value) or self._constants[value]).dims)


def _all(model: Any) -> Iterator[Any]:
    """Every tensor of a model, wherever it stands: also in attributes, branches and functions."""
    graphs, nodes = [model.graph, *(info.initialization for info in model.training_info)], []
    nodes += [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes += graph.node
        for node in nodes:
            for attribute in node.attribute:
                yield from (attribute.t, *attribute.tensors)
                for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                    yield from (sparse.values, sparse.indices)
                graphs += [g for g in (attribute.g, *attribute.graphs) if g.ByteSize()]
        nodes = []


def _constant(node: Any) -> Any:
    """The tensor that a Constant operator gives, if it is one of numbers."""
    if node.op_type != "Constant":
        return None
    return next((a.t for a in node.attribute if a.name == "value" and len(a.t.dims) > 0), None)


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, ONNX)
    except FileError as error:
        raise CheckpointError(
            f"cannot read {path} ({error.reason}): expected an ONNX file of the released "
            "token2wav folder"
        ) from None


def _onnx() -> ModuleType:
    """The onnx package, which only conversion needs."""
    try:
        import onnx
        import onnx.helper
        import onnx.numpy_helper
    except ImportError:
        raise CheckpointError(
            "reading and writing .onnx files needs the onnx package, which is not installed: "
            'pip install "sa2jax[convert]"'
        ) from None
    return onnx

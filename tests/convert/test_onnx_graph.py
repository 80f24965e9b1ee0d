"""ONNX files that refer to other files, lack parts, or claim numbers that they do not hold."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sa2jax.convert.onnx_graph import OnnxGraph
from sa2jax.convert.voice_structure import speaker_encoder_names, speech_tokenizer_names
from sa2jax.errors import CheckpointError


def elsewhere(name):
    """A tensor that another file holds."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2, 2])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret.bin")
    return tensor


def graph(*nodes, values=()):
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    return helper.make_graph(list(nodes), "g", inputs, outputs, list(values))


def model(*nodes, values=()):
    return helper.make_model(graph(*nodes, values=values))


def weight(name="w", shape=(2, 2)):
    return numpy_helper.from_array(np.ones(shape, np.float32), name)


MATMUL = helper.make_node("MatMul", ["x", "w"], ["y"])
BRANCH = graph(helper.make_node("Constant", [], ["y"], value=elsewhere("")))
SPARSE = helper.make_sparse_tensor(weight(), weight("i", (4,)), [4, 4])
SPARSE.values.CopyFrom(elsewhere("w"))
IN_FUNCTION = model(MATMUL, values=[weight()])
IN_FUNCTION.functions.add(name="f", domain="d").node.add().attribute.add(name="value").t.CopyFrom(
    elsewhere("")
)


@pytest.mark.parametrize(
    "made",
    [
        model(MATMUL, values=[elsewhere("w")]),
        model(helper.make_node("Constant", [], ["w"], value=elsewhere("")), MATMUL),
        model(MATMUL, helper.make_node("If", ["x"], ["z"], then_branch=BRANCH), values=[weight()]),
        model(MATMUL, helper.make_node("Constant", [], ["z"], sparse_value=SPARSE)),
        IN_FUNCTION,
    ],
    ids=["initializer", "constant", "branch", "sparse", "function"],
)
def test_numbers_in_another_file_are_refused_wherever_they_stand(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.bin").write_bytes(np.ones(4, np.float32).tobytes())
    with pytest.raises(CheckpointError, match="keeps 1 tensors in another file"):
        OnnxGraph(made.SerializeToString())


def changed(kind, value):
    tensor = weight()
    if kind == "dims":
        tensor.dims.append(value)
    else:
        setattr(tensor, kind, value)
    return model(MATMUL, values=[tensor])


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (model(helper.make_node("MatMul", ["x", "w"], [])), "an operator has no output"),
        (changed("data_type", 99), "no exporter writes"),
        (changed("dims", -1), "no exporter writes"),
        (changed("dims", 1 << 40), "has 16 bytes, expected"),
        (changed("raw_data", b"abc"), "has 3 bytes, expected 16"),
        (changed("raw_data", b""), "has 0 bytes, expected 16"),
    ],
)
def test_damaged_graphs(made, why, tmp_path):
    path = tmp_path / "a.onnx"
    onnx.save(made, path)
    with pytest.raises(CheckpointError, match=why):
        OnnxGraph(path)


@pytest.mark.parametrize("names", [speech_tokenizer_names, speaker_encoder_names])
def test_a_graph_without_the_structure_is_refused(names):
    with pytest.raises(CheckpointError, match="another model's graph"):
        names(OnnxGraph(model(MATMUL, values=[weight()]).SerializeToString()))

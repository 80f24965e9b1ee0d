"""The two .onnx files to our parameters and back, and files that are not they."""

import csv
import sys
from dataclasses import replace

import jax
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from sa2jax import checkpoint
from sa2jax.convert import voice_analysis as va
from sa2jax.convert.onnx_graph import OnnxGraph
from sa2jax.convert.rules import match
from sa2jax.convert.weights import TensorInfo
from sa2jax.errors import CheckpointError
from sa2jax.models.speaker_encoder import speaker_encoder
from sa2jax.models.speech_tokenizer import speech_tokenizer

FILES = {
    va.SPEECH_TOKENIZER_FILE: (va.read_speech_tokenizer, va.write_speech_tokenizer),
    va.SPEAKER_ENCODER_FILE: (va.read_speaker_encoder, va.write_speaker_encoder),
}
BOTH = pytest.mark.parametrize("file", list(FILES))


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "token2wav"


@pytest.fixture(scope="module")
def converted(folder):
    return {file: read(folder / file) for file, (read, _) in FILES.items()}


def numbers_of(model) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def saved(model, folder, name="changed.onnx"):
    path = folder / name
    onnx.save(model, path)
    return path


def same_params(ours, reference, atol=0.0):
    ours, reference = checkpoint.flatten(ours), checkpoint.flatten(reference)
    assert set(ours) == set(reference)
    for name, leaf in reference.items():
        np.testing.assert_allclose(ours[name], leaf, atol=atol, rtol=0, err_msg=name)


# ---- there and back ------------------------------------------------------------------------------


@BOTH
def test_every_bit_comes_back(folder, converted, tmp_path, file):
    _, write = FILES[file]
    write(tmp_path / file, converted[file])
    assert [p.name for p in tmp_path.iterdir()] == [file]
    back, original = onnx.load(tmp_path / file), onnx.load(folder / file)
    ours = numbers_of(back)
    for name, array in numbers_of(original).items():
        assert ours[name].tobytes() == array.tobytes(), name
    assert back == original
    assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()


@BOTH
def test_the_kept_graph_holds_no_weights(folder, converted, file):
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(converted[file].params))
    kept = sum(array.nbytes for array in numbers_of(onnx.load(folder / file)).values())
    assert len(converted[file].graph) < (folder / file).stat().st_size - kept + 4096
    assert weights >= kept > 0


@BOTH
def test_params_are_the_models(converted, file):
    make = speech_tokenizer if file == va.SPEECH_TOKENIZER_FILE else speaker_encoder
    abstract = make(converted[file].config).abstract
    assert jax.tree.structure(abstract) == jax.tree.structure(converted[file].params)
    for leaf, ours in zip(
        jax.tree.leaves(abstract), jax.tree.leaves(converted[file].params), strict=True
    ):
        assert (leaf.shape, leaf.dtype) == (ours.shape, ours.dtype)


@BOTH
def test_names_do_not_matter(folder, converted, tmp_path, file):
    """Every value, tensor and operator renamed and the initializers in another order."""
    model = onnx.load(folder / file)
    kept = {v.name for v in (*model.graph.input, *model.graph.output)} | {""}
    new: dict[str, str] = {}

    def rename(name):
        return name if name in kept else new.setdefault(name, f"v{len(new)}")

    for node in model.graph.node:
        node.name = ""
        node.input[:] = [rename(name) for name in node.input]
        node.output[:] = [rename(name) for name in node.output]
    tensors = [*model.graph.initializer][::-1]
    del model.graph.initializer[:]
    for tensor in tensors:
        tensor.name = rename(tensor.name)
    model.graph.initializer.extend(tensors)
    read, _ = FILES[file]
    same_params(read(saved(model, tmp_path)).params, converted[file].params)


def test_numbers_stored_as_floats_stay_so(folder, converted, tmp_path):
    model = onnx.load(folder / va.SPEECH_TOKENIZER_FILE)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        tensor.ClearField("raw_data")
        tensor.float_data.extend(array.reshape(-1).tolist())
    path = saved(model, tmp_path)
    net = va.read_speech_tokenizer(path)
    same_params(net.params, converted[va.SPEECH_TOKENIZER_FILE].params)
    va.write_speech_tokenizer(tmp_path / "back.onnx", net)
    assert onnx.load(tmp_path / "back.onnx") == model


def test_free_norms_are_folded_and_come_back(folder, converted, tmp_path, with_free_norms):
    """Measured: folding 3.4e-7, unfolding 1.2e-7."""
    model = with_free_norms(onnx.load(folder / va.SPEAKER_ENCODER_FILE))
    path = saved(model, tmp_path)
    net = va.read_speaker_encoder(path)
    same_params(net.params, converted[va.SPEAKER_ENCODER_FILE].params, atol=1e-6)
    va.write_speaker_encoder(tmp_path / "back.onnx", net)
    back = numbers_of(onnx.load(tmp_path / "back.onnx"))
    for name, array in numbers_of(model).items():
        np.testing.assert_allclose(back[name], array, atol=1e-6, err_msg=name)


def test_weights_in_constants_are_read(folder, converted, tmp_path):
    """Some exporters leave folded weights in operators instead of among the initializers."""
    model = onnx.load(folder / va.SPEAKER_ENCODER_FILE)
    tensors = [*model.graph.initializer]
    moved = [t for t in tensors if len(t.dims) == 4]
    kept = [t for t in tensors if len(t.dims) != 4]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for tensor in moved:
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    path = saved(model, tmp_path)
    net = va.read_speaker_encoder(path)
    same_params(net.params, converted[va.SPEAKER_ENCODER_FILE].params)
    assert len(net.graph) < path.stat().st_size / 1.5
    va.write_speaker_encoder(tmp_path / "back.onnx", net)
    assert onnx.load(tmp_path / "back.onnx") == onnx.load(path)


# ---- tables at the released sizes ----------------------------------------------------------------


class Names:
    """Tensors of which only names and shapes are known."""

    def __init__(self, path):
        with path.open() as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        shapes = {r["name"]: tuple(int(n) for n in r["shape"].split("x") if n) for r in rows}
        self.tensors = {n: TensorInfo(s, np.dtype(np.float32)) for n, s in shapes.items()}
        self.shapes = shapes


def test_table_of_the_speech_tokenizer_is_complete(golden):
    names = Names(golden / "names" / "names_s3tokenizer_v2.tsv")
    cfg = va.speech_tokenizer_config(names.shapes)
    assert (cfg.layers, cfg.heads, cfg.codebook) == (6, 20, 6561)
    shapes = shapes_of(speech_tokenizer(cfg))
    plan = match(va.speech_tokenizer_rules(cfg), names.shapes, shapes, "names")
    assert sorted(n for p in plan for n in p.sources) == sorted(names.shapes)
    assert {p.leaf for p in plan} == set(shapes)
    assert all(p.rule.exact for p in plan)
    assert sum(t.size for t in names.tensors.values()) == sum(map(np.prod, shapes.values()))


def test_table_of_the_speaker_encoder_is_complete(golden):
    """With its norms free, as the official code has them: folded, then matched."""
    names = Names(golden / "names" / "names_campplus_torch.tsv")
    cfg = va.speaker_encoder_config(names.shapes)
    assert (cfg.layers, cfg.dilations, cfg.embed) == ((12, 24, 16), (1, 2, 2), 192)
    shapes, folded = shapes_of(speaker_encoder(cfg)), va.Folded(names)
    tensors = {name: info.shape for name, info in folded.tensors.items()}
    plan = match(va.speaker_encoder_rules(cfg), tensors, shapes, "names")
    assert {p.leaf for p in plan} == set(shapes)
    used = [n for p in plan for n in p.sources]
    assert sorted(used) == sorted(tensors)
    # Every official name is used by the table, went into a fold, or counts training steps.
    into_folds = {f"{norm}.{part}" for norm in folded.norms.values() for part in va.NORM_PARTS}
    counters = {n for n in names.shapes if n.endswith("num_batches_tracked")}
    biases = {f"{conv}.bias" for conv in folded.norms}
    assert (set(used) - biases) | into_folds | counters == set(names.shapes)
    assert not (set(used) - biases) & into_folds


def shapes_of(model):
    return {n: tuple(leaf.shape) for n, leaf in checkpoint.flatten(model.abstract).items()}


# ---- bad files -----------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("part", [0, 0.001, 0.3, 0.7, 0.999])
def test_a_truncated_file_says_so(folder, tmp_path, file, part):
    data = (folder / file).read_bytes()
    path = tmp_path / file
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(CheckpointError, match="truncated or no ONNX file") as error:
        FILES[file][0](path)
    assert str(path) in str(error.value)


def test_a_file_that_ends_after_a_whole_operator_says_so(folder, tmp_path):
    """What is left is a valid message: nothing but the missing rest gives it away."""
    model = onnx.load(folder / va.SPEECH_TOKENIZER_FILE)
    del model.graph.initializer[:], model.graph.output[:]
    with pytest.raises(CheckpointError, match="no complete graph"):
        va.read_speech_tokenizer(saved(model, tmp_path))


@BOTH
def test_no_onnx_file_at_all(tmp_path, file):
    (tmp_path / file).write_text("<html>404 Not Found</html>")
    with pytest.raises(CheckpointError, match="truncated or no ONNX file"):
        FILES[file][0](tmp_path / file)
    with pytest.raises(CheckpointError, match=r"cannot read .*nowhere.onnx \(No such file"):
        FILES[file][0](tmp_path / "nowhere.onnx")


@BOTH
def test_the_other_models_graph(folder, file):
    read, _ = FILES[file]
    other = next(name for name in FILES if name != file)
    with pytest.raises(CheckpointError, match="another model's graph: expected the ") as error:
        read(folder / other)
    assert "convolutions" in str(error.value)


def test_a_graph_without_learned_numbers(tmp_path):
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [out])
    path = saved(helper.make_model(graph), tmp_path)
    for read, _ in FILES.values():
        with pytest.raises(CheckpointError, match="found nothing"):
            read(path)


def test_the_onnx_package_is_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(CheckpointError, match=r'pip install "sa2jax\[convert\]"'):
        va.read_speech_tokenizer(folder / va.SPEECH_TOKENIZER_FILE)


def test_everything_wrong_comes_in_one_error(folder, tmp_path):
    model = onnx.load(folder / va.SPEECH_TOKENIZER_FILE)
    tensors = {t.name: t for t in model.graph.initializer}
    convs = [node for node in model.graph.node if node.op_type == "Conv"]
    norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    strides = next(a for a in convs[0].attribute if a.name == "strides")
    strides.ints[:] = [1]
    next(a for a in norms[1].attribute if a.name == "epsilon").f = 1e-3
    tensors[norms[0].input[2]].CopyFrom(
        numpy_helper.from_array(np.zeros(5, np.float32), norms[0].input[2])
    )
    extra = numpy_helper.from_array(np.zeros((16, 16), np.float32), "left.over")
    model.graph.initializer.append(extra)
    path = saved(model, tmp_path)
    with pytest.raises(CheckpointError) as error:
        va.read_speech_tokenizer(path)
    for part in (
        f"{path} is not the network it should be: ",
        "expected strides [2], got [1]",
        "expected epsilon 1e-05, got 0.001",
        "1 unknown tensors: left.over",
        "expected [64], got [5]",
    ):
        assert part in str(error.value)
    assert "config.json" not in str(error.value)
    assert str(error.value).endswith("Use the file of the released token2wav folder")


def test_a_tensor_with_two_roles_is_refused(folder, tmp_path):
    model = onnx.load(folder / va.SPEECH_TOKENIZER_FILE)
    norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    norms[1].input[1] = norms[0].input[1]
    with pytest.raises(CheckpointError, match=r"is both .*mlp_ln.weight and .*attn_ln.weight"):
        va.read_speech_tokenizer(saved(model, tmp_path))


def test_a_last_norm_that_scales_is_refused(folder, tmp_path):
    model = onnx.load(folder / va.SPEAKER_ENCODER_FILE)
    scale = next(n for n in reversed(model.graph.node) if n.op_type == "BatchNormalization").input[
        1
    ]
    node = next(n for n in model.graph.node if n.output[0] == scale)
    array = numpy_helper.to_array(node.attribute[0].t) * 2
    node.attribute[0].t.CopyFrom(numpy_helper.from_array(array))
    with pytest.raises(
        CheckpointError, match=r"unknown tensors: .*dense.nonlinear.batchnorm.weight"
    ):
        va.read_speaker_encoder(saved(model, tmp_path))


def test_weights_in_another_file_are_refused(folder, tmp_path):
    model = onnx.load(folder / va.SPEECH_TOKENIZER_FILE)
    path = tmp_path / "split.onnx"
    onnx.save(model, path, save_as_external_data=True, location="numbers.bin")
    with pytest.raises(CheckpointError, match="tensors in another file"):
        va.read_speech_tokenizer(path)


def test_parameters_that_do_not_fit_the_graph(converted, tmp_path):
    net = converted[va.SPEECH_TOKENIZER_FILE]
    lacking = {name: part for name, part in net.params.items() if name != "conv1"}
    with pytest.raises(CheckpointError, match=r"lack conv1.bias, conv1.kernel"):
        va.write_speech_tokenizer(tmp_path / "x.onnx", replace(net, params=lacking))
    with pytest.raises(CheckpointError, match="is not the network it should be"):
        va.write_speech_tokenizer(
            tmp_path / "x.onnx", replace(net, config=replace(net.config, layers=1))
        )
    digits = {"kernel": np.zeros((8, 63), np.float32), "bias": np.zeros(8, np.float32)}
    with pytest.raises(CheckpointError, match=r"has shape \[64, 8\], got \[63, 8\]"):
        va.write_speech_tokenizer(
            tmp_path / "x.onnx", replace(net, params=net.params | {"digits": digits})
        )
    assert not list(tmp_path.iterdir())


def test_configs_from_tensors_of_another_model():
    with pytest.raises(CheckpointError, match=r"tokenizer: 'encoder.conv1.weight'"):
        va.speech_tokenizer_config({})
    with pytest.raises(CheckpointError, match=r"encoder: 'head.conv1.weight'"):
        va.speaker_encoder_config({"encoder.conv1.weight": (64, 128, 3)})


def test_layers_are_read_in_the_order_of_computation(folder):
    graph = OnnxGraph(folder / va.SPEECH_TOKENIZER_FILE)
    assert graph.contents() == "4 convolutions, 4 layer norms, 13 linear maps"
    up, down, digits = graph.layers[-3:]
    assert graph.upstream(down.source) == [up]
    assert down in graph.upstream(digits.source)

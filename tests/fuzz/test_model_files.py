"""Files of models as strangers might make them: each is read, or refused in one short line."""

import io
import json
import random
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers.fuzzing import attempt, cases, damage_bytes, damage_json, put
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from sa2jax import checkpoint
from sa2jax.chat import tokenizer_files
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.config import StepAudio2Config
from sa2jax.convert import torch_file
from sa2jax.convert.extend_tokenizer import read_vocab
from sa2jax.convert.onnx_graph import OnnxGraph
from sa2jax.convert.tokenizer import copy_tokenizer
from sa2jax.convert.vocoder import config_of
from sa2jax.convert.voice_analysis import speaker_encoder_config, speech_tokenizer_config
from sa2jax.convert.voice_structure import speaker_encoder_names, speech_tokenizer_names
from sa2jax.convert.weights import INDEX, Arrays, SafetensorsFolder, TensorInfo, write_safetensors
from sa2jax.files.archives import parse_npy, parse_npz
from sa2jax.files.yaml_files import read_yaml
from sa2jax.flow_yaml import read_flow_yaml
from sa2jax.speech_config import Token2WavConfig

seeds = st.integers(0, 2**32 - 1)
GOLDEN = Path(__file__).parents[1] / "golden"
CONFIG = json.loads((GOLDEN / "micro" / "llm" / "config.json").read_text("utf-8"))
FLOW = (GOLDEN / "token2wav" / "flow.yaml").read_bytes()
ARRAYS = {"a.weight": np.ones((2, 3), np.float32), "a.bias": np.zeros(2, np.float32)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def archive(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return data.getvalue()


def entries_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name: file.read(name) for name in file.namelist()}


@cases(300)
@given(seed=seeds)
def test_config_json(folder, seed):
    path = put(folder / "config.json", damage_json(CONFIG, random.Random(seed)))
    attempt(lambda: StepAudio2Config.from_hf(path))


@cases(150)
@given(seed=seeds)
def test_config_of_a_detokenizer(folder, seed):
    rng = random.Random(seed)
    value = {"format": 2, "t2w": Token2WavConfig.preset("nano").to_dict()}
    put(folder / checkpoint.INFO, damage_json(value, rng))

    def read():
        info = checkpoint.read_info(folder)
        return Token2WavConfig.from_dict(info.get("t2w"))

    attempt(read)


@cases(200)
@given(seed=seeds)
def test_flow_yaml(folder, seed):
    rng = random.Random(seed)
    lines = FLOW.splitlines(keepends=True)
    if rng.random() < 0.5:
        at = rng.randrange(len(lines))
        key = lines[at].split(b":")[0]
        value = rng.choice(
            (b"*a", b"&a [*a]", b"2001-99-99", b"0x_", b"!!bool x", b"!ref [a]", b"<<")
        )
        lines[at] = key + b": " + value + b"\n"
        data = b"".join(lines)
    else:
        data = damage_bytes(FLOW, rng)
    path = put(folder / "flow.yaml", data)
    attempt(lambda: read_flow_yaml(path))
    attempt(lambda: read_yaml(path))


@pytest.fixture(scope="module")
def weights(folder) -> bytes:
    infos = {name: TensorInfo(a.shape, a.dtype) for name, a in ARRAYS.items()}
    source = Arrays(ARRAYS, "here")
    write_safetensors(folder, infos, source, 1 << 20, lambda done, total: None)
    return (folder / "model.safetensors").read_bytes()


@cases(250)
@given(seed=seeds)
def test_safetensors(folder, weights, seed):
    rng = random.Random(seed)
    length = int.from_bytes(weights[:8], "little")
    if rng.random() < 0.6:
        text = damage_json(json.loads(weights[8 : 8 + length]), rng)
        data = len(text).to_bytes(8, "little") + text + weights[8 + length :]
    else:
        data = damage_bytes(weights, rng)
    put(folder / "model.safetensors", data)

    def read():
        with SafetensorsFolder(folder) as tensors:
            return {name: tensors.get(name).shape for name in tensors.tensors}

    attempt(read)


@cases(100)
@given(seed=seeds)
def test_index_of_safetensors(folder, weights, seed):
    home = folder / "sharded"
    home.mkdir(exist_ok=True)
    put(home / "a.safetensors", weights)
    index = {"metadata": {"total_size": 32}, "weight_map": dict.fromkeys(ARRAYS, "a.safetensors")}
    put(home / INDEX, damage_json(index, random.Random(seed)))
    attempt(lambda: SafetensorsFolder(home).tensors)


@pytest.fixture(scope="module")
def pt(folder) -> bytes:
    path = folder / "good.pt"
    torch_file.write(path, ARRAYS)
    return path.read_bytes()


@cases(350)
@given(seed=seeds)
def test_pt(folder, pt, seed):
    rng = random.Random(seed)
    entries = entries_of(pt)
    if rng.random() < 0.7:
        entries["good/data.pkl"] = damage_bytes(entries["good/data.pkl"], rng)
        kind = zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED
        data = archive(entries, kind)
    else:
        data = damage_bytes(pt, rng)
    path = put(folder / "flow.pt", data)

    def read():
        tensors = Arrays(torch_file.read(path), str(path)).tensors
        config_of({name: info.shape for name, info in tensors.items()}, str(path))
        return {name: info.nbytes for name, info in tensors.items()}

    attempt(read)


def graph() -> bytes:
    """Operators of every kind that is looked for, with numbers here and there."""
    rng = np.random.default_rng(0)

    def tensor(name, *shape):
        return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["y"], strides=[2], pads=[1, 1]),
        helper.make_node("LayerNormalization", ["y", "s", "t"], ["n"], axis=-1, epsilon=1e-5),
        helper.make_node("Constant", [], ["m"], value=tensor("", 4, 4)),
        helper.make_node("MatMul", ["n", "m"], ["l"]),
        helper.make_node("Add", ["l", "s"], ["a"]),
        helper.make_node("Gemm", ["a", "m", "s"], ["g"], transB=1),
        helper.make_node("BatchNormalization", ["g", "s", "t", "s", "t"], ["o"]),
        helper.make_node("AveragePool", ["o"], ["p"], kernel_shape=[100]),
    ]
    values = [tensor("w", 4, 3, 3), tensor("b", 4), tensor("s", 4), tensor("t", 4)]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
    outputs = [helper.make_tensor_value_info("p", TensorProto.FLOAT, None)]
    made = helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, values))
    return made.SerializeToString()


GRAPH = graph()


def damage_graph(rng: random.Random) -> bytes:
    model = onnx.load_model_from_string(GRAPH)
    nodes, values = model.graph.node, model.graph.initializer
    for _ in range(rng.choice((1, 2))):
        node, value = rng.choice(nodes), rng.choice(values)
        kind = rng.randrange(9)
        if kind == 0:
            del node.output[:]
        elif kind == 1:
            del node.input[rng.randrange(4) :]
        elif kind == 2:
            node.op_type = rng.choice(("Conv", "Gemm", "MatMul", "Constant", "BatchNormalization"))
        elif kind == 3:
            value.data_type = rng.choice((0, 8, 16, 22, 23, 99))
        elif kind == 4:
            value.raw_data = value.raw_data[: rng.randrange(20)]
        elif kind == 5:
            value.dims.append(rng.choice((0, -1, 1 << 62)))
        elif kind == 6:
            value.data_location = TensorProto.EXTERNAL
        elif kind == 7:
            node.name = node.input[:1][0] if node.input and rng.random() < 0.5 else "x" * 5000
        elif node.attribute:
            attribute = rng.choice(node.attribute)
            attribute.type = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8))
            attribute.i = rng.choice((-1, 1 << 62))
    return model.SerializeToString()


@cases(300)
@given(seed=seeds)
def test_onnx(folder, seed):
    rng = random.Random(seed)
    data = damage_graph(rng) if rng.random() < 0.7 else damage_bytes(GRAPH, rng)
    path = put(folder / "campplus.onnx", data)

    def read():
        opened = OnnxGraph(path)
        return [opened.get(name) for name in opened.tensors]

    attempt(read)
    attempt(lambda: speech_tokenizer_config(speech_tokenizer_names(OnnxGraph(path)).shapes))
    attempt(lambda: speaker_encoder_config(speaker_encoder_names(OnnxGraph(path))[0].shapes))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("tokenizer")
    return tokenizer_files.save_tokenizer_files(home, audio_start=296, vocab=310)


NAMES = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json", "merges.txt")


@cases(200)
@given(seed=seeds)
def test_tokenizer(tokenizer, seed):
    rng = random.Random(seed)
    name = rng.choice(NAMES)
    kept = (tokenizer / name).read_bytes()
    hidden = tokenizer / "tokenizer.json"
    whole = hidden.read_bytes()
    try:
        if name == "merges.txt":
            put(tokenizer / name, damage_bytes(kept + b"a b\nc d\n", rng))
        else:
            put(tokenizer / name, damage_json(json.loads(kept), rng))
        if name in ("vocab.json", "merges.txt"):
            hidden.unlink()
        attempt(lambda: Tokenizer.from_folder(tokenizer).encode("a <|EOT|> é"))
        attempt(lambda: read_vocab(tokenizer))
    finally:
        put(hidden, whole)
        put(tokenizer / name, kept)


@cases(60)
@given(seed=seeds)
def test_special_ids(folder, seed):
    cfg = StepAudio2Config.from_hf(CONFIG)
    data = damage_json({"audio_start": 1}, random.Random(seed))
    put(folder / "special_ids.json", data)
    out = folder / "out"
    out.mkdir(exist_ok=True)
    attempt(lambda: copy_tokenizer(folder, None, out, cfg), out=out)


@cases(100)
@given(seed=seeds)
def test_orbax_metadata(orbax, seed):
    path = orbax / "_METADATA"
    kept = path.read_bytes()
    try:
        put(path, damage_json(json.loads(kept), random.Random(seed)))
        attempt(lambda: checkpoint.open_leaves(orbax))
    finally:
        put(path, kept)


@pytest.fixture(scope="module")
def orbax(folder) -> Path:
    path = folder / "params"
    checkpoint.save_params(path, {"a": np.ones((2, 3), np.float32), "b": {"c": np.zeros(2)}})
    return path


@cases(150)
@given(seed=seeds)
def test_arrays_of_numpy(seed):
    rng, file = random.Random(seed), io.BytesIO()
    (np.savez_compressed if rng.random() < 0.5 else np.savez)(file, **ARRAYS)
    entries = {name: damage_bytes(data, rng) for name, data in entries_of(file.getvalue()).items()}
    kind = zipfile.ZIP_DEFLATED if rng.random() < 0.5 else zipfile.ZIP_STORED
    damaged = archive(entries, kind)
    attempt(lambda: parse_npz(damage_bytes(damaged, rng) if rng.random() < 0.5 else damaged, "x"))
    attempt(lambda: parse_npy(next(iter(entries.values())), "x"))

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers.detokenizers import stretch
from onnx import helper, numpy_helper

from sa2jax.convert import hf


@pytest.fixture
def source(golden) -> Path:
    return golden / "micro" / "llm"


@pytest.fixture
def broken(source, tmp_path) -> Path:
    """A copy of the source that a test may damage."""
    return Path(shutil.copytree(source, tmp_path / "broken"))


@pytest.fixture(scope="module")
def kept(golden, tmp_path_factory) -> Path:
    """A released folder whose vocoder has weight norms that are not folded, and its conversion."""
    folder = tmp_path_factory.mktemp("kept")
    shutil.copytree(golden / "token2wav", folder / "official")
    stretch(folder / "official" / "hift.pt")
    hf.convert(folder / "official", folder / "ours")
    hf.convert(golden / "micro" / "llm", folder / "whole")
    shutil.copytree(folder / "ours", folder / "whole" / "token2wav")
    return folder


@pytest.fixture
def official(kept, tmp_path) -> Path:
    """A released folder that a test may damage."""
    return Path(shutil.copytree(kept / "official", tmp_path / "official"))


@pytest.fixture
def ours(kept, tmp_path) -> Path:
    """Its conversion, to be damaged."""
    return Path(shutil.copytree(kept / "ours", tmp_path / "ours"))


@pytest.fixture
def whole(kept, tmp_path) -> Path:
    """Language model and detokenizer, converted."""
    return Path(shutil.copytree(kept / "whole", tmp_path / "whole"))


@pytest.fixture
def model(source, kept, tmp_path) -> Path:
    """A Hugging Face folder of language model and detokenizer, to be damaged."""
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    shutil.copytree(kept / "official", folder / "token2wav")
    return folder


@pytest.fixture
def with_free_norms(rng) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    """Changes a speaker encoder's graph, not its function."""
    return lambda model: _with_free_norms(model, rng)


def _with_free_norms(model: onnx.ModelProto, rng: np.random.Generator) -> onnx.ModelProto:
    """The same function, with every folded norm of the speaker encoder as an operator again."""
    numbers = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    nodes, changed = [], {}
    for node in model.graph.node:
        nodes.append(node)
        folded = node.op_type == "Conv" and len(node.input) == 3 and "cam_layer" not in node.name
        if not folded:
            continue
        weight, bias = numbers[node.input[1]], numbers[node.input[2]]
        size, out = len(bias), node.output[0]
        scale, mean = rng.uniform(0.5, 2, size), rng.standard_normal(size)
        variance = rng.uniform(0.5, 2, size)
        factor = scale / np.sqrt(variance + 1e-5)
        changed[node.input[1]] = weight / factor.reshape(-1, *(1,) * (weight.ndim - 1))
        changed[node.input[2]] = None
        parts = {"scale": scale, "shift": bias + mean * factor, "mean": mean, "var": variance}
        names = [f"{out}_{part}" for part in parts]
        changed |= dict(zip(names, parts.values(), strict=True))
        del node.input[2]
        node.output[0] = f"{out}_free"
        norm = helper.make_node("BatchNormalization", [f"{out}_free", *names], [out], epsilon=1e-5)
        nodes.append(norm)
    tensors = {k: v for k, v in (numbers | changed).items() if v is not None}
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in tensors.items()
    )
    return model

"""Folders of released and converted detokenizers: what is in them, and small changes to it."""

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from sa2jax import checkpoint
from sa2jax.convert import torch_file
from sa2jax.convert.vocoder import SPELLINGS

WEIGHTS = ("flow.pt", "hift.pt", "campplus.onnx", "speech_tokenizer_v2_25hz.onnx")
NETWORKS = ("flow", "speaker_encoder", "speech_tokenizer", "vocoder")


def stretch(path: Path, prefix="generator.", spelling=SPELLINGS[0]) -> None:
    """Make a weight norm's directions longer than its lengths, with other names if need be."""
    tensors, rng = {}, np.random.default_rng(1)
    for name, array in torch_file.read(path).items():
        if name.endswith(SPELLINGS[0][1]):
            array = (array * rng.uniform(0.5, 2, (len(array), 1, 1))).astype(np.float32)
        name = name.replace("generator.", prefix)
        for old, new in zip(SPELLINGS[0], spelling, strict=True):
            name = name.replace(old, new)
        tensors[name] = array
    torch_file.write(path, tensors)


def entries(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def leaves(folder: Path) -> dict[str, np.ndarray]:
    return {n: np.asarray(a) for n, a in checkpoint.flatten(checkpoint.load_params(folder)).items()}


def change_tensor(path: Path, change, pick=lambda name, array: array.ndim == 3) -> str:
    """Change the first tensor of a released file that `pick` picks."""
    if path.suffix == ".pt":
        tensors = dict(torch_file.read(path))
        name = next(n for n, a in tensors.items() if pick(n, a))
        tensors[name] = change(np.array(tensors[name]))
        torch_file.write(path, tensors)
        return name
    graph = onnx.load(path)
    tensor = next(t for t in graph.graph.initializer if pick(t.name, np.empty(t.dims, np.float16)))
    array = np.asarray(change(np.array(numpy_helper.to_array(tensor))))
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(graph, path)
    return tensor.name

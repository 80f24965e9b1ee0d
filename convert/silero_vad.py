"""The voice activity detection that comes with the library, from the released ONNX file.

    # pip download --no-deps silero-vad==6.2.3 && unzip silero_vad-*.whl
    convert_silero_vad("silero_vad/data/silero_vad_16k_op15.onnx", assets.SILERO_VAD)

The `.safetensors` beside it in that package are the numbers of another training.
"""

import os
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from sa2jax.atomic_io import new_file
from sa2jax.audio.features import hann
from sa2jax.audio.silero import SHAPES, UNITS, WINDOW
from sa2jax.convert.onnx_graph import OnnxGraph
from sa2jax.errors import CheckpointError

_STFT = "model.stft.forward_basis_buffer"
_CELL = "model.decoder.rnn"
_SOURCES = {
    **{
        f"conv{n}.{ours}": f"model.encoder.{n - 1}.reparam_conv.{theirs}"
        for n in range(1, 5)
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    },
    "lstm.input": f"{_CELL}.weight_ih",
    "lstm.hidden": f"{_CELL}.weight_hh",
    "lstm.bias": f"{_CELL}.bias_ih",
    "output.kernel": "model.decoder.decoder.2.weight",
    "output.bias": "model.decoder.decoder.2.bias",
}
# Every tensor that is read, with its shape.
TENSORS: dict[str, tuple[int, ...]] = {
    **{theirs: SHAPES[ours] for ours, theirs in _SOURCES.items()},
    "model.decoder.decoder.2.weight": (1, UNITS, 1),
    f"{_CELL}.bias_hh": SHAPES["lstm.bias"],
    _STFT: (WINDOW + 2, 1, WINDOW),
}


def convert_silero_vad(source: str | os.PathLike[str], out: str | Path) -> dict[str, np.ndarray]:
    """Write the file of `audio.silero` from `silero_vad_16k_op15.onnx`, release 6.

    Args:
        source: the ONNX file.
        out: the safetensors file, which is replaced if it is there.

    Returns:
        The tensors that were written, float32, by name.

    Raises:
        CheckpointError: if the ONNX file is missing, damaged or another network.
    """
    graph = OnnxGraph(source)
    found = {name: info.shape for name, info in graph.tensors.items()}
    if missing := sorted(name for name, shape in TENSORS.items() if found.get(name) != shape):
        raise CheckpointError(
            f"{graph.where} is not silero_vad_16k_op15.onnx of the package silero-vad 6: it has no "
            f"{', '.join(missing)} of that network's shape"
        )
    tensors = {ours: graph.get(theirs) for ours, theirs in _SOURCES.items()}
    tensors["lstm.bias"] = tensors["lstm.bias"] + graph.get(f"{_CELL}.bias_hh")
    tensors["output.kernel"] = tensors["output.kernel"].reshape(-1)
    if not _is_hann_dft(graph.get(_STFT)):
        raise CheckpointError(
            f"{graph.where}: the spectrum is not that of silero_vad_16k_op15.onnx of the package "
            "silero-vad 6"
        )
    with new_file(out) as temp:
        # One entry of metadata: of several, the order would not be the same each time.
        temp.write_bytes(save(tensors, {"source": "silero_vad_16k_op15.onnx"}))
    return tensors


def _is_hann_dft(basis: np.ndarray) -> bool:
    """Whether a convolution is the spectrum of windows of 256 samples: it needs no numbers then."""
    wave = np.fft.rfft(np.eye(WINDOW) * hann(WINDOW)).T  # [129, 256]
    expected = np.concatenate([wave.real, wave.imag])[:, None]
    return bool(np.abs(basis - expected).max() < 1e-6)

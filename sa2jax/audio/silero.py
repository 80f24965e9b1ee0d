"""Silero VAD 6 in NumPy: how likely somebody speaks in each 32 ms of 16 kHz samples.

A frame is 512 samples with the 64 before it. Its spectrum (four windows of 256 samples) goes
through four convolutions, which see nothing else, and then one LSTM cell, which remembers what came
before. So the frames of a recording, or of many streams, are encoded together, and only the cell
goes step by step. Where the numbers are from: `sa2jax/assets/silero_vad`; who uses them: `vad`.
"""

import os
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Self

import numpy as np
from jaxtyping import Float32

from sa2jax.assets import SILERO_VAD
from sa2jax.audio.blas import one_thread
from sa2jax.audio.features import hann
from sa2jax.errors import CheckpointError, FileError
from sa2jax.files.safetensors_files import read_safetensors

FRAME = 512  # samples that each probability is of
CONTEXT = 64  # samples before them that are seen as well
UNITS = 128  # of the LSTM
SHAPES: Mapping[str, tuple[int, ...]] = {
    "conv1.kernel": (128, 129, 3),  # [out, in, taps]
    "conv1.bias": (128,),
    "conv2.kernel": (64, 128, 3),
    "conv2.bias": (64,),
    "conv3.kernel": (64, 64, 3),
    "conv3.bias": (64,),
    "conv4.kernel": (128, 64, 3),
    "conv4.bias": (128,),
    "lstm.input": (4 * UNITS, UNITS),  # gates: input, forget, cell, output
    "lstm.hidden": (4 * UNITS, UNITS),
    "lstm.bias": (4 * UNITS,),
    "output.kernel": (UNITS,),
    "output.bias": (1,),
}
STRIDES = (1, 2, 2, 1)
WINDOW, _HOP = 256, 128  # samples
_BLOCK = 128  # frames that are encoded at once: what they need fits into a processor's cache


class SileroVAD:
    """The network; without state, for any number of threads.

    Args:
        tensors: float32 arrays by name, as `SHAPES` lists them.

    Raises:
        CheckpointError: if they are others.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        found = {name: tuple(array.shape) for name, array in tensors.items()}
        if found != SHAPES:
            wrong = sorted(n for n in found.keys() | SHAPES if found.get(n) != SHAPES.get(n))
            raise CheckpointError(
                f"expected the tensors of Silero VAD for 16 kHz, but {', '.join(wrong)} are "
                "missing or have other shapes; make the file with sa2jax.convert.silero_vad"
            )
        get = {name: np.asarray(array, np.float32) for name, array in tensors.items()}
        self._convolutions = [
            (_as_matrix(get[f"conv{n}.kernel"]), get[f"conv{n}.bias"], stride)
            for n, stride in enumerate(STRIDES, 1)
        ]
        # sigmoid(x) = (1 + tanh(x / 2)) / 2: with halves, one tanh serves all gates.
        half = np.repeat(np.array([0.5, 0.5, 1, 0.5], np.float32), UNITS)
        self._input = np.ascontiguousarray((get["lstm.input"] * half[:, None]).T)
        self._hidden = np.ascontiguousarray((get["lstm.hidden"] * half[:, None]).T)
        self._bias = get["lstm.bias"] * half
        self._output = get["output.kernel"], get["output.bias"]

    @classmethod
    def load(cls, path: str | os.PathLike[str] = SILERO_VAD) -> Self:
        """The network of a file, by default the one that comes with the library.

        Raises:
            CheckpointError: if the file is missing, damaged or another network's.
        """
        try:
            return cls(read_safetensors(path)[0])
        except FileError as error:
            raise CheckpointError(
                f"no voice activity detection without its weights: {error}; install sa2jax again"
            ) from None

    def __call__(
        self,
        frames: Sequence[Float32[np.ndarray, "_ 576"]],
        hidden: Float32[np.ndarray, "B 128"],
        cell: Float32[np.ndarray, "B 128"],
    ) -> list[Float32[np.ndarray, " _"]]:
        """The probability of speech in each frame.

        Args:
            frames: of each stream, any number, each with its context before it.
            hidden: the cell's output in each stream; changed to that after the last frame.
            cell: its memory; changed as well.
        """
        counts = np.array([len(own) for own in frames], int)
        order = np.argsort(-counts, kind="stable")  # the streams of a step are then the first
        active = [int((counts > k).sum()) for k in range(counts.max(initial=0))]
        ends = np.cumsum(counts)
        starts = (ends - counts)[order]
        steps = [starts[:n] + k for k, n in enumerate(active)]
        at = np.concatenate(steps) if steps else np.zeros(0, int)
        h, c = hidden[order], cell[order]
        with one_thread():
            gates = self._encode(np.concatenate([*frames])[at])
            outputs, first = np.empty((len(gates), UNITS), np.float32), 0
            for n in active:
                h[:n], c[:n] = self._cell(gates[first : first + n], h[:n], c[:n])
                outputs[first : first + n] = h[:n]
                first += n
            kernel, bias = self._output
            logits = np.maximum(outputs, 0, out=outputs) @ kernel + bias
        hidden[order], cell[order] = h, c
        probabilities = np.empty(len(gates), np.float32)
        probabilities[at] = 0.5 + 0.5 * np.tanh(0.5 * logits)
        return np.split(probabilities, ends[:-1])

    def _encode(self, frames: Float32[np.ndarray, "N 576"]) -> Float32[np.ndarray, "N 512"]:
        """What the gates of the LSTM get from each frame."""
        gates = np.empty((len(frames), 4 * UNITS), np.float32)
        for n in range(0, len(frames), _BLOCK):
            x = np.pad(frames[n : n + _BLOCK], ((0, 0), (0, CONTEXT)), "reflect")
            x = np.lib.stride_tricks.sliding_window_view(x, WINDOW, axis=1)[:, ::_HOP]
            x = np.abs(np.fft.rfft(x * hann(WINDOW)))  # [N, 4, 129]
            for kernel, bias, stride in self._convolutions:
                x = _convolve(x, kernel, bias, stride)
            gates[n : n + _BLOCK] = x[:, 0] @ self._input + self._bias
        return gates

    def _cell(
        self, gates: np.ndarray, hidden: np.ndarray, cell: np.ndarray
    ) -> tuple[Float32[np.ndarray, "B 128"], Float32[np.ndarray, "B 128"]]:
        """One step of the LSTM: its new output and memory."""
        gates = np.tanh(gates + hidden @ self._hidden)
        opened = 0.5 + 0.5 * gates
        into, keep, _, out = (opened[:, n * UNITS : (n + 1) * UNITS] for n in range(4))
        cell = keep * cell + into * gates[:, 2 * UNITS : 3 * UNITS]
        return out * np.tanh(cell), cell


@cache
def shipped() -> SileroVAD:
    """The network that comes with the library, read once."""
    return SileroVAD.load()


def _as_matrix(kernel: Float32[np.ndarray, "out in taps"]) -> Float32[np.ndarray, "taps_in out"]:
    return np.ascontiguousarray(kernel.transpose(2, 1, 0).reshape(-1, len(kernel)))


def _convolve(
    x: Float32[np.ndarray, "N T in"], kernel: np.ndarray, bias: np.ndarray, stride: int
) -> Float32[np.ndarray, "N _ out"]:
    """A convolution of three taps with a zero at both ends, then ReLU."""
    length = x.shape[1]
    x = np.pad(x, ((0, 0), (1, 1), (0, 0)))
    taps = np.concatenate([x[:, tap : tap + length : stride] for tap in range(3)], axis=2)
    return np.maximum(taps @ kernel + bias, 0)

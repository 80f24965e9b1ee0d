"""Speaker verification by the speaker encoder of resemblyzer, in numpy.

    judge = VoiceJudge()
    judge.closest(wave, 24_000, {"anna": judge.embed(anna, rate), "rob": judge.embed(rob, rate)})

Three LSTM layers over 40 mel bands (Wan et al. 2018, "Generalized End-to-End Loss for Speaker
Verification"). The wheel's weights are read as data, so that neither torch nor librosa is needed;
its shortening of long silences is left out: replies have none.
"""

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float

from sa2jax.audio import features
from sa2jax.audio.rates import SAMPLE_RATE
from sa2jax.errors import AudioError, DataError
from sa2jax.evaluate.judges import require, to_16khz

WINDOW, HOP, MELS = 400, 160, 40  # samples, samples, bands
PART, STEP = 160, 77  # frames that are heard at once, and frames between two such parts
_COVERED = 0.75  # of the last part must be sound
_LEVEL = -30.0  # dB of full scale, the least that is heard
_LAYERS = 3

Vector = Float[np.ndarray, "256"]


class VoiceJudge:
    """Turns speech into a vector that says who speaks.

    Raises:
        DataError: if resemblyzer is not installed, or its weights are damaged.
    """

    def __init__(self):
        path = require("resemblyzer") / "pretrained.pt"
        state = read_legacy(path).get("model_state", {})
        names = [
            f"lstm.{n}_l{i}"
            for i in range(_LAYERS)
            for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ]
        if missing := {*names, "linear.weight", "linear.bias"} - state.keys():
            raise DataError(f"{path} is not resemblyzer's: it lacks {', '.join(sorted(missing))}")
        self._params: dict[str, np.ndarray] = state

    def embed(self, wave: Float[np.ndarray, " T"], rate: int) -> Vector:
        """The mean direction of all parts of 1.6 s (`VoiceEncoder.embed_utterance`), of length 1.

        Args:
            wave: speech, best 1.6 s or more.
            rate: its rate in Hz.

        Raises:
            AudioError: if there is no sound.
        """
        wave = _loud(to_16khz(wave, rate))
        frames = -(-(len(wave) + 1) // HOP)
        starts = list(range(0, max(1, frames - PART + STEP + 1), STEP))
        if len(starts) > 1 and len(wave) - starts[-1] * HOP < _COVERED * PART * HOP:
            starts.pop()
        wave = np.pad(wave, (0, max(0, (starts[-1] + PART) * HOP - len(wave))))
        mel = _mel(wave)
        vectors = np.stack([self._network(mel[start : start + PART]) for start in starts])
        return _unit(vectors.mean(axis=0))

    def closest(
        self, wave: Float[np.ndarray, " T"], rate: int, known: Mapping[str, Vector]
    ) -> tuple[str, dict[str, float]]:
        """Which of some voices it is most like, and the cosine similarity to each."""
        vector = self.embed(wave, rate)
        likeness = {name: float(vector @ other) for name, other in known.items()}
        return max(likeness, key=lambda name: likeness[name]), likeness

    def _network(self, mel: Float[np.ndarray, "T 40"]) -> Vector:
        """The vector of one part: products with single vectors, which numpy does in one thread."""
        p, x = self._params, mel
        for layer in range(_LAYERS):
            back = p[f"lstm.weight_hh_l{layer}"]
            fed = x @ p[f"lstm.weight_ih_l{layer}"].T
            fed += p[f"lstm.bias_ih_l{layer}"] + p[f"lstm.bias_hh_l{layer}"]
            hidden = cell = np.zeros(back.shape[1], np.float32)
            outputs = []
            for step in fed:  # gates in torch's order: input, forget, cell, output
                i, f, g, o = np.split(step + back @ hidden, 4)
                cell = _sigmoid(f) * cell + _sigmoid(i) * np.tanh(g)
                hidden = _sigmoid(o) * np.tanh(cell)
                outputs.append(hidden)
            x = np.stack(outputs)
        return _unit(np.maximum(p["linear.weight"] @ x[-1] + p["linear.bias"], 0))


@cache
def voice_judge() -> VoiceJudge:
    """The one voice judge of the process."""
    return VoiceJudge()


def _loud(wave: Float[np.ndarray, " T"]) -> Float[np.ndarray, " T"]:
    """Soft speech at its least level, loud speech as it is."""
    rms = float(np.sqrt(np.mean(np.square(wave, dtype=np.float64)))) if wave.size else 0.0
    if not np.isfinite(rms) or rms == 0:
        raise AudioError("no sound: expected speech")
    return wave * np.float32(max(1.0, 10 ** (_LEVEL / 20) / rms))


def _mel(wave: Float[np.ndarray, " T"]) -> Float[np.ndarray, "frames 40"]:
    """Power in mel bands, no logarithm, as `librosa.feature.melspectrogram` has it."""
    padded = np.pad(wave, WINDOW // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]
    power = np.abs(np.fft.rfft(frames * features.hann(WINDOW), axis=-1)) ** 2
    return (power @ features.slaney(SAMPLE_RATE, WINDOW, MELS).T).astype(np.float32)


def _unit(x: Float[np.ndarray, "*B 256"]) -> Float[np.ndarray, "*B 256"]:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * x)


# --- files of torch before 1.6 ------------------------------------------------------------------


class _Data(pickle.Unpickler):
    """A pickle that may hold float tensors and plain data, and can import nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "torch._utils._rebuild_tensor_v2": lambda *parts: parts[:4],
            "collections.OrderedDict": OrderedDict,
            "torch.FloatStorage": np.dtype("<f4"),
        }
        if (value := known.get(f"{module}.{name}")) is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no tensor")
        return value

    def persistent_load(self, pid: Any) -> str:
        """The key of a storage, whose numbers come at the end of the file."""
        return pid[2]


def read_legacy(path: str | Path) -> dict[str, Any]:
    """What torch.save wrote before 1.6: pickles, then the numbers. It can run no code.

    Args:
        path: the file; its tensors must be float32.

    Returns:
        Its dictionary; `model_state` and the like hold arrays.

    Raises:
        DataError: for a file that is missing, damaged or holds anything else.
    """
    try:
        with open(path, "rb") as file:
            _magic, _version, _machine, tree = (_Data(file).load() for _ in range(4))
            storages = {key: _storage(file) for key in _Data(file).load()}
        return {
            key: {n: _tensor(t, storages) for n, t in value.items() if isinstance(t, tuple)}
            for key, value in tree.items()
            if isinstance(value, dict)
        }
    except Exception as error:  # whatever a damaged pickle does
        raise DataError(f"{path} cannot be read as a file of torch.save: {error}") from None


def _storage(file: BinaryIO) -> np.ndarray:
    (size,) = np.frombuffer(file.read(8), "<i8")
    return np.frombuffer(file.read(4 * int(size)), "<f4", int(size))


def _tensor(parts: tuple[Any, ...], storages: Mapping[str, np.ndarray]) -> np.ndarray:
    """A contiguous tensor from (storage, offset, shape, strides)."""
    key, offset, shape, strides = parts
    steps = [int(np.prod(shape[n + 1 :])) for n in range(len(shape))]
    if list(strides) != steps:
        raise ValueError("a tensor is not contiguous")
    return storages[key][offset : offset + int(np.prod(shape))].reshape(shape)

"""Sounds that voice activity detection is compared on, and Silero's own network on onnxruntime."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from sa2jax import audio
from sa2jax.audio.silero import CONTEXT, FRAME

GOLDEN = Path(__file__).parents[1] / "golden"


def released() -> Path | None:
    """The file that our numbers are from, if the package silero-vad is installed."""
    spec = find_spec("silero_vad")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "data" / "silero_vad_16k_op15.onnx"


def sounds() -> dict[str, np.ndarray]:
    """Speech, speech in noise, chords, noise, and digital silence, float32 at 16 kHz."""
    draw = np.random.RandomState(0)  # whose numbers never change
    clips = sorted((GOLDEN / "nano" / "heard").glob("*/*.flac"))[::9]
    speech = np.concatenate([audio.load_audio(clip) for clip in clips])
    time = np.arange(5 * 16_000) / 16_000
    chords = [220 * 2 ** (step / 12) for step in (0, 4, 7, 12)]
    music = sum(np.sin(2 * np.pi * f * (1 + time // 1 / 8) * time) for f in chords)
    noise = draw.standard_normal(5 * 16_000)
    found = {
        "speech": speech,
        "noisy speech": speech[: 10 * 16_000] + draw.standard_normal(10 * 16_000) / 50,
        "music": 0.1 * music * (0.5 + 0.5 * np.cos(2 * np.pi * 2 * time)),
        "noise": noise / 10,
        "silence": np.zeros(2 * 16_000),
    }
    return {name: x[: len(x) // FRAME * FRAME].astype(np.float32) for name, x in found.items()}


def original(onnx: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Silero's network: the probability of speech in each frame of samples."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(onnx), options)

    def call(samples: np.ndarray) -> np.ndarray:
        state, context, found = np.zeros((2, 1, 128), np.float32), np.zeros(CONTEXT, np.float32), []
        for frame in samples.reshape(-1, FRAME):
            inputs = {
                "input": np.concatenate([context, frame])[None],
                "state": state,
                "sr": np.array(16_000),
            }
            probability, state = session.run(None, inputs)
            found.append(probability[0, 0])
            context = frame[-CONTEXT:]
        return np.array(found, np.float32)

    return call

"""How loud a recording is: the level of each 20 ms, and whether anything can be heard at all.

What is called silent cannot be heard by anybody. Whether a sound is speech is for `vad` to say.
"""

import numpy as np
from jaxtyping import Float

from sa2jax.audio.rates import SAMPLE_RATE

FRAME = SAMPLE_RATE // 50  # 20 ms
MIN_SOUND = 0.1  # s of sound without which there are no words
SILENT = 5e-4  # standard deviation of a frame, -66 dB of full scale; an offset is no sound


def levels(samples: Float[np.ndarray, " T"]) -> Float[np.ndarray, " F"]:
    """The level of each 20 ms of 16 kHz samples: their standard deviation; the last may be cut."""
    whole = len(samples) // FRAME * FRAME
    found = samples[:whole].reshape(-1, FRAME).std(axis=1)
    return np.append(found, samples[whole:].std()) if whole < len(samples) else found


def sound_seconds(samples: Float[np.ndarray, " T"]) -> float:
    """How much of 16 kHz samples can be heard, in seconds."""
    return float((levels(samples) >= SILENT).sum()) * FRAME / SAMPLE_RATE


def has_sound(samples: Float[np.ndarray, " T"]) -> bool:
    """Whether there is enough sound for a word in 16 kHz samples."""
    return len(samples) >= MIN_SOUND * SAMPLE_RATE and sound_seconds(samples) >= MIN_SOUND


def silence_note(seconds: float) -> str:
    """Why a recording of that length without sound cannot hold speech."""
    if seconds < MIN_SOUND:
        return f"no speech: {seconds * 1000:.0f} ms are too short, expected at least 100 ms"
    return f"no speech: its {seconds:.2f} s are silent, nothing is louder than -66 dB for 0.1 s"

"""Speaker perturbation: pitch and formants moved, timing kept.

    perturb(mel, np.random.default_rng(0))

Codes still tell a little of who speaks, and a flow that has only met codes beside their own
speaker's voice lets them decide. Codes of bent speech beside the true mel frames make it listen to
the speaker vector and the prompt.

Source: vocal tract length perturbation (Jaitly and Hinton, 2013), used as in NANSY (arXiv
2110.14513): what shall not be learnt from is disturbed.
"""

import numpy as np
from jaxtyping import Float

from sa2jax.audio.features import slaney_edges
from sa2jax.audio.rates import SAMPLE_RATE

MAX_FREQUENCY_FACTOR = 1.25  # most that frequencies are multiplied or divided by
MAX_TILT = 4.0  # most that the spectrum is tilted, dB per octave around 1 kHz
_DECIBEL = 1 / 40  # of power, in the units of `s3_log_mel`: log10, a fourth of it


def perturb(mel: Float[np.ndarray, "M F"], rng: np.random.Generator) -> Float[np.ndarray, "M F"]:
    """The log-mel frames (`s3_log_mel`) of the same speech with another pitch, formants and tilt.

    Args:
        mel: frames of speech at 16 kHz.
        rng: how far: frequencies by a factor of 0.8 to 1.25, the tilt by -4 to 4 dB per octave.
    """
    factor = MAX_FREQUENCY_FACTOR ** rng.uniform(-1, 1)
    slope = rng.uniform(-MAX_TILT, MAX_TILT)
    return warp(mel, factor, slope)


def warp(mel: Float[np.ndarray, "M F"], factor: float, slope: float) -> Float[np.ndarray, "M F"]:
    """Frames whose frequencies are `factor` times as high, tilted by `slope` dB per octave.

    What would come from above the highest band is that band.
    """
    hz = slaney_edges(SAMPLE_RATE / 2, len(mel))[1:-1]
    place = np.interp(hz / factor, hz, np.arange(len(hz)))
    below = np.minimum(place.astype(int), len(hz) - 2)
    part = (place - below)[:, None]
    tilt = slope * np.log2(np.maximum(hz, 100) / 1000) * _DECIBEL
    moved = (1 - part) * mel[below] + part * mel[below + 1] + tilt[:, None]
    return moved.astype(np.float32)

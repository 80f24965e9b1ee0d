"""Measures of how far a stream is from the same reply in one piece; sounds to hear."""

from functools import cache
from pathlib import Path

import numpy as np

from sa2jax import audio
from sa2jax.audio.levels import FRAME, levels

HEARD = Path(__file__).parents[1] / "golden" / "nano" / "heard"

RATE = 24_000
FADE = 3840  # samples of a cross-fade: 160 ms


def log_spectral_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Root mean square difference of two power spectra in dB, averaged over frames of 5 ms."""
    size, hop = 512, 120

    def spectrum(x):
        frames = np.lib.stride_tricks.sliding_window_view(np.pad(x, size // 2), size)[::hop]
        return 20 * np.log10(np.abs(np.fft.rfft(frames * np.hanning(size))) + 1e-4)

    return float(np.sqrt(((spectrum(one) - spectrum(other)) ** 2).mean(axis=1)).mean())


def joints(pieces) -> np.ndarray:
    """Where a stream's pieces begin to be faded into each other, and where that ends."""
    edges = np.cumsum([len(piece) for piece in pieces])[:-1]
    both = np.concatenate([edges, edges + FADE])
    return both[both < sum(map(len, pieces)) - RATE // 24]


def click_energy(wave: np.ndarray, places: np.ndarray) -> float:
    """Peak energy within 1 ms of these places over the mean of the 20 ms around.

    Of the third difference, which lifts high bands by 18 dB an octave: a jump or a kink stands out
    there, while speech is weak.
    """
    energy, ms = np.diff(wave, 3) ** 2, RATE // 1000
    ratios = []
    for at in places:
        around = [energy[max(at - 20 * ms, 0) : at - 2 * ms], energy[at + 2 * ms : at + 20 * ms]]
        near = energy[max(at - ms, 0) : at + ms].max()
        ratios.append(near / (np.concatenate(around).mean() + 1e-12))
    return float(np.mean(ratios))


def tone(seconds: float, *, rate: int, frequency: float) -> np.ndarray:
    """A steady sound with ten harmonics, as a voice has them."""
    time = np.arange(round(seconds * rate)) / rate
    waves = [np.sin(2 * np.pi * n * frequency * time) / n for n in range(1, 11)]
    return (0.2 * sum(waves)).astype(np.float32)


def voice(seconds: float, start: float = 0.0) -> np.ndarray:
    """Speech without pauses, float32 at 16 kHz: the same for the same place where it starts."""
    at = round(start * audio.SAMPLE_RATE) + np.arange(round(seconds * audio.SAMPLE_RATE))
    return np.take(_voice(), at, mode="wrap")


@cache
def _voice() -> np.ndarray:
    """What is loud of some recordings, one after the other: half a minute."""
    loud = []
    for path in sorted((HEARD / "asr_seen").glob("*.flac"))[:15]:
        samples = audio.load_audio(path)
        whole = samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME)
        found = levels(whole.reshape(-1))
        loud.append(whole[found > 0.1 * np.percentile(found, 95)].reshape(-1))
    return np.concatenate(loud)

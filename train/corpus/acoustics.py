"""Acoustic data augmentation of speech: reverberation, band limits, noise, spectral tilt, level.

    wave = AcousticAugmentation(noise_probability=0.5, ...).apply(wave, rng, babble)  # 16 kHz

All of it is drawn from one generator, so that the same one gives the same samples.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Float

from sa2jax.audio.rates import SAMPLE_RATE
from sa2jax.errors import ConfigError

NOISES = ("white", "pink", "babble")
Range: TypeAlias = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class AcousticAugmentation:
    """Probabilities and ranges of the augmentation of a recording.

    Attributes:
        peak_db: level of the loudest sample, dB of full scale.
        silence_seconds: silence before and after the speech, s.
        noise_probability: share of recordings with noise: white, pink or babble.
        snr_db: signal-to-noise ratio, dB.
        reverb_probability: share of recordings with reverberation.
        rt60_seconds: reverberation time: its decay by 60 dB, s.
        reverb_db: power of the reverberation against that of the direct sound, dB.
        tilt_probability: share of recordings with spectral tilt.
        tilt_db_per_octave: slope of the tilt around 1 kHz, dB per octave.
        bandpass_probability: share of recordings through a band-pass, as of a telephone line.
        bandpass_low_hz: lower cut-off, Hz.
        bandpass_high_hz: upper cut-off, Hz.
    """

    peak_db: Range = (-26.0, -0.5)
    silence_seconds: Range = (0.05, 0.5)
    noise_probability: float = 0.0
    snr_db: Range = (5.0, 40.0)
    reverb_probability: float = 0.0
    rt60_seconds: Range = (0.1, 0.5)
    reverb_db: Range = (-18.0, -3.0)
    tilt_probability: float = 0.0
    tilt_db_per_octave: Range = (-4.0, 4.0)
    bandpass_probability: float = 0.0
    bandpass_low_hz: Range = (80.0, 350.0)
    bandpass_high_hz: Range = (3400.0, 7500.0)

    def __post_init__(self):
        for name in ("noise", "reverb", "tilt", "bandpass"):
            name = f"{name}_probability"
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: expected 0 to 1, got {getattr(self, name)}")
        for name in (
            "peak_db",
            "silence_seconds",
            "snr_db",
            "rt60_seconds",
            "reverb_db",
            "tilt_db_per_octave",
            "bandpass_low_hz",
            "bandpass_high_hz",
        ):
            given = getattr(self, name)
            if len(given) != 2 or given[0] > given[1]:
                raise ConfigError(f"{name}: expected [low, high], got {list(given)}")
        positive = min(self.rt60_seconds[0], self.bandpass_low_hz[0]) > 0
        if self.peak_db[1] > 0 or self.silence_seconds[0] < 0 or not positive:
            raise ConfigError(
                "expected peak_db <= 0, silence_seconds >= 0, rt60_seconds and bandpass_low_hz "
                "above 0"
            )

    def apply(
        self,
        wave: Float[np.ndarray, " T"],
        rng: np.random.Generator,
        babble: Float[np.ndarray, " N"],
        peak: Range | None = None,
    ) -> Float[np.ndarray, " T2"]:
        """Augment a recording (16 kHz).

        Args:
            wave: speech alone.
            rng: all random choices.
            babble: babble noise, at least a second; empty for other noise instead.
            peak: level in place of this one's, dB.
        """
        ends = [round(rng.uniform(*self.silence_seconds) * SAMPLE_RATE) for _ in range(2)]
        # Always drawn, so that one effect's frequency does not change all others.
        noisy, reverberant, tilted, narrow = rng.random(4) < (
            self.noise_probability,
            self.reverb_probability,
            self.tilt_probability,
            self.bandpass_probability,
        )
        speech = np.pad(wave.astype(np.float64), (ends[0], ends[1]))
        power = float(np.mean(wave.astype(np.float64) ** 2))
        heard = _filtered(
            speech,
            impulse=_impulse_response(rng, self.rt60_seconds, self.reverb_db)
            if reverberant
            else None,
            slope=rng.uniform(*self.tilt_db_per_octave) if tilted else 0.0,
            band=(rng.uniform(*self.bandpass_low_hz), rng.uniform(*self.bandpass_high_hz))
            if narrow
            else None,
        )
        if noisy:
            snr = rng.uniform(*self.snr_db)
            sound = _noise(rng, len(heard), babble)
            heard = heard + sound * np.sqrt(power * 10 ** (-snr / 10))
        level = 10 ** (rng.uniform(*(peak or self.peak_db)) / 20)
        return (heard * (level / np.abs(heard).max())).astype(np.float32)


def _impulse_response(
    rng: np.random.Generator, rt60: Range, level: Range
) -> Float[np.ndarray, " E"]:
    """A room impulse response: the direct sound, then noise that decays exponentially."""
    seconds, power = rng.uniform(*rt60), 10 ** (rng.uniform(*level) / 10)
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    tail = rng.standard_normal(len(time)) * np.exp(-np.log(1000) * time / seconds)
    tail[: round(0.002 * SAMPLE_RATE)] = 0
    tail *= np.sqrt(power / np.sum(tail**2))
    tail[0] = 1
    return tail


def _filtered(
    wave: Float[np.ndarray, " T"],
    *,
    impulse: Float[np.ndarray, " E"] | None,
    slope: float,
    band: tuple[float, float] | None,
) -> Float[np.ndarray, " T"]:
    """Reverberation, tilt and band-pass in the frequency domain; length and power stay."""
    if impulse is None and not slope and band is None:
        return wave
    size = _fast(len(wave) + (0 if impulse is None else len(impulse)))
    spectrum = np.fft.rfft(wave, size)
    frequency = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    if impulse is not None:
        spectrum *= np.fft.rfft(impulse, size)
    if slope:
        octaves = np.log2(np.clip(frequency, 100, 8000) / 1000)
        spectrum *= 10 ** (slope * octaves / 20)
    if band is not None:  # Butterworth of the fourth order, without its delay
        inverse = band[0] / np.maximum(frequency, 1e-3)
        spectrum *= 1 / np.sqrt((1 + inverse**8) * (1 + (frequency / band[1]) ** 8))
    out = np.fft.irfft(spectrum, size)[: len(wave)]
    return out * np.sqrt(np.sum(wave**2) / max(np.sum(out**2), 1e-20))


def _noise(
    rng: np.random.Generator, length: int, babble: Float[np.ndarray, " N"]
) -> Float[np.ndarray, " T"]:
    """Noise of power 1."""
    kind = NOISES[int(rng.integers(len(NOISES)))]
    if kind == "babble" and len(babble):
        sound = np.take(babble, np.arange(length) + int(rng.integers(len(babble))), mode="wrap")
    else:
        sound = rng.standard_normal(length)
        if kind == "pink":
            spectrum = np.fft.rfft(sound, _fast(length))
            sound = np.fft.irfft(spectrum / np.sqrt(np.arange(len(spectrum)) + 1))[:length]
    return sound / np.sqrt(max(float(np.mean(sound**2)), 1e-12))


def _fast(length: int) -> int:
    """An FFT length of small factors."""
    return -(-length // 4096) * 4096

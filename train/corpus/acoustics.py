"""What happens to speech before it is heard: rooms, lines, noise, levels.

    wave = Effects(noise=0.5, ...).apply(wave, rng, babble)  # 16 kHz

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
class Effects:
    """How often something happens to a recording, and how much of it.

    Attributes:
        peak: level of the loudest sample, dB of full scale.
        silence: before and after the speech, s.
        noise: part of the recordings with noise: white, pink or other voices.
        snr: of speech against noise, dB.
        room: part of them in a room.
        decay: time in which its echo falls by 60 dB, s.
        echo: power of the echo against that of the direct sound, dB.
        tilt: part of them with a tilted spectrum.
        slope: of that, dB per octave around 1 kHz.
        band: part of them over a narrow line.
        low: where that begins, Hz.
        high: where it ends, Hz.
    """

    peak: Range = (-26.0, -0.5)
    silence: Range = (0.05, 0.5)
    noise: float = 0.0
    snr: Range = (5.0, 40.0)
    room: float = 0.0
    decay: Range = (0.1, 0.5)
    echo: Range = (-18.0, -3.0)
    tilt: float = 0.0
    slope: Range = (-4.0, 4.0)
    band: float = 0.0
    low: Range = (80.0, 350.0)
    high: Range = (3400.0, 7500.0)

    def __post_init__(self):
        for name in ("noise", "room", "tilt", "band"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: expected 0 to 1, got {getattr(self, name)}")
        for name in ("peak", "silence", "snr", "decay", "echo", "slope", "low", "high"):
            given = getattr(self, name)
            if len(given) != 2 or given[0] > given[1]:
                raise ConfigError(f"{name}: expected [low, high], got {list(given)}")
        if self.peak[1] > 0 or self.silence[0] < 0 or self.decay[0] <= 0 or self.low[0] <= 0:
            raise ConfigError("expected peak <= 0 dB, silence >= 0 s, decay and low above 0")

    def apply(
        self,
        wave: Float[np.ndarray, " T"],
        rng: np.random.Generator,
        babble: Float[np.ndarray, " N"],
        peak: Range | None = None,
    ) -> Float[np.ndarray, " T2"]:
        """A recording (16 kHz) as it is heard.

        Args:
            wave: speech alone.
            rng: what happens to it.
            babble: other voices, at least a second; none for other noise instead.
            peak: level in place of this one's, dB.
        """
        ends = [round(rng.uniform(*self.silence) * SAMPLE_RATE) for _ in range(2)]
        # Always drawn, so that one effect's frequency does not change all others.
        noisy, roomy, tilted, narrow = rng.random(4) < (self.noise, self.room, self.tilt, self.band)
        speech = np.pad(wave.astype(np.float64), (ends[0], ends[1]))
        power = float(np.mean(wave.astype(np.float64) ** 2))
        heard = _filtered(
            speech,
            echo=_echo(rng, self.decay, self.echo) if roomy else None,
            slope=rng.uniform(*self.slope) if tilted else 0.0,
            band=(rng.uniform(*self.low), rng.uniform(*self.high)) if narrow else None,
        )
        if noisy:
            snr = rng.uniform(*self.snr)
            sound = _noise(rng, len(heard), babble)
            heard = heard + sound * np.sqrt(power * 10 ** (-snr / 10))
        level = 10 ** (rng.uniform(*(peak or self.peak)) / 20)
        return (heard * (level / np.abs(heard).max())).astype(np.float32)


def _echo(rng: np.random.Generator, decay: Range, level: Range) -> Float[np.ndarray, " E"]:
    """A room's answer to one sample: itself, then noise that dies away."""
    seconds, power = rng.uniform(*decay), 10 ** (rng.uniform(*level) / 10)
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    tail = rng.standard_normal(len(time)) * np.exp(-np.log(1000) * time / seconds)
    tail[: round(0.002 * SAMPLE_RATE)] = 0
    tail *= np.sqrt(power / np.sum(tail**2))
    tail[0] = 1
    return tail


def _filtered(
    wave: Float[np.ndarray, " T"],
    *,
    echo: Float[np.ndarray, " E"] | None,
    slope: float,
    band: tuple[float, float] | None,
) -> Float[np.ndarray, " T"]:
    """A recording through a room and a line; its length and its power stay."""
    if echo is None and not slope and band is None:
        return wave
    size = _fast(len(wave) + (0 if echo is None else len(echo)))
    spectrum = np.fft.rfft(wave, size)
    frequency = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    if echo is not None:
        spectrum *= np.fft.rfft(echo, size)
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
    """A length that is quickly transformed."""
    return -(-length // 4096) * 4096

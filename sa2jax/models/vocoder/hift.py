"""The vocoder: mel frames (50 Hz) to a waveform (24 kHz), a HiFT network.

Source: HiFTNet (arXiv 2309.09493) as CosyVoice 2 has it: pitch is predicted from the mel, a source
of harmonics and noise is made from the pitch, and convolutions shape both into the spectrum of a
short inverse Fourier transform. Rows of a batch may have different lengths; each is computed as if
it were alone.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from sa2jax.models.convolution import Conv, conv
from sa2jax.models.vocoder.signal import (
    RowMask,
    apply_mask,
    istft,
    mask_of,
    sine_of_phase,
    sine_squared,
    stft,
)
from sa2jax.models.vocoder.stream import HiFTState, vocoder_state, vocoder_step
from sa2jax.nn import Functional, Linear, Policy, length_mask, param, structure_of, tap
from sa2jax.speech_config import VocoderConfig

MAX_MAGNITUDE = 100.0
LAST_SLOPE = 0.01  # of the leaky relu before the last convolution


def vocoder(cfg: VocoderConfig, policy: Policy | None = None) -> Functional["HiFT"]:
    """The structure of a config's vocoder, see `nn.structure_of`."""
    return structure_of(HiFT, cfg, policy)


class Upsample(nnx.Module):
    """A transposed convolution, `rate` frames out for one in, `kernel - rate` cut off the ends.

    Computed as a plain convolution that makes the `rate` frames as channels. Output q·rate + r
    takes tap j = r + cut + (q - t)·rate of input t, so the taps, with zeros before and after, fall
    into one row of `rate` taps for each offset q - t.
    """

    def __init__(
        self, inputs: int, outputs: int, *, kernel: int, rate: int, policy: Policy, rngs: nnx.Rngs
    ):
        self.rate, self.policy = rate, policy
        shape, scale = (kernel, inputs, outputs), (kernel / rate * inputs) ** -0.5
        self.kernel = param(rngs, shape, (None,) * 3, dtype=policy.param, scale=scale)
        self.bias = param(rngs, (outputs,), (None,), dtype=policy.param, scale=0.02)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B S D"]:
        """Upsample."""
        kernel, rate = self.kernel[...], self.rate
        taps, inputs, outputs = kernel.shape
        cut = (taps - rate) // 2
        ahead = -(-cut // rate)  # offsets below zero: inputs later than the output
        before = ahead * rate - cut
        rows = -(-(before + taps) // rate)
        after = rows * rate - taps - before
        kernel = jnp.pad(kernel, ((before, after), (0, 0), (0, 0)))
        kernel = kernel.reshape(rows, rate, inputs, outputs)[::-1].swapaxes(1, 2)
        kernel = kernel.reshape(rows, inputs, rate * outputs)
        behind = rows - 1 - ahead
        bias = jnp.tile(self.bias[...], rate)
        y = conv(x, kernel, bias, padding=((behind, ahead),), policy=self.policy)
        return y.reshape(y.shape[0], -1, outputs)


class SnakeConv(Conv):
    """The activation x + sin²(αx)/α (arXiv 2006.08195), then a convolution."""

    def __init__(
        self, channels: int, *, kernel: int, dilation: int, policy: Policy, rngs: nnx.Rngs
    ):
        super().__init__(
            channels, channels, kernel=kernel, dilation=dilation, policy=policy, rngs=rngs
        )
        self.alpha = param(rngs, (channels,), (None,), dtype=policy.param, constant=1.0)

    def __call__(self, x: Float[Array, "B T C"], mask: RowMask | None) -> Float[Array, "B T C"]:
        """Activate, mask what lies beyond a row's end, convolve."""
        alpha = self.alpha[...].astype(x.dtype)
        y = x + sine_squared(x * alpha) / (alpha + 1e-9)
        return super().__call__(apply_mask(y, mask))


class ResBlock(nnx.Module):
    """Pairs of convolutions, each pair added to its input."""

    def __init__(
        self,
        channels: int,
        *,
        kernel: int,
        dilations: tuple[int, ...],
        policy: Policy,
        rngs: nnx.Rngs,
    ):
        self.pairs = len(dilations)
        for i, dilation in enumerate(dilations):
            for name, spacing in (("first", dilation), ("second", 1)):
                layer = SnakeConv(
                    channels, kernel=kernel, dilation=spacing, policy=policy, rngs=rngs
                )
                setattr(self, f"{name}{i}", layer)

    def __call__(self, x: Float[Array, "B T C"], mask: RowMask | None) -> Float[Array, "B T C"]:
        """Add each pair. Dilations differ, so layers are neither scanned nor stacked."""
        for i in range(self.pairs):
            x = x + getattr(self, f"second{i}")(getattr(self, f"first{i}")(x, mask), mask)
        return x


class Stage(nnx.Module):
    """Upsample, add the source at this rate, average parallel residual blocks."""

    def __init__(self, cfg: VocoderConfig, index: int, *, policy: Policy, rngs: nnx.Rngs):
        self.slope, self.last = cfg.slope, index == len(cfg.rates) - 1
        self.blocks = len(cfg.block_kernels)
        channels, bins = cfg.channels >> (index + 1), cfg.n_fft + 2
        how = {"policy": policy, "rngs": rngs}
        self.up = Upsample(
            2 * channels, channels, kernel=cfg.kernels[index], rate=cfg.rates[index], **how
        )
        step = math.prod(cfg.rates[index + 1 :])  # source frames per frame of this stage
        taps, padding = (1, 0) if step == 1 else (2 * step, step // 2)
        self.down = Conv(bins, channels, kernel=taps, stride=step, padding=padding, **how)
        kernel, dilations = cfg.source_kernels[index], cfg.source_dilations[index]
        self.source = ResBlock(channels, kernel=kernel, dilations=dilations, **how)
        for i, kernel in enumerate(cfg.block_kernels):
            block = ResBlock(channels, kernel=kernel, dilations=cfg.block_dilations[i], **how)
            setattr(self, f"block{i}", block)

    def __call__(
        self,
        x: Float[Array, "B T C"],
        spectrum: Float[Array, "B S F"],
        mask: RowMask | None,
        tap,
    ) -> Float[Array, "B U D"]:
        """Run the stage; `mask` is of the output's rate, `tap(name, array)` records."""
        x = tap("up", self.up(jax.nn.leaky_relu(x, self.slope)))
        if self.last:  # one more frame, so that the inverse transform has both of its ends
            x = jnp.concatenate([x[:, 1:2], x], axis=1)
        source = tap("source_down", self.down(spectrum))
        x = x + tap("source_resblock", self.source(source, mask))
        blocks = [getattr(self, f"block{i}")(x, mask) for i in range(self.blocks)]
        tap("resblock", blocks[0])
        return sum(blocks[1:], blocks[0]) / len(blocks)


class F0Predictor(nnx.Module):
    """Mel frames to their pitch."""

    def __init__(self, cfg: VocoderConfig, *, policy: Policy, rngs: nnx.Rngs):
        self.layers = cfg.f0_layers
        for i in range(cfg.f0_layers):
            inputs = cfg.f0_channels if i else cfg.mels
            layer = Conv(inputs, cfg.f0_channels, kernel=3, policy=policy, rngs=rngs)
            setattr(self, f"conv{i}", layer)
        self.out = Linear({"embed": cfg.f0_channels}, {"one": 1}, policy=policy, rngs=rngs)

    def __call__(self, mel: Float[Array, "B T M"], mask: RowMask | None) -> Float[Array, "B T"]:
        """Pitch in Hz; unvoiced frames are small."""
        x = apply_mask(mel, mask)
        for i in range(self.layers):
            x = apply_mask(jax.nn.elu(getattr(self, f"conv{i}")(x)), mask)
        return jnp.abs(self.out(x)[..., 0].astype(jnp.float32))


class HiFT(nnx.Module):
    """Mel frames to a waveform; a `Vocoder`."""

    def __init__(self, cfg: VocoderConfig, *, policy: Policy, rngs: nnx.Rngs):
        self.cfg, self.policy = cfg, policy
        self.f0_predictor = F0Predictor(cfg, policy=policy, rngs=rngs)
        self.merge = Linear({"harmonics": cfg.harmonics + 1}, {"one": 1}, policy=policy, rngs=rngs)
        self.pre = Conv(cfg.mels, cfg.channels, kernel=7, policy=policy, rngs=rngs)
        for i in range(len(cfg.rates)):
            setattr(self, f"stage{i}", Stage(cfg, i, policy=policy, rngs=rngs))
        channels = cfg.channels >> len(cfg.rates)
        self.post = Conv(channels, cfg.n_fft + 2, kernel=7, policy=policy, rngs=rngs)

    def __call__(
        self,
        mel: Float[Array, "B T M"],
        frames: Int[Array, "B"] | None = None,
        *,
        noise: Float[Array, "B N H"] | None = None,
        key: Key[Array, ""] | Key[Array, "B"] | None = None,
        cache_source: Float[Array, "B S"] | None = None,
        cached: Int[Array, "B"] | None = None,
        trace: dict[str, Array] | None = None,
    ) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
        """Synthesise.

        Args:
            mel: log-mel frames (50 Hz); rows may be padded on the right with anything.
            frames: mel frames of each row; by default all.
            noise: standard normal draws of the source, see `source`.
            key: random key, see `source`.
            cache_source: source samples that replace the first ones, so that a chunk goes on where
                the one before stopped.
            cached: how many of them count in each row; by default all.
            trace: filled with intermediate results by name, to compare implementations.

        Returns:
            Waveform in [-0.99, 0.99] and source, both at 24 kHz, N = 480·T, zero beyond each
            row's 480·frames samples.
        """
        with jax.named_scope("f0"):
            f0 = self.f0(mel, frames)
            tap(trace, "f0", f0)
        with jax.named_scope("source"):
            source = self.source(f0, frames, noise=noise, key=key)
            if cache_source is not None:
                size = cache_source.shape[1]
                count = jnp.full((mel.shape[0],), size) if cached is None else cached
                head = jnp.where(length_mask(count, size), cache_source, source[:, :size])
                source = jnp.concatenate([head, source[:, size:]], axis=1)
            tap(trace, "source", source)
        return self.decode(mel, source, frames, trace=trace), source

    def start(
        self, rows: int = 1, key: Key[Array, ""] | Key[Array, "B"] | None = None
    ) -> HiFTState:
        """Streams that have not begun, see `vocoder_state`."""
        return vocoder_state(self.cfg, rows, key)

    def step(
        self,
        state: HiFTState,
        mel: Float[Array, "B T M"],
        frames: Int[Array, "B"] | None = None,
        *,
        last: bool | Bool[Array, "B"] = False,
        noise: Float[Array, "B N H"] | None = None,
        equal_gain: bool = False,
    ) -> tuple[HiFTState, Float[Array, "B N"], Int[Array, "B"]]:
        """Advance every stream by one chunk of mel frames, see `vocoder_step`."""
        return vocoder_step(
            self, self.cfg, state, mel, frames, last=last, noise=noise, equal_gain=equal_gain
        )

    def f0(
        self, mel: Float[Array, "B T M"], frames: Int[Array, "B"] | None = None
    ) -> Float[Array, "B T"]:
        """Pitch of each frame in Hz."""
        return self.f0_predictor(mel, mask_of(frames, mel.shape[1]))

    def phase_increment(self, f0: Float[Array, "B T"]) -> Float[Array, "B T H"]:
        """Phase increment per sample, in turns below 1, of the fundamental and each overtone."""
        harmonics = jnp.arange(1, self.cfg.harmonics + 2, dtype=jnp.float32)
        return f0[..., None] * harmonics / self.cfg.sample_rate % 1

    def harmonics(
        self, f0: Float[Array, "B T"], frames: Int[Array, "B"] | None = None
    ) -> Float[Array, "B N H"]:
        """Harmonics: a sine of amplitude 1 for the fundamental and each overtone.

        The phase runs straight from the middle of one frame to the middle of the next and stands
        still in the first and last half frame. It is counted in 2⁻³² of a turn: integers wrap as
        turns do, so it is exact however long the utterance; the official code adds up float32
        radians, whose error grows with length and pitch.
        """
        cfg, step = self.cfg, self.cfg.samples
        mask = mask_of(frames, f0.shape[1])
        turn = (self.phase_increment(f0) * 2.0**32).astype(jnp.uint32)
        if mask is not None:
            turn = jnp.where(mask, turn, 0)
        middle = jnp.cumsum(turn * jnp.uint32(step), axis=1)  # wraps
        start = jnp.concatenate([middle[:, :1], middle], axis=1)
        slope = jnp.pad(turn[:, 1:], ((0, 0), (1, 1), (0, 0)))  # [B, T+1, H]
        count = jnp.arange(step, dtype=jnp.uint32)[:, None]
        phase = start[:, :, None] + slope[:, :, None] * count + slope[:, :, None] // 2
        phase = phase.reshape(f0.shape[0], -1, cfg.harmonics + 1)[:, step // 2 : -step // 2]
        return sine_of_phase(phase)

    def source(
        self,
        f0: Float[Array, "B T"],
        frames: Int[Array, "B"] | None = None,
        *,
        noise: Float[Array, "B N H"] | None = None,
        key: Key[Array, ""] | Key[Array, "B"] | None = None,
    ) -> Float[Array, "B N"]:
        """Harmonics and noise for this pitch.

        Args:
            f0: pitch of each frame in Hz.
            frames: mel frames of each row; by default all.
            noise: standard normal draws per sample and harmonic; none are made then.
            key: one key, or one for each row, to draw from; by default key 0. A row's draws do not
                depend on the length of the batch.
        """
        cfg, step = self.cfg, self.cfg.samples
        samples = f0.shape[1] * step
        weight = self.merge.kernel[...][0].astype(jnp.float32)
        bias = self.merge.bias[...].astype(jnp.float32)  # type: ignore[union-attr]
        voiced = jnp.repeat(f0 > cfg.voiced_threshold, step, axis=1)
        level = jnp.where(voiced, cfg.noise_std, cfg.sine_amplitude / 3)
        if noise is None:
            # A weighted sum of independent draws is one draw of their joint size.
            keys = jax.random.key(0) if key is None else key
            keys = keys if keys.ndim else jax.random.split(keys, f0.shape[0])
            draw = jax.vmap(lambda k: jax.random.normal(k, (samples,)))(keys)
            hiss = draw * jnp.sqrt(jnp.sum(weight * weight))
        else:
            hiss = jnp.einsum("bnh,h->bn", noise, weight, precision="highest")
        tone = jnp.einsum("bnh,h->bn", self.harmonics(f0, frames), weight, precision="highest")
        source = jnp.tanh(jnp.where(voiced, cfg.sine_amplitude * tone, 0) + level * hiss + bias)
        return (
            source if frames is None else jnp.where(length_mask(frames * step, samples), source, 0)
        )

    def decode(
        self,
        mel: Float[Array, "B T M"],
        source: Float[Array, "B N"],
        frames: Int[Array, "B"] | None = None,
        *,
        trace: dict[str, Array] | None = None,
    ) -> Float[Array, "B N"]:
        """Mel and source to the waveform."""
        cfg, rate = self.cfg, 1
        with jax.named_scope("stft"):
            spectrum = tap(trace, "stft", stft(source, cfg, frames))
        with jax.named_scope("pre"):
            mask = mask_of(frames, mel.shape[1])
            x = apply_mask(tap(trace, "conv_pre", self.pre(apply_mask(mel, mask))), mask)
        for i, factor in enumerate(cfg.rates):
            rate *= factor
            last = i == len(cfg.rates) - 1

            def tap_here(name, x, i=i):
                return tap(trace, f"{name}{i}", x)

            if frames is not None:
                mask = mask_of(frames * rate + last, mel.shape[1] * rate + last)
            with jax.named_scope(f"stage{i}"):
                x = getattr(self, f"stage{i}")(x, spectrum, mask, tap_here)
                x = apply_mask(x, mask)
        with jax.named_scope("post"):
            x = jax.nn.leaky_relu(x, LAST_SLOPE)
            x = tap(trace, "conv_post", self.post(x)).astype(jnp.float32)
        with jax.named_scope("istft"):
            bins = cfg.n_fft // 2 + 1
            # The inner limit changes no result: beyond it exp and so its gradient are infinite.
            magnitude = jnp.minimum(jnp.exp(jnp.minimum(x[..., :bins], 80)), MAX_MAGNITUDE)
            phase = jnp.sin(x[..., bins:])
            parts = [magnitude * jnp.cos(phase), magnitude * jnp.sin(phase)]
            speech = istft(jnp.concatenate(parts, axis=-1), cfg, frames)
        return jnp.clip(speech, -cfg.limit, cfg.limit)

"""The CAM++ speaker encoder: filterbank energies (100 Hz) to a speaker vector (x-vector).

Source: CAM++ (arXiv 2303.00332) and the released `campplus.onnx`. A head of two-dimensional
convolutions, blocks of densely connected layers over time, each masked by its context (the mean of
the clip plus the mean of its second), then mean and deviation over time. Batch norms that follow a
convolution are folded into it; those that come before one cannot be and stay. Clips of a batch do
not feel each other or their padding.

Each densely connected layer reads more channels than the one before. Their weights are padded to
the widest of a block and stacked, so that a block is one scan: 52 layers written out take half a
minute to compile, for a fifth less arithmetic.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sa2jax.models.convolution import Conv, conv
from sa2jax.nn import (
    Functional,
    Linear,
    Policy,
    length_mask,
    over_layers,
    param,
    stack,
    structure_of,
    tap,
)
from sa2jax.sharding import shard
from sa2jax.speech_config import SpeakerEncoderConfig

NORM_EPS = 1e-5
STRIDE = 2  # of the first convolution over time, and of each stage of the head over the bands


class BatchNorm(nnx.Module):
    """Batch norm with the statistics of training, in float32."""

    def __init__(self, size: int, *, affine: bool = True, policy: Policy, rngs: nnx.Rngs):
        def make(value):
            return param(rngs, (size,), (None,), dtype=policy.param, constant=value)

        self.mean, self.variance = make(0.0), make(1.0)
        self.scale, self.bias = (make(1.0), make(0.0)) if affine else (None, None)

    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        """Normalise each channel."""
        factor = jax.lax.rsqrt(self.variance[...].astype(jnp.float32) + NORM_EPS)
        if self.scale is not None:
            factor = factor * self.scale[...].astype(jnp.float32)
        y = (x.astype(jnp.float32) - self.mean[...].astype(jnp.float32)) * factor
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class ResidualBlock(nnx.Module):
    """Two convolutions over time and bands; the first of a stage halves the bands."""

    def __init__(self, size: int, *, halve: bool, policy: Policy, rngs: nnx.Rngs):
        stride = (1, STRIDE) if halve else (1, 1)
        make = {"policy": policy, "rngs": rngs}
        self.conv1 = Conv(size, size, kernel=(3, 3), stride=stride, **make)
        self.conv2 = Conv(size, size, kernel=(3, 3), **make)
        self.shortcut = Conv(size, size, kernel=(1, 1), stride=stride, **make) if halve else None

    def __call__(
        self, x: Float[Array, "B T M C"], valid: Bool[Array, "B T"]
    ) -> Float[Array, "B T M C"]:
        """Add the convolved input to the input."""
        y = self.conv2(_masked_relu(self.conv1(x), valid))
        return _masked_relu(y + (x if self.shortcut is None else self.shortcut(x)), valid)


class DenseLayer(nnx.Module):
    """One densely connected layer: `growth` new channels from all channels before it.

    Args:
        inputs: channels that the last layer of the block reads; earlier layers read fewer.
        dilation: spacing of the taps over time.
        cfg: sizes.
        policy: dtypes.
        rngs: source of randomness.
    """

    def __init__(
        self,
        inputs: int,
        dilation: int,
        cfg: SpeakerEncoderConfig,
        *,
        policy: Policy,
        rngs: nnx.Rngs,
    ):
        make = {"policy": policy, "rngs": rngs}
        narrow, mask, new = {"bottleneck": cfg.bottleneck}, {"mask": cfg.mask}, {"new": cfg.growth}
        self.segment = cfg.segment
        self.norm = BatchNorm(inputs, **make)
        self.squeeze = Linear({"channels": inputs}, narrow, **make)
        self.local = Conv(
            cfg.bottleneck, cfg.growth, kernel=(cfg.taps,), dilation=dilation, bias=False, **make
        )
        self.context = Linear(narrow, mask, **make)
        self.mask = Linear(mask, new, **make)

    def __call__(
        self, x: Float[Array, "B T C"], valid: Bool[Array, "B T"], channels: Int[Array, ""]
    ) -> Float[Array, "B T G"]:
        """New channels, gated by the context of clip and segment (context-aware mask).

        Args:
            x: all channels of the block, of which the first `channels` are there already.
            valid: which frames are a clip's own.
            channels: how many this layer reads.
        """
        total = x.shape[1]
        x = jnp.where(jnp.arange(x.shape[2]) < channels, jax.nn.relu(self.norm(x)), 0)
        x = _masked_relu(self.squeeze(x), valid)
        with jax.named_scope("context"):
            # All frames of a segment share one context: the mask is computed once per segment.
            parts = self._segments(x).sum(2)  # [B, S, C]
            sizes = self._segments(valid[..., None]).sum(2)  # [B, S, 1]
            clip = parts.sum(1, keepdims=True) / jnp.maximum(sizes.sum(1, keepdims=True), 1)
            context = clip + parts / jnp.maximum(sizes, 1)
            mask = jax.nn.sigmoid(self.mask(jax.nn.relu(self.context(context))))
        return self.local(x) * jnp.repeat(mask, self.segment, axis=1)[:, :total]

    def _segments(self, x: Array) -> Array:
        count = -(-x.shape[1] // self.segment)
        x = jnp.pad(x, ((0, 0), (0, count * self.segment - x.shape[1]), (0, 0)))
        return x.reshape(x.shape[0], count, self.segment, x.shape[2])


class DenseBlock(nnx.Module):
    """Densely connected layers, then a map to half as many channels."""

    def __init__(
        self, inputs: int, number: int, cfg: SpeakerEncoderConfig, *, policy: Policy, rngs: nnx.Rngs
    ):
        make = {"policy": policy, "rngs": rngs}
        layers, dilation = cfg.layers[number], cfg.dilations[number]
        self.inputs, self.growth = inputs, cfg.growth
        self.outputs = inputs + layers * cfg.growth
        widest = self.outputs - cfg.growth
        self.layers = stack(
            lambda rngs: DenseLayer(widest, dilation, cfg, policy=policy, rngs=rngs), layers, rngs
        )
        self.norm = BatchNorm(self.outputs, **make)
        last = number == len(cfg.layers) - 1  # followed by a norm, folded into weights and bias
        half = {"half": self.outputs // 2}
        self.linear = Linear({"channels": self.outputs}, half, bias=last, **make)

    def __call__(
        self, x: Float[Array, "B T C"], valid: Bool[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Grow the channels layer by layer, then halve them."""
        x = jnp.pad(x, ((0, 0), (0, 0), (0, self.outputs - self.inputs)))

        def layer(x, layer_and_index):
            module, index = layer_and_index
            channels = self.inputs + index * self.growth
            new = module(x[..., : -self.growth], valid, channels)
            x = jax.lax.dynamic_update_slice_in_dim(x, new, channels, axis=2)
            return shard(x, "batch", None, None), None

        with jax.named_scope("layers"):
            x, _ = over_layers(layer, x, self.layers)
        with jax.named_scope("transit"):
            return self.linear(jax.nn.relu(self.norm(x)))


class SpeakerEncoder(nnx.Module):
    """Filterbank energies to speaker vectors."""

    def __init__(self, cfg: SpeakerEncoderConfig, *, policy: Policy, rngs: nnx.Rngs):
        self.cfg, self.policy = cfg, policy
        make = {"policy": policy, "rngs": rngs}
        size = cfg.head
        self.conv_in = Conv(1, size, kernel=(3, 3), **make)
        self.stages = nnx.Dict(
            {
                f"stage{s}": nnx.Dict(
                    {f"block{b}": ResidualBlock(size, halve=b == 0, **make) for b in range(blocks)}
                )
                for s, blocks in enumerate(cfg.stages, 1)
            }
        )
        self.conv_out = Conv(size, size, kernel=(3, 3), stride=(1, STRIDE), **make)
        # Over time, and over all bands that are left at once.
        bands, size = cfg.mels // cfg.shrink, cfg.channels
        scale = (cfg.kernel * bands * cfg.head) ** -0.5
        shape = (cfg.kernel, bands, cfg.head, size)
        self.tdnn = param(rngs, shape, (None,) * 4, dtype=policy.param, scale=scale)
        self.tdnn_bias = param(rngs, (size,), (None,), dtype=policy.param, scale=0.02)
        blocks = {}
        for b, layers in enumerate(cfg.layers):
            blocks[f"block{b + 1}"] = DenseBlock(size, b, cfg, **make)
            size = (size + layers * cfg.growth) // 2
        self.blocks = nnx.Dict(blocks)
        embed = {"embed": cfg.embed}
        self.project = Linear({"statistics": 2 * size}, embed, bias=False, **make)
        self.norm = BatchNorm(cfg.embed, affine=False, **make)

    def __call__(
        self,
        fbank: Float[Array, "B T M"],
        frames: Int[Array, "B"],
        *,
        trace: dict[str, Array] | None = None,
    ) -> Float[Array, "B D"]:
        """Speaker vectors of right-padded clips, not normalised to unit length.

        Args:
            fbank: energies (100 Hz) minus their mean over the clip, of
                `audio.features.fbank(..., subtract_mean=True)`.
            frames: frames of each clip; what lies beyond is ignored. One of three frames or less
                has no deviation over time: zero is used.
            trace: filled with intermediate results by name, to compare implementations.
        """
        valid = length_mask(frames, fbank.shape[1])
        x = _apply_mask(fbank.astype(self.policy.compute)[..., None], valid)  # [B, T, M, 1]
        with jax.named_scope("head"):
            x = _masked_relu(self.conv_in(x), valid)
            for s, blocks in enumerate(self.cfg.stages, 1):
                for b in range(blocks):
                    x = self.stages[f"stage{s}"][f"block{b}"](x, valid)
            x = tap(trace, "head", _masked_relu(self.conv_out(x), valid))  # [B, T, M/8, C]
        with jax.named_scope("tdnn"):
            frames = (frames - 1) // STRIDE + 1
            x = self._over_time(x)
            valid = length_mask(frames, x.shape[1])
            x = tap(trace, "tdnn", _masked_relu(x, valid))
        for b in range(1, len(self.cfg.layers) + 1):
            with jax.named_scope(f"block{b}"):
                x = tap(trace, f"block{b}", self.blocks[f"block{b}"](x, valid))
        with jax.named_scope("pool"):
            x = _masked_relu(x, valid).astype(jnp.float32)
            count = jnp.maximum(frames, 1)[:, None]
            mean = x.sum(1) / count
            spread = _apply_mask(x - mean[:, None], valid)
            deviation = jnp.sqrt((spread * spread).sum(1) / jnp.maximum(count - 1, 1))
            x = tap(trace, "pool", jnp.concatenate([mean, deviation], axis=-1))
        return self.norm(self.project(x.astype(self.policy.compute)))

    def _over_time(self, x: Float[Array, "B T M C"]) -> Float[Array, "B S D"]:
        kernel = self.tdnn[...]
        taps, bands, channels, size = kernel.shape
        return conv(
            x.reshape(*x.shape[:2], bands * channels),
            kernel.reshape(taps, bands * channels, size),
            self.tdnn_bias[...],
            stride=(STRIDE,),
            padding=((taps // 2, taps // 2),),
            policy=self.policy,
        )


def speaker_encoder(
    cfg: SpeakerEncoderConfig, policy: Policy | None = None
) -> Functional[SpeakerEncoder]:
    """The structure of a config's speaker encoder, see `nn.structure_of`."""
    return structure_of(SpeakerEncoder, cfg, policy)


def _apply_mask(x: Float[Array, "B T *C"], valid: Bool[Array, "B T"]) -> Float[Array, "B T *C"]:
    return jnp.where(valid.reshape(*valid.shape, *(1,) * (x.ndim - 2)), x, 0)


def _masked_relu(x: Float[Array, "B T *C"], valid: Bool[Array, "B T"]) -> Float[Array, "B T *C"]:
    """Rectify, then mask what lies beyond a clip, so that no convolution sees it."""
    return _apply_mask(jax.nn.relu(x), valid)

"""Audio encoder (100 Hz mel → 25 Hz) and adapter (25 Hz → 12.5 Hz).

Source: Step-Audio 2 technical report (arXiv 2507.16632), section 2; a Whisper-style encoder with
an average pool before its last norm. In the released code a clip's result depends on the padding
of its batch: the key mask follows the parity of the padded length, and convolutions look past the
end of a shorter clip. Here each clip is computed as if it were alone; `official_batch=True`
reproduces the released behaviour.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sa2jax.attention.base import Mask
from sa2jax.attention.dispatch import attention
from sa2jax.config import AdapterConfig, AudioEncoderConfig
from sa2jax.models.convolution import Conv
from sa2jax.models.whisper import AttentionProjections
from sa2jax.nn import LayerNorm, Linear, Policy, Remat, over_layers, param, stack, tap
from sa2jax.sharding import shard

MEL_TAIL = 2  # frames at the end of each clip that the released code does not count as its length
ALIGN, GAP = 8, 4  # packed clips begin at a frame of the adapter's, after zeros for convolutions


def encoder_length(mel_frames):
    """Valid encoder frames (25 Hz) of a clip with this many mel frames (100 Hz)."""
    return (mel_frames - MEL_TAIL + 1) // 2 // 2


def adapter_length(encoder_frames, config: AdapterConfig):
    """Decoder positions (12.5 Hz) that this many encoder frames fill."""
    padding = config.kernel // 2
    return (encoder_frames + 2 * padding - config.kernel) // config.stride + 1


class SelfAttention(AttentionProjections):
    """Multi-head attention over audio frames; the key projection has no bias."""

    def __init__(self, cfg: AudioEncoderConfig, *, policy: Policy, rngs: nnx.Rngs):
        super().__init__(cfg.embed, cfg.heads, cfg.head_dim, policy=policy, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], mask: Mask) -> Float[Array, "B T D"]:
        """Attend where the mask allows."""
        return self.o(attention(self.q(x), self.k(x), self.v(x), mask))


class Mlp(nnx.Module):
    """Two layers with an exact (erf) gelu between."""

    def __init__(self, cfg: AudioEncoderConfig, *, policy: Policy, rngs: nnx.Rngs):
        embed, wide = {"embed": cfg.embed}, {"mlp": cfg.mlp_ratio * cfg.embed}
        self.up = Linear(embed, wide, policy=policy, rngs=rngs)
        self.down = Linear(wide, embed, policy=policy, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply to each frame."""
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


class EncoderLayer(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(self, cfg: AudioEncoderConfig, *, policy: Policy, rngs: nnx.Rngs):
        self.attn_norm = LayerNorm(cfg.embed, policy=policy, rngs=rngs)
        self.attn = SelfAttention(cfg, policy=policy, rngs=rngs)
        self.mlp_norm = LayerNorm(cfg.embed, policy=policy, rngs=rngs)
        self.mlp = Mlp(cfg, policy=policy, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], mask: Mask) -> Float[Array, "B T D"]:
        """Add attention, then the MLP."""
        x = x + self.attn(self.attn_norm(x), mask)
        return x + self.mlp(self.mlp_norm(x))


class AudioEncoder(nnx.Module):
    """Log-mel frames to 25 Hz features."""

    def __init__(self, cfg: AudioEncoderConfig, *, policy: Policy, rngs: nnx.Rngs):
        self.policy = policy
        conv = {"kernel": 3, "policy": policy, "rngs": rngs}
        self.conv1 = Conv(cfg.mels, cfg.embed, **conv)
        self.conv2 = Conv(cfg.embed, cfg.embed, stride=2, **conv)
        self.positions = param(
            rngs, (cfg.max_positions, cfg.embed), (None, None), dtype=policy.param, scale=0.02
        )

        def make(rngs):
            return EncoderLayer(cfg, policy=policy, rngs=rngs)

        self.layers = stack(make, cfg.layers, rngs)
        self.norm = LayerNorm(cfg.embed, policy=policy, rngs=rngs)

    def __call__(
        self,
        mels: Float[Array, "B M T"],
        frames: Int[Array, "B"] | Int[Array, "B N"],
        starts: Int[Array, "B N"] | None = None,
        *,
        official_batch: bool = False,
        remat: Remat | None = None,
        trace: dict[str, Array] | None = None,
    ) -> Float[Array, "B S D"]:
        """Encode a right-padded batch of clips.

        Args:
            mels: log-mel frames (100 Hz), zero beyond each clip's own frames.
            frames: mel frames of each clip, 0 for an empty row.
            starts: where each of a row's N packed clips begins: at a multiple of `ALIGN` frames,
                with `GAP` empty ones or more after the clip before. Each is heard as if alone.
            official_batch: let clips feel the batch's padding as the released code does.
            remat: what a gradient computes again, see `nn.over_layers`.
            trace: filled with intermediate results by name, to compare implementations.

        Returns:
            Features at 25 Hz, `S = ((T + 1) // 2) // 2`; each clip's first
            `encoder_length(frames)` are its own, one more may be read by the adapter.
        """
        x = mels.swapaxes(1, 2).astype(self.policy.compute)  # [B, T, M]
        total = x.shape[1]
        clips = _clips(frames, starts, total)
        with jax.named_scope("conv"):
            x = tap(trace, "conv1", self.conv1(x))
            x = jax.nn.gelu(x, approximate=False)
            if not official_batch:  # a clip alone sees the convolution's zeros after its last frame
                x = jnp.where(clips.own[..., None], x, 0)
            x = tap(trace, "conv2", self.conv2(x))
            x = jax.nn.gelu(x, approximate=False)
            steps = x.shape[1]
            table = self.positions[...].astype(x.dtype)
            x = x + (table[:steps] if starts is None else table[clips.offset[:, ::2] // 2])

        # The released mask picks every second mel position, from the parity of the padded length.
        length = clips.length[:, ::2]
        first = (total + 1) % 2 if official_batch else (length + 1) % 2
        keys = first + clips.offset[:, ::2] < length - MEL_TAIL  # [B, S]
        mask = Mask(keys=keys, segments=None if starts is None else clips.number[:, ::2])

        def layer(x, layer_and_index):
            module, _ = layer_and_index
            x = shard(module(x, mask), "batch", None, None)
            return x, x if trace is not None else None

        with jax.named_scope("layers"):
            x, outputs = over_layers(layer, x, self.layers, remat)
        tap(trace, "layers", outputs)
        with jax.named_scope("pool"):
            x = x[:, : steps // 2 * 2].reshape(x.shape[0], steps // 2, 2, -1).mean(2)  # [B, S, D]
            x = self.norm(x)
        if not official_batch:
            own = clips.own[:, ::2][:, : steps // 2 * 2].reshape(x.shape[0], -1, 2).all(-1)
            x = jnp.where(own[..., None], x, 0)
        return x


class Adapter(nnx.Module):
    """Encoder features (25 Hz) to decoder embeddings (12.5 Hz)."""

    def __init__(
        self, cfg: AdapterConfig, encoder: int, decoder: int, *, policy: Policy, rngs: nnx.Rngs
    ):
        self.conv = Conv(
            encoder,
            encoder,
            kernel=cfg.kernel,
            stride=cfg.stride,
            padding=cfg.kernel // 2,
            policy=policy,
            rngs=rngs,
        )
        wide = {"mlp": cfg.hidden}
        self.up = Linear({"embed": encoder}, wide, policy=policy, rngs=rngs)
        self.down = Linear(wide, {"embed": decoder}, policy=policy, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B S D"], *, trace: dict[str, Array] | None = None
    ) -> Float[Array, "B T E"]:
        """Halve the rate and map to the decoder's width."""
        x = tap(trace, "adapter_conv", self.conv(x))
        x = jax.nn.gelu(x, approximate=False)
        return self.down(jax.nn.relu(self.up(x)))


class _Clips(NamedTuple):
    """What each mel frame belongs to: one of its row's clips, or nothing.

    Attributes:
        own: whether it belongs to a clip.
        number: of that clip in its row, from 1; 0 for none.
        offset: frames since the clip's start.
        length: the clip's frames, 0 for none.
    """

    own: Bool[Array, "B T"]
    number: Int[Array, "B T"]
    offset: Int[Array, "B T"]
    length: Int[Array, "B T"]


def _clips(frames: Array, starts: Array | None, total: int) -> _Clips:
    place = jnp.arange(total)[None]
    if starts is None:  # one clip a row: what lies behind it is the clip's, but for `own`
        length = jnp.broadcast_to(frames[:, None], (len(frames), total))
        own = place < length
        return _Clips(own, own.astype(jnp.int32), jnp.broadcast_to(place, own.shape), length)
    offset = place[..., None] - starts[:, None]  # [B, T, N]
    inside = (offset >= 0) & (offset < frames[:, None])

    def pick(x):
        return jnp.sum(jnp.where(inside, x, 0), axis=-1)

    number = pick(1 + jnp.arange(starts.shape[1]))
    return _Clips(inside.any(-1), number, pick(offset), pick(frames[:, None]))

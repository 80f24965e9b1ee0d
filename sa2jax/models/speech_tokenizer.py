"""The S3 speech tokenizer, version 2: log-mel frames (100 Hz) to codes (25 Hz).

Source: CosyVoice 2 (arXiv 2412.10117), section 2.2, and the official `s3tokenizer.model_v2`. Two
strided convolutions, transformer layers whose attention is joined by an FSMN memory (a convolution
over the values), then finite scalar quantization: eight numbers, each rounded to −1, 0 or 1, are
the base-3 digits of a code.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sa2jax.attention.base import Mask
from sa2jax.attention.dispatch import attention
from sa2jax.models.convolution import Conv
from sa2jax.models.whisper import AttentionProjections
from sa2jax.nn import (
    Functional,
    LayerNorm,
    Linear,
    Params,
    Policy,
    length_mask,
    make_layers,
    over_layers,
    param,
    rotary,
    structure_of,
    tap,
    unstack,
)
from sa2jax.sharding import shard
from sa2jax.speech_config import SpeechTokenizerConfig

ROPE_THETA = 10_000.0
LEVELS = 3  # of one digit
FSQ_SCALE = 0.9990000128746033  # keeps tanh off the rounding borders of a wider range

WINDOW = 3000  # frames that are analysed at once: 30 s
STRIDE = 2600  # frames from one window to the next: 26 s
OVERLAP_EDGE = 50  # codes dropped where two windows overlap: half of the 4 s they share


def code_length(frames):
    """Codes (25 Hz) of a clip with this many mel frames (100 Hz); int or array."""
    return (frames + 3) // 4


class FsmnAttention(AttentionProjections):
    """Rotary attention plus a memory: a depthwise convolution over the values."""

    def __init__(self, cfg: SpeechTokenizerConfig, *, policy: Policy, rngs: nnx.Rngs):
        super().__init__(cfg.embed, cfg.heads, cfg.head_dim, policy=policy, rngs=rngs)
        shape, scale = (cfg.memory, 1, cfg.embed), cfg.memory**-0.5
        self.memory = param(rngs, shape, (None, None, None), dtype=policy.param, scale=scale)

    def __call__(
        self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Attention plus FSMN memory over a clip's valid frames."""
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), valid.shape)
        q = rotary(self.q(x), positions, ROPE_THETA)
        k = rotary(self.k(x), positions, ROPE_THETA)
        v = self.v(x)
        return self.o(attention(q, k, v, Mask(keys=valid))) + self._fsmn_memory(
            v.reshape(x.shape), valid
        )

    def _fsmn_memory(
        self, v: Float[Array, "B T D"], valid: Bool[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        v = jnp.where(valid[..., None], v, 0)
        kernel = self.memory[...].astype(v.dtype)
        taps = kernel.shape[0]
        padded = jnp.pad(v, ((0, 0), ((taps - 1) // 2, taps // 2), (0, 0)))
        # One multiply-add per tap: XLA fuses them into one pass, faster than a grouped convolution.
        shifted = (padded[:, i : i + v.shape[1]] * kernel[i] for i in range(taps))
        return jnp.where(valid[..., None], sum(shifted) + v, 0)


class Layer(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(self, cfg: SpeechTokenizerConfig, *, policy: Policy, rngs: nnx.Rngs):
        embed, wide = {"embed": cfg.embed}, {"mlp": cfg.mlp}
        self.attn_norm = LayerNorm(cfg.embed, policy=policy, rngs=rngs)
        self.attn = FsmnAttention(cfg, policy=policy, rngs=rngs)
        self.mlp_norm = LayerNorm(cfg.embed, policy=policy, rngs=rngs)
        self.up = Linear(embed, wide, policy=policy, rngs=rngs)
        self.down = Linear(wide, embed, policy=policy, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Add attention, then the MLP (exact gelu)."""
        x = x + self.attn(self.attn_norm(x), valid)
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x)), approximate=False))


class SpeechTokenizer(nnx.Module):
    """Log-mel frames to codes; one window of at most 30 s, see `tokenize` for longer clips.

    With `stacked=False` layers are a list in a loop instead of one scan, see `nn.unstack`.
    """

    def __init__(
        self,
        cfg: SpeechTokenizerConfig,
        *,
        policy: Policy,
        rngs: nnx.Rngs,
        stacked: bool = True,
    ):
        self.policy = policy
        conv = {"kernel": 3, "stride": 2, "policy": policy, "rngs": rngs}
        self.conv1 = Conv(cfg.mels, cfg.embed, **conv)
        self.conv2 = Conv(cfg.embed, cfg.embed, **conv)

        def make(rngs):
            return Layer(cfg, policy=policy, rngs=rngs)

        self.layers = make_layers(make, cfg.layers, rngs, stacked=stacked)
        self.digits = Linear({"embed": cfg.embed}, {"digits": cfg.digits}, policy=policy, rngs=rngs)

    def encode(
        self,
        mels: Float[Array, "B M T"],
        frames: Int[Array, "B"],
        *,
        trace: dict[str, Array] | None = None,
    ) -> Float[Array, "B S D"]:
        """Hidden states (25 Hz) of right-padded clips; each is as if its clip were alone.

        Args:
            mels: log-mel frames (100 Hz) of `audio.features.s3_log_mel`.
            frames: mel frames of each clip; what lies beyond is ignored.
            trace: filled with intermediate results by name, to compare implementations.

        Returns:
            `S = code_length(T)` frames, of which each clip's first `code_length(frames)` count.
        """
        x = mels.swapaxes(1, 2).astype(self.policy.compute)  # [B, T, M]
        for name, conv in (("conv1", self.conv1), ("conv2", self.conv2)):
            with jax.named_scope(name):
                x = jnp.where(length_mask(frames, x.shape[1])[..., None], x, 0)
                x = tap(trace, name, conv(x))
                x = jax.nn.gelu(x, approximate=False)
                frames = (frames + 1) // 2
        valid = length_mask(frames, x.shape[1])

        def layer(x, layer_and_index):
            module, _ = layer_and_index
            x = shard(module(x, valid), "batch", None, None)
            return x, x if trace is not None else None

        with jax.named_scope("layers"):
            x, outputs = over_layers(layer, x, self.layers)
        tap(trace, "layers", outputs)
        return tap(trace, "hidden", x)

    def __call__(
        self,
        mels: Float[Array, "B M T"],
        frames: Int[Array, "B"],
        *,
        trace: dict[str, Array] | None = None,
    ) -> Int[Array, "B S"]:
        """Codes (25 Hz) of right-padded clips of at most `WINDOW` frames.

        Args:
            mels: log-mel frames (100 Hz) of `audio.features.s3_log_mel`.
            frames: mel frames of each clip.
            trace: filled with intermediate results by name.

        Returns:
            `S = code_length(T)` codes in 0..codebook−1; those beyond `code_length(frames)` are 0.
        """
        x = self.encode(mels, frames, trace=trace)
        with jax.named_scope("quantize"):
            x = jnp.tanh(self.digits(x).astype(jnp.float32)) * FSQ_SCALE
            digits = jnp.round(tap(trace, "pre_round", x)).astype(jnp.int32) + LEVELS // 2
            codes = digits @ (LEVELS ** jnp.arange(x.shape[-1], dtype=jnp.int32))
        return jnp.where(length_mask(code_length(frames), codes.shape[1]), codes, 0)


def tokenize(
    model: SpeechTokenizer,
    mels: Float[Array, "B M T"],
    frames: Int[Array, "B"],
    *,
    official_windows: bool = False,
) -> tuple[Int[Array, "B S"], Int[Array, "B"]]:
    """Codes of right-padded clips of any length.

    A clip of more than 30 s is analysed in windows of 30 s every 26 s, one after the other, so that
    memory does not grow with its length; of the 4 s that two windows share, each gives the half
    that is nearer to its middle. The released code also opens a window that lies wholly inside the
    one before, and then loses up to 2 s at the end: not done here.

    Args:
        model: the tokenizer, bound to its parameters; meant to be called inside `jax.jit`.
        mels: log-mel frames (100 Hz) of `audio.features.s3_log_mel`, over the whole clip.
        frames: mel frames of each clip.
        official_windows: open the windows that the released code opens.

    Returns:
        Codes, `S = code_length(T)`, zero beyond each clip's own, and how many each clip has.
    """
    total = mels.shape[2]
    if total <= WINDOW:
        return model(mels, frames), code_length(frames)
    shared = 0 if official_windows else WINDOW - STRIDE
    count = -(-(total - shared) // STRIDE)
    mels = jnp.pad(mels, ((0, 0), (0, 0), (0, (count - 1) * STRIDE + WINDOW - total)))
    windows = jnp.where(frames > WINDOW, -(-(frames - shared) // STRIDE), 1)  # [B]

    def window(index):
        here = jnp.where(index < windows, frames - index * STRIDE, 0).clip(0, WINDOW)
        part = jax.lax.dynamic_slice_in_dim(mels, index * STRIDE, WINDOW, axis=2)
        return model(part, here), code_length(here)

    index = jnp.arange(count)
    codes, lengths = jax.lax.map(window, index)  # [W, B, S], [W, B]
    first = jnp.where(index == 0, 0, OVERLAP_EDGE)[:, None]
    last = jnp.where(index[:, None] < windows - 1, lengths - OVERLAP_EDGE, lengths)
    kept = jnp.maximum(last - first, 0)  # [W, B]
    start = jnp.cumsum(kept, axis=0) - kept
    place = jnp.arange(codes.shape[2])
    keep = (place >= first[..., None]) & (place < last[..., None])  # [W, B, S]
    size = code_length(total)
    target = jnp.where(keep, start[..., None] + place - first[..., None], size)  # size: dropped
    rows = jnp.arange(mels.shape[0])[None, :, None]
    merged = jnp.zeros((mels.shape[0], size), codes.dtype).at[rows, target].set(codes, mode="drop")
    return merged, kept.sum(0)


def speech_tokenizer(
    cfg: SpeechTokenizerConfig, policy: Policy | None = None, *, stacked: bool = True
) -> Functional[SpeechTokenizer]:
    """The structure of a config's tokenizer, see `nn.structure_of`. Codes are exact in float32."""
    return structure_of(SpeechTokenizer, cfg, policy, stacked=stacked)


def unstack_speech_tokenizer(params: Params) -> Params:
    """The same parameters for `speech_tokenizer(..., stacked=False)`, faster on a CPU."""
    return params | {"layers": unstack(params["layers"])}

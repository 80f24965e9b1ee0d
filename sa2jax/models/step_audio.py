"""Step-Audio 2: an audio encoder and an adapter in front of a decoder.

A prompt is a row of token ids in which each clip holds a run of placeholder positions. Their
embeddings are replaced by the adapter's frames (12.5 Hz) where the prompt was built with a clip,
and only there: an `<audio_start>` that the model itself generates is a token like any other.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sa2jax.config import StepAudio2Config
from sa2jax.models.audio_encoder import Adapter, AudioEncoder, adapter_length, encoder_length
from sa2jax.models.decoder import Decoder, KVCache
from sa2jax.nn import Functional, Params, Policy, Remat, structure_of, unstack
from sa2jax.sharding import shard


class StepAudio2Model(nnx.Module):
    """The listening and thinking parts of Step-Audio 2."""

    def __init__(
        self, cfg: StepAudio2Config, *, policy: Policy, rngs: nnx.Rngs, stacked: bool = True
    ):
        self.cfg = cfg
        self.audio_encoder = AudioEncoder(cfg.audio_encoder, policy=policy, rngs=rngs)
        self.adapter = Adapter(
            cfg.adapter, cfg.audio_encoder.embed, cfg.decoder.embed, policy=policy, rngs=rngs
        )
        self.decoder = Decoder(cfg.decoder, policy=policy, rngs=rngs, stacked=stacked)

    def encode_audio(
        self,
        mels: Float[Array, "C M T"],
        frames: Int[Array, "C"] | Int[Array, "C N"],
        starts: Int[Array, "C N"] | None = None,
        *,
        official_batch: bool = False,
        remat: Remat | None = None,
        trace: dict[str, Array] | None = None,
    ) -> Float[Array, "C S D"]:
        """Turn clips into decoder embeddings (12.5 Hz).

        Args:
            mels: right-padded log-mel frames (100 Hz) of C clips, or C rows of packed clips.
            frames: mel frames of each clip.
            starts: of packed clips, see `AudioEncoder`.
            official_batch: see `AudioEncoder`.
            remat: what a gradient computes again, see `nn.over_layers`.
            trace: filled with intermediate results by name.

        Returns:
            Embeddings; a clip's own are the first `feature_length(frames)` from an eighth of its
            start on.
        """
        with jax.named_scope("audio_encoder"):
            x = self.audio_encoder(
                mels, frames, starts, official_batch=official_batch, remat=remat, trace=trace
            )
        with jax.named_scope("adapter"):
            return self.adapter(x, trace=trace)

    def feature_length(self, mel_frames):
        """Decoder positions that a clip of this many mel frames fills."""
        return adapter_length(encoder_length(mel_frames), self.cfg.adapter)

    def embed(
        self,
        ids: Int[Array, "B T"],
        features: Float[Array, "C S D"] | None = None,
        feature_index: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Embed tokens, with audio features at the positions that hold them.

        Args:
            ids: token ids.
            features: what `encode_audio` returned for all clips of the batch.
            feature_index: for each position, which row of `features` (flattened over clips and
                frames) stands there, −1 for a token.
        """
        x = self.decoder.embed(ids)
        if features is None or feature_index is None:
            return x
        flat = features.reshape(-1, features.shape[-1]).astype(x.dtype)
        return jnp.where(
            feature_index[..., None] >= 0, shard(flat[feature_index], "batch", None, None), x
        )

    def __call__(
        self,
        ids: Int[Array, "B T"],
        features: Float[Array, "C S D"] | None = None,
        feature_index: Int[Array, "B T"] | None = None,
        kv_cache: KVCache | None = None,
        lengths: Int[Array, "B"] | None = None,
        *,
        cache_is_empty: bool = False,
        remat: Remat | None = None,
        trace: dict[str, Array] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Hidden states of a batch of right-padded prompts; see `embed` and `Decoder`."""
        x = self.embed(ids, features, feature_index)
        if trace is not None:
            trace["embed"] = x
        with jax.named_scope("decoder"):
            return self.decoder(
                x, kv_cache, lengths, cache_is_empty=cache_is_empty, remat=remat, trace=trace
            )


def step_audio2(
    cfg: StepAudio2Config, policy: Policy | None = None, *, stacked: bool = True
) -> Functional[StepAudio2Model]:
    """The structure of a config's model, see `nn.structure_of`; the decoder is what is stacked."""
    return structure_of(StepAudio2Model, cfg, policy, stacked=stacked)


def unstack_decoder(params: Params) -> Params:
    """The same parameters for `step_audio2(..., stacked=False)`."""
    decoder = params["decoder"]
    return params | {"decoder": decoder | {"layers": unstack(decoder["layers"])}}

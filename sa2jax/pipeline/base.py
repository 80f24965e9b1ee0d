"""A model's parts and what they do together: prompts to ids, and ids that continue them."""

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sa2jax import audio, checkpoint
from sa2jax.audio.recording import Heard
from sa2jax.chat import template
from sa2jax.chat.interleave import deinterleave
from sa2jax.chat.template import Audio, Piece
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.checkpoint import Progress
from sa2jax.config import StepAudio2Config
from sa2jax.errors import CheckpointError
from sa2jax.inference.engine import Generator
from sa2jax.inference.loading import policy_of
from sa2jax.inference.requests import Generation, Options, Request
from sa2jax.models.heads import spread_heads
from sa2jax.models.step_audio import step_audio2, unstack_decoder
from sa2jax.nn import Params, Policy
from sa2jax.runtime import scans_layers
from sa2jax.speech import Speech
from sa2jax.speech.token2wav import Token2Wav

Style = Literal["chat", "base"]


class Base:
    """A model with its tokenizer and its voices.

    Args:
        cfg: its config.
        params: its parameters, decoder layers stacked, as checkpoints have them.
        tokenizer: its tokenizer, or a function that reads it when it is first needed.
        speech: its detokenizer and voices, or a function that opens them when first needed.
        policy: its dtypes; by default those of the platform, see `loading.policy_of`.
        mesh: the device mesh the parameters are sharded over, heads spread as it needs them.
        style: `chat` for models with turns, `base` for the pre-trained model without.
        batch_size: prompts that are answered at once.
    """

    def __init__(
        self,
        cfg: StepAudio2Config,
        params: Params,
        tokenizer: Tokenizer | Callable[[], Tokenizer],
        *,
        speech: Speech | Callable[[], Speech] | None = None,
        policy: Policy | None = None,
        mesh: Mesh | None = None,
        style: Style = "chat",
        batch_size: int = 8,
    ):
        self.cfg, self.style, self.batch_size = cfg, style, batch_size
        self._tokenizer, self._speech, self._turns = tokenizer, speech, itertools.count()
        stacked = scans_layers(mesh)
        params = params if stacked else unstack_decoder(params)
        policy = policy_of(None) if policy is None else policy
        model = step_audio2(spread_heads(cfg, mesh), policy, stacked=stacked)
        self.generator = Generator(model, params, cfg, mesh=mesh)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            TokenizerError: if the folder has none, or one without Step-Audio 2's tokens.
        """
        found = self._tokenizer
        return found if isinstance(found, Tokenizer) else found()

    @cached_property
    def speech(self) -> Speech:
        """The checkpoint's detokenizer and its voices.

        Raises:
            CheckpointError: if it has none: it cannot speak.
        """
        if self._speech is None:
            raise CheckpointError("this model was made without a detokenizer: it cannot speak")
        return self._speech if isinstance(self._speech, Speech) else self._speech()

    @cached_property
    def replicas(self) -> list[Generator]:
        """Generators that work apart: one for each index of the mesh's data axis."""
        return self.generator.replicas()

    def next_replica(self) -> int:
        """The replica of the next conversation: each in turn."""
        return next(self._turns) % len(self.replicas)

    def token2wav(self, replica: int) -> Token2Wav:
        """What speaks where a replica thinks."""
        if len(self.replicas) == 1:
            return self.speech.token2wav
        voices = self.speech.replicas  # one, if it was opened without the mesh
        return voices[replica % len(voices)]

    @property
    def sample_rate(self) -> int:
        """Of what the model speaks, in Hz."""
        return self.speech.sample_rate

    @cached_property
    def fingerprint(self) -> str:
        """A hash that tells checkpoints apart: of the config and a few numbers of each matrix."""
        return fingerprint_of(self.cfg, self.generator.params)

    # --- prompts ---------------------------------------------------------------------------

    def request(self, pieces: Sequence[Piece]) -> Request:
        """Turn the pieces of a prompt (see `chat.template`) into ids and log-mel frames."""
        clips = [
            as_heard(piece.source).mels(self.cfg.audio_encoder.mels)
            for piece in pieces
            if isinstance(piece, Audio)
        ]
        counts = [[audio.num_tokens(mel.shape[1]) for mel in mels] for mels in clips]
        prompt = template.build_prompt(pieces, self.tokenizer, counts)
        # A chunk of a few samples gets markers in the prompt but no frames.
        heard = [clip for clip in prompt.clips if clip.tokens]
        return Request(
            ids=prompt.ids,
            mels=tuple(clips[clip.audio][clip.chunk] for clip in heard),
            starts=tuple(clip.start for clip in heard),
            counts=tuple(clip.tokens for clip in heard),
        )

    def generate(
        self,
        requests: Sequence[Request],
        options: Options,
        *,
        progress: Progress | None = None,
    ) -> list[list[Generation]]:
        """Continue prompts in batches of similar length; see `Generator.generate`."""
        options = replace(options, stop_ids=options.stop_ids or self.stop_ids)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].ids))
        replies: list[list[Generation]] = [[] for _ in requests]
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = [requests[i] for i in chosen]
            # Numbered as given: a sampled reply does not depend on `batch_size`.
            answers = self.generator.generate(
                batch, options, numbers=chosen, decode_text=self.text_of
            )
            for index, answer in zip(chosen, answers, strict=True):
                replies[index] = answer
            if progress is not None:
                progress(min(start + self.batch_size, len(order)), len(order))
        return replies

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The id that ends a reply of this style of model."""
        special = self.tokenizer.special
        return (special.end_of_text if self.style == "base" else special.eot,)

    def text_of(self, ids: Sequence[int]) -> str:
        """The text in generated ids: without audio codes and pads, with everything else."""
        special = self.tokenizer.special
        reply = deinterleave(ids, special)
        return self.tokenizer.decode([*reply.text_ids, *reply.trailing_text_ids])


def as_heard(source: Any) -> Heard:
    """A recording, read if it was not yet."""
    return source if isinstance(source, Heard) else Heard.of(source)


def fingerprint_of(cfg: StepAudio2Config, params: Params) -> str:
    """A hash of a config and a few numbers of the first and last layer's matrices.

    The same for every dtype that holds the checkpoint's numbers, and for stacked layers or not.
    """
    layers = params["decoder"]["layers"]
    stacked = "attn" in layers
    parts = {
        "first": jax.tree.map(lambda leaf: leaf[0], layers) if stacked else layers[0],
        "last": jax.tree.map(lambda leaf: leaf[-1], layers) if stacked else layers[len(layers) - 1],
        "norm": params["decoder"]["norm"],
        "adapter": params["adapter"],
    }
    digest = hashlib.sha256(json.dumps(cfg.with_dtype("float32").to_hf(), sort_keys=True).encode())
    for name, leaf in checkpoint.flatten(parts).items():
        corner = leaf[(0,) * (leaf.ndim - 1)][:8]
        digest.update(name.encode() + np.asarray(corner.astype(jnp.bfloat16)).tobytes())
    return digest.hexdigest()[:16]

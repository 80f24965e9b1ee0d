"""Base class of `StepAudio2`: its parts, prompts to requests, and batched generation."""

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sa2jax import audio, checkpoint
from sa2jax.audio.recording import Recording
from sa2jax.chat import template
from sa2jax.chat.interleave import deinterleave
from sa2jax.chat.template import PROMPT_STYLES, Audio, Piece, PromptStyle
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.checkpoint import Progress
from sa2jax.config import StepAudio2Config
from sa2jax.errors import CheckpointError, PromptError
from sa2jax.families import family_of
from sa2jax.inference.engine import Engine
from sa2jax.inference.loading import resolve_policy
from sa2jax.inference.requests import Completion, GenerationConfig, Request
from sa2jax.models.heads import pad_heads_for_mesh
from sa2jax.models.step_audio import unstack_decoder
from sa2jax.nn import Params, Policy
from sa2jax.runtime import uses_scan
from sa2jax.speech import Speech
from sa2jax.speech.token2wav import Token2Wav


class PipelineBase:
    """A model with its tokenizer and its voices.

    Args:
        cfg: its config.
        params: its parameters, decoder layers stacked, as checkpoints have them.
        tokenizer: its tokenizer, or a function that reads it when it is first needed.
        speech: its detokenizer and voices, or a function that opens them when first needed.
        policy: its dtypes; by default those of the platform, see `loading.resolve_policy`.
        mesh: the device mesh the parameters are sharded over, heads spread as it needs them.
        prompt_style: `chat` for models with turns, `base` for the pre-trained model without.
        batch_size: replies that are generated at a time, at most; others wait.
        parity: do everything as the official pipeline does, see docs/parity.md; what is said can
            open turns then.
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
        prompt_style: PromptStyle = "chat",
        batch_size: int = 8,
        parity: bool = False,
    ):
        if prompt_style not in PROMPT_STYLES:
            raise PromptError(
                f"prompt_style={prompt_style!r}: expected one of {', '.join(PROMPT_STYLES)}"
            )
        self.cfg, self.prompt_style, self.batch_size = cfg, prompt_style, batch_size
        self.parity = parity
        self._tokenizer, self._speech, self._conversations = tokenizer, speech, itertools.count()
        stacked = uses_scan(mesh)
        params = params if stacked else unstack_decoder(params)
        policy = resolve_policy(None) if policy is None else policy
        self.family = family_of(cfg)
        model = self.family.model(pad_heads_for_mesh(cfg, mesh), policy, stacked=stacked)
        self.engine = Engine(model, params, cfg, mesh=mesh, rows=batch_size, parity=parity)

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
    def replicas(self) -> list[Engine]:
        """Data-parallel replicas of the generator: one for each index of the mesh's data axis."""
        return self.engine.replicas()

    def next_replica(self) -> int:
        """Index of the replica that the next conversation runs on, round-robin."""
        return next(self._conversations) % len(self.replicas)

    def token2wav(self, replica: int) -> Token2Wav:
        """The detokenizer on the devices of a replica."""
        if len(self.replicas) == 1:
            return self.speech.token2wav
        voices = self.speech.replicas  # one, if it was opened without the mesh
        return voices[replica % len(voices)]

    @property
    def sample_rate(self) -> int:
        """Sample rate of synthesised speech, in Hz."""
        return self.speech.sample_rate

    @cached_property
    def fingerprint(self) -> str:
        """A hash that tells checkpoints apart: of the config and a few numbers of each matrix."""
        return fingerprint_of(self.cfg, self.engine.params)

    # --- prompts ---------------------------------------------------------------------------

    def request(self, pieces: Sequence[Piece]) -> Request:
        """Turn the pieces of a prompt (see `chat.template`) into ids and log-mel frames."""
        clips = [
            as_recording(piece.source).mels(self.cfg.audio_encoder.mels)
            for piece in pieces
            if isinstance(piece, Audio)
        ]
        counts = [[audio.num_tokens(mel.shape[1]) for mel in mels] for mels in clips]
        prompt = template.build_prompt(
            pieces, self.tokenizer, counts, split_special_tokens=not self.parity
        )
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
        options: GenerationConfig,
        *,
        first_index: int = 0,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """Continue prompts, `batch_size` at a time; see `Engine.generate`.

        Args:
            requests: the prompts.
            options: how to continue them.
            first_index: number of the first one: what a prompt draws depends on its number.
            progress: called with (prompts done, prompts in all).
        """
        replies = self.engine.generate(
            requests,
            self.resolve(options),
            prompt_indices=range(first_index, first_index + len(requests)),
            decode_text=self.text_of,
            progress=progress,
        )
        return [[_official(c) for c in reply] for reply in replies] if self.parity else replies

    def resolve(self, options: GenerationConfig) -> GenerationConfig:
        """Options with the model's stop ids, and without a repetition guard where nobody has it."""
        most = 0 if self.parity else options.max_repeat
        return replace(options, stop_ids=options.stop_ids or self.stop_ids, max_repeat=most)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The id that ends a reply in the model's prompt style."""
        special = self.tokenizer.special
        return (special.end_of_text if self.prompt_style == "base" else special.eot,)

    def text_of(self, ids: Sequence[int]) -> str:
        """The text in generated ids: without audio codes and pads, with everything else."""
        special = self.tokenizer.special
        reply = deinterleave(ids, special)
        return self.tokenizer.decode([*reply.text_ids, *reply.trailing_text_ids])


def as_recording(source: Any) -> Recording:
    """A recording, opened if it is not one yet."""
    return source if isinstance(source, Recording) else Recording.from_source(source)


def _official(completion: Completion) -> Completion:
    """A reply as the official pipeline gives it: the last id is dropped, a stop id or not."""
    if completion.finish_reason == "stop":
        return completion
    return replace(completion, ids=completion.ids[:-1])


def opened(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces with their recordings in memory: each is read once, whatever becomes of its file.

    Raises:
        AudioError: if one cannot be read.
    """
    return [Audio(as_recording(p.source)) if isinstance(p, Audio) else p for p in pieces]


def recording_notes(pieces: Sequence[Piece]) -> list[str]:
    """What the user should know of the recordings in opened pieces."""
    sources = [piece.source for piece in pieces if isinstance(piece, Audio)]
    return [note for source in sources if isinstance(source, Recording) for note in source.notes]


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

"""Requests, generation configs and completions: what goes into the engine and what comes out."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from sa2jax.config import StepAudio2Config
from sa2jax.errors import PromptError
from sa2jax.inference.sampling import SamplingParams
from sa2jax.models.audio_encoder import adapter_length, encoder_length

FinishReason = Literal["stop", "string", "length", "repetition"]


@dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
        ids: token ids, [T]; each clip's frames stand at a run of placeholder ids.
        mels: log-mel frames of each clip, [M, L] each.
        starts: position in `ids` of each clip's first frame.
        counts: number of positions each clip fills.
        max_new_tokens: limit of this reply, where it is lower than that of the options.
    """

    ids: Int[np.ndarray, "T"]
    mels: tuple[Float[np.ndarray, "M L"], ...] = ()
    starts: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    max_new_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to continue a prompt: sampling, limits and stops.

    Attributes:
        sampling: how the next token is chosen.
        max_new_tokens: upper limit of the reply's length; the context may be reached before.
        stop_ids: ids that end the reply; they are not part of it.
        stop_strings: texts that end the reply; they are part of it.
        seed: same seed, same reply. Reply j to prompt i of a batch draws from (seed, i, j).
        samples: replies per prompt.
        max_repeat: a reply that repeats the same few ids (at most `RepetitionGuard`'s period) is
            ended after this many; 0 lets it go on.
    """

    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0))
    max_new_tokens: int = 256
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int = 0
    samples: int = 1
    max_repeat: int = 320

    def __post_init__(self):
        if self.max_new_tokens < 1 or self.samples < 1:
            raise PromptError(
                f"max_new_tokens={self.max_new_tokens}, samples={self.samples}: expected at least 1"
            )


@dataclass(frozen=True)
class Completion:
    """One reply.

    Attributes:
        ids: the generated ids without the stop id.
        finish_reason: `stop` (a stop id), `string` (a stop string), `length`, or `repetition`
            (stopped by the repetition guard).
    """

    ids: tuple[int, ...]
    finish_reason: FinishReason


def validate_request(prompt_index: int, request: Request, cfg: StepAudio2Config) -> None:
    """Raise a PromptError unless a prompt fits the model and leaves room for a reply."""
    ids, vocab, context = request.ids, cfg.decoder.vocab, cfg.decoder.max_positions
    if not 0 < len(ids) < context:
        raise PromptError(
            f"prompt {prompt_index} has {len(ids)} tokens: expected 1 to {context - 1}, since the "
            f"model's context of {context} must also hold a reply"
        )
    if ids.min() < 0 or ids.max() >= vocab:
        raise PromptError(
            f"prompt {prompt_index} holds id {ids.max() if ids.min() >= 0 else ids.min()}, outside "
            f"the vocabulary of {vocab}: is this the checkpoint's own tokenizer?"
        )
    clips = (request.mels, request.starts, request.counts)
    if len({len(part) for part in clips}) > 1:
        raise PromptError(
            f"prompt {prompt_index} has {' and '.join(str(len(part)) for part in clips)} mels, "
            "starts and counts: expected one of each per clip"
        )
    for mel, start, count in zip(*clips, strict=True):
        frames = mel.shape[1]
        embeddings = adapter_length(encoder_length(frames), cfg.adapter)
        longest = 2 * cfg.audio_encoder.max_positions
        if start < 0 or start + count > len(ids) or not 0 <= count <= max(embeddings, 0):
            raise PromptError(
                f"prompt {prompt_index}: a clip of {frames} frames gives {max(embeddings, 0)} "
                f"embeddings and cannot fill {count} positions from {start} on of {len(ids)}"
            )
        if mel.shape[0] != cfg.audio_encoder.mels or frames > longest:
            raise PromptError(
                f"prompt {prompt_index}: expected clips of {cfg.audio_encoder.mels} mels and at "
                f"most {longest} frames, got {list(mel.shape)}"
            )

"""Result types: `Reply`, the pieces of a streamed one, and its timings."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float

from sa2jax.audio.rates import SPEECH_SAMPLE_RATE
from sa2jax.chat.toolbox import ToolResult
from sa2jax.chat.tools import MalformedToolCall, ToolCall

FinishReason = Literal[
    "stop", "string", "length", "repeat", "cancelled", "tool_calls", "tool_limit"
]
NO_SOUND = np.zeros(0, np.float32)


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Latency of an answer, in seconds from the request, and its token counts.

    Attributes:
        first_text: time to the first characters, None if there were none.
        first_audio: time to the first audio, None if there was none.
        total: time to the end.
        speech: duration of the spoken answer, s.
        prompt_tokens: prompt positions that were prefilled; the prefix cache held the others.
        generated_tokens: tokens that were generated, thinking included.
    """

    first_text: float | None
    first_audio: float | None
    total: float
    speech: float
    prompt_tokens: int
    generated_tokens: int

    @property
    def real_time_factor(self) -> float | None:
        """Seconds of work per second of speech; below 1 is faster than it is heard."""
        return self.total / self.speech if self.speech else None


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the model answered.

    Attributes:
        text: the answer's text, without calls of tools.
        ids: all generated ids, without stop tokens and thinking.
        finish_reason: why it ended: `stop`, `string` (a stop string), `length` (the limit, or the
            end of the context), `repeat` (stopped by the repetition guard), `cancelled`,
            `tool_calls` (calls that the caller has to answer) or `tool_limit` (it called tools
            once too often).
        thinking: a Think model's thinking.
        audio: the spoken answer, [-1, 1] at `sample_rate`; empty if nothing was to be spoken.
        sample_rate: of `audio`, in Hz.
        codes: the speech codes, 25 per second, without pads.
        voice: name of the voice at the end, None if nothing was to be spoken.
        tool_calls: calls of tools, in order.
        tool_results: what the tools answered.
        notes: what the caller should know, such as turns that were dropped.
        timings: how long it took.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    thinking: str = ""
    audio: Float[np.ndarray, "N"] = field(default_factory=lambda: NO_SOUND, compare=False)
    sample_rate: int = SPEECH_SAMPLE_RATE
    codes: tuple[int, ...] = ()
    voice: str | None = None
    tool_calls: tuple[ToolCall | MalformedToolCall, ...] = ()
    tool_results: tuple[ToolResult, ...] = field(default=(), compare=False)
    notes: tuple[str, ...] = ()
    timings: Timings | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True)
class ReplyPiece:
    """A piece of an answer as it comes.

    Attributes:
        text: new characters.
        audio: new samples, [-1, 1] at 24 kHz.
        thinking: new characters of a Think model's thoughts.
        tool_results: what tools answered that the model has called.
    """

    text: str = ""
    audio: Float[np.ndarray, "N"] = field(default_factory=lambda: NO_SOUND)
    thinking: str = ""
    tool_results: tuple[ToolResult, ...] = ()

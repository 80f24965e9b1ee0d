"""What the model answers, and how one answer comes about: ids to text, sound and calls."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float

from sa2jax.audio.rates import SPEECH_SAMPLE_RATE
from sa2jax.chat.toolbox import ToolResult
from sa2jax.chat.tools import MalformedToolCall, ToolCall

Finish = Literal["stop", "string", "length", "repeat", "cancelled", "tool_calls", "tool_limit"]
NO_SOUND = np.zeros(0, np.float32)


@dataclass(frozen=True, kw_only=True)
class Timings:
    """How long an answer took, in seconds from the moment it was asked for.

    Attributes:
        first_text: until the first characters, None if there were none.
        first_audio: until the first sound, None if there was none.
        total: until the end.
        speech: length of what was spoken.
        read: positions of the prompts that had to be read; the cache held the others.
        made: tokens that were generated.
    """

    first_text: float | None
    first_audio: float | None
    total: float
    speech: float
    read: int
    made: int

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
        finish: why it ended: `stop`, `string` (a stop string), `length` (the limit, or the end of
            the context), `repeat` (it went round in circles), `cancelled`, `tool_calls` (calls
            that the caller has to answer) or `tool_limit` (it called tools once too often).
        thinking: what a Think model thought before.
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
    finish: Finish
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

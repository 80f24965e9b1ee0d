"""Result types: `Reply`, its segments, the pieces of a streamed one, and its timings."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float

from sa2jax.audio.rates import SPEECH_SAMPLE_RATE
from sa2jax.chat.toolbox import ToolResult
from sa2jax.chat.tools import MalformedToolCall, ToolCall

FinishReason = Literal[
    "stop", "string", "length", "repetition", "error", "cancelled", "tool_calls", "tool_limit"
]
_WORST: tuple[FinishReason, ...] = ("repetition", "length", "string")
_SHOWN = 5  # segments of which a note tells
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
class Segment:
    """A part of a recording and what the model answered to it.

    Attributes:
        start: its first moment in the recording, in seconds.
        end: its last, in seconds.
        text: the answer's text.
        finish_reason: why the answer ended, see `Reply`.
    """

    start: float
    end: float
    text: str
    finish_reason: FinishReason


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the model answered.

    Attributes:
        text: the answer's text, without calls of tools.
        ids: all generated ids, without stop tokens and thinking.
        finish_reason: why it ended: `stop`, `string` (a stop string), `length` (the limit, or the
            end of the context), `repetition` (stopped by the repetition guard), `error` (the
            recording could not be read, see `TaskRunner.run`), `cancelled`,
            `tool_calls` (calls that the caller has to answer) or `tool_limit` (it called tools
            once too often). Of several segments, that of one that did not end by itself.
        thinking: a Think model's thinking.
        audio: the spoken answer, [-1, 1] at `sample_rate`; empty if nothing was to be spoken.
        sample_rate: of `audio`, in Hz.
        codes: the speech codes, 25 per second, without pads.
        voice: name of the voice at the end, None if nothing was to be spoken.
        tool_calls: calls of tools, in order.
        tool_results: what the tools answered.
        segments: of a recording whose answer is written, the parts that were answered one by one;
            none where nothing can be heard.
        notes: what the caller should know: turns that were dropped, a text that was cut at its
            limit, a recording in which nothing can be heard.
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
    segments: tuple[Segment, ...] = ()
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


def finish_reason_of(segments: Sequence[Segment]) -> FinishReason:
    """That of a whole: of the segment that went most wrong."""
    reasons = {segment.finish_reason for segment in segments}
    return next((reason for reason in _WORST if reason in reasons), "stop")


def finish_note(reason: FinishReason, limit: int) -> str | None:
    """What to say of an answer that did not end by itself.

    Args:
        reason: why it ended.
        limit: how many tokens it could have.
    """
    if reason == "length":
        return (
            f"the answer was cut at its limit of {limit} tokens, or at the end of the model's "
            "context: allow more with max_new_tokens (--max-new-tokens)"
        )
    if reason == "repetition":
        return "the answer repeats itself and was ended: do not rely on its last words"
    return None


def segment_notes(segments: Sequence[Segment], limit: int) -> list[str]:
    """The same of each segment, as far as one can read it.

    Args:
        segments: all of a recording.
        limit: how many tokens each answer could have.
    """
    notes = []
    for segment in segments:
        if note := finish_note(segment.finish_reason, limit):
            where = f"{segment.start:.1f} to {segment.end:.1f} s: " if len(segments) > 1 else ""
            notes.append(where + note)
    if len(notes) > _SHOWN:
        notes[_SHOWN:] = [f"so do {len(notes) - _SHOWN} more segments"]
    return notes

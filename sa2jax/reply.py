"""What the model answers, and how one answer comes about: ids to text, sound and calls."""

import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float

from sa2jax.chat.reading import Before, ReplyReader
from sa2jax.chat.template import THINK_END
from sa2jax.chat.tokenizer import Tokenizer, Utf8Stream
from sa2jax.chat.toolbox import ToolResult
from sa2jax.chat.tools import MalformedToolCall, ToolCall
from sa2jax.inference.loops import LoopWatch
from sa2jax.inference.requests import Options, Request
from sa2jax.inference.session import Session
from sa2jax.inference.speaking import Speaker

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
    sample_rate: int = 24_000
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


class Step:
    """One generation of an answer, under way or done.

    Args:
        tokenizer: the checkpoint's tokenizer.

    Attributes:
        reader: the ids so far, taken apart.
        finish: why it ended; `cancelled` until it has.
        audio: what was spoken so far and handed out.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.reader = ReplyReader(tokenizer)
        self.finish: Finish = "cancelled"
        self.audio: list[np.ndarray] = []

    @property
    def samples(self) -> int:
        """Samples that were handed out."""
        return sum(map(len, self.audio))

    def run(
        self,
        session: Session,
        request: Request,
        options: Options,
        *,
        number: int,
        speaker: Speaker | None = None,
    ) -> Generator[ReplyPiece]:
        """Generate, and speak at the same time.

        Args:
            session: the conversation's cache.
            request: the conversation up to here.
            options: how to continue it.
            number: see `Session.reply`.
            speaker: who speaks the codes; None for nobody.
        """
        watch = LoopWatch(options.max_repeat)
        made = session.reply(request, options, number=number)
        try:
            finish: Finish | None = None
            for ids in made:
                text, codes, finish = self._read(ids, watch, options)
                if text:
                    yield ReplyPiece(text=text)
                if speaker is not None:
                    speaker.say(codes)
                    yield from map(self._heard, speaker.ready())
                if finish is not None:
                    made.close()
                    break
            if finish is None:
                finish = "stop" if session.finish == "stop" else "length"
            if text := self.reader.end():
                yield ReplyPiece(text=text)
            if speaker is not None:
                yield from map(self._heard, speaker.finish())
            self.finish = finish
        finally:
            made.close()
            if speaker is not None:
                speaker.stop()

    def _read(
        self, ids: list[int], watch: LoopWatch, options: Options
    ) -> tuple[str, list[int], Finish | None]:
        """Text and codes of the next ids, and why the reply ends with them, if it does."""
        looped = watch.push(ids)
        finish: Finish | None = None if looped is None else "repeat"
        ids = ids[:looped]
        if not options.stop_strings:
            part = self.reader.push(ids)
            return part.text, part.codes, finish
        text, codes = "", []
        for i in ids:
            more, spoken = self.reader.push([i])
            text, codes = text + more, codes + spoken
            if more and any(stop in self.reader.text for stop in options.stop_strings):
                return text, codes, "string"
        return text, codes, finish

    def _heard(self, piece: np.ndarray) -> ReplyPiece:
        self.audio.append(piece)
        return ReplyPiece(audio=piece)


class Thoughts:
    """What a Think model thinks before it answers.

    Attributes:
        text: the thoughts so far.
        made: tokens that were generated.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.text, self.made = "", 0
        self._utf8, self._before = Utf8Stream(tokenizer), Before(THINK_END)

    def run(
        self, session: Session, request: Request, options: Options, *, number: int
    ) -> Generator[ReplyPiece]:
        """Generate up to `</think>`, or the limit."""
        watch = LoopWatch(options.max_repeat)
        made = session.reply(request, options, number=number)
        try:
            for ids in made:
                looped = watch.push(ids)
                self.made += len(ids)
                text = self._before.push("".join(map(self._utf8.push, ids[:looped])))
                self.text += text
                if text:
                    yield ReplyPiece(thinking=text)
                if self._before.found or looped is not None:
                    return
            if not self._before.found and (rest := self._before.flush() + self._utf8.flush()):
                self.text += rest
                yield ReplyPiece(thinking=rest)
        finally:
            made.close()


class Clock:
    """Takes the times of an answer."""

    def __init__(self):
        self._start = time.perf_counter()
        self._first_text: float | None = None
        self._first_audio: float | None = None

    def see(self, piece: ReplyPiece) -> None:
        """A piece is about to be handed out."""
        if piece.text and self._first_text is None:
            self._first_text = self._now()
        if len(piece.audio) and self._first_audio is None:
            self._first_audio = self._now()

    def stop(self, *, samples: int, sample_rate: int, read: int, made: int) -> Timings:
        """The times so far."""
        return Timings(
            first_text=self._first_text, first_audio=self._first_audio, total=self._now(),
            speech=samples / sample_rate, read=read, made=made,
        )  # fmt: skip

    def _now(self) -> float:
        return time.perf_counter() - self._start

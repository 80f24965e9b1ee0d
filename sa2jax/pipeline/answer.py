"""How one answer comes about: ids to text, sound and calls, and what is thought before."""

import time
from collections.abc import Generator

import numpy as np

from sa2jax.chat.reply_parser import Before, ReplyReader
from sa2jax.chat.template import THINK_END
from sa2jax.chat.tokenizer import Tokenizer, Utf8Stream
from sa2jax.inference.repetition import LoopWatch
from sa2jax.inference.requests import Options, Request
from sa2jax.inference.session import Session
from sa2jax.pipeline.reply import Finish, ReplyPiece, Timings
from sa2jax.speech.worker import SynthesisWorker


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
        speaker: SynthesisWorker | None = None,
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
                    speaker.put(codes)
                    yield from map(self._heard, speaker.poll())
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

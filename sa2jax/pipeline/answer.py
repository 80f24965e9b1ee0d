"""One answer step of a conversation: generated ids to text, audio and tool calls; thinking."""

import time
from collections.abc import Generator

import numpy as np

from sa2jax.chat.reply_parser import MarkerFilter, ReplyParser
from sa2jax.chat.template import THINK_END
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.chat.utf8_stream import Utf8Stream
from sa2jax.inference.engine import Engine
from sa2jax.inference.requests import GenerationConfig, Request
from sa2jax.pipeline.reply import FinishReason, ReplyPiece, Timings
from sa2jax.speech.worker import BackgroundReply


class AnswerStep:
    """One generation of an answer (an answer with tool calls takes several), under way or done.

    Args:
        tokenizer: the checkpoint's tokenizer.
        parity: whether the last id is dropped, if it is no stop id either, as officially.

    Attributes:
        reader: parser of the ids so far.
        finish_reason: why it ended; `cancelled` until it has.
        audio: the audio handed out so far, 24 kHz.
        prefilled: positions of the prompt that were not in the prefix cache.
    """

    def __init__(self, tokenizer: Tokenizer, *, parity: bool = False):
        self.reader = ReplyParser(tokenizer)
        self._ahead = ReplyParser(tokenizer) if parity else self.reader  # of all ids
        self._held: list[int] = []  # the newest id, which may be the last
        self.finish_reason: FinishReason = "cancelled"
        self.audio: list[np.ndarray] = []
        self.prefilled = 0

    @property
    def samples(self) -> int:
        """Audio samples handed out so far."""
        return sum(map(len, self.audio))

    def run(
        self,
        engine: Engine,
        request: Request,
        options: GenerationConfig,
        *,
        number: int,
        conversation: object | None = None,
        speaker: BackgroundReply | None = None,
    ) -> Generator[ReplyPiece]:
        """Generate tokens, and synthesise speech at the same time.

        Args:
            engine: generates them.
            request: the prompt: the conversation up to here.
            options: sampling and limits.
            number: the prompt's index, see `Engine.submit`.
            conversation: likewise.
            speaker: synthesises the audio codes; None for a written answer.
        """
        made = engine.submit(request, options, prompt_index=number, conversation=conversation)
        try:
            finish_reason: FinishReason | None = None
            for ids in made:
                text, codes, finish_reason = self._read(ids, options)
                if text:
                    yield ReplyPiece(text=text)
                if speaker is not None:
                    speaker.put(codes)
                    yield from map(self._emit_audio, speaker.poll())
                if finish_reason is not None:
                    break
            if finish_reason is None:
                assert made.finish_reason != "abandoned"
                finish_reason = made.finish_reason
            if finish_reason == "stop":
                text, codes = self.reader.push(self._held)
                if speaker is not None:
                    speaker.put(codes)
                if text:
                    yield ReplyPiece(text=text)
            if text := self.reader.end():
                yield ReplyPiece(text=text)
            if speaker is not None:
                yield from map(self._emit_audio, speaker.finish())
            self.finish_reason = finish_reason
        finally:
            made.close()
            self.prefilled = made.prefilled
            if speaker is not None:
                speaker.stop()

    def _read(
        self, ids: list[int], options: GenerationConfig
    ) -> tuple[str, list[int], FinishReason | None]:
        """Text and codes of the next ids, and `string` if they complete a stop string."""
        if not options.stop_strings:
            part = self.reader.push(self._kept(ids))
            return part.text, part.codes, None
        text, codes = "", []
        for i in ids:
            more, spoken = self.reader.push(self._kept([i]))
            text, codes = text + more, codes + spoken
            if self._ahead is not self.reader:
                more, _ = self._ahead.push([i])
            if more and any(stop in self._ahead.text for stop in options.stop_strings):
                return text, codes, "string"
        return text, codes, None

    def _kept(self, ids: list[int]) -> list[int]:
        """The ids that are read now: with `parity` all but the newest."""
        if self._ahead is self.reader:
            return ids
        ids = [*self._held, *ids]
        self._held = ids[-1:]
        return ids[:-1]

    def _emit_audio(self, piece: np.ndarray) -> ReplyPiece:
        self.audio.append(piece)
        return ReplyPiece(audio=piece)


class ThinkingStep:
    """The thinking of a Think model before an answer.

    Attributes:
        text: the thinking so far.
        generated_tokens: tokens that were generated.
        prefilled: positions of the prompt that were not in the prefix cache.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.text, self.generated_tokens, self.prefilled = "", 0, 0
        self._utf8, self._before = Utf8Stream(tokenizer), MarkerFilter(THINK_END)

    def run(
        self,
        engine: Engine,
        request: Request,
        options: GenerationConfig,
        *,
        number: int,
        conversation: object | None = None,
    ) -> Generator[ReplyPiece]:
        """Generate up to `</think>`, or the limit."""
        made = engine.submit(request, options, prompt_index=number, conversation=conversation)
        try:
            for ids in made:
                self.generated_tokens += len(ids)
                text = self._before.push("".join(map(self._utf8.push, ids)))
                self.text += text
                if text:
                    yield ReplyPiece(thinking=text)
                if self._before.found:
                    return
            if not self._before.found and (rest := self._before.flush() + self._utf8.flush()):
                self.text += rest
                yield ReplyPiece(thinking=rest)
        finally:
            made.close()
            self.prefilled = made.prefilled


class Stopwatch:
    """Measures the latencies of an answer: first text, first audio, total."""

    def __init__(self):
        self._start = time.perf_counter()
        self._first_text: float | None = None
        self._first_audio: float | None = None

    def observe(self, piece: ReplyPiece) -> None:
        """Note a piece that is about to be handed out."""
        if piece.text and self._first_text is None:
            self._first_text = self._now()
        if len(piece.audio) and self._first_audio is None:
            self._first_audio = self._now()

    def stop(
        self, *, samples: int, sample_rate: int, prompt_tokens: int, generated_tokens: int
    ) -> Timings:
        """The times so far."""
        return Timings(
            first_text=self._first_text,
            first_audio=self._first_audio,
            total=self._now(),
            speech=samples / sample_rate,
            prompt_tokens=prompt_tokens,
            generated_tokens=generated_tokens,
        )

    def _now(self) -> float:
        return time.perf_counter() - self._start

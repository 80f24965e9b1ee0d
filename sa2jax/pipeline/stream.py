"""Streaming answers: thinking, text and audio in pieces; can be cancelled at any time."""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Literal, Self

import numpy as np

from sa2jax.audio.rates import CODE_RATE
from sa2jax.chat import template
from sa2jax.chat.template import Ids, Message
from sa2jax.chat.toolbox import ToolResult, results_text
from sa2jax.errors import AudioError, PromptError, VoiceError
from sa2jax.inference.requests import GenerationConfig, Request
from sa2jax.pipeline.answer import AnswerStep, Stopwatch, ThinkingStep
from sa2jax.pipeline.chat_state import ChatState
from sa2jax.pipeline.reply import NO_SOUND, FinishReason, Reply, ReplyPiece, finish_note
from sa2jax.speech.api import AnyVoice
from sa2jax.speech.reply_stream import ReplyStream
from sa2jax.speech.voices import Voice
from sa2jax.speech.worker import BackgroundReply


class Stream(Iterator[ReplyPiece]):
    """An answer as it comes; made by `Chat.stream`.

    It ends by itself, or by `cancel`. One that is left without either counts as cancelled when the
    conversation goes on.
    """

    def __init__(
        self,
        chat: ChatState,
        turns: Sequence[Message],
        rounds: Sequence[list[Message]],
        *,
        is_newest: Callable[["Stream", list[Message]], bool],
        voice: Voice | None,
        chunk: int,
        first: int | None,
        options: GenerationConfig,
        notes: Sequence[str] = (),
    ):
        self._chat, self._voice, self._spoken = chat, voice, voice is not None
        self._is_newest = is_newest  # see `Chat.ends_with`
        self._rounds = list(rounds)  # before this one
        self._turns = list(turns)  # of this one, complete
        self._chunk, self._first = chunk, first
        self._options = chat.model.resolve(options)
        self._steps: list[tuple[int, AnswerStep]] = []  # with how many turns there were before
        self._results: list[ToolResult] = []
        self._notes = list(notes)
        self._thoughts: list[str] = []
        self._prompt_tokens = self._generated_tokens = 0
        self._finish_reason: FinishReason = "cancelled"
        self._stopwatch = Stopwatch()
        self._reply: Reply | None = None
        self._state: Literal["open", "done", "failed"] = "open"
        self._lock, self._stopped = threading.RLock(), threading.Event()
        self._completed = False  # whether it has ended by itself
        self._heard_samples: int | None = None  # samples, if it was cut
        self._pieces = self._run()

    def __next__(self) -> ReplyPiece:
        """The next piece.

        Raises:
            PromptError: if the conversation does not fit in the model's context.
        """
        with self._lock:
            if self._stopped.is_set():
                raise StopIteration
            try:
                piece = next(self._pieces)
            except StopIteration:
                if self._state == "open":
                    self._finalize() if self._completed else self.cancel()
                raise
            except Exception:
                self._state = "failed"  # the history stays as it was
                raise
            self._stopwatch.observe(piece)
            return piece

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def reply(self) -> Reply:
        """The whole answer, or what there was of it when it was cancelled.

        Raises:
            PromptError: if it is still under way, or failed.
        """
        if self._reply is None:
            raise PromptError("no reply yet: take all pieces of the stream, or cancel it")
        return self._reply

    @property
    def is_open(self) -> bool:
        """Whether the answer is still under way."""
        return self._state == "open"

    def close(self) -> None:
        """Cancel the answer if it is still under way."""
        if self._state == "open":
            self.cancel()

    def cancel(self, played: float | None = None) -> Reply:
        """Interrupt the answer: the history keeps what was really spoken.

        Of a spoken answer that are the codes whose sound was handed out (or played), of a written
        one the text that was.

        From any thread; a block of ids or a tool that is under way is waited for.

        Args:
            played: seconds of the sound that were really heard, where a player lags behind; also
                for an answer that has ended, if it is the newest of its conversation.

        Returns:
            What there was of the answer.

        Raises:
            PromptError: if the conversation has gone on.
        """
        self._stopped.set()  # whoever takes the pieces, in whatever thread, gets no more
        with self._lock:
            self._pieces.close()
            if self._state == "failed" or (self._state == "done" and played is None):
                return self.reply
            if self._state == "done" and not self._is_newest(self, self._turns):
                raise PromptError("the conversation has gone on: only its newest answer can be cut")
            rate = self._chat.model.sample_rate if self._spoken else CODE_RATE
            heard = sum(step.samples for _, step in self._steps)
            if self._heard_samples is not None:
                heard = min(heard, self._heard_samples)
            if played is not None:
                heard = min(heard, round(max(played, 0) * rate))
            kept = self._cut(heard, rate // CODE_RATE)
            if self._state == "open" or kept is not self._turns:
                self._finish_reason, self._heard_samples = "cancelled", heard
            self._turns = kept
            self._finalize()
            return self.reply

    def abandon(self) -> None:
        """Give the answer up: the history stays as it was before."""
        self._stopped.set()
        with self._lock:
            self._pieces.close()
            if self._state == "open":
                self._state = "failed"

    # --- how an answer comes about ----------------------------------------------------------

    def _run(self) -> Generator[ReplyPiece]:
        yield from self._answer_steps()
        self._completed = True

    def _answer_steps(self) -> Generator[ReplyPiece]:
        chat, spoken, said = self._chat, self._spoken, False
        for count in range(chat.max_tool_rounds + 1):
            last = template.reply_turn(spoken=spoken)
            if chat.think:
                yield from self._think()
                last = template.answer_turn(self._thoughts[-1], spoken=spoken)
            step = AnswerStep(chat.model.tokenizer, parity=chat.model.parity)
            request = self._request(last)
            self._steps.append((len(self._turns), step))
            speaker = None
            if self._voice is not None:
                reply = ReplyStream(
                    chat.model.token2wav(chat.replica),
                    self._voice,
                    chunk=self._chunk,
                    first=self._first,
                    seed=self._options.seed,
                    parity=chat.model.parity,
                )
                speaker = BackgroundReply(reply)
            pieces = step.run(
                chat.engine,
                request,
                self._options,
                number=self._number,
                conversation=chat,
                speaker=speaker,
            )
            fresh = True
            try:
                for piece in pieces:
                    if piece.text and fresh:
                        piece, fresh = replace(piece, text="\n" * said + piece.text), False
                        said = True
                    yield piece
            finally:
                pieces.close()
                self._prompt_tokens += step.prefilled
                self._generated_tokens += len(step.reader.ids)
            self._finish_reason = step.finish_reason
            # Cut by a limit, speech ends here; officially it stays open.
            closed = spoken and step.finish_reason != "stop" and not chat.model.parity
            ids = step.reader.closed() if closed else step.reader.ids
            self._turns.append(_answer(ids, spoken))
            calls = step.reader.calls
            if not (calls and chat.tools):
                return
            if not all(map(chat.tools.can_run, calls)):
                self._finish_reason = "tool_calls"
                return
            if count == chat.max_tool_rounds:
                self._finish_reason = "tool_limit"
                self._notes.append(f"the model called tools more than {count} times: not run again")
                return
            results = [self._with_tool_voice(result) for result in chat.tools.run(calls)]
            self._results += results
            self._turns.append(template.tool_result_turn(results_text(results)))
            yield ReplyPiece(tool_results=tuple(results))

    def _think(self) -> Iterator[ReplyPiece]:
        thinking = ThinkingStep(self._chat.model.tokenizer)
        request = self._request(template.think_turn())
        try:
            yield from thinking.run(
                self._chat.engine,
                request,
                self._options,
                number=self._number,
                conversation=self._chat,
            )
        finally:
            self._thoughts.append(thinking.text)
            self._prompt_tokens += thinking.prefilled
            self._generated_tokens += thinking.generated_tokens

    @property
    def _number(self) -> int:
        """Of the reply in its conversation: what it draws depends on it."""
        turns = [*(turn for turns in self._rounds for turn in turns), *self._turns]
        return sum(turn.role == "assistant" for turn in turns)

    def _request(self, last: Message) -> Request:
        """The prompt; the oldest turns are dropped where it would be too long."""
        chat, context = self._chat, self._chat.model.cfg.decoder.max_positions
        room = min(self._options.max_new_tokens, context // 4)
        dropped = 0
        while True:
            before = [turn for turns in self._rounds for turn in turns]
            turns = [*chat.head, *before, *self._turns, last]
            request = chat.model.request(chat.model.family.chat_template(turns))
            if len(request.ids) + room <= context or not self._rounds:
                break
            if chat.overflow == "refuse":
                raise PromptError(
                    f"the conversation of {len(request.ids)} tokens and an answer of {room} do not "
                    f"fit in the model's context of {context}: undo turns, start anew, or let the "
                    "oldest be dropped (overflow='drop')"
                )
            self._rounds.pop(0)
            dropped += 1
        if dropped:
            turns = "turn was" if dropped == 1 else f"{dropped} turns were"
            self._notes.append(
                f"the oldest {turns} dropped: the model's context holds {context} tokens"
            )
        return request

    def _with_tool_voice(self, result: ToolResult) -> ToolResult:
        """Take the voice that a tool gives, if there is such a voice."""
        if result.voice is None or self._voice is None:
            return result
        try:
            self._chat.voice = self._named(result.voice)
        except (AudioError, VoiceError) as error:
            return replace(result, text=f"error: {error}", ok=False, voice=None)
        self._voice = self._chat.voice
        return result

    def _named(self, voice: AnyVoice) -> AnyVoice:
        """A tool's voice: a text may come from the model, so it is a name and opens no file."""
        names = self._chat.model.speech.folder.voices
        if isinstance(voice, str) and voice not in names and voice != "default":
            known = ", ".join(list(names)[:12])
            raise VoiceError(f"no voice {voice!r:.120}: expected one of {known}")
        return voice

    def _cut(self, heard: int, samples: int) -> list[Message]:
        """The turns of this round up to what was heard.

        Args:
            heard: samples of the answer that were heard.
            samples: samples of a code.
        """
        for before, step in self._steps:
            complete = step.finish_reason != "cancelled"
            if complete and heard >= step.samples:
                heard -= step.samples
                continue
            reader = step.reader
            if self._spoken:
                return [*self._turns[:before], _answer(reader.until(heard // samples), True)]
            return [*self._turns[:before], _answer(reader.ids[: reader.shown], False)]
        if self._turns[-1].role == "assistant":
            return self._turns
        nothing = [self._chat.model.tokenizer.special.tts_end] if self._spoken else []
        return [*self._turns, _answer(nothing, self._spoken)]

    def _finalize(self) -> None:
        """The answer is over: make it part of the history, and sum it up."""
        chat, turns = self._chat, self._turns
        self._state = "done"
        chat.rounds = [*self._rounds, turns]
        begun = self._steps[0][0] if self._steps else len(turns)
        answers = [chat.parse_answer(turn) for turn in turns[begun:] if turn.role == "assistant"]
        ids: list[int] = []
        for n, (_, reader) in enumerate(answers):
            raw = self._steps[n][1].reader.ids if n < len(self._steps) else reader.ids
            # A whole answer as it was generated, without what closes it in the history.
            ids += raw if reader.ids[: len(raw)] == raw else reader.ids
        calls = [call for _, reader in answers for call in reader.calls]
        pieces = [piece for _, step in self._steps for piece in step.audio]
        audio = np.concatenate([NO_SOUND, *pieces])[: self._heard_samples]
        rate = chat.model.sample_rate if self._spoken else Reply.sample_rate
        if self._reply is not None and self._reply.timings is not None:  # cut after its end
            timings = replace(self._reply.timings, speech=len(audio) / rate)
        else:
            timings = self._stopwatch.stop(
                samples=len(audio),
                sample_rate=rate,
                prompt_tokens=self._prompt_tokens,
                generated_tokens=self._generated_tokens,
            )
        note = finish_note(self._finish_reason, self._options.max_new_tokens)
        self._reply = Reply(
            text="\n".join(text for text, _ in answers if text),
            ids=tuple(ids),
            finish_reason=self._finish_reason,
            thinking="\n".join(self._thoughts),
            audio=audio,
            sample_rate=rate,
            codes=tuple(c for _, reader in answers for c in reader.codes),
            voice=self._voice.name if self._voice is not None else None,
            tool_calls=tuple(calls),
            tool_results=tuple(self._results[: len(calls)]),
            notes=(*self._notes, *([] if note is None else [note])),
            timings=timings,
        )


def _answer(ids: Sequence[int], spoken: bool) -> Message:
    return template.spoken_turn(ids) if spoken else Message("assistant", [Ids(tuple(ids))])

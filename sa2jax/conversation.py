"""Conversations: turns of speech and text, streams that can be interrupted, thinking and tools.

chat = model.chat(voice="default", tools=["get_date_time"])
chat.say("question.wav").audio                    # 24 kHz
for piece in chat.stream("And tomorrow?"): ...    # piece.text, piece.audio as they come
chat.undo(); other = chat.fork(); chat.save("talk.json")

The history holds what the model was trained on: spoken replies as their own ids, thinking left
out. What the model has read stays in its cache, see `inference.session`.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from sa2jax import audio
from sa2jax.chat import history as files
from sa2jax.chat import template
from sa2jax.chat.history import Heard
from sa2jax.chat.reading import ReplyReader
from sa2jax.chat.template import Audio, Ids, Message, Piece, Text
from sa2jax.chat.toolbox import ToolAnswer, Toolbox, read_answer
from sa2jax.errors import PromptError, Sa2jaxError
from sa2jax.inference.requests import Options
from sa2jax.inference.session import Session
from sa2jax.inference.token2wav import CHUNK
from sa2jax.inference.voices import Voice
from sa2jax.reply import Reply
from sa2jax.stream import Stream

if TYPE_CHECKING:
    from sa2jax.pipeline import StepAudio2
    from sa2jax.speech import AnyVoice

log = logging.getLogger(__name__)

Content = str | audio.Audio | Piece | Sequence[Any]
Overflow = Literal["drop", "refuse"]
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")


class Chat:
    """A conversation; made by `StepAudio2.chat`.

    Attributes:
        model: who answers.
        head: the turns before the first question: system prompt and tools.
        rounds: questions with all that belongs to their answers, oldest first.
        tools: what the model may call.
        think: whether a Think model thinks before each answer.
        options: sampling and limits.
        overflow: what happens when the context is full: `drop` the oldest turns, or `refuse`.
        max_tool_rounds: how often the model may call tools before an answer must stand.
        replica: the part of the mesh that it runs on.
        session: the cache of what the model has read.
    """

    def __init__(
        self,
        model: "StepAudio2",
        head: Sequence[Message],
        *,
        voice: "AnyVoice | None" = None,
        tools: Toolbox,
        think: bool = False,
        options: Options,
        overflow: Overflow = "drop",
        max_tool_rounds: int = 4,
    ):
        if overflow not in ("drop", "refuse"):
            raise PromptError(f"overflow={overflow!r}: expected 'drop' or 'refuse'")
        if max_tool_rounds < 0:
            raise PromptError(f"max_tool_rounds={max_tool_rounds}: expected at least 0")
        self.model, self.head, self.tools = model, list(head), tools
        self.think, self.options = think, options
        self.overflow: Overflow = overflow
        self.max_tool_rounds = max_tool_rounds
        self.rounds: list[list[Message]] = []
        self.replica = model.next_replica()
        self.session = Session(model.replicas[self.replica])
        self._stream: Stream | None = None
        self._voice: Voice | None = None
        self.voice = voice

    @property
    def history(self) -> tuple[Message, ...]:
        """All turns, as the model sees them."""
        return (*self.head, *(turn for turns in self.rounds for turn in turns))

    @property
    def voice(self) -> Voice | None:
        """The voice of the answers; None if none was chosen, and answers are written."""
        return self._voice

    @voice.setter
    def voice(self, voice: "AnyVoice | None") -> None:
        self._voice = None if voice is None else self.model.speech.voice(voice)
        name = None if self._voice is None else self._voice.name
        is_file = isinstance(voice, str | Path) and Path(voice).is_file()
        self._voice_name = str(Path(str(voice)).absolute()) if is_file else name

    def say(self, content: Content | ToolAnswer, **options: Any) -> Reply:
        """Say something and hear the whole answer.

        Args:
            content: see `stream`.
            **options: see `stream`.

        Raises:
            PromptError: if nothing was said, or the conversation does not fit in the context; the
                history is then as before.
        """
        stream = self.stream(content, **options)
        try:
            for _ in stream:
                pass
        except BaseException:
            stream.abandon()
            raise
        return stream.reply

    def stream(
        self,
        content: Content | ToolAnswer,
        *,
        speak: bool | None = None,
        voice: "AnyVoice | None" = None,
        chunk: int = CHUNK,
        first: int | None = None,
        seed: int | None = None,
    ) -> Stream:
        """Say something and take the answer as it comes.

        Args:
            content: text; a recording as a `Path`, bytes, file or `(array, rate)`; or a list of
                them in order. A str that ends like an audio file's name counts as a recording.
                Or a `ToolAnswer` to the calls of an answer that ended with `tool_calls`.
            speak: whether the answer is to be speech; by default if a voice was chosen.
            voice: the voice of this answer, by default that of the conversation, or `default`.
            chunk: codes (25 Hz) that are spoken at once.
            first: codes of the first chunk, by default `chunk`; with fewer the sound begins
                sooner.
            seed: of this answer, by default that of the options.

        Raises:
            PromptError: if nothing was said.
            AudioError: if a recording cannot be read.
            VoiceError: if there is no such voice.
            CheckpointError: if the model has no detokenizer and is to speak.
        """
        self._end_stream()
        if chunk < 1 or (first is not None and first < 1):
            raise PromptError(f"expected chunks of at least 1 code, got {chunk} and {first}")
        turns, rounds = self._turns_of(content), self.rounds
        if isinstance(content, ToolAnswer):
            turns, rounds = [*rounds[-1], *turns], rounds[:-1]
        speak = (voice or self._voice) is not None if speak is None else speak
        if isinstance(content, ToolAnswer) and content.voice is not None and speak:
            self.voice = content.voice  # as when a function returns it: only speech has a voice
        chosen = None
        if speak:
            known = voice or self._voice or "default"
            chosen = known if isinstance(known, Voice) else self.model.speech.voice(known)
        self._stream = Stream(
            self, turns, rounds, voice=chosen, chunk=chunk, first=first,
            options=self.options if seed is None else replace(self.options, seed=seed),
        )  # fmt: skip
        return self._stream

    def undo(self) -> None:
        """Take back the last question and its answer.

        Raises:
            PromptError: if nothing was said yet.
        """
        self._end_stream()
        if not self.rounds:
            raise PromptError("nothing was said yet: there is nothing to undo")
        self.rounds = self.rounds[:-1]

    def fork(self) -> "Chat":
        """Another conversation that begins like this one and then goes its own way."""
        self._end_stream()
        other = Chat(
            self.model, self.head, voice=self._voice, tools=self.tools, think=self.think,
            options=self.options, overflow=self.overflow, max_tool_rounds=self.max_tool_rounds,
        )  # fmt: skip
        other.rounds, other.session = list(self.rounds), self.session.fork()
        other.replica = self.replica
        other._voice_name = self._voice_name
        return other

    def save(self, path: str | Path) -> None:
        """Write the conversation: turns as JSON, recordings in an npz file beside it.

        Raises:
            PromptError: if `path` does not end in .json or is another kind of file.
        """
        self._end_stream()
        facts = {"voice": self._voice_name}
        files.save(path, self.history, model=self.model.fingerprint, facts=facts)

    def load(self, path: str | Path) -> Self:
        """Go on with a conversation that was saved: its turns replace those of this one.

        Its voice is taken too, if this conversation has chosen none and the model knows it, and so
        are the schemas of its tools; they are run by the tools of the same names here. If it had
        none, those of this conversation stay.

        Raises:
            PromptError: if the file is damaged, no conversation, or one with another checkpoint;
                this conversation is then as before.
        """
        saved = files.load(path, model=self.model.fingerprint)
        starts = [n for n, turn in enumerate(saved.turns) if turn.role == "human"]
        ends = [*starts[1:], len(saved.turns)] if starts else []
        rounds = [list(saved.turns[a:b]) for a, b in zip(starts, ends, strict=True)]
        head = list(saved.turns[: starts[0] if starts else None])
        schemas = [turn.content for turn in head if turn.role == "tool_json_schemas"]
        tools = self.tools.shown_as(str(schemas[0])) if schemas else self.tools
        if tools and not schemas:  # begun without tools, it goes on with those of this one
            head.append(template.tools_turn(tools.text))
        self._end_stream()
        name = saved.facts.get("voice")
        if self._voice is None and name is not None:
            try:
                self.voice = name
            except Sa2jaxError as error:
                log.warning("the conversation goes on without its voice: %s", error)
        self.head, self.tools = head, tools
        self.rounds = rounds
        return self

    def ends_with(self, stream: Stream, turns: list[Message]) -> bool:
        """Whether these turns are the newest, and no answer but this one is under way."""
        other = self._stream
        alone = other is None or other is stream or not other.is_open
        return alone and bool(self.rounds) and self.rounds[-1] is turns

    def read(self, turn: Message) -> tuple[str, ReplyReader]:
        """Text of an answer in the history, and the answer taken apart."""
        reader = ReplyReader(self.model.tokenizer)
        ids = [i for piece in turn.content or () if isinstance(piece, Ids) for i in piece.ids]
        return reader.push(ids).text + reader.end(), reader

    def _turns_of(self, content: Any) -> list[Message]:
        if isinstance(content, ToolAnswer):
            if not (self.rounds and self.read(self.rounds[-1][-1])[1].calls):
                raise PromptError("no call of a tool waits for an answer")
            try:
                text, _ = read_answer(content)
            except (TypeError, ValueError, RecursionError):
                raise PromptError(
                    f"expected a tool's answer as text or something for JSON, got {content!r:.80}"
                ) from None
            return [template.tool_result_turn(self.model.tokenizer.harmless(text))]
        pieces = as_pieces(content)
        if any(not isinstance(piece, Text) or piece.text.strip() for piece in pieces):
            return [template.human_turn([_heard(piece) for piece in pieces])]
        raise PromptError("nothing was said: expected text, a recording, or both")

    def _end_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def as_pieces(content: Any) -> list[Piece]:
    """What a user says as pieces of a turn: text, recordings, or a list of both."""
    if isinstance(content, list):
        return [piece for item in content for piece in as_pieces(item)]
    if isinstance(content, str) and not _names_audio(content):
        return [Text(content)]
    if isinstance(content, str | Path | bytes | tuple) or hasattr(content, "read"):
        return [Audio(content)]
    return [template.as_piece(content)]


def _heard(piece: Piece) -> Piece:
    """A recording is read once, whatever becomes of its file."""
    if isinstance(piece, Audio) and not isinstance(piece.source, Heard):
        return Audio(Heard.of(piece.source))
    return piece


def _names_audio(text: str) -> bool:
    return text.lower().endswith(AUDIO_SUFFIXES) and "\n" not in text

"""Conversations: turns of speech and text, streams that can be interrupted, thinking and tools.

chat = model.chat(voice="default", tools=["get_date_time"])
chat.say(Path("question.wav")).audio              # 24 kHz
for piece in chat.stream("And tomorrow?"): ...    # piece.text, piece.audio as they come
chat.undo(); other = chat.fork(); chat.save("talk.json")

The history holds what the model was trained on: spoken replies as their own ids, thinking left
out. What was prefilled stays in the engine's prefix cache, see `inference.prefix_cache`.
"""

import logging
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from sa2jax.chat import history as files
from sa2jax.chat import template
from sa2jax.chat.content import Content, as_pieces
from sa2jax.chat.template import Audio, Ids, Message, Text
from sa2jax.chat.toolbox import ToolAnswer, Toolbox, read_answer
from sa2jax.errors import PromptError, Sa2jaxError, VoiceError
from sa2jax.inference.requests import GenerationConfig
from sa2jax.pipeline.base import PipelineBase, opened, recording_notes
from sa2jax.pipeline.chat_state import ChatState, Overflow
from sa2jax.pipeline.reply import Reply
from sa2jax.pipeline.stream import Stream
from sa2jax.speech.api import AnyVoice
from sa2jax.speech.token2wav import CHUNK
from sa2jax.speech.voices import Voice

log = logging.getLogger(__name__)


class Chat(ChatState):
    """A conversation; made by `StepAudio2.chat`."""

    def __init__(
        self,
        model: PipelineBase,
        head: Sequence[Message],
        *,
        voice: AnyVoice | None = None,
        tools: Toolbox,
        think: bool = False,
        options: GenerationConfig,
        overflow: Overflow = "drop",
        max_tool_rounds: int = 4,
    ):
        super().__init__(
            model,
            head,
            replica=model.next_replica(),
            tools=tools,
            think=think,
            options=options,
            overflow=overflow,
            max_tool_rounds=max_tool_rounds,
        )
        self._stream: Stream | None = None
        self.voice = voice

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
        voice: AnyVoice | None = None,
        chunk: int = CHUNK,
        first: int | None = None,
        seed: int | None = None,
    ) -> Stream:
        """Say something and take the answer as it comes.

        Args:
            content: text; a recording as a `Path`, bytes, file, `(array, rate)` or `AudioSource`;
                or a list of them in order. A str is text whatever it says, and names no file. Or a
                `ToolAnswer` to the calls of an answer that ended with `tool_calls`.
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
        said = [piece for turn in turns for piece in turn.content or () if isinstance(piece, Audio)]
        notes = recording_notes(said)
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
            self,
            turns,
            rounds,
            is_newest=self.ends_with,
            voice=chosen,
            chunk=chunk,
            first=first,
            options=self.options if seed is None else replace(self.options, seed=seed),
            notes=notes,
        )
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
        other = copy(self)
        other.rounds = list(self.rounds)
        return other

    def save(self, path: str | Path) -> None:
        """Write the conversation: turns as JSON, recordings in an npz file beside it.

        Of its voice the name and the hash are kept: it comes back where the model has that voice.

        Raises:
            PromptError: if `path` does not end in .json or is another kind of file.
        """
        self._end_stream()
        voice = self._voice
        facts = {} if voice is None else {"voice": voice.name, "voice_hash": voice.hash}
        files.save_conversation(path, self.history, model=self.model.fingerprint, facts=facts)

    def load(self, path: str | Path) -> Self:
        """Go on with a conversation that was saved: its turns replace those of this one.

        Its voice is taken too, if this conversation has chosen none and the model knows it, and so
        are the schemas of its tools; they are run by the tools of the same names here. If it had
        none, those of this conversation stay.

        Raises:
            PromptError: if the file is damaged, no conversation, or one with another checkpoint;
                this conversation is then as before.
        """
        saved = files.load_conversation(path, model=self.model.fingerprint)
        vocab = self.model.cfg.decoder.vocab
        largest = max((i for turn in saved.turns for i in _ids_of(turn)), default=0)
        if largest >= vocab:
            raise PromptError(f"{path} holds the id {largest}: expected ids below {vocab}")
        starts = [n for n, turn in enumerate(saved.turns) if turn.role == "human"]
        ends = [*starts[1:], len(saved.turns)] if starts else []
        rounds = [list(saved.turns[a:b]) for a, b in zip(starts, ends, strict=True)]
        head = list(saved.turns[: starts[0] if starts else None])
        schemas = [turn.content for turn in head if turn.role == "tool_json_schemas"]
        tools = self.tools.with_schemas(str(schemas[0])) if schemas else self.tools
        if tools and not schemas:  # begun without tools, it goes on with those of this one
            head.append(template.tools_turn(tools.text))
        self._end_stream()
        if self._voice is None and (name := saved.facts.get("voice")) is not None:
            try:
                self._voice = self._known_voice(name, saved.facts.get("voice_hash"))
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

    def _known_voice(self, name: Any, voice_hash: Any) -> Voice:
        """A voice of the model that a file names: no other file is opened for its sake."""
        speech = self.model.speech
        if not isinstance(name, str) or name not in speech.folder.voices:
            raise VoiceError(f"this model has no voice {name!r:.80}; choose it with voice=")
        voice = speech.voice(name)
        if voice.hash != voice_hash:
            raise VoiceError(f"this model's voice {name} is another one; choose it with voice=")
        return voice

    def _turns_of(self, content: Any) -> list[Message]:
        if isinstance(content, ToolAnswer):
            if not (self.rounds and self.parse_answer(self.rounds[-1][-1])[1].calls):
                raise PromptError("no call of a tool waits for an answer")
            try:
                text, _ = read_answer(content)
            except (TypeError, ValueError, RecursionError):
                raise PromptError(
                    f"expected a tool's answer as text or something for JSON, got {content!r:.80}"
                ) from None
            return [template.tool_result_turn(text)]
        pieces = as_pieces(content)
        if any(not isinstance(piece, Text) or piece.text.strip() for piece in pieces):
            return [template.human_turn(opened(pieces))]
        raise PromptError("nothing was said: expected text, a recording, or both")

    def _end_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _ids_of(turn: Message) -> Iterator[int]:
    """All ids that a turn gives as such."""
    for piece in turn.content or ():
        if isinstance(piece, Ids):
            yield from piece.ids

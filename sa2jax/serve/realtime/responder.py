"""What a session needs of whatever answers in it: the model, or a script in tests."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

from sa2jax.audio.recording import Recording
from sa2jax.chat.tools import ToolCall
from sa2jax.pipeline.reply import FinishReason, ReplyPiece
from sa2jax.serve.realtime.session_config import SessionConfig, Transcription


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of a response.

    Attributes:
        input_text: positions of the prompt that are text.
        input_audio: positions of it that are recordings.
        cached_text: of `input_text`, those that were known from before.
        cached_audio: of `input_audio`, likewise.
        output_text: generated tokens that are text.
        output_audio: generated speech codes.
    """

    input_text: int = 0
    input_audio: int = 0
    cached_text: int = 0
    cached_audio: int = 0
    output_text: int = 0
    output_audio: int = 0


class Utterance(Protocol):
    """What the model has said, as the history keeps it: to be cut where it was heard no more."""

    @property
    def text(self) -> str:
        """Its words."""
        ...

    def until(self, seconds: float) -> Self:
        """The part whose sound was heard, to the code (1/25 s); without calls of tools."""
        ...

    def without_calls(self) -> Self:
        """It without calls of tools."""
        ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a response came out.

    Attributes:
        utterance: what was said, None for nothing.
        finish_reason: why it ended, see `sa2jax.pipeline.reply.Reply`.
        calls: of tools, which the client answers.
        usage: its tokens.
    """

    utterance: Utterance | None
    finish_reason: FinishReason
    calls: Sequence[ToolCall] = ()
    usage: Usage = Usage()


# --- the conversation so far -------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class UserTurn:
    """What the user said: texts and recordings in order."""

    parts: Sequence[str | Recording]


@dataclass(frozen=True)
class SystemTurn:
    """An instruction in the midst of the conversation."""

    text: str


@dataclass(frozen=True)
class WrittenTurn:
    """An answer that the client wrote into the history."""

    text: str


@dataclass(frozen=True, eq=False)
class SaidTurn:
    """An answer of the model, exactly."""

    utterance: Utterance


@dataclass(frozen=True)
class CallTurn:
    """A call of a tool that is not part of a `SaidTurn`; `arguments` is JSON."""

    name: str
    arguments: str


@dataclass(frozen=True)
class CallOutputTurn:
    """What a tool answered; `name` is the tool's, "" if its call is not known."""

    name: str
    output: str


Turn = UserTurn | SystemTurn | WrittenTurn | SaidTurn | CallTurn | CallOutputTurn


# --- responses ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ResponseRequest:
    """A response to be made.

    Attributes:
        id: of the response.
        turns: the conversation up to here.
        config: its settings.
        in_conversation: whether it is part of the session's conversation, so that what is known of
            that conversation's beginning is used.
    """

    id: str
    turns: Sequence[Turn]
    config: SessionConfig
    in_conversation: bool = True


class RunningResponse(Protocol):
    """A response under way: its pieces as they come."""

    def __aiter__(self) -> AsyncIterator[ReplyPiece]:
        """Itself."""
        ...

    async def __anext__(self) -> ReplyPiece:
        """The next piece; its errors are those of the response."""
        ...

    async def outcome(self) -> Outcome:
        """How it came out; once all pieces were taken."""
        ...

    async def cancel(self, sent: float) -> Outcome:
        """End it and wait until it has ended.

        Args:
            sent: seconds of its sound that have gone to the client: what the history can hold.
        """
        ...


class Responder(Protocol):
    """What answers in one session."""

    def check_voice(self, name: str) -> str:
        """A voice's name as the server has it.

        Raises:
            VoiceError: if there is no such voice.
        """
        ...

    def start(self, request: ResponseRequest) -> RunningResponse:
        """Begin a response; errors come from its iteration."""
        ...

    async def transcribe(self, recording: Recording, transcription: Transcription) -> str:
        """The words of a recording, "" if nobody speaks; waits for what is urgent.

        Raises:
            Sa2jaxError: if that fails.
        """
        ...


CancelReason = Literal["turn_detected", "client_cancelled"]

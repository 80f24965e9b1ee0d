"""State of a conversation: its turns, voice and tools."""

from collections.abc import Sequence
from typing import Literal

from sa2jax.chat.reply_parser import ReplyParser
from sa2jax.chat.template import Ids, Message
from sa2jax.chat.toolbox import Toolbox
from sa2jax.errors import PromptError
from sa2jax.inference.engine import Engine
from sa2jax.inference.requests import GenerationConfig
from sa2jax.pipeline.base import PipelineBase
from sa2jax.speech.api import AnyVoice
from sa2jax.speech.voices import Voice

Overflow = Literal["drop", "refuse"]


class ChatState:
    """State of a conversation; `Chat` changes it, a `Stream` appends an answer.

    Attributes:
        model: the model that answers.
        head: the turns before the first question: system prompt and tools.
        rounds: questions with all turns of their answers, oldest first.
        tools: the tools that the model may call.
        think: whether a Think model thinks before each answer.
        options: sampling and limits.
        overflow: what happens when the context is full: `drop` the oldest turns, or `refuse`.
        max_tool_rounds: how often the model may call tools before an answer must stand.
        replica: index of the data-parallel replica that it runs on.
    """

    def __init__(
        self,
        model: PipelineBase,
        head: Sequence[Message],
        *,
        replica: int,
        tools: Toolbox,
        think: bool,
        options: GenerationConfig,
        overflow: Overflow,
        max_tool_rounds: int,
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
        self.replica = replica
        self._voice: Voice | None = None

    @property
    def engine(self) -> Engine:
        """What generates its answers; it keeps what was read of the conversation."""
        return self.model.replicas[self.replica]

    @property
    def history(self) -> tuple[Message, ...]:
        """All turns, as the model sees them."""
        return (*self.head, *(turn for turns in self.rounds for turn in turns))

    @property
    def voice(self) -> Voice | None:
        """The voice of the answers; None if none was chosen, and answers are written."""
        return self._voice

    @voice.setter
    def voice(self, voice: AnyVoice | None) -> None:
        self._voice = None if voice is None else self.model.speech.voice(voice)

    def parse_answer(self, turn: Message) -> tuple[str, ReplyParser]:
        """Text of an answer in the history, and its parser."""
        reader = ReplyParser(self.model.tokenizer)
        ids = [i for piece in turn.content or () if isinstance(piece, Ids) for i in piece.ids]
        return reader.push(ids).text + reader.end(), reader

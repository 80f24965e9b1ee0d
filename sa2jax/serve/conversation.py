"""The seam between the server and the library: one answer of one conversation, and its numbers.

What the server needs of `sa2jax.pipeline` beyond `Chat.stream` is here and nowhere else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sa2jax.chat import template
from sa2jax.chat.reply_parser import is_code
from sa2jax.chat.template import Message, Piece
from sa2jax.chat.toolbox import ToolAnswer
from sa2jax.chat.tools import ToolCall
from sa2jax.inference.requests import GenerationConfig
from sa2jax.pipeline import StepAudio2
from sa2jax.pipeline.conversation import Chat
from sa2jax.pipeline.reply import Reply
from sa2jax.pipeline.stream import Stream
from sa2jax.serve.errors import ApiError
from sa2jax.speech.voices import Voice


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """Tokens of an answer and its prompt.

    Attributes:
        prompt: positions of the prompt.
        prompt_audio: how many of them are heard sound.
        cached: how many of them the prefix cache held.
        generated: tokens that were generated, thinking included.
        audio: how many of them are speech codes or pads between them.
        thinking: how many of them are thoughts.
    """

    prompt: int = 0
    prompt_audio: int = 0
    cached: int = 0
    generated: int = 0
    audio: int = 0
    thinking: int = 0

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        return TokenCounts(**{name: n + getattr(other, name) for name, n in vars(self).items()})


@dataclass
class Conversation:
    """A conversation that is about to be answered once.

    Attributes:
        model: the model.
        system: the system prompt, None for none.
        rounds: the turns before the newest.
        question: the newest turn.
        tools: schemas of the tools that the caller runs.
        think: whether a Think model thinks first.
        options: sampling and limits.
        voice: who speaks; None for a written answer.
        max_len: positions that prompt and answer may have together.
        first: codes of the first chunk of sound.
        chunk: codes of the others.
    """

    model: StepAudio2
    system: str | None
    rounds: Sequence[Sequence[Message]]
    question: Sequence[Piece] | ToolAnswer
    options: GenerationConfig
    max_len: int
    tools: Sequence[Mapping[str, Any]] = ()
    think: bool = False
    voice: Voice | None = None
    first: int | None = None
    chunk: int = 25

    def __post_init__(self):
        self.prompt_tokens = self.prompt_audio_tokens = 0
        self._chat: Chat | None = None

    def start(self) -> Stream:
        """Begin the answer; in a worker thread.

        Raises:
            ApiError: if the conversation does not fit in the model's context.
            PromptError: for tools that cannot be used, or an answer of tools that nothing called.
            VoiceError: if there is no such voice.
        """
        # No tool runs here, one that the library could run neither: calls are the client's.
        chat = self.model.chat(
            self.system,
            tools=list(self.tools) or None,
            think=self.think,
            options=self.options,
            overflow="refuse",
            max_tool_rounds=0,
        )
        chat.rounds = [list(turns) for turns in self.rounds]
        chat.options = replace(
            self.options, max_new_tokens=min(self.options.max_new_tokens, self._room(chat))
        )
        question = self.question
        self._chat = chat
        return chat.stream(
            question if isinstance(question, ToolAnswer) else list(question),
            speak=self.voice is not None,
            voice=self.voice,
            first=self.first,
            chunk=self.chunk,
        )

    @property
    def answer_turn(self) -> Message:
        """The answer as the history has it, once it has ended."""
        assert self._chat is not None
        return self._chat.rounds[-1][-1]

    def counts(self, reply: Reply) -> TokenCounts:
        """The tokens of the answer that this conversation got."""
        special, timings = self.model.tokenizer.special, reply.timings
        generated = len(reply.ids) if timings is None else timings.generated_tokens
        read = self.prompt_tokens if timings is None else timings.prompt_tokens
        audio = sum(is_code(i, special) for i in reply.ids)
        return TokenCounts(
            prompt=self.prompt_tokens,
            prompt_audio=self.prompt_audio_tokens,
            cached=max(self.prompt_tokens - read, 0),
            generated=generated,
            audio=audio,
            thinking=max(generated - len(reply.ids), 0) if self.think else 0,
        )

    def _room(self, chat: Chat) -> int:
        """Positions that the answer may have."""
        newest = self.question
        if isinstance(newest, ToolAnswer):
            last = template.tool_result_turn(str(newest.text))
        else:
            last = template.human_turn(list(newest))
        turns = [*chat.history, last, template.reply_turn(spoken=self.voice is not None)]
        request = self.model.request(self.model.family.chat_template(turns))
        self.prompt_tokens, self.prompt_audio_tokens = len(request.ids), sum(request.counts)
        room = self.max_len - self.prompt_tokens
        if room < 1:
            raise ApiError(
                f"the conversation has {self.prompt_tokens} tokens, which leaves none of the "
                f"{self.max_len} that it may have with its answer: send fewer messages",
                param="messages",
                code="context_length_exceeded",
            )
        return room


def calls_of(reply: Reply) -> list[ToolCall]:
    """The calls of a reply that can be read."""
    return [call for call in reply.tool_calls if isinstance(call, ToolCall)]


def codes_text(reply: Reply) -> str:
    """The speech codes of a reply as StepFun's clients read them."""
    return "".join(f"<audio_{code}>" for code in reply.codes)

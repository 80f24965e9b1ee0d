"""The conversation of a session as turns of the model's template; and what it said, to be cut."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

from sa2jax.audio.rates import CODE_RATE
from sa2jax.audio.recording import Recording
from sa2jax.chat import template
from sa2jax.chat.reply_parser import ReplyParser
from sa2jax.chat.template import Audio, Ids, Message, Piece, Text
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.chat.toolbox import ToolAnswer
from sa2jax.chat.tools import CALL_END, CALL_START
from sa2jax.serve.realtime.responder import (
    CallOutputTurn,
    CallTurn,
    SaidTurn,
    SystemTurn,
    Turn,
    UserTurn,
    WrittenTurn,
)

# Who answers though nobody has asked, as in a greeting, answers an empty question.
NO_QUESTION: tuple[Piece, ...] = (Ids(()),)
_EPSILON = 1e-6  # codes: seconds are sums of binary fractions


@dataclass(frozen=True, eq=False)
class ModelUtterance:
    """What the model has said, as its own ids.

    Attributes:
        turns: all turns of the answer, those included in which tools answered the model.
        spoken: whether it is speech.
        tokenizer: the model's.
    """

    turns: tuple[Message, ...]
    spoken: bool
    tokenizer: Tokenizer = field(repr=False)

    @property
    def text(self) -> str:
        """Its words, without calls of tools."""
        texts = (text for text, _ in self._answers())
        return "\n".join(text for text in texts if text)

    @property
    def counts(self) -> tuple[int, int]:
        """How many ids are text and how many speech codes."""
        readers = [reader for _, reader in self._answers()]
        codes = sum(len(reader.codes) for reader in readers)
        return sum(len(reader.ids) for reader in readers) - codes, codes

    def until(self, seconds: float) -> Self:
        """The part whose sound was heard: exactly its codes, and the words that belong to them."""
        codes, kept = int(seconds * CODE_RATE + _EPSILON), []
        for turn in self.turns:
            if turn.role != "assistant":
                kept.append(turn)
                continue
            _, reader = _parsed(turn, self.tokenizer)
            if codes < len(reader.codes) or turn is self.turns[-1]:
                kept.append(template.spoken_turn(reader.until(codes)))
                break
            codes -= len(reader.codes)
            kept.append(turn)
        return type(self)(tuple(kept), self.spoken, self.tokenizer)

    def without_calls(self) -> Self:
        """It without the calls of tools that it ends with."""
        *before, last = self.turns
        _, reader = _parsed(last, self.tokenizer)
        if not reader.calls:
            return self
        if self.spoken:
            cut = template.spoken_turn(reader.until(len(reader.codes)))
        else:
            cut = Message("assistant", [Ids(tuple(reader.ids[: reader.shown]))])
        return type(self)((*before, cut), self.spoken, self.tokenizer)

    def _answers(self) -> Iterator[tuple[str, ReplyParser]]:
        for turn in self.turns:
            if turn.role == "assistant":
                yield _parsed(turn, self.tokenizer)


@dataclass(frozen=True)
class Prompt:
    """A conversation as `Chat` takes it.

    Attributes:
        rounds: the turns before the newest, from one question to the next.
        question: the newest: what the user says, or what tools have answered.
    """

    rounds: list[list[Message]]
    question: list[Piece] | ToolAnswer


def as_prompt(turns: Sequence[Turn], tokenizer: Tokenizer) -> Prompt:
    """A conversation as the model's template has it.

    What a user says in a row is one turn, and so is what tools answer in a row. What people and
    tools have said is text, special tokens in it too.

    Args:
        turns: the conversation.
        tokenizer: the model's.
    """
    rounds: list[list[Message]] = []
    left = list(turns)
    question: list[Piece] | ToolAnswer = list(NO_QUESTION)
    while left:
        match left[0]:
            case UserTurn():
                pieces = [_piece(part) for turn in _take(left, UserTurn) for part in turn.parts]
                if left:
                    rounds.append([template.human_turn(pieces)])
                else:
                    question = pieces
            case CallOutputTurn():
                answer = _tool_answer(_take(left, CallOutputTurn))
                if not left and rounds and _has_calls(rounds[-1][-1], tokenizer):
                    question = answer
                else:
                    _open(rounds).append(template.tool_result_turn(str(answer.text)))
            case SystemTurn(text):
                _open(rounds).append(Message("system", text))
                left.pop(0)
            case turn:
                _answered(rounds).extend(_assistant_turns(turn, tokenizer))
                left.pop(0)
    return Prompt(rounds, question)


def _take(left: list[Turn], kind: type) -> list:
    taken = []
    while left and isinstance(left[0], kind):
        taken.append(left.pop(0))
    return taken


def _piece(part: str | Recording) -> Piece:
    return Text(part) if isinstance(part, str) else Audio(part)


def _open(rounds: list[list[Message]]) -> list[Message]:
    if not rounds:
        rounds.append([])
    return rounds[-1]


def _answered(rounds: list[list[Message]]) -> list[Message]:
    """The round that an answer belongs to; one without a question answers the empty one."""
    last = _open(rounds)
    if not any(turn.role in ("human", "input") for turn in last):
        last.append(template.human_turn(list(NO_QUESTION)))
    return last


def _assistant_turns(
    turn: SaidTurn | WrittenTurn | CallTurn, tokenizer: Tokenizer
) -> Sequence[Message]:
    if isinstance(turn, SaidTurn):
        assert isinstance(turn.utterance, ModelUtterance)
        return turn.utterance.turns
    if isinstance(turn, WrittenTurn):
        ids = tokenizer.encode(turn.text, split_special_tokens=True)
    else:
        ids = tokenizer.encode(
            f"function\n{turn.name}\n{turn.arguments}",
            prefix=CALL_START,
            suffix=CALL_END,
            split_special_tokens=True,
        )
    return [Message("assistant", [Ids(tuple(ids))])]


def _has_calls(turn: Message, tokenizer: Tokenizer) -> bool:
    """Whether a turn ends with calls of tools, which the newest answers are to."""
    return turn.role == "assistant" and bool(_parsed(turn, tokenizer)[1].calls)


def _parsed(turn: Message, tokenizer: Tokenizer) -> tuple[str, ReplyParser]:
    """Text of an answer without calls, and its parser."""
    reader = ReplyParser(tokenizer)
    ids = [i for piece in turn.content or () if isinstance(piece, Ids) for i in piece.ids]
    return reader.push(ids).text + reader.end(), reader


def _tool_answer(turns: Sequence[CallOutputTurn]) -> ToolAnswer:
    if len(turns) == 1:
        return ToolAnswer(turns[0].output)
    return ToolAnswer("\n".join(f"{turn.name or 'tool_call'}: {turn.output}" for turn in turns))

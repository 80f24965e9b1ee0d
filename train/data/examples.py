r"""Examples: samples tokenized for training, exactly as a conversation would build them.

Data of the language model: samples in shards, packed into rows (`language.data`). Single networks
have another system, prepared folders of clips in batches of like length: `data.recordings`.

    example = make_example(sample, tokenizer, cfg, prompt_style="chat", loss_weights={"text": 1.0,
    ...})

What stands before an assistant's words equals the prompt that `Chat` and the tasks give the model
at the same place, so nothing is learnt in one form and asked for in another. A reply is its own
ids and `<|EOT|>`; the turn's head, and `<tts_start>` of a spoken one, are the caller's to write:

    <|BOT|>human\n hello <|EOT|> <|BOT|>assistant\n <tts_start> | H c0 c1 c2 c3 … <tts_end> <|EOT|>
    ---------------------- not learnt ------------------------- | ----------- learnt -----------
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from sa2jax import audio
from sa2jax.chat import template
from sa2jax.chat.interleave import interleave
from sa2jax.chat.template import (
    PROMPT_STYLES,
    Audio,
    Ids,
    Message,
    Piece,
    PromptStyle,
    Text,
)
from sa2jax.chat.tokenizer import SpecialTokens, Tokenizer
from sa2jax.chat.toolbox import ToolResult, results_text
from sa2jax.chat.tools import CALL_START, MalformedToolCall, ToolCall
from sa2jax.config import StepAudio2Config
from sa2jax.errors import DataError, PromptError
from sa2jax.train.data.records import AUDIO_MARK, RecordError, Turn, parse_tool_call
from sa2jax.train.data.samples import Sample

TOKEN_KINDS = ("text", "audio", "pads")  # of tokens, by their number in `Example.kinds`

_RESULT_ROLES = ("tool_response", "tool")


@dataclass(frozen=True, eq=False)
class Example:
    """A sequence to learn.

    Attributes:
        ids: all tokens, the last one too, [T].
        weights: of predicting each token from those before it; 0 where nothing is learnt, [T].
        kinds: what each token is, an index into `TOKEN_KINDS`, [T].
        mels: log-mel frames (100 Hz) of all chunks that are heard, in order, [M, F] each.
        starts: position of each chunk's first `<audio_patch>`.
        where: the record's file and line.
    """

    ids: Int32[np.ndarray, "T"]
    weights: Float32[np.ndarray, "T"]
    kinds: UInt8[np.ndarray, "T"]
    mels: tuple[Float32[np.ndarray, "M F"], ...] = ()
    starts: tuple[int, ...] = ()
    where: str = ""


def make_example(
    sample: Sample,
    tokenizer: Tokenizer,
    cfg: StepAudio2Config,
    *,
    prompt_style: PromptStyle = "chat",
    loss_weights: Mapping[str, float] | None = None,
) -> Example:
    """Turn a sample into tokens.

    In the `chat` style an assistant's turns are learnt, `<|EOT|>` included, but not those with
    `loss: false`; of other turns those with `loss: true`, except for what is heard in them. A
    `tool_call` belongs to the assistant's turn before it. In the `base` style, that of base models,
    contents follow each other and end with `<|endoftext|>`.

    Args:
        sample: the conversation with its sound.
        tokenizer: the checkpoint's tokenizer.
        cfg: the model's sizes.
        prompt_style: of the prompts.
        loss_weights: of predicting a token of each of `TOKEN_KINDS`, 1 by default.

    Raises:
        RecordError: if nothing of the sample can be learnt.
        DataError: for an unknown prompt style.
    """
    row = _build(sample, tokenizer, cfg, prompt_style)
    ids = np.asarray(row.ids, np.int32)
    kinds = token_kinds(ids, tokenizer.special)
    given = loss_weights or {}
    table = np.array([given.get(kind, 1.0) for kind in TOKEN_KINDS], np.float32)
    learnt = np.where(row.learnt, table[kinds], np.float32(0))
    learnt[:1] = 0  # nothing stands before the first token to predict it from
    if not learnt.any():
        raise RecordError(
            "nothing to learn: expected an assistant's turn, or one with loss: true, of a kind "
            "whose weight is not 0"
        )
    return Example(ids, learnt, kinds, tuple(row.mels), tuple(row.starts), sample.record.where)


def example_length(sample: Sample, tokenizer: Tokenizer, cfg: StepAudio2Config) -> int:
    """How many tokens `make_example` makes of a sample in the `chat` style.

    Raises:
        RecordError: if the sample is no conversation that the template knows.
    """
    return len(_build(sample, tokenizer, cfg, "chat").ids)


def token_kinds(ids: Int32[np.ndarray, "T"], special: SpecialTokens) -> UInt8[np.ndarray, "T"]:
    """Which of `TOKEN_KINDS` each token is: a speech code, a filler of either side, or text."""
    codes = ids - special.audio_code_0
    kinds = np.where((codes >= 0) & (codes < special.num_codes), 1, 0).astype(np.uint8)
    kinds[(ids == special.tts_pad) | (ids == special.code_pad)] = 2
    return kinds


# --- the row under way --------------------------------------------------------------------------


def _build(
    sample: Sample, tokenizer: Tokenizer, cfg: StepAudio2Config, prompt_style: PromptStyle
) -> "_ExampleBuilder":
    """All tokens of a sample."""
    if prompt_style not in PROMPT_STYLES:
        expected = ", ".join(PROMPT_STYLES)
        raise DataError(f"prompt_style={prompt_style!r}: expected one of {expected}")
    row = _ExampleBuilder(sample, tokenizer, cfg)
    try:
        if prompt_style == "chat":
            _write_chat(row)
        else:
            _write_base(row)
    except PromptError as error:
        raise RecordError(str(error)) from None
    return row


class _ExampleBuilder:
    """Tokens of a sample so far, piece by piece."""

    def __init__(self, sample: Sample, tokenizer: Tokenizer, cfg: StepAudio2Config):
        self.sample, self.tokenizer = sample, tokenizer
        self.ids: list[int] = []
        self.learnt: list[bool] = []
        self.mels: list[np.ndarray] = []
        self.starts: list[int] = []
        self._heard = 0  # recordings that have been asked for
        bands, most = cfg.audio_encoder.mels, 2 * cfg.audio_encoder.max_positions
        for mel in (mel for clip in sample.mels for mel in clip):
            if mel.ndim != 2 or mel.shape[0] != bands or mel.shape[1] > most:
                raise RecordError(
                    f"expected sound as {bands} mel bands of at most {most} frames, got "
                    f"{list(mel.shape)}: run `sa2jax data prepare` for this model"
                )

    def pieces_of(self, content: str) -> list[Piece]:
        """A text with `<audio>` marks as pieces; each mark is the sample's next recording."""
        pieces: list[Piece] = []
        for n, text in enumerate(content.split(AUDIO_MARK)):
            if n:
                if self._heard == len(self.sample.mels):
                    raise RecordError(
                        f"more {AUDIO_MARK} marks than recordings ({len(self.sample.mels)})"
                    )
                pieces.append(Audio(self._heard))
                self._heard += 1
            if text:
                pieces.append(Text(text))
        return pieces or [Text("")]

    def write(self, piece: Piece, learn: bool, head: str = "", *, own: bool = True) -> None:
        """Add a piece; of what is learnt, a head that it may begin with and sound are left out.

        Args:
            piece: the piece.
            learn: whether it is learnt.
            head: what it begins with.
            own: whether the model says it: special tokens written in it are those tokens then, and
                text, as in a conversation, in what it is told.
        """
        clips = self.sample.mels

        def counts(n):
            return [audio.num_tokens(mel.shape[1]) for mel in clips[n]]

        prompt = template.build_prompt(
            [piece], self.tokenizer, counts, split_special_tokens=not own
        )
        ids = prompt.ids.tolist()
        learnt = [learn and not isinstance(piece, Audio)] * len(ids)
        if head and learn:
            # A token that reaches over the head's end is learnt: nobody else writes it.
            for n, (mine, given) in enumerate(zip(ids, self.tokenizer.encode(head), strict=False)):
                if mine != given:
                    break
                learnt[n] = False
        if isinstance(piece, Audio):
            for clip in prompt.clips:
                if clip.tokens:  # a chunk of a few samples has markers only
                    self.starts.append(len(self.ids) + clip.start)
                    self.mels.append(clips[piece.source][clip.chunk])
        self.ids += ids
        self.learnt += learnt

    def write_turn(self, message: Message, learn: bool | Sequence[bool] = False) -> None:
        """Add a turn; `learn` is for all of it, or for each piece of its content."""
        head = f"<|BOT|>{message.role}\n"
        pieces = template.render([message])
        # Given for each piece, `<|EOT|>` goes with what it follows.
        each = [learn] * len(pieces) if isinstance(learn, bool) else [False, *learn, learn[-1]]
        for n, (piece, flag) in enumerate(zip(pieces, each, strict=True)):
            self.write(piece, flag, "" if n else head, own=message.role == "assistant")


# --- conversations ------------------------------------------------------------------------------

_Numbered = tuple[int, Turn]  # turns by their index


def _write_chat(row: _ExampleBuilder) -> None:
    record = row.sample.record
    tools = None if record.tools is None else template.tools_turn(record.tools)
    calls: list[ToolCall] = []
    for n, turns in enumerate(_group_turns(record.turns)):
        _, first = turns[0]
        if tools is not None and (n or first.role != "system"):
            row.write_turn(tools)
            tools = None
        if first.role in ("assistant", "tool_call"):
            calls = [parse_tool_call(turn.content) for _, turn in turns if turn.role == "tool_call"]
            _write_reply(row, turns)
            continue
        learn = any(turn.loss for _, turn in turns)
        if first.role in _RESULT_ROLES:
            text = _tool_results([turn.content for _, turn in turns], calls)
            message = template.tool_result_turn(text)
        else:
            match row.pieces_of(first.content):
                case [Text(text)]:
                    message = Message(first.role, text)
                case pieces:
                    message = Message(first.role, pieces)
        row.write_turn(message, learn)
    if tools is not None:  # nothing but a system prompt
        row.write_turn(tools)


def _group_turns(turns: Iterable[Turn]) -> Iterator[list[_Numbered]]:
    """Messages that are one turn of the model's prompts: a reply with its calls, or results."""

    def group() -> Iterator[tuple[int, _Numbered]]:
        number, before = 0, ""
        for index, turn in enumerate(turns):
            reply = turn.role == "tool_call" and before in ("assistant", "tool_call")
            number += not (reply or (turn.role in _RESULT_ROLES and before in _RESULT_ROLES))
            before = turn.role
            yield number, (index, turn)

    for _, found in groupby(group(), key=lambda item: item[0]):
        yield [item for _, item in found]


def _write_reply(row: _ExampleBuilder, turns: Sequence[_Numbered]) -> None:
    """An assistant's turn: what it says, then its calls of tools."""
    pieces: list[Piece] = []
    learn: list[bool] = []
    for index, turn in turns:
        if turn.role == "tool_call":
            own: list[Piece] = [Text(parse_tool_call(turn.content).to_text())]
        elif turn.speech is None:
            own = row.pieces_of(turn.content)
        else:
            own = _spoken(row, index, turn)
            pieces.append(own.pop(0))
            learn.append(False)
        pieces += own
        learn += [turn.loss is not False] * len(own)
    row.write_turn(Message("assistant", pieces), learn)


def _spoken(row: _ExampleBuilder, index: int, turn: Turn) -> list[Piece]:
    """A spoken content: `<tts_start>`, words and codes up to `<tts_end>`, and what is not said."""
    special, place = row.tokenizer.special, f"message {index + 1}"
    codes = row.sample.codes.get(index)
    if codes is None:
        raise RecordError(f"{place}: its speech has no codes: run `sa2jax data prepare` first")
    wrong = codes[(codes < 0) | (codes >= special.num_codes)]
    if wrong.size:
        raise RecordError(
            f"{place}: no audio code {wrong[0]}, expected 0 to {special.num_codes - 1} as this "
            "tokenizer has them"
        )
    if template.THINK_END in turn.content:
        raise RecordError(
            f"{place}: a spoken turn cannot hold {template.THINK_END}: expected only what is said"
        )
    words, mark, rest = turn.content.partition(CALL_START)
    try:
        ids = interleave(row.tokenizer.encode(words), codes, special)
    except PromptError as error:
        raise RecordError(f"{place}: {error}") from None
    start, said = Text("<tts_start>"), Ids(tuple(ids[1:]))
    return [start, said, *([Text(mark + rest)] if mark else [])]


def _tool_results(texts: Sequence[str], calls: Sequence[ToolCall]) -> str:
    """What tools answered to the calls before, as a conversation shows it."""
    unknown = [MalformedToolCall("", "")] * len(texts)
    asked = zip([*calls, *unknown], texts, strict=False)
    return results_text([ToolResult(call, text, ok=True) for call, text in asked])


# --- base models --------------------------------------------------------------------------------


def _write_base(row: _ExampleBuilder) -> None:
    record, learn = row.sample.record, False
    if record.tools is not None:
        raise RecordError("tools are for the chat style: a base model knows none")
    for index, turn in enumerate(record.turns):
        if turn.role not in ("system", "user", "human", "assistant"):
            raise RecordError(f"message {index + 1}: a base model knows no {turn.role} turns")
        assistant = turn.role == "assistant"
        learn = (turn.loss is not False) if assistant else bool(turn.loss)
        if turn.speech is None:
            pieces = row.pieces_of(turn.content)
        else:
            start, *pieces = _spoken(row, index, turn)
            row.write(start, False)
        for piece in template.render_base(pieces):
            row.write(piece, learn, own=assistant)
    row.write(Ids((row.tokenizer.special.end_of_text,)), learn)

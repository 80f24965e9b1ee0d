"""OpenAI's messages as turns of a conversation, StepFun's forms of them included.

What people, tools and models have said is text, special tokens in it too; only the template opens
and closes turns. No message opens a file.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sa2jax.audio.recording import Recording
from sa2jax.chat import template
from sa2jax.chat.interleave import interleave
from sa2jax.chat.template import SPEECH_MARK, SUMMARISE_RESULT, Audio, Ids, Message, Piece, Text
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.chat.toolbox import ToolAnswer
from sa2jax.chat.tools import CALL_END, CALL_START
from sa2jax.errors import AudioError, FileError
from sa2jax.files.json_files import parse_json
from sa2jax.serve.errors import ApiError, as_api_error
from sa2jax.serve.recordings import decode_recording

_SYSTEM, _USER, _TOOL = ("system", "developer"), ("user", "human"), ("tool", "input")
_CODE = re.compile(r"<audio_(\d{1,9})>")


@dataclass
class Dialogue:
    """What a request says, as a conversation takes it.

    Attributes:
        system: the system prompt, None if there is none.
        rounds: the turns before the newest, from one question to the next.
        question: the newest turn: pieces that a user says, or the answer of tools.
        opens_speech: whether it ends with an open `<tts_start>`, StepFun's way to ask for speech.
    """

    system: str | None = None
    rounds: list[list[Message]] = field(default_factory=list)
    question: list[Piece] | ToolAnswer = field(default_factory=list)
    opens_speech: bool = False


class MessageReader:
    """Reads messages; in a worker thread, since recordings are decoded.

    Args:
        tokenizer: the model's.
        find_reply: the turn of a spoken answer by its id, None if it is not kept.
        max_seconds: longest recording.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        find_reply: Callable[[str], Message | None],
        max_seconds: float,
    ):
        self._tokenizer, self._find_reply = tokenizer, find_reply
        self._max_seconds = max_seconds
        self._names: dict[str, str] = {}  # of tools, by the ids of calls

    def read(self, messages: Sequence[Mapping[str, Any]]) -> Dialogue:
        """The conversation.

        Raises:
            ApiError: 400, naming the message and its field.
        """
        dialogue, rest = Dialogue(), list(enumerate(messages))
        dialogue.opens_speech = _pop_open_turn(rest)
        heads: list[str] = []
        while rest and rest[0][1].get("role") in _SYSTEM:
            number, message = rest.pop(0)
            heads.append(_text_of(message, f"messages[{number}]"))
        dialogue.system = "\n\n".join(heads) if heads else None
        turns: list[Message] = []
        while rest:
            role = rest[0][1].get("role")
            if role in _TOOL:
                taken = _take_while(rest, _TOOL)
                answer = self._tool_answer(taken)
                if not rest:
                    dialogue.question = answer
                    break
                turns.append(template.tool_result_turn(str(answer.text)))
            elif role in _USER:
                number, message = rest.pop(0)
                pieces = self._user_pieces(message, f"messages[{number}]")
                if not rest:
                    dialogue.question = pieces
                    break
                turns.append(template.human_turn(pieces))
            elif role in _SYSTEM:
                number, message = rest.pop(0)
                turns.append(Message("system", _text_of(message, f"messages[{number}]")))
            elif role == "assistant":
                number, message = rest.pop(0)
                turns.append(self._assistant_turn(message, f"messages[{number}]"))
            else:
                number = rest[0][0]
                raise ApiError(
                    f"messages[{number}].role: expected system, developer, user, assistant or "
                    f"tool, got {role!r:.40}",
                    param=f"messages[{number}].role",
                )
        else:
            raise ApiError(
                "messages: expected what a user says, or a tool's answer, at the end",
                param="messages",
            )
        dialogue.rounds = _rounds_of(turns)
        return dialogue

    # --- turns --------------------------------------------------------------------------------

    def _user_pieces(self, message: Mapping[str, Any], where: str) -> list[Piece]:
        content = message.get("content")
        if isinstance(content, str):
            pieces: list[Piece] = [Text(content)]
        elif isinstance(content, list) and content:
            pieces = [self._user_piece(i, f"{where}.content[{n}]") for n, i in enumerate(content)]
        else:
            raise ApiError(f"{where}.content: expected text or a list of parts", param=where)
        if any(not isinstance(piece, Text) or piece.text.strip() for piece in pieces):
            return pieces
        raise ApiError(f"{where}.content: expected text or a recording, got nothing", param=where)

    def _user_piece(self, item: Any, where: str) -> Piece:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if isinstance(item, Mapping) and kind == "text" and isinstance(item.get("text"), str):
            return Text(item["text"])
        if isinstance(item, Mapping) and kind == "input_audio":
            given = item.get("input_audio")
            if not isinstance(given, Mapping):
                raise ApiError(f"{where}.input_audio: expected data and format", param=where)
            where = f"{where}.input_audio"
            source = decode_recording(
                given.get("data"),
                given.get("format", "wav"),
                param=where,
                max_seconds=self._max_seconds,
            )
            try:
                return Audio(Recording.from_source(source))
            except AudioError as error:
                raise as_api_error(error, param=where) from None
        raise ApiError(
            f"{where}: expected a part of type text or input_audio, got {kind!r:.40}", param=where
        )

    def _assistant_turn(self, message: Mapping[str, Any], where: str) -> Message:
        given = message.get("audio")
        if given is not None:
            key = given.get("id") if isinstance(given, Mapping) else None
            turn = self._find_reply(key) if isinstance(key, str) else None
            if turn is None:
                raise ApiError(
                    f"{where}.audio.id: no spoken answer {key!r:.60} is kept, or it has expired: "
                    "send its text, or its tts_content",
                    param=f"{where}.audio.id",
                    code="audio_not_found",
                )
            self._call_ids(message.get("tool_calls"), f"{where}.tool_calls")
            return turn
        calls = self._call_ids(message.get("tool_calls"), f"{where}.tool_calls")
        if (spoken := message.get("tts_content")) is not None:
            return template.spoken_turn([*self._spoken_ids(spoken, f"{where}.tts_content"), *calls])
        content = message.get("content")
        text = "" if content is None else _text_of(message, where)
        if not text and not calls:
            raise ApiError(f"{where}: expected content, audio or tool_calls", param=where)
        ids = self._tokenizer.encode(text, split_special_tokens=True)
        return Message("assistant", [Ids((*ids, *calls))])

    def _spoken_ids(self, spoken: Any, where: str) -> list[int]:
        """A spoken answer from its words and codes, as StepFun's clients keep it."""
        parts = spoken if isinstance(spoken, Mapping) else {}
        text, audio = parts.get("tts_text") or "", parts.get("tts_audio") or ""
        if not isinstance(text, str) or not isinstance(audio, str) or not (text or audio):
            raise ApiError(f"{where}: expected tts_text and tts_audio as texts", param=where)
        special = self._tokenizer.special
        words = self._tokenizer.encode(text, split_special_tokens=True)
        codes = [code for code in map(int, _CODE.findall(audio)) if code < special.num_codes]
        return interleave(words, codes, special)[1:]

    def _call_ids(self, calls: Any, where: str) -> list[int]:
        """Ids of the calls that an answer made, as the model writes them."""
        ids: list[int] = []
        if calls is None:
            return ids
        if not isinstance(calls, list):
            raise ApiError(f"{where}: expected a list", param=where)
        for number, call in enumerate(calls):
            place = f"{where}[{number}]"
            function = call.get("function") if isinstance(call, Mapping) else None
            name = function.get("name") if isinstance(function, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(name, str):
                raise ApiError(f"{place}: expected a function with a name", param=place)
            arguments = function.get("arguments") or "{}"
            where_arguments = f"{place}.function.arguments"
            if not isinstance(arguments, str):
                raise ApiError(f"{where_arguments}: expected JSON as text", param=where_arguments)
            try:
                value = parse_json(arguments, dict, where=where_arguments)
            except FileError as error:
                raise ApiError(str(error), param=where_arguments) from None
            written = json.dumps(value, ensure_ascii=False)
            self._names[str(call.get("id", ""))] = name
            ids += self._tokenizer.encode(
                f"function\n{name}\n{written}",
                prefix=CALL_START,
                suffix=CALL_END,
                split_special_tokens=True,
            )
        return ids

    def _tool_answer(self, messages: Sequence[tuple[int, Mapping[str, Any]]]) -> ToolAnswer:
        """The answers of tools in a row, as one turn holds them."""
        texts = []
        for number, message in messages:
            text = _text_of(message, f"messages[{number}]").removesuffix(SUMMARISE_RESULT)
            name = message.get("name") or self._names.get(str(message.get("tool_call_id", "")))
            texts.append((name or "tool_call", text))
        if len(texts) == 1:
            return ToolAnswer(texts[0][1])
        return ToolAnswer("\n".join(f"{name}: {text}" for name, text in texts))


def _pop_open_turn(messages: list[tuple[int, Mapping[str, Any]]]) -> bool:
    """Take away the open turn at the end that StepFun's clients send; whether it opens speech.

    Raises:
        ApiError: if it is one that has to be gone on with.
    """
    if not messages or messages[-1][1].get("role") != "assistant":
        return False
    number, last = messages[-1]
    if {"audio", "tts_content", "tool_calls"} & {k for k, v in last.items() if v is not None}:
        return False
    content = last.get("content")
    if content is None or (content == SPEECH_MARK and last.get("eot") is False):
        messages.pop()
        return content is not None
    raise ApiError(
        f"messages[{number}]: an answer that has begun cannot be gone on with: end with what a "
        f'user says; or with content "{SPEECH_MARK}" and "eot": false for a spoken answer',
        param=f"messages[{number}]",
    )


def _take_while(
    messages: list[tuple[int, Mapping[str, Any]]], roles: Sequence[str]
) -> list[tuple[int, Mapping[str, Any]]]:
    taken = []
    while messages and messages[0][1].get("role") in roles:
        taken.append(messages.pop(0))
    return taken


def _text_of(message: Mapping[str, Any], where: str) -> str:
    """The text of a message that has only text."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    texts = []
    for number, item in enumerate(content if isinstance(content, list) else [None]):
        text = item.get("text") if isinstance(item, Mapping) else None
        if not isinstance(text, str):
            place = (
                f"{where}.content[{number}]" if isinstance(content, list) else f"{where}.content"
            )
            raise ApiError(f"{place}: expected text", param=place)
        texts.append(text)
    return "".join(texts)


def _rounds_of(turns: Sequence[Message]) -> list[list[Message]]:
    """Turns by rounds, each of which begins with a question."""
    rounds: list[list[Message]] = []
    for turn in turns:
        if turn.role == "human" or not rounds:
            rounds.append([])
        rounds[-1].append(turn)
    return rounds

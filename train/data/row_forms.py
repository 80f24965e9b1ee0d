"""Forms in which people have conversations, brought to one: `messages` and `audios`.

Data of the language model: samples in shards, packed into rows (`language.data`). Single networks
have another system, prepared folders of clips in batches of like length: `data.recordings`.

Understood are ms-swift's forms, those of its older versions, ShareGPT's and OpenAI's, as far as
they have one meaning:

    {"query": "<audio>What is it?", "response": "Tea.", "history": [["Hi", "Hello"]], "audios": […]}
    {"instruction": "Translate.", "input": "Tee", "output": "tea"}
    {"conversations": [{"from": "human", "value": "<audio>a.wav</audio>"}, {"from": "gpt", …}]}
    {"conversation": [{"human": "Hi", "assistant": "Hello"}], "system": "…"}
    {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}, …]}
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sa2jax.errors import DataError

AUDIO_MARK = "<audio>"  # stands in a text where a clip goes

_MESSAGES = ("messages", "conversations", "conversation")
_ROLES = {
    "gpt": "assistant",
    "bot": "assistant",
    "function_call": "tool_call",
    "observation": "tool_response",
}
_QUESTIONS = ("user", "human", "tool")  # of a message that holds a question and its answer
_ANSWERS = ("assistant", "gpt", "bot")
_MARK = re.compile(r"<audio>(?:([^<>\n]+)</audio>)?")
_AUDIO_PARTS = ("audio", "audio_url", "input_audio")


class RecordError(DataError):
    """One record that cannot be used; the message says why and names no place."""


@dataclass(frozen=True)
class StandardRow:
    """What a row says, whatever its form.

    Attributes:
        messages: objects with `role` and `content`, not checked any further.
        audios: what stands for its files.
        rejected: a worse last answer.
    """

    messages: list[Any]
    audios: Any
    rejected: Any = None


def standard_row(row: Mapping[str, Any]) -> StandardRow:
    """The messages and files of a row in any form that is understood.

    Raises:
        RecordError: if its form is not understood, or has several meanings.
    """
    if row.get("label") is False:
        raise RecordError(
            "label: false marks a bad answer, which cannot be learnt from: leave it out"
        )
    messages, inline = _with_audio_marks(_all_messages(row))
    rejected = row.get("rejected_response")
    if (others := row.get("rejected_messages")) not in (None, []):
        found = _rejected_answer(messages, inline, others, row)
        if rejected not in (None, found):
            raise RecordError("'rejected_response' and 'rejected_messages' differ: give one")
        rejected = found
    audios = _audios(row)
    if inline and all(inline):
        if audios and audios != inline:
            raise RecordError("files in the texts, and others under 'audios': give them once")
        return StandardRow(messages, inline, rejected)
    if any(inline):
        raise RecordError(f"some {AUDIO_MARK} name a file and some do not: give all in one way")
    if not inline and audios:
        _mark_only_question(messages, audios)
    return StandardRow(messages, audios, rejected)


# --- messages -----------------------------------------------------------------------------------


def _all_messages(row: Mapping[str, Any]) -> list[Any]:
    """The messages of a row, each with a role and a content if it is an object."""
    given = [key for key in _MESSAGES if row.get(key) is not None]
    if len(given) > 1:
        raise RecordError(f"{given[0]!r} and {given[1]!r}: give one")
    if given:
        listed = row[given[0]]
        if not isinstance(listed, list) or not listed:
            raise RecordError(
                f"expected a list of messages under {given[0]!r}, got {short(listed)}"
            )
        messages = [turn for n, item in enumerate(listed, 1) for turn in _messages_of(n, item)]
    else:
        messages = _question_and_answer(row)
    system = row.get("system")
    if not system:
        return messages
    first = messages[0] if isinstance(messages[0], dict) else {}
    if first.get("role") != "system":
        return [{"role": "system", "content": system}, *messages]
    if first.get("content") != system:
        raise RecordError("'system' and the first message are different system prompts: give one")
    return messages


def _messages_of(number: int, item: Any) -> list[Any]:
    """The messages that one of a list stands for; it is checked where it is used."""
    if not isinstance(item, dict):
        return [item]
    if not {"role", "content", "from", "value"} & set(item):
        asked, said = ([key for key in keys if key in item] for keys in (_QUESTIONS, _ANSWERS))
        if len(asked) == len(said) == 1 and len(item) == 2:
            return [
                {"role": asked[0], "content": item[asked[0]]},
                {"role": "assistant", "content": item[said[0]]},
            ]
    message = dict(item)
    for key, usual in (("from", "role"), ("value", "content")):
        if usual not in message and key in message:
            message[usual] = message.pop(key)
    role = message.get("role")
    if isinstance(role, str):
        message["role"] = _ROLES.get(role, role)
    if message.get("loss") in (0, 1):
        message["loss"] = bool(message["loss"])
    calls = message.pop("tool_calls", None)
    if not calls:
        return [message]
    if not isinstance(calls, list):
        raise RecordError(f"message {number}: expected a list of calls, got {short(calls)}")
    own = [message] if message.get("content") else []
    return [*own, *(_tool_call(number, call, message.get("loss")) for call in calls)]


def _tool_call(number: int, call: Any, loss: Any) -> dict[str, Any]:
    """One of OpenAI's `tool_calls` as a message."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or "name" not in inner:
        raise RecordError(f"message {number}: expected calls with a name, got {short(call)}")
    content = {"name": inner["name"], "arguments": inner.get("arguments", {})}
    return {"role": "tool_call", "content": json.dumps(content, ensure_ascii=False), "loss": loss}


def _question_and_answer(row: Mapping[str, Any]) -> list[Any]:
    """The messages of a row without any."""
    if row.get("response") is not None and row.get("query") is not None:
        query, answer = row["query"], row["response"]
    elif row.get("output") is not None and row.get("instruction") is not None:
        parts = [part for part in (row["instruction"], row.get("input")) if part]
        if not all(isinstance(part, str) for part in parts):
            raise RecordError("expected texts under 'instruction' and 'input'")
        query, answer = "\n".join(parts), row["output"]
    else:
        raise RecordError(
            "expected a list of messages under 'messages', or 'query' and 'response', got "
            f"{', '.join(map(repr, list(row)[:8])) or 'nothing'}"
        )
    history = row.get("history") or []
    pairs = isinstance(history, list) and all(isinstance(p, list) and len(p) == 2 for p in history)
    if not pairs:
        raise RecordError(f"expected pairs of texts under 'history', got {short(history)}")
    return [
        {"role": role, "content": text}
        for pair in [*history, (query, answer)]
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _rejected_answer(
    messages: list[Any], inline: list[Any], others: Any, row: Mapping[str, Any]
) -> Any:
    """The last of `rejected_messages`, if all before it are those of `messages`."""
    try:
        rejected, files = _with_audio_marks(_all_messages({**row, "messages": others}))
    except RecordError as error:
        raise RecordError(f"rejected_messages: {error}") from None
    last = rejected[-1] if isinstance(rejected[-1], dict) else {}
    same = rejected[:-1] == messages[:-1] and files == inline
    if not same or last.get("role") != "assistant" or not isinstance(last.get("content"), str):
        raise RecordError(
            "'rejected_messages' is supported where the last answer alone differs from 'messages'"
        )
    return last["content"]


# --- clips --------------------------------------------------------------------------------------


def _with_audio_marks(messages: list[Any]) -> tuple[list[Any], list[Any]]:
    """Messages with a mark for each clip, and each mark's file; None where none is given."""
    found: list[Any] = []

    def mark(match: re.Match[str]) -> str:
        found.append(match[1])
        return AUDIO_MARK

    marked = []
    for number, message in enumerate(messages, 1):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and all(isinstance(part, dict) for part in content):
            texts = []
            for part in content:
                if part.get("type") in _AUDIO_PARTS:
                    found.append(_file_of(number, part))
                    texts.append(AUDIO_MARK)
                elif part.get("type") == "text" and isinstance(part.get("text"), str):
                    texts.append(_MARK.sub(mark, part["text"]))
                else:
                    raise RecordError(
                        f"message {number}: expected parts of type text or audio, got {short(part)}"
                    )
            message = {**message, "content": "".join(texts)}
        elif isinstance(content, str):
            message = {**message, "content": _MARK.sub(mark, content)}
        marked.append(message)
    return marked, found


def _file_of(number: int, part: Mapping[str, Any]) -> str | None:
    """The file of a part of a content; None if it names none."""
    given = [part[key] for key in ("audio", "audio_url", "path", "url") if part.get(key)]
    value = given[0] if len(given) == 1 else None
    if isinstance(value, dict):
        value = value.get("path") or value.get("url")
    if isinstance(value, str) and not value.startswith("data:"):
        return value
    if set(part) == {"type"}:
        return None
    raise RecordError(f"message {number}: expected an audio's file, got {short(part)}")


def _audios(row: Mapping[str, Any]) -> Any:
    """What a row lists as its files."""
    several, single = (_listed(row.get(key)) for key in ("audios", "audio"))
    if several and single and several != single:
        raise RecordError("'audio' and 'audios' differ: give one")
    return several or single


def _listed(audios: Any) -> Any:
    return [audios] if isinstance(audios, str | dict) else audios


def _mark_only_question(messages: list[Any], audios: Any) -> None:
    """Put the clips of a row without marks before its only question, as ms-swift does."""
    asked = [
        message
        for message in messages
        if isinstance(message, dict) and message.get("role") in ("user", "human")
    ]
    if len(asked) == 1 and isinstance(asked[0].get("content"), str):
        count = len(audios) if isinstance(audios, list) else 1
        asked[0]["content"] = AUDIO_MARK * count + asked[0]["content"]


def short(value: Any) -> str:
    """The start of a value, for what is said of it."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"

"""Records: training data as users have it, one line of jsonl each, validated.

Data of the language model: samples in shards, packed into rows (`language.data`). Single networks
have another system, prepared folders of clips in batches of like length: `data.recordings`.

The format is ms-swift's: `messages` with roles and text, `<audio>` where a clip goes, the clips'
files in `audios`; other forms, see `row_forms`, are brought to it. One key is this library's own:
an assistant's message may have `speech`, what it sounds like, as a recording or as audio codes.

    {"messages": [{"role": "user", "content": "<audio>What did it say?"},
                  {"role": "assistant", "content": "Good morning.", "speech": "reply.wav"}],
     "audios": ["a.wav"]}
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from sa2jax.chat.tools import ToolCall, render_tools
from sa2jax.errors import FileError, PromptError, reason_of
from sa2jax.files.json_files import parse_json
from sa2jax.train.data.row_forms import AUDIO_MARK, RecordError, short, standard_row

ROLES = (
    "system",
    "user",
    "human",
    "assistant",
    "tool_call",
    "tool_response",
    "tool",
    "input",
    "function_output",
)

# Keys that would change what is learnt if they were left out without a word.
_UNSUPPORTED_KEYS = (
    "images",
    "videos",
    "objects",
    "rejected_audios",
    "rejected_images",
    "rejected_videos",
    "rejected_tools",
    "positive_messages",
    "negative_messages",
)


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: one of `ROLES`, as written.
        content: its text, with `<audio>` marks.
        loss: whether it is learnt; None for what its role says.
        speech: what an assistant's turn sounds like: a recording's path or URL, or audio codes
            (25 Hz); None if it is not spoken.
    """

    role: str
    content: str
    loss: bool | None = None
    speech: str | tuple[int, ...] | None = None


@dataclass(frozen=True)
class Record:
    """One line of training data.

    Attributes:
        turns: the conversation.
        audios: path or URL of each clip, in the order of the `<audio>` marks.
        tools: schemas of the tools, a list or its JSON text, see `chat.tools.render_tools`.
        rejected: a worse last answer, for learning from preferences.
        solution: what a right answer is, for learning from rewards; of any JSON type.
        where: file and line, such as "talks.jsonl:12".
    """

    turns: tuple[Turn, ...]
    audios: tuple[str, ...] = ()
    tools: str | list[Any] | None = None
    rejected: str | None = None
    solution: Any = None
    where: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`, also after a way through JSON."""
        turns = tuple(Turn(**turn | {"speech": _tupled(turn["speech"])}) for turn in data["turns"])
        changed: dict[str, Any] = {"turns": turns, "audios": tuple(data["audios"])}
        return cls(**{**data, **changed})


def parse_record(line: str | bytes, where: str, root: str | os.PathLike[str]) -> Record:
    """Check one line of jsonl.

    Args:
        line: the line.
        where: its file and number, for messages.
        root: the folder (or URL of one) that relative paths start at.

    Raises:
        RecordError: for the first thing that is wrong with it.
    """
    row = _json(line)
    for key in _UNSUPPORTED_KEYS:
        if row.get(key):
            raise RecordError(f"{key!r} is not supported: expected text and audio only")
    standard = standard_row(row)
    turns = tuple(_turn(n, message, root) for n, message in enumerate(standard.messages, 1))
    audios = _audios(standard.audios, root)
    marks = sum(turn.content.count(AUDIO_MARK) for turn in turns)
    if marks != len(audios):
        raise RecordError(f"{marks} {AUDIO_MARK} in the messages, but {len(audios)} under 'audios'")
    rejected = standard.rejected
    if rejected is not None and not isinstance(rejected, str):
        raise RecordError(f"expected text under 'rejected_response', got {short(rejected)}")
    tools = _tools(row.get("tools"))
    return Record(turns, audios, tools, rejected, row.get("solution"), where)


def parse_tool_call(content: str) -> ToolCall:
    """The call in a `tool_call` message: JSON with `name` and `arguments`.

    Raises:
        RecordError: if it is none.
    """
    try:
        call = parse_json(content)
        if isinstance(call, dict) and isinstance(call.get("arguments"), str):
            call["arguments"] = parse_json(call["arguments"])  # as OpenAI's histories have it
    except FileError as error:
        raise RecordError(
            f"a tool_call that is no JSON ({error.reason}): {short(content)}"
        ) from None
    name = call.get("name") if isinstance(call, dict) else None
    if not isinstance(name, str) or not name or any(c.isspace() for c in name):
        raise RecordError(f"expected a tool_call with the name of a tool, got {short(content)}")
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        raise RecordError(f"expected a tool_call's arguments by name, got {short(arguments)}")
    return ToolCall(name, arguments)


def resolve_path(path: str, root: str | os.PathLike[str]) -> str:
    """A path or URL as seen from a folder: absolute, or a URL."""
    root = os.fspath(root)
    if "://" in path or os.path.isabs(path):
        return path
    if "://" in root:
        return f"{root.rstrip('/')}/{path}"
    return os.path.normpath(os.path.join(os.path.abspath(root), path))


# --- parts of a record --------------------------------------------------------------------------


def _json(line: str | bytes) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except FileError as error:
        raise RecordError(error.reason) from None
    if not isinstance(row, dict):
        raise RecordError(f"expected a JSON object on each line, got {short(row)}")
    return row


def _turn(number: int, message: Any, root: str | os.PathLike[str]) -> Turn:
    """One message; `number` counts from 1."""
    if not isinstance(message, dict):
        raise RecordError(f"message {number}: expected an object, got {short(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RecordError(f"message {number}: unknown role {role!r}, known: {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise RecordError(f"message {number} ({role}): expected text, got {short(content)}")
    loss = message.get("loss")
    if loss is not None and not isinstance(loss, bool):
        raise RecordError(f"message {number}: expected true or false as loss, got {short(loss)}")
    if role == "tool_call":
        parse_tool_call(content)
    speech = message.get("speech")
    if speech is None:
        return Turn(role, content, loss)
    if role != "assistant":
        raise RecordError(f"message {number}: only an assistant's may have speech, not a {role}'s")
    if AUDIO_MARK in content:
        raise RecordError(f"message {number}: a spoken text cannot hold {AUDIO_MARK}")
    return Turn(role, content, loss, _speech(number, speech, root))


def _speech(number: int, speech: Any, root: str | os.PathLike[str]) -> str | tuple[int, ...]:
    if isinstance(speech, str):
        return resolve_path(_path(speech, f"message {number}: speech"), root)
    if not isinstance(speech, list) or not all(type(c) is int and c >= 0 for c in speech):
        raise RecordError(
            f"message {number}: expected a recording or a list of codes as speech, got "
            f"{short(speech)}"
        )
    if not speech:
        raise RecordError(f"message {number}: speech without codes; leave 'speech' out instead")
    return tuple(speech)


def _audios(audios: Any, root: str | os.PathLike[str]) -> tuple[str, ...]:
    if audios is None:
        return ()
    if not isinstance(audios, list):
        raise RecordError(f"expected a list of files under 'audios', got {short(audios)}")
    found = []
    for entry in audios:
        if isinstance(entry, dict):
            entry = entry.get("path") or (
                "audio as bytes" if entry.get("bytes") is not None else entry
            )
            if entry == "audio as bytes":
                raise RecordError(f"{entry} under 'audios' is not supported: give files")
        if not isinstance(entry, str):
            raise RecordError(f"expected files under 'audios', got {short(entry)}")
        found.append(resolve_path(_path(entry, "audios"), root))
    return tuple(found)


def _path(path: str, what: str) -> str:
    if not path or "\0" in path:
        raise RecordError(f"{what}: {path!r} is no name of a file")
    return path.removeprefix("file://")


def _tools(tools: Any) -> str | list[Any] | None:
    if not tools:
        return None
    if not isinstance(tools, str | list):
        raise RecordError(f"expected a list under 'tools', or its JSON text, got {short(tools)}")
    try:
        if isinstance(tools, str) and parse_json(tools) == []:
            return None
        render_tools(tools)
    except (FileError, PromptError) as error:
        raise RecordError(f"tools: {reason_of(error)}") from None
    return tools


def _tupled(speech: Any) -> Any:
    return tuple(speech) if isinstance(speech, list) else speech

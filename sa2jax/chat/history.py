"""Conversations on disk: a JSON file to read, and beside it the recordings that were said.

save_conversation("talk.json", turns, model=fingerprint, facts={"voice": "anna"})
load_conversation("talk.json", model=fingerprint).turns

The JSON names its recordings by their hash: it is never read together with those of another time.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sa2jax.atomic_io import disk_errors, new_file
from sa2jax.audio.recording import Recording
from sa2jax.chat.template import ROLES, Audio, Ids, Message, Piece, Text
from sa2jax.errors import AudioError, FileError, PromptError, reason_of
from sa2jax.files.archives import parse_npz
from sa2jax.files.json_files import read_json
from sa2jax.files.limits import ARRAYS
from sa2jax.files.raw import read_bytes

FORMAT, VERSION = "sa2jax-chat", 1
LOUDEST = 1 << 16  # of a recording: 16-bit numbers that nobody has scaled are below
_KEYS = {"format", "version", "model", "arrays", "sha256", "facts", "turns"}


@dataclass(frozen=True)
class SavedConversation:
    """A conversation from disk.

    Attributes:
        turns: its turns; the source of every `Audio` is a `Recording`.
        facts: whatever was saved with it.
    """

    turns: tuple[Message, ...]
    facts: Mapping[str, Any]


def save_conversation(
    path: str | Path, turns: Sequence[Message], *, model: str, facts: Mapping[str, Any]
) -> None:
    """Write a conversation, replacing an earlier one at `path` at the very end.

    Args:
        path: a name that ends in .json; recordings go beside it.
        turns: the turns; every `Audio` in them has a `Recording` as its source.
        model: fingerprint of the checkpoint, to be given to `load_conversation`.
        facts: anything else for JSON.

    Raises:
        PromptError: for turns or facts that no file can hold, or if something else is at `path`.
        CheckpointError: if it cannot be written.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise PromptError(f"expected a conversation's name to end in .json, got {path}")
    names: dict[Recording, str] = {}
    written = [_turn_to_json(turn, names) for turn in turns]
    data = _pack({name: recording.samples for recording, name in names.items()}) if names else b""
    digest = hashlib.sha256(data).hexdigest() if data else None
    arrays = f"{path.stem}.{digest[:12]}.npz" if digest else None
    head = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "arrays": arrays,
        "sha256": digest,
        "facts": dict(facts),
    }
    try:
        lines = [f"  {json.dumps(key)}: {_dump(value)},\n" for key, value in head.items()]
        rows = ",\n".join(f"    {_dump(turn)}" for turn in written)
        text = f'{{\n{"".join(lines)}  "turns": [\n{rows}\n  ]\n}}\n'.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"a conversation must hold plain JSON and Unicode ({error})") from None
    before = _own_arrays(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if arrays:
                _replace(path.with_name(arrays), data)
            _replace(path, text)
        finally:  # keep the recordings of the conversation that is there now
            for name in {before, arrays} - {None, _own_arrays(path)}:
                path.with_name(str(name)).unlink(missing_ok=True)


def load_conversation(path: str | Path, *, model: str) -> SavedConversation:
    """Read what `save_conversation` wrote.

    Args:
        path: the .json file.
        model: fingerprint of the checkpoint at hand.

    Raises:
        PromptError: if it is no conversation, is damaged, or was held with another checkpoint.
    """
    path = Path(path)
    if not os.path.exists(path):  # which, unlike a Path, never raises
        raise PromptError(f"there is no conversation {path}: expected a file made by saving one")
    document = _read(path)
    if document.get("version") != VERSION:
        raise PromptError(
            f"{path} has version {document.get('version')!r:.40}, expected {VERSION}: read it "
            "with the sa2jax that wrote it"
        )
    if document.get("model") != model:
        raise PromptError(
            f"{path} was held with another checkpoint: expected {model}, got "
            f"{document.get('model')!s:.40}; load that one or start anew"
        )
    try:
        _dump(
            document
        ).encode()  # refuses what `save_conversation` cannot have written: NaN, lone surrogates
        _expect_keys("the file", document, _KEYS)
        if not isinstance(document["facts"], dict) or not isinstance(document["turns"], list):
            raise PromptError("expected facts as an object and turns as a list")
        recordings = _unpack(path, document["arrays"], document["sha256"])
        turns = tuple(_turn_from_json(turn, recordings) for turn in document["turns"])
    except (PromptError, ValueError, RecursionError) as error:
        raise PromptError(
            f"{path} is damaged ({str(error)[:200]}): use a copy or start anew"
        ) from None
    return SavedConversation(turns, document["facts"])


# --- files -------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any]:
    """The JSON of a conversation."""
    try:
        document = read_json(path)
    except FileError as error:
        raise PromptError(
            f"{path} cannot be read as JSON ({error.reason}): expected a saved conversation"
        ) from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise PromptError(f"{path} is something else: expected a saved conversation")
    return document


def _own_arrays(path: Path) -> str | None:
    """The file of recordings that the conversation at `path`, if any, names and nobody else."""
    name = _read(path).get("arrays") if os.path.exists(path) else None
    pattern = re.escape(path.stem) + r"\.[0-9a-f]{12}\.npz"
    return name if isinstance(name, str) and re.fullmatch(pattern, name) else None


def _replace(path: Path, data: bytes) -> None:
    with new_file(path) as temporary:
        temporary.write_bytes(data)


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _pack(arrays: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def _unpack(path: Path, name: Any, digest: Any) -> dict[str, Recording]:
    """The recordings beside a conversation."""
    if name is None and digest is None:
        return {}
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".npz"):
        raise PromptError(f"expected recordings in an .npz file beside it, got {name!r}")
    try:
        data = read_bytes(path.with_name(name), ARRAYS)
    except FileError as error:
        raise PromptError(f"its recordings {name} cannot be read: {error.reason}") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise PromptError(f"its recordings {name} have changed")
    try:
        return {key: _recording(key, array) for key, array in parse_npz(data, name).items()}
    except (FileError, PromptError) as error:
        raise PromptError(f"its recordings {name} cannot be read: {reason_of(error)}") from None


def _recording(key: str, samples: np.ndarray) -> Recording:
    """A recording, if `save_conversation` can have written it."""
    try:
        recording = Recording(samples)
    except AudioError as error:
        raise PromptError(f"{key[:40]!r}: {error}") from None
    if np.abs(recording.samples).max() > LOUDEST:
        raise PromptError(f"{key[:40]!r}: expected samples within ±{LOUDEST}")
    return recording


# --- turns -------------------------------------------------------------------------------------


def _turn_to_json(turn: Message, names: dict[Recording, str]) -> dict[str, Any]:
    """A turn for JSON; `names` gets each new recording."""
    content: Any = turn.content
    if not isinstance(content, str | None):
        content = [_piece_to_json(piece, names) for piece in content]
    return {"role": turn.role, "content": content, "eot": bool(turn.eot)}


def _piece_to_json(piece: Any, names: dict[Recording, str]) -> dict[str, Any]:
    if isinstance(piece, Text):
        if piece.marked != piece.text:
            raise PromptError(f"cannot save text with marks around it: {piece.marked!r:.80}")
        return {"type": "text", "text": piece.text}
    if isinstance(piece, Ids):
        if any(i < 0 for i in piece.ids):
            raise PromptError(f"expected ids from 0 on, got {min(piece.ids)}")
        return {"type": "ids", "ids": [int(i) for i in piece.ids]}
    if not isinstance(piece, Audio) or not isinstance(piece.source, Recording):
        source = getattr(piece, "source", piece)
        raise PromptError(
            f"cannot save audio given as {type(source).__name__}: expected "
            "Audio(Recording.from_source(…))"
        )
    return {"type": "audio", "array": names.setdefault(piece.source, f"clip{len(names)}")}


def _turn_from_json(turn: Any, recordings: Mapping[str, Recording]) -> Message:
    _expect_keys("a turn", turn, {"role", "content", "eot"})
    role, content, eot = turn["role"], turn["content"], turn["eot"]
    if role not in ROLES:
        raise PromptError(f"unknown role {role!r}")
    if not isinstance(content, str | list | None) or not isinstance(eot, bool):
        raise PromptError(
            "expected a turn's content as text, a list or null and eot as true or false, got "
            f"{type(content).__name__} and {eot!r}"
        )
    if isinstance(content, list):
        content = [_piece_from_json(item, recordings) for item in content]
    return Message(role, content, eot)


def _piece_from_json(item: Any, recordings: Mapping[str, Recording]) -> Piece:
    kind = item.get("type") if isinstance(item, dict) else None
    key = {"text": "text", "ids": "ids", "audio": "array"}.get(str(kind))
    if key is None:
        raise PromptError(f"expected an item of type text, ids or audio, got {item!r:.80}")
    _expect_keys("an item", item, {"type", key})
    value = item[key]
    if kind == "ids":
        if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
            raise PromptError("expected a list of ids, whole numbers from 0 on")
        return Ids(tuple(value))
    if not isinstance(value, str):
        raise PromptError(f"expected {key} to be text, got {type(value).__name__}")
    if kind == "text":
        return Text(value)
    if value not in recordings:
        raise PromptError(f"there is no recording {value!r}")
    return Audio(recordings[value])


def _expect_keys(what: str, value: Any, wanted: set[str]) -> None:
    if not isinstance(value, dict) or set(value) != wanted:
        got = ", ".join(sorted(value)) if isinstance(value, dict) else type(value).__name__
        raise PromptError(f"expected {what} to have {', '.join(sorted(wanted))}, got {got}")

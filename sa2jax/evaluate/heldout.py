"""The held-out set: recordings and texts that no training file has.

    held_out = HeldOut.find("corpus")    # what `sa2jax data synthesize` made, or its heldout/ alone
    held_out.samples("sums", limit=20)

A folder has NAME.jsonl, lines of training data (`messages`, `audios`) or `{"audio", "text"}`; and
voices/NAME.wav, a clean recording of each voice, there or beside it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sa2jax.errors import DataError, FileError, reason_of
from sa2jax.files.json_files import parse_json
from sa2jax.files.raw import is_file, read_jsonl_lines

FOLDER, VOICES = "heldout", "voices"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question and its right answer.

    Attributes:
        name: file and number, such as "sums:12".
        audio: the recording that is heard; None for a written question.
        text: the written question, "" for none.
        system: the system prompt, None for none.
        expected: what the first answer says.
        reference: a recording of it, None for none.
        tool: name of the tool that is to be called, None for none.
        tools: JSON text of the tools that are offered, None for none.
    """

    name: str
    audio: Path | None
    expected: str
    text: str = ""
    system: str | None = None
    reference: Path | None = None
    tool: str | None = None
    tools: str | None = None

    @property
    def content(self) -> Path | str:
        """The question as a conversation takes it: the recording, or the text."""
        return self.text if self.audio is None else self.audio


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A held-out set.

    Attributes:
        folder: where its files are.
        voices: a clean recording of each voice, by name.
    """

    folder: Path
    voices: dict[str, Path]

    @classmethod
    def find(cls, folder: str | Path) -> "HeldOut":
        """The held-out set of a corpus, or one that stands alone.

        Raises:
            DataError: if there is none.
        """
        folder = Path(folder)
        inner = folder / FOLDER
        home = inner if inner.is_dir() else folder
        if not any(home.glob("*.jsonl")):
            raise DataError(
                f"{folder} has no held-out set: expected heldout/*.jsonl, as `sa2jax data "
                "synthesize` makes them"
            )
        places = [home / VOICES, *([folder / VOICES] if home is inner else [home.parent / VOICES])]
        voices: dict[str, Path] = {}
        for place in reversed(places):
            for path in sorted([*place.glob("*.wav"), *place.glob("*.flac")]):
                voices[path.stem] = path
        return cls(folder=home, voices=voices)

    def samples(self, name: str, limit: int | None = None) -> list[Sample]:
        """The samples of a file, or some evenly spaced ones; none if there is no such file."""
        path = self.folder / f"{name}.jsonl"
        return evenly_spaced(read_samples(path), limit) if path.is_file() else []


def read_samples(path: str | Path) -> list[Sample]:
    """All samples of a jsonl file.

    Raises:
        DataError: for a line that is none, or a recording that is not there.
    """
    path = Path(path)
    try:
        lines = list(read_jsonl_lines(path))
    except FileError as error:
        raise DataError(f"{path} cannot be read ({error.reason}): expected jsonl") from None
    samples = []
    for number, line in lines:
        try:
            sample = _sample(parse_json(line, dict), f"{path.stem}:{number}", path.parent)
        except (FileError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}:{number}: expected a question with its answer, as in training data, or "
                f'{{"audio", "text"}}: {type(error).__name__} {reason_of(error)}'
            ) from None
        if sample.audio is not None and not is_file(sample.audio):
            raise DataError(f"{path}:{number}: no such recording: {sample.audio}")
        samples.append(sample)
    return samples


def evenly_spaced(samples: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` samples, evenly spaced."""
    if limit is None or limit >= len(samples):
        return list(samples)
    return [samples[number * len(samples) // limit] for number in range(limit)]


def _sample(row: dict[str, Any], name: str, root: Path) -> Sample:
    """One line; paths start at the file's folder."""
    if "messages" not in row:
        return Sample(name=name, audio=root / row["audio"], expected=str(row["text"]))
    messages, tools = row["messages"], row.get("tools")
    first: dict[str, dict[str, Any]] = {}
    for message in messages:
        first.setdefault(message["role"], message)
    answer, call = first["assistant"], first.get("tool_call")
    audios = row.get("audios") or []
    speech = answer.get("speech")
    return Sample(
        name=name,
        audio=root / audios[0] if audios else None,
        text="" if audios else first["user"]["content"],
        system=first.get("system", {}).get("content"),
        expected=answer["content"],
        reference=root / speech if isinstance(speech, str) else None,
        tool=parse_json(call["content"], dict)["name"] if call else None,
        tools=tools if tools is None or isinstance(tools, str) else json.dumps(tools),
    )

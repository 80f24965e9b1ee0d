"""The held-out set: recordings and texts that no training file has.

    held_out = HeldOut.find("corpus")    # what `sa2jax data synthesize` made, or its heldout/ alone
    held_out.samples("sums", limit=20)

A folder has NAME.jsonl, lines of training data in any form that training reads, or
`{"audio", "text"}`; and voices/NAME.wav, a clean recording of each voice, there or beside it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sa2jax.errors import DataError, FileError, reason_of
from sa2jax.files.json_files import parse_json
from sa2jax.files.raw import is_file
from sa2jax.files.rows import read_rows

if TYPE_CHECKING:
    from sa2jax.train.data.records import Turn

FOLDER, VOICES = "heldout", "voices"
_SAME_ROLES = {"human": "user"}
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question and its right answer.

    Attributes:
        name: file and number, such as "sums:12".
        audio: the first recording that is heard; None for a written question.
        text: what is written of the question, "" for nothing.
        parts: recordings and texts of the question, in order.
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
    parts: tuple[Path | str, ...] = ()
    system: str | None = None
    reference: Path | None = None
    tool: str | None = None
    tools: str | None = None

    @property
    def content(self) -> Path | str | list[Path | str]:
        """The question as a conversation takes it: a recording, a text, or several of them."""
        parts = list(self.parts) or [self.text if self.audio is None else self.audio]
        return parts[0] if len(parts) == 1 else parts


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
        rows = list(read_rows(path))
    except FileError as error:
        raise DataError(f"{path} cannot be read ({error.reason}): expected jsonl") from None
    samples = []
    for place, row in rows:
        try:
            sample = _sample(row, f"{path.stem}{place}", path.parent)
        except (FileError, DataError) as error:
            raise DataError(
                f"{path}{place}: expected a question with its answer, as in training data, or "
                f'{{"audio", "text"}}: {reason_of(error)}'
            ) from None
        for recording in sample.parts:
            if isinstance(recording, Path) and not is_file(recording):
                raise DataError(f"{path}{place}: no such recording: {recording}")
        samples.append(sample)
    return samples


def evenly_spaced(samples: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` samples, evenly spaced."""
    if limit is None or limit >= len(samples):
        return list(samples)
    return [samples[number * len(samples) // limit] for number in range(limit)]


def _sample(row: bytes, name: str, root: Path) -> Sample:
    """One row; paths start at the file's folder."""
    from sa2jax.train.data.records import parse_record, parse_tool_call
    from sa2jax.train.data.row_forms import AUDIO_MARK

    facts = parse_json(row, dict)
    if isinstance(facts.get("audio"), str) and isinstance(facts.get("text"), str | int | float):
        audio = root / facts["audio"]
        return Sample(name=name, audio=audio, parts=(audio,), expected=str(facts["text"]))
    record = parse_record(row, name, root)
    first: dict[str, Turn] = {}
    for turn in record.turns:
        first.setdefault(_SAME_ROLES.get(turn.role, turn.role), turn)
    if not {"user", "assistant"} <= first.keys():
        raise DataError(f"the messages are of {', '.join(first)}: expected a user and an assistant")
    question, answer, call = first["user"], first["assistant"], first.get("tool_call")
    # The first question comes first, and so do its clips.
    clips = iter(record.audios)
    texts = question.content.split(AUDIO_MARK)
    parts: list[Path | str] = [texts[0]]
    for text in texts[1:]:
        parts += [Path(next(clips)), text]
    kept = tuple(part for part in parts if isinstance(part, Path) or part.strip())
    tools = record.tools
    return Sample(
        name=name,
        audio=next((part for part in kept if isinstance(part, Path)), None),
        text="".join(part for part in kept if isinstance(part, str)),
        parts=kept,
        system=first["system"].content if "system" in first else None,
        expected=answer.content,
        reference=Path(answer.speech) if isinstance(answer.speech, str) else None,
        tool=None if call is None else parse_tool_call(call.content).name,
        tools=tools if tools is None or isinstance(tools, str) else json.dumps(tools),
    )

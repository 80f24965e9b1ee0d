"""Shards: prepared samples on disk, written, counted and read.

Data of the language model: samples in shards, packed into rows (`language.data`). Single networks
have another system, prepared folders of clips in batches of like length: `data.recordings`.

OUT/samples-00000.array_record …   each record one sample, see `samples.encode_sample`
OUT/dataset.json                   how many there are, what is in them, their SHA-256
"""

import hashlib
import json
import re
from array import array
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np

from sa2jax import audio
from sa2jax.atomic_io import disk_errors, write_text
from sa2jax.audio.rates import CODE_RATE
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.config import StepAudio2Config
from sa2jax.convert.weights import parse_size
from sa2jax.errors import DataError
from sa2jax.train.data.examples import example_length
from sa2jax.train.data.records import AUDIO_MARK
from sa2jax.train.data.samples import DATASET_JSON, FORMAT, N_MELS, Reject, Sample, encode_sample

REJECTS = "rejects.jsonl"

# Letters of each script; what has none of them is not counted.
_SCRIPTS = {
    "ja": re.compile("[\u3040-\u30ff]"),
    "zh": re.compile("[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U000323af]"),
    "ko": re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3]"),
    "en": re.compile("[A-Za-z]"),
}
_LETTER = re.compile(r"[^\W\d_]")


# --- shards -------------------------------------------------------------------------------------


class ShardWriter:
    """Writes samples as shards and, when its block ends well, dataset.json.

    Args:
        folder: where; must exist.
        n_mels: mel bands of the recordings.
        shard_size: largest shard such as "1GB", or a plain number of samples.

    Attributes:
        samples: how many have been written.
        speech_tokenizer: hash of the weights that made codes here, if any.
        summary: what else dataset.json shall say.
    """

    def __init__(self, folder: Path, *, n_mels: int = N_MELS, shard_size: str = "1GB"):
        self.folder, self.n_mels = folder, n_mels
        self.samples = 0
        self.speech_tokenizer: str | None = None
        self.summary: dict[str, Any] = {}
        self._limits = shard_limits(shard_size)
        self._digest = hashlib.sha256()
        self._seconds = self._spoken = 0.0
        self._shards: list[dict[str, Any]] = []
        self._writer: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._close()
        if kind is None:
            text = json.dumps(self.info(), ensure_ascii=False, indent=2)
            (self.folder / DATASET_JSON).write_text(text + "\n", encoding="utf-8")

    def add(self, sample: Sample) -> None:
        """Write a sample."""
        from array_record.python.array_record_module import ArrayRecordWriter

        blob = encode_sample(sample)
        shard: dict[str, Any] = self._shards[-1] if self._writer else {"bytes": 0, "samples": 0}
        if shard["samples"] and (
            shard["bytes"] + len(blob) > self._limits[0] or shard["samples"] >= self._limits[1]
        ):
            self._close()
        if self._writer is None:
            name = f"samples-{len(self._shards):05d}.array_record"
            shard = {"file": name, "samples": 0, "bytes": 0}
            self._shards.append(shard)
            # One sample a group: each can be read alone.
            self._writer = ArrayRecordWriter(str(self.folder / name), "group_size:1,zstd:1")
        self._writer.write(blob)
        self._digest.update(len(blob).to_bytes(8, "little") + blob)
        shard["samples"] += 1
        shard["bytes"] += len(blob)
        self.samples += 1
        self._seconds += audio_seconds(sample)
        self._spoken += sum(map(len, sample.codes.values())) / CODE_RATE

    def info(self) -> dict[str, Any]:
        """What dataset.json says."""
        return {
            "format": FORMAT,
            "samples": self.samples,
            "seconds": round(self._seconds, 2),
            "seconds_spoken": round(self._spoken, 2),
            "n_mels": self.n_mels,
            "speech_tokenizer": self.speech_tokenizer,
            "fingerprint": self._digest.hexdigest(),
            **self.summary,
            "shards": self._shards,
        }

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
            shard = self._shards[-1]
            shard["bytes"] = (self.folder / shard["file"]).stat().st_size


def audio_seconds(sample: Sample) -> float:
    """How long a sample's recordings are."""
    frames = sum(max(chunk.shape[1] - 2, 0) for clip in sample.mels for chunk in clip)
    return frames * audio.HOP / audio.SAMPLE_RATE


def shard_limits(size: str) -> tuple[float, float]:
    """Bytes and samples that a shard may have."""
    if str(size).isdigit():
        if int(size) < 1:
            raise DataError(f"shard size {size}: expected at least one sample")
        return float("inf"), int(size)
    return parse_size(size), float("inf")


# --- what is left out -------------------------------------------------------------------------


class RejectWriter:
    """Writes down what cannot be used, when its block ends well or there is too much of it.

    Args:
        path: the file, one JSON object a line with `where` and `reason`.
        out: folder that is being made; where there is too much, the file is left beside it.
        limit: how much may be.
    """

    def __init__(self, path: Path, out: Path, limit: int):
        self.path, self.limit = path, limit
        self.kept = out.with_name(f"{out.name}.{REJECTS}")  # where it is left if the run is stopped
        self.rows: list[Reject] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is None:
            self._write(self.path)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def last(self) -> str:
        """Where and why the last one was rejected."""
        return f"{self.rows[-1].where}: {self.rows[-1].reason}" if self.rows else "nothing"

    def add(self, reject: Reject) -> None:
        """Remember one.

        Raises:
            DataError: if these are more than the limit.
        """
        self.rows.append(reject)
        if len(self.rows) > self.limit:
            self._write(self.kept)
            raise DataError(
                f"{len(self.rows)} records cannot be used, more than --max-rejects {self.limit}; "
                f"the last one is {self.last}; all are in {self.kept}"
            )

    def _write(self, path: Path) -> None:
        lines = (json.dumps(asdict(row), ensure_ascii=False) for row in self.rows)
        with disk_errors(path):
            write_text(path, "".join(f"{line}\n" for line in lines))  # not through a link


# --- what is in them ----------------------------------------------------------------------------


def count_letters(text: str) -> dict[str, int]:
    """Letters of a text by script: a guess at its languages.

    Latin letters without accents count as `en`, and Chinese ones as `ja` where kana are near.
    """
    found = {name: len(pattern.findall(text)) for name, pattern in _SCRIPTS.items()}
    if found["ja"]:
        found["ja"] += found.pop("zh")
    return found | {"other": max(len(_LETTER.findall(text)) - sum(found.values()), 0)}


class DatasetStatistics:
    """What the samples hold.

    Args:
        reader: tokenizer and sizes of the model that will read them; without one lengths are
            seconds.
    """

    def __init__(self, reader: tuple[Tokenizer, StepAudio2Config] | None = None):
        self.reader = reader
        self.characters = dict.fromkeys(("zh", "en", "ja", "ko", "other"), 0)
        self.tokens = dict.fromkeys(("text", "heard", "codes"), 0)
        self.heard, self.lengths = array("d"), array("d")

    @property
    def unit(self) -> str:
        """What lengths are measured in."""
        return "seconds" if self.reader is None else "tokens"

    def add(self, sample: Sample) -> None:
        """Count a sample.

        Raises:
            RecordError: if lengths are in tokens, and this is no conversation that a model reads;
                nothing has been counted then.
        """
        heard = audio_seconds(sample)
        spoken = sum(map(len, sample.codes.values()))
        if self.reader is None:
            self.lengths.append(heard + spoken / CODE_RATE)
        else:
            self.lengths.append(example_length(sample, *self.reader))
        self.heard.append(heard)
        self.tokens["codes"] += spoken
        self.tokens["heard"] += sum(
            int(audio.num_tokens(chunk.shape[1])) + 2 for clip in sample.mels for chunk in clip
        )
        for turn in sample.record.turns:
            text = turn.content.replace(AUDIO_MARK, "")
            for script, count in count_letters(text).items():
                self.characters[script] += count
            if self.reader is not None:
                self.tokens["text"] += len(self.reader[0].encode(text))

    def summary(self) -> dict[str, Any]:
        """The counts, for dataset.json."""
        lengths = np.asarray(self.lengths)
        middle, most, largest = (float(round(x, 2)) for x in np.quantile(lengths, (0.5, 0.95, 1)))
        tokens = None if self.reader is None else self.tokens
        return {
            "characters": self.characters,
            "tokens": tokens,
            "lengths": {"unit": self.unit, "median": middle, "p95": most, "longest": largest},
        }


def length_plotter() -> Callable[[DatasetStatistics, Path], None]:
    """What draws how long the samples are, as a PNG file.

    Raises:
        DataError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise DataError(
            "drawing lengths needs matplotlib: install it with `pip install 'sa2jax[train]'`"
        ) from None

    def plot(tally: DatasetStatistics, path: Path) -> None:
        figure = Figure(figsize=(9, 3.5), layout="constrained")
        FigureCanvasAgg(figure)
        panels = (
            ("audio heard, seconds", tally.heard),
            (f"whole sample, {tally.unit}", tally.lengths),
        )
        for axes, (title, values) in zip(figure.subplots(1, 2), panels, strict=True):
            axes.hist(np.asarray(values), bins=40, color="#3b6ea5")
            axes.set(title=title, ylabel="samples")
        figure.savefig(path, dpi=100)

    return plot

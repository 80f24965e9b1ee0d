"""Packing: several whole examples in each row of one length, resumable without loss.

Data of the language model: samples in shards, packed into rows (`language.data`). Single networks
have another system, prepared folders of clips in batches of like length: `data.recordings`.

Two things have to fit. An example of T+1 tokens takes T positions of a row (each predicts the next
token), and each chunk it hears takes a stretch of one of the row's W mel rows:

    tokens   [ example 1 ........ | example 2 ... | example 3 ............ | padding ]
    mel row  [ clip a ...... gap | clip b .. gap |                                  ]

Clips begin where a frame of the adapter does, behind zeros for the convolutions, so that each is
heard as if alone (see `models.audio_encoder`).
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import grain
import numpy as np

from sa2jax import audio
from sa2jax.audio.rates import MEL_RATE
from sa2jax.errors import DataError
from sa2jax.models.audio_encoder import ALIGN, GAP
from sa2jax.train.data.examples import Example
from sa2jax.train.data.samples import Reject

PackedRow = dict[str, Any]
"""A row's arrays by name, see `RowShape.empty`, and `rejects`: what was left out before it."""

# Rejects in a row that are reported without waiting for something to go with them.
_MAX_CONSECUTIVE_REJECTS = 64
_MAX_REPLAY = 16  # draws between two examples up to which going on is cheaper than starting there


@dataclass(frozen=True, kw_only=True)
class RowShape:
    """The size of a row.

    Attributes:
        length: positions, T.
        mel_rows: how many mel rows it has, W; 0 for text only.
        mel_frames: frames (100 Hz) of each, L, a multiple of 8.
        clips: how many clips each can hold, S.
        mels: mel bands, M.
        pad: the token that fills what is left.
    """

    length: int
    mel_rows: int = 1
    mel_frames: int = 3000
    clips: int = 8
    mels: int = 128
    pad: int = 0

    def __post_init__(self):
        if min(self.length, self.clips, self.mels) < 1 or self.mel_rows < 0:
            raise DataError(f"expected length, clips and mels of at least 1, got {self}")
        if self.mel_frames < ALIGN or self.mel_frames % ALIGN:
            raise DataError(
                f"mel_frames={self.mel_frames}: expected a multiple of {ALIGN}, such as 3000"
            )

    @property
    def features(self) -> int:
        """Embeddings (12.5 Hz) that come of a row's mel rows, those of zeros too."""
        return self.mel_rows * (self.mel_frames // ALIGN)

    def empty(self) -> PackedRow:
        """A row without anything.

        Returns:
            ids, targets: int32 [T], the padding; targets follow ids.
            weights: float32 [T], of predicting each target; 0.
            kinds: uint8 [T], which of `examples.TOKEN_KINDS` each target is; 0.
            segments: int32 [T], which example a position belongs to, from 1; 0 for padding.
            positions: int32 [T], of each token in its example; 0.
            feature_index: int32 [T], which of the row's `features` stands at each position; −1 for
                a token.
            mels: float32 [W, M, L], log-mel frames.
            starts, frames: int32 [W, S], first frame and frames of each clip; 0 for none.
        """
        size, heard = self.length, (self.mel_rows, self.clips)
        return {
            "ids": np.full(size, self.pad, np.int32),
            "targets": np.full(size, self.pad, np.int32),
            "weights": np.zeros(size, np.float32),
            "kinds": np.zeros(size, np.uint8),
            "segments": np.zeros(size, np.int32),
            "positions": np.zeros(size, np.int32),
            "feature_index": np.full(size, -1, np.int32),
            "mels": np.zeros((self.mel_rows, self.mels, self.mel_frames), np.float32),
            "starts": np.zeros(heard, np.int32),
            "frames": np.zeros(heard, np.int32),
        }


def padded_frames(frames: int) -> int:
    """Frames that a clip takes of a mel row: its own, and zeros up to where the next may begin."""
    return ALIGN * -(-(frames + GAP) // ALIGN)


class OpenRow:
    """A row that is being filled.

    Args:
        shape: its size.

    Attributes:
        used: positions that are taken.
        origins: what `Pack` has to remember of each of its examples.
    """

    def __init__(self, shape: RowShape):
        self.shape, self.used = shape, 0
        self.origins: list[Any] = []
        self._examples: list[tuple[Example, list[tuple[int, int]]]] = []
        self._ends, self._counts = [0] * shape.mel_rows, [0] * shape.mel_rows

    def __len__(self) -> int:
        return len(self._examples)

    def add(self, example: Example, origin: Any = None) -> bool:
        """Put an example in if it fits, and say whether it did."""
        if self.used + len(example.ids) - 1 > self.shape.length:
            return False
        ends, counts = self._ends.copy(), self._counts.copy()
        places: list[tuple[int, int]] = []
        for mel in example.mels:
            size = padded_frames(mel.shape[1])
            fits = (
                row
                for row, end in enumerate(ends)
                if counts[row] < self.shape.clips and end + size <= self.shape.mel_frames
            )
            if (row := next(fits, None)) is None:
                return False
            places.append((row, ends[row]))
            ends[row] += size
            counts[row] += 1
        self._ends, self._counts = ends, counts
        self._examples.append((example, places))
        self.used += len(example.ids) - 1
        self.origins.append(origin)
        return True

    @property
    def fullness(self) -> float:
        """How much of its tokens or of its sound is taken, whichever is more; from 0 to 1."""
        sound = sum(self._ends) / max(1, self.shape.mel_rows * self.shape.mel_frames)
        return max(self.used / self.shape.length, sound)

    def arrays(self) -> PackedRow:
        """The row as arrays, see `RowShape.empty`."""
        out, at = self.shape.empty(), 0
        counts = [0] * self.shape.mel_rows
        per_row = self.shape.mel_frames // ALIGN
        for number, (example, places) in enumerate(self._examples, 1):
            size = len(example.ids) - 1
            span = slice(at, at + size)
            out["ids"][span], out["targets"][span] = example.ids[:-1], example.ids[1:]
            out["weights"][span], out["kinds"][span] = example.weights[1:], example.kinds[1:]
            out["segments"][span], out["positions"][span] = number, np.arange(size)
            for mel, first, (row, start) in zip(example.mels, example.starts, places, strict=True):
                frames = mel.shape[1]
                tokens = audio.num_tokens(frames)
                slot = row * per_row + start // ALIGN
                out["feature_index"][at + first : at + first + tokens] = slot + np.arange(tokens)
                out["mels"][row, :, start : start + frames] = mel
                out["starts"][row, counts[row]] = start
                out["frames"][row, counts[row]] = frames
                counts[row] += 1
            at += size
        return out


def misfit_reason(example: Example, shape: RowShape) -> str | None:
    """Why an example fits in no row of a shape; None if it does."""
    if OpenRow(shape).add(example):
        return None
    tokens = len(example.ids) - 1
    if tokens > shape.length:
        return (
            f"{tokens} tokens, more than the context of {shape.length}: cut it into parts or "
            "raise `length`"
        )
    seconds, count = sum(mel.shape[1] for mel in example.mels) / MEL_RATE, len(example.mels)
    return (
        f"{count} clip{'s' * (count > 1)} of {seconds:.1f} s, more than a row of "
        f"{shape.mel_rows} × {shape.mel_frames / MEL_RATE:g} s with {shape.clips} clips "
        "each: raise `mel_rows`"
    )


# --- as a part of a Grain pipeline ----------------------------------------------------------------


class Pack(grain.IterDataset):
    """First-fit packing over a few open rows.

    An example goes into the first open row that has room for its tokens and for all that it hears.
    If none has, the fullest is emitted and a new one opened. What fits in no empty row, and what
    comes as a `Reject`, goes into the `rejects` of the row that is emitted next; rows without
    anything carry them where too many came one after another, and at the end.

    Args:
        parent: gives an `Example` or a `Reject` at a time.
        shape: the size of a row.
        open_rows: how many rows are open.
        pack: False to give every example a row of its own.
    """

    def __init__(
        self, parent: grain.IterDataset, shape: RowShape, *, open_rows: int = 16, pack: bool = True
    ):
        super().__init__(parent)
        if open_rows < 1:
            raise DataError(f"open_rows={open_rows}: expected at least 1")
        self._shape, self._open_rows, self._pack = shape, open_rows, pack

    def __iter__(self) -> "PackIterator":
        parent = iter(self.parents[0])
        return PackIterator(parent, self._shape, self._open_rows if self._pack else 0)

    def __str__(self) -> str:
        return f"Pack({self._shape}, open_rows={self._open_rows}, pack={self._pack})"


@dataclass(frozen=True)
class _Origin:
    """Where an example came from.

    Attributes:
        number: how many elements came before it.
        checksum: a checksum of its tokens.
        state: the parent's before it.
    """

    number: int
    checksum: int
    state: Mapping[str, Any] = field(repr=False)


def _checksum(example: Example) -> int:
    return zlib.crc32(example.ids.tobytes())


class PackIterator(grain.DatasetIterator):
    """Iterator of `Pack`; its state names what is in the open rows and is small."""

    def __init__(self, parent: grain.DatasetIterator, shape: RowShape, open_rows: int):
        super().__init__(parent)
        self._examples, self._shape, self._limit = parent, shape, open_rows
        self._rows: list[OpenRow] = []
        self._drawn = 0  # elements taken from the parent

    def __next__(self) -> PackedRow:
        rejects: list[Reject] = []
        consecutive_rejects = 0
        while True:
            before = self._examples.get_state()
            try:
                element = next(self._examples)
            except StopIteration:
                if self._rows:
                    return self._given(self._rows.pop(0), rejects)
                if rejects:
                    return self._given(OpenRow(self._shape), rejects)
                raise
            number, full = self._drawn, None
            self._drawn += 1
            if isinstance(element, Example):
                if reason := misfit_reason(element, self._shape):
                    element = Reject(element.where, reason)
                else:
                    drawn = _Origin(number, _checksum(element), before)
                    full, consecutive_rejects = self._place(element, drawn), 0
            if isinstance(element, Reject):
                rejects.append(element)
                consecutive_rejects += 1
                if consecutive_rejects >= _MAX_CONSECUTIVE_REJECTS:
                    full = OpenRow(self._shape)
            if full is not None:
                return self._given(full, rejects)

    def _place(self, example: Example, drawn: _Origin) -> OpenRow | None:
        """Put an example into a row; the row that has to be emitted now, if there is one."""
        if any(row.add(example, drawn) for row in self._rows):
            return None
        new = OpenRow(self._shape)
        new.add(example, drawn)
        if not self._limit:
            return new
        full = None
        if len(self._rows) == self._limit:
            fullest = max(range(self._limit), key=lambda n: self._rows[n].fullness)
            full = self._rows.pop(fullest)
        self._rows.append(new)
        return full

    def _given(self, row: OpenRow, rejects: list[Reject]) -> PackedRow:
        return {**row.arrays(), "rejects": tuple(rejects)}

    def get_state(self) -> dict[str, Any]:
        """Where the parent is, and where each example in an open row came from."""
        return {
            "parent": self._examples.get_state(),
            "drawn": self._drawn,
            "rows": [[[h.number, h.checksum, h.state] for h in row.origins] for row in self._rows],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Draw the examples of the open rows again, then go on where the state was taken.

        Raises:
            DataError: if other examples come than before.
        """
        owners = {
            held[0]: (owner, _Origin(*held))
            for owner, row in enumerate(state["rows"])
            for held in row
        }
        self._rows = [OpenRow(self._shape) for _ in state["rows"]]
        at = None  # number of the draw that the parent would give next
        for number in sorted(owners):
            owner, drawn = owners[number]
            if at is None or number - at > _MAX_REPLAY:
                self._examples.set_state(dict(drawn.state))
            else:
                for _ in range(number - at):
                    next(self._examples, None)
            at = number + 1
            example = next(self._examples, None)
            same = isinstance(example, Example) and _checksum(example) == drawn.checksum
            if not same or not self._rows[owner].add(example, drawn):
                raise DataError(
                    "the data has changed since this state was saved (at "
                    f"{getattr(example, 'where', 'its end')}): bring it back, or start anew"
                )
        self._examples.set_state(state["parent"])
        self._drawn = state["drawn"]

    def __str__(self) -> str:
        return f"PackIterator({self._shape})"

"""Configuration of the language model's training data: sources, row sizes and packing.

Data of the language model: samples in shards, packed into rows (`language.data`). Single networks
have another system, prepared folders of clips in batches of like length: `data.recordings`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sa2jax.errors import DataError
from sa2jax.train.data.examples import PROMPT_STYLES, TOKEN_KINDS, PromptStyle
from sa2jax.train.language.packing import RowShape


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learnt from, and in which form.

    Attributes:
        sources: files and folders, see `samples.open_source`, and the weight of each: how many
            samples are drawn from it in relation to the others (to about 1 %).
        length: tokens of a row.
        rows: rows of an update, of all hosts.
        accumulation_steps: how many parts an update's rows are split into, one after another; 0
            for no split.
        mel_rows: rows of sound of each row; a second of sound takes 12.5 tokens. 0 for text only.
        mel_frames: frames (100 Hz) of each, a multiple of 8.
        clips: clips (of at most 25 s) that each can hold.
        prompt_style: `chat`, or `base` for base models, see `examples.make_example`.
        loss_weights: of the tokens of each kind in the loss.
        shuffle: draw samples in another order every epoch, rather than in that of the files.
        epochs: how often; None for without end. Of a mixture, an epoch ends when the first of its
            sources has been seen once; in the next, all go on where they were.
        workers: processes that prepare rows; 0 for threads of this one.
        max_rejects: samples that may be unusable.
        pack: False for one example a row.
    """

    sources: Mapping[str, float]
    length: int = 4096
    rows: int = 1
    accumulation_steps: int = 0
    mel_rows: int = 1
    mel_frames: int = 3000
    clips: int = 8
    prompt_style: PromptStyle = "chat"
    loss_weights: Mapping[str, float] = field(
        default_factory=lambda: dict.fromkeys(TOKEN_KINDS, 1.0)
    )
    shuffle: bool = True
    epochs: int | None = None
    workers: int = 0
    max_rejects: int = 100
    pack: bool = True

    def __post_init__(self):
        if not self.sources or not all(0 < w < float("inf") for w in self.sources.values()):
            raise DataError(
                f"expected one or more sources, each with a weight above 0, got {self.sources}"
            )
        for name, least in {
            "length": 2,
            "rows": 1,
            "accumulation_steps": 0,
            "mel_rows": 0,
            "workers": 0,
            "max_rejects": 0,
            "clips": 1,
        }.items():
            if getattr(self, name) < least:
                raise DataError(f"{name}={getattr(self, name)}: expected at least {least}")
        if self.epochs is not None and self.epochs < 1:
            raise DataError(f"epochs={self.epochs}: expected at least 1, or None for without end")
        if self.accumulation_steps and self.rows % self.accumulation_steps:
            raise DataError(
                f"rows={self.rows}: expected a multiple of "
                f"accumulation_steps={self.accumulation_steps}"
            )
        if self.prompt_style not in PROMPT_STYLES:
            raise DataError(
                f"prompt_style={self.prompt_style!r}: expected one of {', '.join(PROMPT_STYLES)}"
            )
        if set(self.loss_weights) - set(TOKEN_KINDS) or not all(
            w >= 0 for w in self.loss_weights.values()
        ):
            raise DataError(
                f"loss_weights={dict(self.loss_weights)}: expected numbers from 0 for "
                f"{', '.join(TOKEN_KINDS)}"
            )
        self.shape(1)

    def shape(self, mels: int, pad: int = 0) -> RowShape:
        """The size of a row for a model with so many mel bands."""
        return RowShape(
            length=self.length,
            mel_rows=self.mel_rows,
            mel_frames=self.mel_frames,
            clips=self.clips,
            mels=mels,
            pad=pad,
        )

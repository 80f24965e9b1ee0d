"""The suite `nano`: its row of the table, without what its runs import."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sa2jax.errors import DataError
from sa2jax.evaluate.base import RunContext, Suite, SuiteRun
from sa2jax.evaluate.heldout import FOLDER, HeldOut
from sa2jax.evaluate.nano_metrics import METRICS, NanoOptions

if TYPE_CHECKING:
    from sa2jax.evaluate.nano import Judges


def _find_data(model: Path, data: Path | None) -> Path:
    if data is None and not (model / FOLDER).is_dir():
        raise DataError(
            f"{model} has no folder {FOLDER}/ with a held-out set: make one with `sa2jax data "
            "synthesize` and give it as --data"
        )
    return HeldOut.find(model if data is None else data).folder


def _load_judges(metrics: Sequence[str]) -> "Judges":
    from sa2jax.evaluate.nano import Judges

    return Judges.load(metrics)


def _start(context: RunContext) -> SuiteRun:
    from sa2jax.evaluate.nano import NanoRun

    return NanoRun(context)


NANO = Suite(
    name="nano",
    description="does the nano model hear, answer, call tools and keep its voice?",
    metrics=METRICS,
    find_data=_find_data,
    load_judges=_load_judges,
    start=_start,
    options=NanoOptions,
    not_compared=("first_sound", "real_time", "streamed"),
)

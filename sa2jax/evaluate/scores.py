"""Tables of scores: rows with their goals, how sure they are, JSON and print."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np
from rich.console import Console
from rich.table import Table

Mark = Literal["met", "floor", "below", "not measured"]
_CONFIDENCE = 1.959964  # standard deviations around which 95 % of a normal distribution lies
_DRAWS = 1000  # of the bootstrap
_COLORS: Mapping[Mark, str] = {
    "met": "green", "floor": "yellow", "below": "red", "not measured": "dim",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of a table.

    Attributes:
        key: what selects it.
        figure: what it says.
        unit: of the figures: `%`, `points` (differences of %), `s`, or "" for a plain ratio.
        floor: the least that is good enough.
        aim: what it should be; None where the floor is the aim.
        lower: whether less is better.
        value: what was measured; None if it was not, and `note` says why.
        n: items (recordings, replies) that it was measured on.
        interval: 95 % confidence; None where it has none.
        note: how it came about.
    """

    key: str
    figure: str
    unit: Literal["%", "points", "s", ""]
    floor: float
    aim: float | None = None
    lower: bool = False
    value: float | None = None
    n: int = 0
    interval: tuple[float, float] | None = None
    note: str = ""

    @property
    def mark(self) -> Mark:
        """Whether the aim is met, the floor is held, or neither."""
        if self.value is None:
            return "not measured"
        if self._reaches(self.floor if self.aim is None else self.aim):
            return "met"
        return "floor" if self._reaches(self.floor) else "below"

    def _reaches(self, goal: float) -> bool:
        value = self.value or 0.0
        return value <= goal + 1e-9 if self.lower else value >= goal - 1e-9

    def missing(self, why: str) -> Self:
        """The row without a figure."""
        return replace(self, value=None, n=0, interval=None, note=f"not measured: {why}")

    def rate(self, rights: Sequence[bool], note: str = "") -> Self:
        """The row as a share of right items in %, with its Wilson interval."""
        if not rights:
            return self.missing("there are no items")
        right, n = sum(map(bool, rights)), len(rights)
        low, high = wilson(right, n)
        interval = 100 * low, 100 * high
        return replace(self, value=100 * right / n, n=n, interval=interval, note=note)

    def errors(self, errors: Sequence[int], words: Sequence[int], note: str = "") -> Self:
        """The row as a word error rate in %, with a bootstrap interval over the recordings."""
        if not sum(words):
            return self.missing("there are no words")
        low, high = bootstrap(errors, words)
        value, interval = 100 * sum(errors) / sum(words), (100 * low, 100 * high)
        return replace(self, value=value, n=len(errors), interval=interval, note=note)

    def measured(self, value: float, n: int, note: str = "") -> Self:
        """The row with a figure that has no interval."""
        return replace(self, value=value, n=n, interval=None, note=note)

    def shown(self, value: float | None) -> str:
        """A figure with its unit."""
        if value is None:
            return "–"
        digits = 2 if self.unit in ("s", "") else 1
        sign = "+" if self.unit == "points" and value > 0 else ""
        text = f"{sign}{value:.{digits}f}"
        return f"{text} {self.unit}".rstrip()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One item of a row and what the model made of it.

    Attributes:
        row: key of the row.
        item: which item of the held-out set.
        expected: what would be right.
        found: what the model wrote, or what a judge heard.
        right: whether that is right; None where words are counted.
        model: which of two models answered: "" for the one that is scored.
    """

    row: str
    item: str
    expected: str
    found: str
    right: bool | None = None
    model: str = ""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A table.

    Attributes:
        title: what was scored.
        rows: in order.
        facts: what it was measured on and how.
        answers: every single answer, for whoever wants to know what went wrong.
    """

    title: str
    rows: tuple[Row, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    answers: tuple[Answer, ...] = ()

    def __getitem__(self, key: str) -> Row:
        """The row of a key."""
        return next(row for row in self.rows if row.key == key)

    @property
    def below(self) -> tuple[str, ...]:
        """Keys of the rows that do not hold their floor."""
        return tuple(row.key for row in self.rows if row.mark == "below")

    def to_dict(self) -> dict[str, Any]:
        """For JSON; without the answers."""
        rows = [asdict(row) | {"mark": row.mark} for row in self.rows]
        return {"title": self.title, "facts": dict(self.facts), "rows": rows}


def print_scores(scores: Scores, console: Console) -> None:
    """Print the table, then the notes."""
    table = Table(title=scores.title, title_justify="left")
    table.add_column("figure")
    for name in ("value", "95 %", "n", "floor", "aim"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in scores.rows:
        between = "–".join(f"{x:.1f}" for x in row.interval) if row.interval else ""
        table.add_row(
            row.figure, row.shown(row.value), between, str(row.n or ""), row.shown(row.floor),
            "" if row.aim is None else row.shown(row.aim),
            f"[{_COLORS[row.mark]}]{row.mark}[/]",
        )  # fmt: skip
    console.print(table)
    for row in scores.rows:
        if row.note:
            console.print(f"{row.key}: {row.note}", markup=False, highlight=False)
    facts = ", ".join(f"{name} {value}" for name, value in scores.facts.items())
    console.print(facts, markup=False, highlight=False)


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927), which never leaves 0 to 1."""
    if not 0 <= right <= n or not n:
        raise ValueError(f"expected 0 <= right <= n and n > 0, got {right} of {n}")
    share, z = right / n, _CONFIDENCE
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(errors: Sequence[int], words: Sequence[int]) -> tuple[float, float]:
    """A 95 % interval of errors per word: recordings are drawn again and again, the same each time.

    Words of one recording go wrong together, so that a binomial interval would be too narrow.
    """
    wrong, total = np.asarray(errors), np.asarray(words)
    drawn = np.random.default_rng(0).integers(len(wrong), size=(_DRAWS, len(wrong)))
    rates = wrong[drawn].sum(axis=1) / np.maximum(total[drawn].sum(axis=1), 1)
    low, high = np.quantile(rates, (0.025, 0.975))
    return float(low), float(high)

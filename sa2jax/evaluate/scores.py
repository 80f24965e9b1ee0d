"""Scores: metrics with thresholds and targets, confidence intervals, JSON and printed tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any, Literal, Self

import numpy as np
from rich.console import Console
from rich.table import Table

Verdict = Literal["target", "threshold", "below", "not measured"]
NOTHING_RIGHT = "there is nothing to lose: no answer was right"
_CONFIDENCE = 1.959964  # standard deviations around which 95 % of a normal distribution lies
_DRAWS = 1000  # of the bootstrap
_COLORS: Mapping[Verdict, str] = {
    "target": "green",
    "threshold": "yellow",
    "below": "red",
    "not measured": "dim",
}


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric of a suite, before or after it was measured.

    Attributes:
        key: what selects it.
        title: what it measures.
        unit: of the figures: `%`, `points` (differences of %), `s`, or "" for a plain ratio.
        threshold: the least value that is good enough.
        target: the value aimed at; None where the threshold is the target.
        lower_is_better: as for error rates and latencies.
        value: what was measured; None if it was not, and `note` says why.
        n: items (recordings, replies) that it was measured on.
        interval: 95 % confidence; None where it has none.
        note: how it came about.
    """

    key: str
    title: str
    unit: Literal["%", "points", "s", ""]
    threshold: float
    target: float | None = None
    lower_is_better: bool = False
    value: float | None = None
    n: int = 0
    interval: tuple[float, float] | None = None
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        """Whether the target is met, the threshold is held, or neither."""
        if self.value is None:
            return "not measured"
        if self._reaches(self.threshold if self.target is None else self.target):
            return "target"
        return "threshold" if self._reaches(self.threshold) else "below"

    def _reaches(self, goal: float) -> bool:
        value = self.value or 0.0
        return value <= goal + 1e-9 if self.lower_is_better else value >= goal - 1e-9

    def not_measured(self, why: str) -> Self:
        """The metric without a figure."""
        return replace(self, value=None, n=0, interval=None, note=f"not measured: {why}")

    def accuracy(self, rights: Sequence[bool], note: str = "") -> Self:
        """The metric as a share of right items in %, with its Wilson interval."""
        if not rights:
            return self.not_measured("there are no items")
        right, n = sum(map(bool, rights)), len(rights)
        low, high = wilson(right, n)
        interval = 100 * low, 100 * high
        return replace(self, value=100 * right / n, n=n, interval=interval, note=note)

    def word_error_rate(self, errors: Sequence[int], words: Sequence[int], note: str = "") -> Self:
        """The metric as a word error rate in %, with a bootstrap interval over the recordings."""
        if not sum(words):
            return self.not_measured("there are no words")
        low, high = bootstrap(errors, words)
        value, interval = 100 * sum(errors) / sum(words), (100 * low, 100 * high)
        return replace(self, value=value, n=len(errors), interval=interval, note=note)

    def measured(self, value: float, n: int, note: str = "") -> Self:
        """The metric with a figure that has no interval."""
        return replace(self, value=value, n=n, interval=None, note=note)

    def median(self, values: Sequence[float | None]) -> Self:
        """The metric as the median of the values that are there."""
        known = [value for value in values if value is not None]
        if not known:
            return self.not_measured("no reply had a sound")
        return self.measured(median(known), len(known), f"slowest {max(known):.2f}")

    def format(self, value: float | None) -> str:
        """A figure with its unit."""
        if value is None:
            return "–"
        digits = 2 if self.unit in ("s", "") else 1
        sign = "+" if self.unit == "points" and value > 0 else ""
        text = f"{sign}{value:.{digits}f}"
        return f"{text} {self.unit}".rstrip()


@dataclass(frozen=True)
class Prediction:
    """One sample of a metric, and what the model made of it.

    Attributes:
        metric: key of the metric.
        sample: name of the sample.
        expected: what would be right.
        predicted: what the model wrote, or what a judge heard.
        correct: whether that is right; None where words are counted.
        model: which of two models answered: "" for the one that is scored.
    """

    metric: str
    sample: str
    expected: str
    predicted: str
    correct: bool | None = None
    model: str = ""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The results of a suite.

    Attributes:
        title: what was scored.
        metrics: in order.
        metadata: what it was measured on and how.
        predictions: every single answer, for whoever wants to know what went wrong.
    """

    title: str
    metrics: tuple[Metric, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    predictions: tuple[Prediction, ...] = ()

    def __getitem__(self, key: str) -> Metric:
        """The metric of a key."""
        return next(metric for metric in self.metrics if metric.key == key)

    @property
    def below_threshold(self) -> tuple[str, ...]:
        """Keys of the metrics that do not hold their threshold."""
        return tuple(metric.key for metric in self.metrics if metric.verdict == "below")

    def to_dict(self) -> dict[str, Any]:
        """For JSON; without the predictions."""
        metrics = [asdict(metric) | {"verdict": metric.verdict} for metric in self.metrics]
        return {"title": self.title, "metadata": dict(self.metadata), "metrics": metrics}


def print_scores(scores: Scores, console: Console) -> None:
    """Print the table, then the notes."""
    table = Table(title=scores.title, title_justify="left")
    table.add_column("figure")
    for name in ("value", "95 %", "n", "threshold", "target"):
        table.add_column(name, justify="right")
    table.add_column("")
    for metric in scores.metrics:
        between = "–".join(f"{x:.1f}" for x in metric.interval) if metric.interval else ""
        table.add_row(
            metric.title,
            metric.format(metric.value),
            between,
            str(metric.n or ""),
            metric.format(metric.threshold),
            "" if metric.target is None else metric.format(metric.target),
            f"[{_COLORS[metric.verdict]}]{metric.verdict}[/]",
        )
    console.print(table)
    for metric in scores.metrics:
        if metric.note:
            console.print(f"{metric.key}: {metric.note}", markup=False, highlight=False)
    metadata = ", ".join(f"{name} {value}" for name, value in scores.metadata.items())
    console.print(metadata, markup=False, highlight=False)


def worst_change(
    metric: Metric, before: Mapping[str, Metric], after: Mapping[str, Metric], *, condition: str
) -> Metric:
    """By how many points metrics got better, where they got worst.

    Metrics of which `before` has nothing right are left out: there is nothing to lose.

    Args:
        metric: the one to fill.
        before: measured metrics, by key.
        after: the same in the other case; some may be missing.
        condition: says what `before` is, such as "with float weights".
    """
    points, is_measured = {}, False
    for key, old in before.items():
        value, new = old.value, after[key].value if key in after else None
        if value is None or new is None:
            continue
        is_measured = True
        if old.lower_is_better and value < 100:
            points[key] = value - new
        elif not old.lower_is_better and value > 0:
            points[key] = new - value
    if not is_measured:
        return metric.not_measured("no metric to compare was measured")
    if not points:
        return metric.not_measured(f"{NOTHING_RIGHT} {condition}")
    note = ", ".join(f"{key} {value:+.1f}" for key, value in points.items())
    return metric.measured(min(points.values()), sum(before[key].n for key in points), note)


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

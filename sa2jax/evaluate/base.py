"""Evaluation suites: what one declares, and the run of one model through it.

A suite is a row of `suites.SUITES`: its metrics, its data, its judges, and a `SuiteRun` that asks a
model every sample and scores the predictions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa2jax.errors import DataError
from sa2jax.evaluate.scores import Metric, Prediction

if TYPE_CHECKING:
    from sa2jax.inference.requests import GenerationConfig
    from sa2jax.pipeline import StepAudio2

INT8 = "int8"  # key of the metric that compares int8 weights with float ones


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Options of every suite.

    Attributes:
        metrics: keys of the metrics to measure, all by default.
        limit: samples of each metric at most.
        max_new_tokens: limit of a reply; a second of speech takes 31.
        greedy: take the most likely token, instead of drawing as conversations do by default.
        seed: of what is drawn; reply n has seed + n.

    Raises:
        DataError: for a limit below 1.
    """

    metrics: tuple[str, ...] = ()
    limit: int | None = None
    max_new_tokens: int = 256
    greedy: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise DataError(f"limit={self.limit}: expected at least 1 item")


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Options of a suite that has none of its own."""


class ProgressCounter:
    """Counts samples done, over all models of an evaluation.

    Args:
        progress: called with (samples done, samples in all).
    """

    def __init__(self, progress: Callable[[int, int], None]):
        self.progress, self.done, self.total = progress, 0, 0

    def add(self) -> None:
        """Count one sample."""
        self.done += 1
        self.progress(self.done, self.total)

    def sub_progress(self, most: int) -> Callable[[int, int], None]:
        """A callback (done, total) that counts up to `most` samples from here."""
        before = self.done

        def update(done: int, total: int) -> None:
            while self.done < before + min(done, most):
                self.add()

        return update


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """Inputs of a run.

    Attributes:
        model: the model to ask.
        data: folder of the samples, as the suite's `find_data` gave it.
        metrics: the metrics to measure, none of them measured yet.
        options: options of every suite.
        suite_options: the suite's own, of its class `Suite.options`.
        judges: what the suite's `load_judges` gave.
        counter: counts samples done.
        name: which of two models this is: "" for the one that is scored.
    """

    model: "StepAudio2"
    data: Path
    metrics: tuple[Metric, ...]
    options: EvalOptions
    suite_options: Any
    judges: Any
    counter: ProgressCounter
    name: str = ""


class SuiteRun(ABC):
    """Evaluation of one model by a suite.

    Attributes:
        context: the model, the data and the options.
        predictions: every prediction, by `record`.
    """

    def __init__(self, context: RunContext):
        self.context = context
        self.model, self.options, self.counter = context.model, context.options, context.counter
        self.metrics = {metric.key: metric for metric in context.metrics}
        self.predictions: list[Prediction] = []

    @property
    @abstractmethod
    def total(self) -> int:
        """Samples that the run will count: those of all metrics together."""

    @abstractmethod
    def run(self) -> dict[str, Metric]:
        """Ask the model, record its predictions, and measure the metrics.

        Returns:
            The metrics of the context, by key: each measured, or `Metric.not_measured`.
        """

    @property
    def metadata(self) -> dict[str, Any]:
        """What the metrics were measured on, and how: the last line of the report."""
        options = self.options
        sampling = "greedy" if options.greedy else "as in conversations"
        return {"data": str(self.context.data), "sampling": sampling, "seed": options.seed}

    def generation_config(self) -> "GenerationConfig":
        """Sampling and limits of a reply, as conversations have them unless options say else."""
        from sa2jax.chat.template import TASKS
        from sa2jax.pipeline.task_runner import task_options

        options = self.options
        config = replace(task_options(TASKS["chat"]), max_new_tokens=options.max_new_tokens)
        if options.greedy:
            config = replace(config, sampling=replace(config.sampling, temperature=0.0))
        return config

    def record(self, prediction: Prediction) -> None:
        """Keep a prediction of this model."""
        self.predictions.append(replace(prediction, model=self.context.name))


def _no_judges(metrics: Sequence[str], /) -> None:
    """Judges of a suite that compares texts."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """An evaluation suite.

    Attributes:
        name: what selects it: `sa2jax eval NAME`.
        description: one sentence for its help.
        metrics: its metrics in the order of the report, with thresholds and targets.
        find_data: finds its data: called with (the model's folder, the folder that the user gave or
            None), gives the folder of the samples; a `DataError` says how to get them.
        start: makes the run of one model; imports what that takes.
        load_judges: loads what the metrics of some keys need, before a model is; a `DataError` says
            how to install what is missing.
        options: class of its own options, a dataclass whose fields are flags of the command.
        not_compared: keys of the metrics that int8 weights are not compared in, beside `int8`
            itself. A suite with a metric of that key is run again with int8 weights.
    """

    name: str
    description: str
    metrics: tuple[Metric, ...]
    find_data: Callable[[Path, Path | None], Path]
    start: Callable[[RunContext], SuiteRun]
    load_judges: Callable[[Sequence[str]], Any] = _no_judges
    options: type[Any] = NoOptions
    not_compared: Sequence[str] = ()
    by_key: Mapping[str, Metric] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "by_key", {metric.key: metric for metric in self.metrics})

    def keys(self, options: EvalOptions) -> tuple[str, ...]:
        """Keys of the metrics to report.

        Raises:
            DataError: if the options name one that the suite does not have.
        """
        if unknown := [key for key in options.metrics if key not in self.by_key]:
            raise DataError(
                f"there is no metric {unknown[0]!r}: expected some of {', '.join(self.by_key)}"
            )
        return tuple(key for key in self.by_key if key in (options.metrics or self.by_key))

    def measured_keys(self, options: EvalOptions) -> tuple[str, ...]:
        """Keys of the metrics to measure of one model; int8 alone needs all that are compared."""
        keys = tuple(key for key in self.keys(options) if key != INT8)
        return keys or tuple(key for key in self.by_key if self.is_compared(key))

    def compares(self, options: EvalOptions) -> bool:
        """Whether int8 weights are to be compared with float ones."""
        return INT8 in self.keys(options)

    def is_compared(self, key: str) -> bool:
        """Whether int8 weights are compared with float ones in a metric."""
        return key != INT8 and key not in self.not_compared

"""Run a suite: one model, or two of them compared; metrics and predictions become a report.

suite = find_suite("nano")
scores = run_suite(suite, model, suite.find_data(folder, None), EvalOptions(limit=20))
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa2jax.evaluate.base import (
    INT8,
    EvalOptions,
    ProgressCounter,
    RunContext,
    Suite,
    SuiteRun,
)
from sa2jax.evaluate.scores import Scores, worst_change

if TYPE_CHECKING:
    from sa2jax.pipeline import StepAudio2


def run_suite(
    suite: Suite,
    model: "StepAudio2",
    data: Path,
    options: EvalOptions | None = None,
    suite_options: Any = None,
    *,
    other: "StepAudio2 | None" = None,
    is_int8: bool = False,
    judges: Any = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """Score a model.

    Args:
        suite: the suite, see `suites.find_suite`.
        model: the model to score.
        data: folder of its samples, as `suite.find_data` gives it.
        options: which metrics, and how.
        suite_options: the suite's own options, of the class `suite.options`.
        other: the same model with int8 weights; without it the metric `int8` is not measured.
        is_int8: whether `model` itself has int8 weights, and `other` float ones.
        judges: who judges; by default those that `suite.load_judges` gives.
        progress: called with (samples done, samples in all).

    Raises:
        DataError: if a judge, a sample or a metric is missing.
    """
    options = options or EvalOptions()
    keys = suite.measured_keys(options)
    judges = suite.load_judges(keys) if judges is None else judges
    counter = ProgressCounter(progress)

    def start(model: "StepAudio2", keys: tuple[str, ...], name: str = "") -> SuiteRun:
        context = RunContext(
            model=model,
            data=data,
            metrics=tuple(suite.by_key[key] for key in keys),
            options=options,
            suite_options=suite.options() if suite_options is None else suite_options,
            judges=judges,
            counter=counter,
            name=name,
        )
        return suite.start(context)

    runs = [start(model, keys)]
    compared_keys = tuple(key for key in keys if suite.is_compared(key))
    if other is not None and suite.compares(options) and compared_keys:
        runs.append(start(other, compared_keys, "other"))
    counter.total = sum(run.total for run in runs)
    results = [run.run() for run in runs]
    metrics = dict(results[0])
    if suite.compares(options):
        metric = suite.by_key[INT8]
        if len(results) == 2:
            floats, int8 = reversed(results) if is_int8 else results
            metrics[INT8] = worst_change(metric, floats, int8, condition="with float weights")
        else:
            metrics[INT8] = metric.not_measured(
                "there is nothing to compare with, see --compare-with"
            )
    return Scores(
        title=suite.name,
        metrics=tuple(metrics[key] for key in suite.keys(options) if key in metrics),
        metadata=runs[0].metadata,
        predictions=tuple(prediction for run in runs for prediction in run.predictions),
    )


def write_predictions(path: Path, scores: Scores) -> None:
    """Write every prediction as a line of jsonl, all or none.

    Raises:
        Sa2jaxError: if the file cannot be written.
    """
    from sa2jax.atomic_io import disk_errors, write_text

    lines = (json.dumps(asdict(each), ensure_ascii=False) for each in scores.predictions)
    with disk_errors(path):
        write_text(path, "".join(f"{line}\n" for line in lines))

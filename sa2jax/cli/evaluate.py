"""The command `eval`: score a model by an evaluation suite."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from sa2jax.cli import common
from sa2jax.cli.common import ModelDtype

if TYPE_CHECKING:
    from sa2jax.evaluate.base import Suite
    from sa2jax.pipeline import StepAudio2

SuiteName = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SUITE")]]
Metrics = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class EvalCommand:
    """Options of every suite."""

    model: str = "nano"
    """Model folder, or nano."""
    data: Path | None = None
    """Folder of the suite's data; by default what comes with the model."""
    metric: Metrics = ()
    """A metric to measure, instead of all; the option may be given several times. Another name
    lists all."""
    limit: int | None = None
    """Samples of each metric at most."""
    dtype: ModelDtype | None = None
    """Dtype of weights and computation, as for other commands."""
    compare_with: Path | None = None
    """Model folder with float weights that int8 weights are compared with, for a model whose own
    are int8."""
    greedy: bool = False
    """Take the most likely token, instead of drawing as conversations do."""
    max_new_tokens: int = 256
    """Limit of a reply; a second of speech takes 31."""
    batch_size: int = 8
    """Recordings that are transcribed at once."""
    parity: bool = False
    """Do everything as the official pipeline does, as for other commands."""
    seed: int = 0
    """Of what is drawn."""
    predictions: Path | None = None
    """File (.jsonl) for every single answer."""
    strict: bool = False
    """Exit code 1 if a metric does not hold its threshold."""
    json: bool = False
    """Print JSON."""

    def load(self, source: str | Path, dtype: ModelDtype | None) -> "StepAudio2":
        """Read a model, with a progress bar."""
        from sa2jax.pipeline import StepAudio2

        with common.progress_bar("loading") as progress:
            return StepAudio2.from_pretrained(
                source,
                dtype=dtype,
                batch_size=self.batch_size,
                parity=self.parity,
                progress=progress,
            )


Options = Annotated[EvalCommand, tyro.conf.arg(name="")]


def evaluate(suite: SuiteName, options: Options):
    """Score a model by an evaluation suite: a table of metrics with thresholds and targets.

    A suite may have options of its own: `sa2jax eval nano --help` shows them beside these.

    Judges of spoken answers come with pip install "sa2jax[judges]" and pip install --no-deps
    resemblyzer==0.1.4.

    Args:
        suite: Name of the suite, such as nano, which is that of the model that comes along; another
            name lists all.
        options: Options of every suite.
    """
    from sa2jax.evaluate.suites import find_suite

    _evaluate(find_suite(suite), options, None)


def suite_command(arguments: Sequence[str]) -> Callable[..., None]:
    """The command `eval` with the options of the suite that is named first.

    Args:
        arguments: those that follow `eval`.

    Raises:
        DataError: if there is no such suite.
    """
    if not arguments or arguments[0].startswith("-"):
        return evaluate  # its help, or a mistake
    from sa2jax.evaluate.suites import find_suite

    chosen = find_suite(arguments[0])
    suite_arg = tyro.conf.arg(name="", constructor=chosen.options)

    def command(suite: SuiteName, options: Options, suite_options: Annotated[Any, suite_arg]):
        _evaluate(chosen, options, suite_options)

    command.__doc__ = (
        f"Score a model by the suite {chosen.name}: {chosen.description}\n\n"
        f"Metrics: {', '.join(chosen.by_key)}.\n\n"
        "Args:\n    suite: Name of the suite.\n"
    )
    return command


def _evaluate(suite: "Suite", command: EvalCommand, suite_options: Any) -> None:
    """Load the model, run the suite and print its report."""
    from sa2jax.assets import model_folder
    from sa2jax.errors import DataError
    from sa2jax.evaluate.base import INT8, EvalOptions
    from sa2jax.evaluate.runner import run_suite, write_predictions
    from sa2jax.evaluate.scores import print_scores

    if command.predictions is not None:
        common.require_writable(command.predictions)
    options = EvalOptions(
        metrics=tuple(command.metric),
        limit=command.limit,
        max_new_tokens=command.max_new_tokens,
        greedy=command.greedy,
        seed=command.seed,
    )
    compares, compare_with = suite.compares(options), command.compare_with
    if compare_with is not None and INT8 not in suite.by_key:
        raise DataError(f"the suite {suite.name} compares no models: leave --compare-with out")
    folder = Path(model_folder(command.model))
    data = suite.find_data(folder, command.data)
    judges = suite.load_judges(suite.measured_keys(options))  # before a model is loaded
    model = command.load(folder, command.dtype)
    is_int8 = _has_int8(model)
    other: StepAudio2 | None = None
    if compares:
        source = folder if compare_with is None else compare_with
        other = command.load(source, None if is_int8 else "int8")
        if _has_int8(other) == is_int8:  # both are int8
            if compare_with is not None:
                raise DataError(f"{compare_with} holds int8 weights: expected float ones")
            other = None
    with common.progress_bar("asking", unit="samples") as progress:
        scores = run_suite(
            suite,
            model,
            data,
            options,
            suite_options,
            other=other,
            is_int8=is_int8,
            judges=judges,
            progress=progress,
        )
    if command.json:
        common.print_json(scores.to_dict() | {"model": command.model})
    else:
        print_scores(scores, common.wide_console())
    if command.predictions is not None:  # last, so that a full disk costs no scores
        write_predictions(command.predictions, scores)
    if command.strict and scores.below_threshold:
        common.log(f"below the threshold: {', '.join(scores.below_threshold)}")
        raise SystemExit(1)


def _has_int8(model: "StepAudio2") -> bool:
    """Whether a model has int8 matrices."""
    import jax
    import jax.numpy as jnp

    return any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(model.engine.params))

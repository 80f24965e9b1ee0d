"""The command that scores a trained model: `eval`."""

import json as json_
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from sa2jax.cli import common
from sa2jax.cli.common import ModelDtype

if TYPE_CHECKING:
    from sa2jax.evaluate.scores import Scores
    from sa2jax.pipeline import StepAudio2

Table = tyro.conf.Positional[Annotated[Literal["nano"], tyro.conf.arg(metavar="TABLE")]]
Metrics = tyro.conf.UseAppendAction[tuple[str, ...]]


def evaluate(
    table: Table = "nano",
    *,
    model: str = "nano",
    corpus: Path | None = None,
    real_recordings: Path | None = None,
    metric: Metrics = (),
    limit: int | None = None,
    dtype: ModelDtype | None = None,
    compare_with: Path | None = None,
    greedy: bool = False,
    first: int = 5,
    chunk: int = 10,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    seed: int = 0,
    predictions: Path | None = None,
    strict: bool = False,
    json: bool = False,
):
    """Score a trained model by judges that hear what it says: a table with thresholds and targets.

    The judges come with pip install "sa2jax[judges]" and pip install --no-deps resemblyzer==0.1.4.

    Args:
        table: Which table; nano is that of the model that comes along.
        model: Model folder, or nano.
        corpus: Folder of the held-out set, made by `sa2jax data synthesize`; by default the small
            one in the model's folder heldout/.
        real_recordings: Folder of real recordings, made by examples/fetch_real.sh.
        metric: A metric to measure, instead of all: seen, unseen, digits, sums, sums_open,
            tool_asked, tool_unasked, voice, streamed, int8, first_sound or real_time; the option
            may be given several times.
        limit: Items of each metric at most.
        dtype: Dtype of weights and computation, as for other commands.
        compare_with: Model folder with float weights that int8 weights are compared with, for a
            model whose own are int8.
        greedy: Take the most likely token, instead of drawing as conversations do.
        first: Codes of the first chunk of streamed replies (25 are a second).
        chunk: Codes of their other chunks.
        max_new_tokens: Limit of a reply; a second of speech takes 31.
        batch_size: Recordings that are transcribed at once.
        seed: Of what is drawn.
        predictions: File (.jsonl) for every single answer.
        strict: Exit code 1 if a metric does not hold its threshold.
        json: Print JSON.
    """
    from sa2jax.assets import model_folder
    from sa2jax.errors import DataError
    from sa2jax.evaluate.heldout import FOLDER, HeldOut
    from sa2jax.evaluate.nano import Judges, NanoOptions, evaluate_nano
    from sa2jax.evaluate.scores import print_scores

    options = NanoOptions(
        metrics=tuple(metric), limit=limit, real_recordings=real_recordings, first=first,
        chunk=chunk, greedy=greedy, max_new_tokens=max_new_tokens, seed=seed,
    )  # fmt: skip
    home = Path(model_folder(model))
    if corpus is None and not (home / FOLDER).is_dir():
        raise DataError(
            f"{home} has no folder {FOLDER}/ with a held-out set: make one with `sa2jax data "
            "synthesize` and give it as --corpus"
        )
    folder = home if corpus is None else corpus
    HeldOut.find(folder)
    judges = Judges.load(options.measured)  # all that may be missing, before a model is loaded

    def load(source: str | Path, kind: ModelDtype | None) -> "StepAudio2":
        from sa2jax.pipeline import StepAudio2

        with common.progress_bar("loading") as tick:
            return StepAudio2.from_pretrained(
                source, dtype=kind, batch_size=batch_size, progress=tick
            )

    scored = load(home, dtype)
    is_int8 = _has_int8(scored)
    other: StepAudio2 | None = None
    if options.compares:
        other = load(home if compare_with is None else compare_with, None if is_int8 else "int8")
        if _has_int8(other) == is_int8:  # both are int8
            if compare_with is not None:
                raise DataError(f"{compare_with} holds int8 weights: expected float ones")
            other = None
    with common.progress_bar("asking", unit="items") as tick:
        scores = evaluate_nano(
            scored, folder, options, other=other, is_int8=is_int8, judges=judges, progress=tick
        )
    if predictions is not None:
        _write(predictions, scores)
    if json:
        common.print_json(scores.to_dict() | {"model": str(model)})
    else:
        print_scores(scores, common.wide_console())
    if strict and scores.below_threshold:
        common.log(f"below the threshold: {', '.join(scores.below_threshold)}")
        raise SystemExit(1)


def _has_int8(model: "StepAudio2") -> bool:
    """Whether a model's matrices are whole numbers."""
    import jax
    import jax.numpy as jnp

    return any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(model.engine.params))


def _write(path: Path, scores: "Scores") -> None:
    """Write every answer as a line of jsonl."""
    from sa2jax.atomic_io import disk_errors

    lines = (json_.dumps(asdict(answer), ensure_ascii=False) for answer in scores.predictions)
    with disk_errors(path):
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

"""The commands `train` and `merge`."""

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from sa2jax.cli import common
from sa2jax.cli.common import Devices, Out, Source

Words = tyro.conf.UseAppendAction[tuple[str, ...]]  # the option may be given several times
Common = Annotated[Devices, tyro.conf.arg(name="")]


def train(
    *,
    config: Annotated[str, tyro.conf.arg(metavar="NAME|FILE")],
    out: Path | None = None,
    model: Path | None = None,
    data: Words = (),
    steps: int | None = None,
    set: Words = (),
    devices: Common,
    fresh: bool = False,
    dry_run: bool = False,
    profile: int = 0,
    json: bool = False,
):
    """Train as a recipe says; the same command again goes on from the last checkpoint.

    What is trained is the language model, or what the `kind` of a recipe names: the audio
    `encoder`; of the detokenizer the `flow`, the `vocoder`, the speech `tokenizer` or the `speaker`
    encoder, on what `sa2jax data prepare-flow` or `prepare-speech` made; or `stages`, several
    commands one after the other.

    A first Ctrl-C ends the run after the step at hand, with a checkpoint.

    Args:
        config: Recipe: a name from configs/recipes, or a YAML file.
        out: The run's folder; by default runs/NAME.
        model: Model folder to begin with, in place of the recipe's.
        data: Files or folders to learn from, in place of the recipe's; PATH or PATH=WEIGHT. For a
            single network one prepared folder.
        steps: Updates, in place of the recipe's.
        set: Other values in place of the recipe's, such as optimizer.learning_rate=1e-5.
        devices: Devices.
        fresh: Begin anew: forget the checkpoints in the run's folder.
        dry_run: Show what would be trained, and the memory of each device; train nothing.
        profile: Steps to record for a profiler, in the run's folder.
        json: Print JSON.
    """
    devices.join_hosts()
    from sa2jax.runtime import enable_compilation_cache
    from sa2jax.train.language.recipe import LanguageRecipe
    from sa2jax.train.recipe import (
        LANGUAGE,
        STAGES,
        apply_overrides,
        build_config,
        parse_overrides,
        read_recipe_values,
        split_kind,
    )

    kind, values = split_kind(
        apply_overrides(read_recipe_values(config), parse_overrides(set)), config
    )
    name = Path(config).stem if Path(config).suffix else config  # a file's, or a recipe's
    folder = Path("runs") / name if out is None else out
    if kind == STAGES:
        given = {
            "--model": model,
            "--data": data,
            "--steps": steps,
            "--mesh": devices.mesh,
            "--dry-run": dry_run,
            "--profile": profile,
        }
        _run_stages(values, config, folder, [k for k, v in given.items() if v], fresh, json)
        return
    enable_compilation_cache()
    is_language = kind == LANGUAGE
    changes: dict[str, Any] = {}
    if model is not None:
        changed_model = {"model.folder": str(model), "model.preset": None}
        changes |= changed_model if is_language else {"network.folder": str(model)}
    if data and is_language:
        changes["data.sources"] = _weights(data)
    elif data:
        changes["data.folder"] = _only(data, kind)
    if steps is not None:
        changes["optimizer.steps"] = steps
    if devices.mesh is not None:
        changes["mesh"] = devices.mesh
    values = apply_overrides(values, changes)
    if is_language:
        from sa2jax.train.language.task import train_language_model

        recipe = build_config(LanguageRecipe, values, config)
        start = partial(train_language_model, recipe)
    else:
        from sa2jax.train.networks.task import TRAINERS, train_network

        recipe = build_config(TRAINERS[kind].recipe, values, config)
        start = partial(train_network, recipe)
    if dry_run:
        from sa2jax.train.dry_run import dry_run_language, dry_run_network

        report = (dry_run_language if is_language else dry_run_network)(recipe)
        common.print_json(asdict(report)) if json else report.print(common.wide_console())
        return
    outcome = start(folder, fresh=fresh, profile=profile)
    if json:
        common.print_json(asdict(outcome))
    else:
        for name, path in outcome.results.items():
            print(f"{name}: {path}")
    if not outcome.finished:
        common.log(f"stopped after step {outcome.step}: the same command goes on")
        sys.exit(130)


def merge(
    model: Source,
    adapter: Annotated[Source, tyro.conf.arg(metavar="ADAPTER")],
    out: Out,
    *,
    overwrite: bool = False,
):
    """Put low-rank matrices into the model that they were trained beside.

    Args:
        model: Model folder with float matrices.
        adapter: Folder of an adapter, as `train` and PEFT write it.
        out: Folder to make; it appears only when it is complete.
        overwrite: Replace a checkpoint at OUT.
    """
    common.use_cpu()
    from sa2jax.train.language.model_io import open_base_model, stored_dtype
    from sa2jax.train.language.recipe import ModelSpec
    from sa2jax.train.recipe import build_config

    # What is stored as it is read takes the least memory.
    values = {"folder": str(model), "dtype": stored_dtype(model).name}
    base, params = open_base_model(build_config(ModelSpec, values, str(model))).with_adapter(
        adapter
    )
    base.save(params, out, overwrite=overwrite)
    print(f"model: {out}")


def _run_stages(
    values: Any, config: str, out: Path, others: list[str], fresh: bool, json: bool
) -> None:
    """Run a recipe of several commands, which have options of their own."""
    from sa2jax.errors import ConfigError
    from sa2jax.train.stages import build_stages_recipe, run_stages

    if others:
        raise ConfigError(
            f"{config} is a recipe of stages, it takes no {', '.join(others)}: run a stage's own "
            "command with it"
        )
    outcome = run_stages(build_stages_recipe(values, config), out, fresh=fresh, say=common.log)
    if json:
        common.print_json(asdict(outcome))
    if not outcome.finished:
        common.log("stopped: the same command goes on")
        sys.exit(130)


def _only(data: tuple[str, ...], kind: str) -> str:
    """The one folder that a single network learns from."""
    from sa2jax.errors import ConfigError

    if len(data) != 1:
        command = "prepare-flow" if kind == "flow" else "prepare-speech"
        raise ConfigError(
            f"--data {' '.join(data)}: the {kind} learns from one folder; `sa2jax data {command}` "
            "makes one of many sources"
        )
    return data[0]


def _weights(data: tuple[str, ...]) -> dict[str, float]:
    """`PATH=WEIGHT` words; a path alone has the weight 1."""
    from sa2jax.errors import ConfigError

    weights = {}
    for word in data:
        path, equals, weight = word.rpartition("=")
        try:
            weights[path if equals else word] = float(weight) if equals else 1.0
        except ValueError:
            raise ConfigError(f"--data {word}: expected PATH or PATH=WEIGHT") from None
    return weights

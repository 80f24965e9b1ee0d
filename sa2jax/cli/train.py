"""The commands `train` and `merge`."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

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

    What is trained is the language model, or what the `kind` of a recipe names: the
    `audio_encoder`; of the detokenizer the `flow`, the `vocoder`, the `speech_tokenizer` or the
    `speaker_encoder`, on what `sa2jax data prepare-flow` or `prepare-speech` made; or `stages`,
    several commands one after the other.

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
    from sa2jax.train.kinds import find_kind
    from sa2jax.train.recipe import (
        apply_overrides,
        build_config,
        parse_overrides,
        read_recipe_values,
        split_kind,
    )

    values = apply_overrides(read_recipe_values(config), parse_overrides(set))
    kind_name, values = split_kind(values)
    kind = find_kind(kind_name, config)
    options = {"model": model, "data": data or None, "steps": steps, "mesh": devices.mesh}
    options = {name: value for name, value in options.items() if value is not None}
    run_options = {"fresh": fresh, "profile": profile}
    run_options = {name: value for name, value in run_options.items() if value}
    kind.require_options((*options, *run_options, *(["dry_run"] if dry_run else [])), config)
    recipe = build_config(kind.recipe, apply_overrides(values, kind.option_values(options)), config)
    enable_compilation_cache()
    if dry_run and kind.dry_run is not None:
        found = kind.dry_run(recipe)
        common.print_json(asdict(found)) if json else found.print(common.wide_console())
        return
    name = Path(config).stem if Path(config).suffix else config  # a file's, or a recipe's
    outcome = kind.run(recipe, Path("runs") / name if out is None else out, **run_options)
    if json:
        common.print_json(asdict(outcome))
    else:
        for name, path in outcome.results.items():
            print(f"{name}: {path}")
    if not outcome.finished:
        common.log(f"stopped after {outcome.progress}: the same command goes on")
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
    from sa2jax.atomic_io import keep_sources
    from sa2jax.train.language.model_io import open_base_model, stored_dtype
    from sa2jax.train.language.peft_merge import merge_adapter, read_adapter
    from sa2jax.train.language.recipe import ModelSpec
    from sa2jax.train.recipe import build_config

    keep_sources(out, (model, adapter))
    # What is stored as it is read takes the least memory.
    values = {"folder": str(model), "dtype": stored_dtype(model).name}
    base = open_base_model(build_config(ModelSpec, values, str(model)))
    changes = read_adapter(adapter)
    params = merge_adapter(changes, base.load_params(None, 0), base.cfg)
    base.save(params, out, overwrite=overwrite)
    print(f"model: {out}")

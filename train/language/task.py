"""Training of the language model: what a recipe says, as a task for the loop.

outcome = train(read_recipe("sft", {"model.folder": "mini"}), "runs/talk")
model = StepAudio2.from_pretrained(outcome.results["model"])
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from sa2jax.audio.rates import MEL_RATE
from sa2jax.errors import DataError, TrainError
from sa2jax.train import loop
from sa2jax.train.language.data import Data, DataConfig, make_data
from sa2jax.train.language.model_io import Base, open_base
from sa2jax.train.language.objective import Sums
from sa2jax.train.language.peft import save_adapter
from sa2jax.train.language.recipe import Recipe
from sa2jax.train.language.step import Batch, host_part, make_evaluation, make_step, place_batch
from sa2jax.train.log import Log, Meter, flops_of, peak_flops
from sa2jax.train.loop import REJECTS, Outcome, Task
from sa2jax.train.lora import LORA, split_lora
from sa2jax.train.optimizer import OptimizerConfig, make_optimizer
from sa2jax.train.state import TrainState, abstract_state, init_state


def train(recipe: Recipe, out: str | Path, **options: Any) -> Outcome:
    """Train as a recipe says; goes on from the last checkpoint if there is one.

    Args:
        recipe: everything that the run depends on.
        out: the run's folder, made if need be.
        **options: see `loop.run`.

    Raises:
        ConfigError: if the model's config is not understood.
        DataError: if the data cannot be used, or too much of it cannot.
        TrainError: if the folder holds another run, or checkpoints do not fit.
        ShardingError: for a mesh that does not fit the devices.
        CheckpointError: if the model cannot be read or something not be written.
    """
    task = make_task(recipe, Path(out))
    return loop.run(task, recipe.pace, out, steps=recipe.optimizer.steps, **options)


def make_task(recipe: Recipe, out: Path) -> Task:
    """What a recipe trains; nothing is loaded yet.

    Args:
        recipe: everything that the run depends on.
        out: the run's folder, for what cannot be used of the data.

    Raises:
        ConfigError: if the model's config is not understood.
        DataError: if the data cannot be used.
        TrainError: if nothing is trained, or sizes do not fit each other.
        ShardingError: for a mesh that does not fit the devices.
    """
    mesh, base = loop.mesh_of(recipe.mesh), open_base(recipe.model, recipe.lora)

    # --- input --------------------------------------------------------------------------------
    tokenizer = base.tokenizer()
    if recipe.data.length > base.cfg.decoder.max_positions:
        raise TrainError(
            f"data.length {recipe.data.length}: the model has {base.cfg.decoder.max_positions} "
            "positions, a row can have no more"
        )
    part, parts = host_part(mesh, loop.rows_at_once(recipe.data.rows, recipe.data.parts, mesh))

    def open_data(config: DataConfig, rejects: Path | None = None) -> Data:
        return make_data(
            config, tokenizer, base.cfg, seed=recipe.seed, host=part, hosts=parts, rejects=rejects
        )

    data = open_data(recipe.data, out / REJECTS)

    # --- model and update ---------------------------------------------------------------------
    optimizer = make_optimizer(optimizer_config(recipe))
    step = make_step(
        base.model, optimizer, mesh, remat=recipe.remat, chunk=recipe.chunk,
        gradients=recipe.gradients, unroll=recipe.unroll,
    )  # fmt: skip
    like = abstract_state(base.model, optimizer, mesh)
    trains = lambda part: optimizer.trains(f"{part}.kernel")
    work = flops_of(
        base.cfg,
        base_trained=trains("decoder.layers.mlp.up"),
        encoder_trained=trains("audio_encoder.layers.mlp.up"),
    )

    sound = recipe.data.mel_rows * recipe.data.mel_frames / MEL_RATE
    room = recipe.data.rows * recipe.data.length, recipe.data.rows * sound

    # --- evaluation ---------------------------------------------------------------------------
    evaluate = None
    if recipe.evaluate is not None:
        held_out = replace(
            recipe.data, sources=recipe.evaluate.sources, shuffle=False, epochs=1, workers=0
        )
        sums = make_evaluation(base.model, mesh, chunk=recipe.chunk)

        def evaluate(state: TrainState) -> dict[str, float]:
            found = (sums(state.params, place_batch(piece, mesh)) for piece in pieces())
            return _means(found)

        def pieces() -> Iterator[Batch]:
            yield from _batches(open_data(held_out), recipe.evaluate.batches)

    return Task(
        title=loop.describe("language model", like, optimizer, mesh),
        facts={"recipe": recipe.plain(), "model": base.fingerprint(), "data": data.fingerprint},
        data=data, hosts=parts, finite=recipe.data.epochs is not None, optimizer=optimizer,
        like=like, load=partial(base.load, mesh, recipe.seed),
        begin=partial(init_state, base.model, optimizer, mesh), step=step,
        place=partial(place_batch, mesh=mesh), evaluate=evaluate,
        finish=partial(_write_results, base), meter=Meter(work, peak_flops(), room),
    )  # fmt: skip


def optimizer_config(recipe: Recipe) -> OptimizerConfig:
    """The recipe's, of which LoRA trains nothing but itself unless `rates` names more."""
    if recipe.lora is None:
        return recipe.optimizer
    rates = {LORA: recipe.lora.rate, **recipe.optimizer.rates, "": 0.0}
    return replace(recipe.optimizer, rate=recipe.lora.rate, rates=rates)


def _batches(data: Data, most: int) -> Iterator[Batch]:
    """Held-out batches; parts of an update are single batches here."""
    for _ in range(most):
        batch = next(data, None)
        if loop.anywhere(batch is None):
            break
        batch = batch or data.empty()
        if batch.ids.ndim == 2:
            yield batch
            continue
        for n in range(len(batch.ids)):
            yield jax.tree.map(lambda leaf, n=n: leaf[n], batch)
    data.close()


def _means(found: Iterator[dict[str, Sums]]) -> dict[str, float]:
    """What all batches say together."""
    total: dict[str, Sums] = {}
    for sums in found:
        total = {name: part + total[name] if total else part for name, part in sums.items()}
    if not total:
        raise DataError("nothing to evaluate: the held-out data makes no batch")
    means = {name: sums.means() for name, sums in jax.device_get(total).items()}
    return {
        f"evaluate/{'' if name == 'all' else f'{name}/'}{key}": float(value)
        for name, of_name in means.items() for key, value in of_name.items()
    }  # fmt: skip


def _write_results(base: Base, state: TrainState, out: Path, log: Log) -> dict[str, Path]:
    """The model and the adapter of a run that is done."""
    results = {}
    if base.lora is not None:
        results["adapter"] = out / "adapter"
        lora = loop.whole(split_lora(state.params)[1])
        if jax.process_index() == 0:
            save_adapter(
                results["adapter"], lora, base.cfg, rank=base.lora.rank, alpha=base.lora.alpha,
                base=str(base.spec.folder or base.spec.preset), overwrite=True,
            )  # fmt: skip
    if base.keeps_whole_numbers:
        log.say("int8 matrices cannot take in what was learnt: the adapter is the result")
    else:
        results["model"] = out / "model"
        base.save(state.params, results["model"], overwrite=True)
    return results

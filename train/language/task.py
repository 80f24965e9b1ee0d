"""Training of the language model as a task for the loop.

    result = train_language_model(read_recipe("sft", {"model.folder": "mini"}), "runs/talk")
    model = StepAudio2.from_pretrained(result.results["model"])

`train.kinds` has it in the table of kinds.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from sa2jax.audio.rates import MEL_RATE
from sa2jax.errors import DataError, TrainError
from sa2jax.train import loop
from sa2jax.train.language.data import LanguageData, make_language_data
from sa2jax.train.language.data_config import DataConfig
from sa2jax.train.language.model_io import BaseModel, open_base_model
from sa2jax.train.language.objective import LossSums
from sa2jax.train.language.peft import save_adapter
from sa2jax.train.language.recipe import LanguageRecipe
from sa2jax.train.language.step import (
    LanguageBatch,
    host_shard,
    make_language_evaluation,
    make_language_step,
    place_batch,
)
from sa2jax.train.log import Meter, TrainingLog, peak_flops, training_flops
from sa2jax.train.loop import REJECTS, TrainingTask, TrainResult
from sa2jax.train.lora import LORA_PATTERN, split_lora
from sa2jax.train.optimizer import Optimizer, OptimizerConfig, make_optimizer
from sa2jax.train.state import TrainState, TrainStep, abstract_state, init_state


def train_language_model(recipe: LanguageRecipe, out: str | Path, **options: Any) -> TrainResult:
    """Train as a recipe says; goes on from the last checkpoint if there is one.

    Args:
        recipe: everything that the run depends on.
        out: the run's folder, made if need be.
        **options: see `loop.run_training`.

    Raises:
        ConfigError: if the model's config is not understood.
        DataError: if the data cannot be used, or too much of it cannot.
        TrainError: if the folder holds another run, or checkpoints do not fit.
        ShardingError: for a mesh that does not fit the devices.
        CheckpointError: if the model cannot be read or something not be written.
    """
    task = make_language_task(recipe, Path(out))
    return loop.run_training(task, recipe.intervals, out, steps=recipe.optimizer.steps, **options)


def make_language_task(recipe: LanguageRecipe, out: Path) -> TrainingTask:
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
    mesh, base = loop.mesh_from_spec(recipe.mesh), open_base_model(recipe.model, recipe.lora)

    # --- input --------------------------------------------------------------------------------
    tokenizer = base.load_tokenizer()
    if recipe.data.length > base.cfg.decoder.max_positions:
        raise TrainError(
            f"data.length {recipe.data.length}: the model has {base.cfg.decoder.max_positions} "
            "positions, a row can have no more"
        )
    part, parts = host_shard(
        mesh, loop.micro_batch_rows(recipe.data.rows, recipe.data.accumulation_steps, mesh)
    )

    def open_data(config: DataConfig, rejects: Path | None = None) -> LanguageData:
        return make_language_data(
            config, tokenizer, base.cfg, seed=recipe.seed, host=part, hosts=parts, rejects=rejects
        )

    data = open_data(recipe.data, out / REJECTS)

    # --- model and update ---------------------------------------------------------------------
    optimizer = make_optimizer(optimizer_config(recipe))
    step = make_step(recipe, base, optimizer, mesh)
    like = abstract_state(base.model, optimizer, mesh)

    def trains(part):
        return optimizer.is_trained(f"{part}.kernel")

    work = training_flops(
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
        sums = make_language_evaluation(base.model, mesh, loss_chunk=recipe.loss_chunk)

        def evaluate(state: TrainState) -> dict[str, float]:
            found = (sums(state.params, place_batch(piece, mesh)) for piece in pieces())
            return _evaluation_metrics(found)

        def pieces() -> Iterator[LanguageBatch]:
            yield from _evaluation_batches(open_data(held_out), recipe.evaluate.batches)

    return TrainingTask(
        title=loop.describe_training("language model", like, optimizer, mesh),
        metadata={
            "recipe": recipe.to_dict(),
            "model": base.fingerprint(),
            "data": data.fingerprint,
            "recordings": data.recordings_fingerprint(),
        },
        data=data,
        data_shards=parts,
        finite=recipe.data.epochs is not None,
        optimizer=optimizer,
        abstract_state=like,
        load_params=partial(base.load_params, mesh, recipe.seed),
        init_state=partial(init_state, base.model, optimizer, mesh),
        step=step,
        place_batch=partial(place_batch, mesh=mesh),
        evaluate=evaluate,
        write_results=partial(_write_results, base),
        meter=Meter(work, peak_flops(), room),
        sources=[] if base.spec.folder is None else [base.spec.folder],
    )


def optimizer_config(recipe: LanguageRecipe) -> OptimizerConfig:
    """The recipe's, of which LoRA trains nothing but itself unless `rates` names more."""
    if recipe.lora is None:
        return recipe.optimizer
    rates = {
        LORA_PATTERN: recipe.lora.learning_rate,
        **recipe.optimizer.learning_rate_overrides,
        "": 0.0,
    }
    return replace(
        recipe.optimizer, learning_rate=recipe.lora.learning_rate, learning_rate_overrides=rates
    )


def make_step(
    recipe: LanguageRecipe, base: BaseModel, optimizer: Optimizer, mesh: Mesh | None
) -> TrainStep[LanguageBatch]:
    """The step of a recipe, see `language.step`."""
    return make_language_step(
        base.model,
        optimizer,
        mesh,
        remat=recipe.remat,
        loss_chunk=recipe.loss_chunk,
        grad_dtype=recipe.grad_dtype,
        unroll=recipe.unroll,
    )


def _evaluation_batches(data: LanguageData, most: int) -> Iterator[LanguageBatch]:
    """Held-out batches; parts of an update are single batches here."""
    for _ in range(most):
        batch = next(data, None)
        if loop.any_host(batch is None):
            break
        batch = batch or data.empty_batch()
        if batch.ids.ndim == 2:
            yield batch
            continue
        for n in range(len(batch.ids)):
            yield jax.tree.map(lambda leaf, n=n: leaf[n], batch)
    data.close()


def _evaluation_metrics(found: Iterator[dict[str, LossSums]]) -> dict[str, float]:
    """What all batches say together."""
    total: dict[str, LossSums] = {}
    for sums in found:
        total = {name: part + total[name] if total else part for name, part in sums.items()}
    if not total:
        raise DataError("nothing to evaluate: the held-out data makes no batch")
    means = {name: sums.means() for name, sums in jax.device_get(total).items()}
    return {
        f"evaluate/{'' if name == 'all' else f'{name}/'}{key}": float(value)
        for name, of_name in means.items()
        for key, value in of_name.items()
    }


def _write_results(
    base: BaseModel, state: TrainState, out: Path, log: TrainingLog
) -> dict[str, Path]:
    """The model and the adapter of a run that is done."""
    results = {}
    if base.lora is not None:
        results["adapter"] = out / "adapter"
        lora = loop.gather_to_host(split_lora(state.params)[1])
        if jax.process_index() == 0:
            save_adapter(
                results["adapter"],
                lora,
                base.cfg,
                rank=base.lora.rank,
                alpha=base.lora.alpha,
                base=str(base.spec.folder or base.spec.preset),
                overwrite=True,
            )
    if base.is_int8:
        log.print("int8 matrices cannot take in what was learnt: the adapter is the result")
    else:
        results["model"] = out / "model"
        base.save(state.params, results["model"], overwrite=True)
    return results

"""Training of one network as a task for the loop.

    prepare_flow(["speech/"], "ready", "mini")
    recipe = read_network_recipe("flow", {"network.folder": "mini", "data.folder": "ready"})
    outcome = train_network(recipe, "runs/anna")
    speech = Speech.from_pretrained(outcome.results["model"])

The result is a whole folder: the network that has learnt, beside everything else as it was. Of the
detokenizer that is the flow, the vocoder, the speech tokenizer or the speaker encoder; of a model
its audio encoder. `TRAINERS` names what teaches each of them.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax

from sa2jax.errors import TrainError
from sa2jax.nn import Params
from sa2jax.train import loop
from sa2jax.train.log import Meter, TrainingLog
from sa2jax.train.loop import TrainingTask, TrainResult
from sa2jax.train.networks.audio_encoder import AUDIO_ENCODER_TRAINER
from sa2jax.train.networks.flow import FLOW_TRAINER
from sa2jax.train.networks.model_io import DetokenizerNetwork, EncoderNetwork
from sa2jax.train.networks.recipes import NetworkRecipe
from sa2jax.train.networks.speaker_encoder import SPEAKER_ENCODER_TRAINER
from sa2jax.train.networks.speech_tokenizer import SPEECH_TOKENIZER_TRAINER
from sa2jax.train.networks.step import place_network_batch
from sa2jax.train.networks.trainer import NetworkTrainer
from sa2jax.train.networks.vocoder import VOCODER_TRAINER
from sa2jax.train.optimizer import make_optimizer
from sa2jax.train.recipe import build_config, recipe_values_of_kind
from sa2jax.train.state import TrainState, abstract_state, init_state

TRAINERS: Mapping[str, NetworkTrainer[Any, Any, Any]] = {
    trainer.recipe.kind: trainer
    for trainer in (
        AUDIO_ENCODER_TRAINER,
        SPEECH_TOKENIZER_TRAINER,
        SPEAKER_ENCODER_TRAINER,
        FLOW_TRAINER,
        VOCODER_TRAINER,
    )
}


def read_network_recipe(
    source: str | Path, changes: Mapping[str, Any] | None = None, *, kind: str = "flow"
) -> NetworkRecipe:
    """A recipe by its name or file; see `language.recipe.read_language_recipe`.

    Raises:
        ConfigError: for a key that does not exist, a value of another kind, or a recipe of one.
    """
    return build_config(
        TRAINERS[kind].recipe, recipe_values_of_kind(kind, source, changes), str(source)
    )


def train_network(recipe: NetworkRecipe, out: str | Path, **options: Any) -> TrainResult:
    """Train as a recipe says; goes on from the last checkpoint if there is one.

    Args:
        recipe: everything that the run depends on.
        out: the run's folder, made if need be; the whole will be in `out`/model.
        **options: see `loop.run_training`.

    Raises:
        DataError: if the data cannot be used, or was heard by another model.
        TrainError: if the folder holds another run, checkpoints do not fit, the detokenizer is not
            converted, or this is a run of several hosts.
        ShardingError: for a mesh that does not fit the devices.
        CheckpointError: if the model cannot be read or something not be written.
    """
    task = make_network_task(recipe)
    return loop.run_training(task, recipe.intervals, out, steps=recipe.optimizer.steps, **options)


def make_network_task(recipe: NetworkRecipe) -> TrainingTask:
    """What a recipe trains; of the weights nothing is kept yet.

    Args:
        recipe: everything that the run depends on.

    Raises:
        DataError: if the data cannot be used, or was heard by another model.
        TrainError: if nothing is trained, sizes do not fit each other, the detokenizer is not
            converted, or this is a run of several hosts.
        ShardingError: for a mesh that does not fit the devices.
        CheckpointError: if the folder has no such network, or a damaged one.
    """
    if jax.process_count() > 1:
        raise TrainError(
            f"{jax.process_count()} processes: a single network is trained by one, on all devices "
            "of its host; run the command there alone, without --distributed"
        )
    trainer, mesh = TRAINERS[recipe.kind], loop.mesh_from_spec(recipe.mesh)
    network = trainer.open(recipe.network.folder, recipe.network.compute_dtype)

    # --- input --------------------------------------------------------------------------------
    loop.micro_batch_rows(recipe.data.rows, 0, mesh)
    data = trainer.open_data(network, recipe, seed=recipe.seed)

    # --- model and update ---------------------------------------------------------------------
    model = trainer.model(network, recipe)
    optimizer = make_optimizer(recipe.optimizer)
    like = abstract_state(model, optimizer, mesh)

    # --- held out -----------------------------------------------------------------------------
    evaluate = None
    if recipe.evaluate is not None:
        config = replace(recipe.data, folder=recipe.evaluate.folder, shuffle=False, epochs=1)
        held_out = replace(recipe, data=config)
        open_held_out = partial(trainer.open_data, network, held_out, seed=0, training=data)
        open_held_out()  # what is wrong with it comes up now, not at the end
        measure = trainer.make_measure(model, recipe, mesh)
        most = recipe.evaluate.batches

        def evaluate(state: TrainState) -> dict[str, float]:
            batches = (place_network_batch(batch, mesh) for batch in islice(open_held_out(), most))
            found = measure(state.params, batches)
            return {f"evaluate/{name}": value for name, value in found.items()}

    def load() -> Params:
        return trainer.init_params(network, recipe, network.load_params(mesh))

    return TrainingTask(
        title=loop.describe_training(recipe.kind, like, optimizer, mesh),
        metadata={
            "recipe": recipe.to_dict(),
            "model": network.fingerprint(),
            "data": data.fingerprint,
        },
        data=data,
        finite=recipe.data.epochs is not None,
        optimizer=optimizer,
        abstract_state=like,
        load_params=load,
        init_state=partial(init_state, model, optimizer, mesh),
        step=trainer.make_step(model, optimizer, recipe, mesh),
        place_batch=partial(place_network_batch, mesh=mesh),
        evaluate=evaluate,
        write_results=partial(_write_results, trainer, network),
        meter=Meter((0.0, 0.0), 0.0),
        sources=[network.home],
    )


def _write_results(
    trainer: NetworkTrainer[Any, Any, Any],
    network: DetokenizerNetwork | EncoderNetwork,
    state: TrainState,
    out: Path,
    log: TrainingLog,
) -> dict[str, Path]:
    """The whole folder of a run that is done."""
    results = {"model": out / "model"}
    for note in network.save(trainer.network_params(state.params), results["model"]):
        log.print(f"note: {note}")
    return results

"""Training of one network: what a recipe says, as a task for the loop.

    prepare_flow(["speech/"], "ready", "mini")
    recipe = read_network_recipe("flow", {"network.folder": "mini", "data.folder": "ready"})
    outcome = train_network(recipe, "runs/anna")
    speech = Speech.from_pretrained(outcome.results["model"])

The result is a whole folder: the network that has learnt, beside everything else as it was. Of the
detokenizer that is the flow, the vocoder, the speech tokenizer or the speaker encoder; of a model
its audio encoder. `TRAINERS` says what each of them is taught with.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from sa2jax import audio
from sa2jax.audio.features import HOP
from sa2jax.errors import TrainError
from sa2jax.evaluate.judges import require
from sa2jax.evaluate.words import word_errors
from sa2jax.models.speech_tokenizer import code_length
from sa2jax.nn import Functional, Params
from sa2jax.train import loop
from sa2jax.train.log import Meter, TrainingLog
from sa2jax.train.loop import TrainingTask, TrainResult
from sa2jax.train.networks import (
    audio_encoder,
    flow,
    recognition,
    speaker_encoder,
    speech_tokenizer,
    vocoder,
)
from sa2jax.train.networks.flow_data import FlowData, FlowDataConfig
from sa2jax.train.networks.model_io import (
    DetokenizerNetwork,
    EncoderNetwork,
    open_audio_encoder,
    open_detokenizer_network,
)
from sa2jax.train.networks.recipes import (
    AudioEncoderRecipe,
    FlowRecipe,
    NetworkRecipe,
    SpeakerEncoderRecipe,
    SpeechTokenizerRecipe,
    VocoderRecipe,
)
from sa2jax.train.networks.recognition import SoundBatch
from sa2jax.train.networks.speech_data import (
    ClipConfig,
    ClipData,
    CropConfig,
    CropData,
    max_letters,
    read_speech_info,
)
from sa2jax.train.networks.step import (
    LossFunction,
    make_loss_evaluation,
    make_loss_step,
    place_network_batch,
)
from sa2jax.train.optimizer import make_optimizer
from sa2jax.train.recipe import build_config, recipe_values_of_kind
from sa2jax.train.state import TrainState, abstract_state, init_state


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


# --- what each is taught with ---------------------------------------------------------------------

Found = DetokenizerNetwork | EncoderNetwork
FoundT = TypeVar("FoundT", DetokenizerNetwork, EncoderNetwork)
Measure = Callable[[Params, Iterator[Any]], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class NetworkTrainer(Generic[FoundT]):
    """How one kind of network is trained.

    Attributes:
        recipe: its recipe.
        open: the network of a folder, for a dtype of computation.
        data: batches of a config and a seed, for a network; `of` are those of training.
        batch: shapes of a batch of the longest rows.
        loss: what is made small, see `networks.step`.
        measure: metrics of parameters on held-out batches, for a structure, a mesh and a recipe.
        unit: what lengths of rows are counted in.
        longest: that of a row, by a config of data.
        model: the structure of what is trained, for a network and a config of data.
        start: all numbers, from those of the network.
        learnt: the network's numbers among all.
    """

    recipe: type[NetworkRecipe]
    open: Callable[[str, str], FoundT]
    data: Callable[..., Any]
    batch: Callable[[FoundT, Any, Mesh | None, int], Any]
    loss: LossFunction
    measure: Callable[[Functional[Any], Mesh | None, Any], Measure]
    unit: str
    longest: Callable[[Any], int]
    model: Callable[[FoundT, Any], Functional[Any]] = lambda network, data: network.model
    start: Callable[[FoundT, Any, Params, int], Params] = lambda network, data, params, seed: params
    learnt: Callable[[Params], Params] = lambda params: params


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
    task = make_network_task(recipe, Path(out))
    return loop.run_training(task, recipe.intervals, out, steps=recipe.optimizer.steps, **options)


def make_network_task(recipe: NetworkRecipe, out: Path) -> TrainingTask:
    """What a recipe trains; of the weights nothing is kept yet.

    Args:
        recipe: everything that the run depends on.
        out: the run's folder.

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
    subject, mesh = TRAINERS[recipe.kind], loop.mesh_from_spec(recipe.mesh)
    network = subject.open(recipe.network.folder, recipe.network.compute_dtype)
    if out.resolve().is_relative_to(network.folder.resolve()):
        raise TrainError(
            f"{out} is inside of the model's folder, which would be copied into itself: "
            "choose another --out"
        )

    # --- input --------------------------------------------------------------------------------
    loop.micro_batch_rows(recipe.data.rows, 0, mesh)
    data = subject.data(network, recipe.data, seed=recipe.seed)

    # --- model and update ---------------------------------------------------------------------
    model = subject.model(network, recipe.data)
    optimizer = make_optimizer(recipe.optimizer)
    like = abstract_state(model, optimizer, mesh)

    # --- held out -----------------------------------------------------------------------------
    evaluate = None
    if recipe.evaluate is not None:
        held_out = replace(recipe.data, folder=recipe.evaluate.folder, shuffle=False, epochs=1)
        open_held_out = partial(subject.data, network, held_out, seed=0, of=data)
        open_held_out()  # what is wrong with it comes up now, not at the end
        measure = subject.measure(model, mesh, recipe)
        most = recipe.evaluate.batches

        def evaluate(state: TrainState) -> dict[str, float]:
            batches = (place_network_batch(batch, mesh) for batch in islice(open_held_out(), most))
            found = measure(state.params, batches)
            return {f"evaluate/{name}": value for name, value in found.items()}

    def load() -> Params:
        return subject.start(network, recipe.data, network.load_params(mesh), recipe.seed)

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
        step=make_loss_step(
            subject.loss,
            model,
            optimizer,
            recipe.loss,
            mesh,
            seed=recipe.seed,
            unroll=recipe.unroll,
        ),
        place_batch=partial(place_network_batch, mesh=mesh),
        evaluate=evaluate,
        write_results=partial(_write_results, subject, network),
        meter=Meter((0.0, 0.0), 0.0),
    )


def _write_results(
    subject: NetworkTrainer[Any], network: Found, state: TrainState, out: Path, log: TrainingLog
) -> dict[str, Path]:
    """The whole folder of a run that is done."""
    results = {"model": out / "model"}
    for note in network.save(subject.learnt(state.params), results["model"]):
        log.print(f"note: {note}")
    return results


# --- evaluation ---------------------------------------------------------------------------------


def _mean_loss(loss: LossFunction) -> Callable[..., Measure]:
    """The mean loss over frames, each batch with several draws that are always the same."""

    def make(model: Functional[Any], mesh: Mesh | None, recipe: NetworkRecipe) -> Measure:
        compiled = make_loss_evaluation(loss, model, recipe.loss, mesh)
        draws = 1 if recipe.evaluate is None else recipe.evaluate.draws

        def measure(params: Params, batches: Iterator[Any]) -> dict[str, float]:
            total = frames = 0.0
            for number, batch in enumerate(batches):
                for draw in range(draws):
                    key = jax.random.fold_in(jax.random.key(draw), number)
                    value, report = jax.device_get(compiled(params, batch, key))
                    count = float(report["frames"])
                    total, frames = total + float(value) * count, frames + count
            return {"loss": total / max(frames, 1.0)}

        return measure

    return make


def _mean_flow_loss(model: Functional[Any], mesh: Mesh | None, recipe: NetworkRecipe) -> Measure:
    """The flow's, of which no condition is dropped."""
    whole = replace(recipe, loss=replace(recipe.loss, cfg_dropout=0.0))
    return _mean_loss(flow.flow_loss)(model, mesh, whole)


def _heard(hear: Callable[..., recognition.RecognitionOutput]) -> Callable[..., Measure]:
    """Mean loss and reports over clips; words that are wrong, and codes, where there are some."""

    def make(model: Functional[Any], mesh: Mesh | None, recipe: NetworkRecipe) -> Measure:
        require("jiwer")
        compiled = make_loss_evaluation(hear, model, recipe.loss, mesh)

        def measure(params: Params, batches: Iterator[SoundBatch]) -> dict[str, float]:
            clips, sums, codes = 0, defaultdict(float), []
            said, read = [], []
            for batch in batches:
                found, given = jax.device_get((compiled(params, batch), batch))
                real = np.flatnonzero(given.lengths)
                clips += len(real)
                for name in MEANS & found.report.keys():
                    sums[name] += float(found.report[name]) * len(real)
                sums["loss"] += float(found.loss) * len(real)
                if found.letters is not None:
                    said += [recognition.letters_to_text(given.letters[row]) for row in real]
                    read += [recognition.letters_to_text(found.letters[row]) for row in real]
                if found.codes is not None:
                    counts = code_length(given.lengths // HOP)
                    codes += [found.codes[row][: counts[row]] for row in real]
            means = {name: value / max(clips, 1) for name, value in sums.items()}
            if said:
                errors, words = word_errors(said, read)
                means["wer"] = sum(errors) / max(sum(words), 1)
            return means | (speech_tokenizer.codebook_usage(np.concatenate(codes)) if codes else {})

        return measure

    return make


# Of what a batch of clips reports, the means over clips.
MEANS = frozenset(
    {"ctc", "mel_error", "codebook_balance", "accuracy", "same_speaker", "other_speaker"}
)


# --- the table ------------------------------------------------------------------------------------


def _flow_data(
    network: DetokenizerNetwork, config: FlowDataConfig, *, seed: int, of: Any = None
) -> FlowData:
    del of
    return FlowData(config, seed=seed, analysis=network.speech.analysis_hash)


def _crops(network: Found, config: CropConfig, *, seed: int, of: Any = None) -> CropData:
    del network, of
    return CropData(config, seed=seed)


def _clips(network: Found, config: ClipConfig, *, seed: int, of: Any = None) -> ClipData:
    del network
    return ClipData(config, seed=seed, speakers=None if of is None else of.speakers)


def _voices(config: ClipConfig) -> int:
    """How many speakers a folder knows."""
    return len(read_speech_info(Path(config.folder), audio.SAMPLE_RATE)[0]["speakers"])


def _flow_batch(
    network: DetokenizerNetwork, recipe: Any, mesh: Mesh | None, rows: int
) -> flow.FlowBatch:
    return flow.abstract_flow_batch(network.cfg, mesh, rows, recipe.data.buckets[-1])


def _crop_batch(network: Found, recipe: Any, mesh: Mesh | None, rows: int) -> vocoder.VocoderBatch:
    del network
    return vocoder.abstract_vocoder_batch(mesh, rows, recipe.data.crop)


def _clip_batch(network: Found, recipe: Any, mesh: Mesh | None, rows: int) -> SoundBatch:
    del network
    longest = recipe.data.buckets[-1]
    samples, letters = HOP * longest, max_letters(longest)
    return recognition.abstract_sound_batch(mesh, rows, samples, letters)


def _beside(fresh: Callable[[Any, Any, int], Params]) -> Callable[..., Params]:
    """Loaded numbers, and fresh heads."""

    def start(network: Any, config: Any, params: Params, seed: int) -> Params:
        return {"model": params, "heads": fresh(network, config, seed)["heads"]}

    return start


TRAINERS: Mapping[str, NetworkTrainer[Any]] = {
    "flow": NetworkTrainer(
        recipe=FlowRecipe,
        open=partial(open_detokenizer_network, "flow"),
        data=_flow_data,
        batch=_flow_batch,
        loss=flow.flow_loss,
        measure=_mean_flow_loss,
        unit="codes",
        longest=lambda data: data.buckets[-1],
    ),
    "vocoder": NetworkTrainer(
        recipe=VocoderRecipe,
        open=partial(open_detokenizer_network, "vocoder"),
        data=_crops,
        batch=_crop_batch,
        loss=vocoder.vocoder_loss,
        measure=_mean_loss(vocoder.vocoder_loss),
        unit="frames",
        longest=lambda data: data.crop,
    ),
    "speech_tokenizer": NetworkTrainer(
        recipe=SpeechTokenizerRecipe,
        open=partial(open_detokenizer_network, "speech_tokenizer"),
        data=_clips,
        batch=_clip_batch,
        loss=speech_tokenizer.speech_tokenizer_loss,
        measure=_heard(speech_tokenizer.speech_tokenizer_forward),
        unit="frames",
        longest=lambda data: data.buckets[-1],
        model=lambda network, data: speech_tokenizer.speech_tokenizer_with_heads(
            network.cfg, network.policy
        ),
        start=_beside(
            lambda network, data, seed: speech_tokenizer.init_speech_tokenizer(
                network.cfg, seed=seed
            )
        ),
        learnt=recognition.network_params,
    ),
    "speaker_encoder": NetworkTrainer(
        recipe=SpeakerEncoderRecipe,
        open=partial(open_detokenizer_network, "speaker_encoder"),
        data=_clips,
        batch=_clip_batch,
        loss=speaker_encoder.speaker_encoder_loss,
        measure=_heard(speaker_encoder.speaker_encoder_forward),
        unit="frames",
        longest=lambda data: data.buckets[-1],
        model=lambda network, data: speaker_encoder.speaker_encoder_with_heads(
            network.cfg, network.policy, speakers=_voices(data)
        ),
        start=_beside(
            lambda network, data, seed: speaker_encoder.init_speaker_encoder(
                network.cfg, speakers=_voices(data), seed=seed
            )
        ),
        learnt=recognition.network_params,
    ),
    "audio_encoder": NetworkTrainer(
        recipe=AudioEncoderRecipe,
        open=open_audio_encoder,
        data=_clips,
        batch=_clip_batch,
        loss=audio_encoder.audio_encoder_loss,
        measure=_heard(audio_encoder.audio_encoder_forward),
        unit="frames",
        longest=lambda data: data.buckets[-1],
        model=lambda network, data: audio_encoder.audio_encoder_with_heads(
            network.cfg, network.policy
        ),
        start=_beside(
            lambda network, data, seed: audio_encoder.init_audio_encoder(network.cfg, seed=seed)
        ),
        learnt=recognition.network_params,
    ),
}

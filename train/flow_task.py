"""Training of the detokenizer's flow: what a recipe says, as a task for the loop.

    prepare_flow(["speech/"], "ready", "mini")
    recipe = read_flow_recipe("flow", {"flow.folder": "mini", "data.folder": "ready"})
    outcome = train_flow(recipe, "runs/anna")
    speech = Speech.from_pretrained(outcome.results["model"])

The result is a whole detokenizer: the flow that has learnt, beside the other networks and the
voices of the one it began with. Prepared recordings and voices stay valid for it, since what heard
them is not trained.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sa2jax import checkpoint, folders
from sa2jax.convert.token2wav import supply_voices
from sa2jax.convert.transfer import read_stored
from sa2jax.errors import CheckpointError, ConfigError, TrainError
from sa2jax.inference.speech_folder import RECORDINGS, VOICES, SpeechFolder
from sa2jax.models.flow import flow_model
from sa2jax.models.flow.flow_matching import Flow
from sa2jax.nn import Functional, Params, Policy
from sa2jax.speech_config import FlowConfig
from sa2jax.train import loop
from sa2jax.train.flow import (
    FlowBatch,
    Teaching,
    make_flow_evaluation,
    make_flow_step,
    place_flow_batch,
)
from sa2jax.train.flow_data import FlowData, FlowDataConfig
from sa2jax.train.log import Log, Meter
from sa2jax.train.loop import Outcome, Task
from sa2jax.train.optimizer import OptimizerConfig, make_optimizer
from sa2jax.train.recipe import FLOW, Pace, build, values_of
from sa2jax.train.step import TrainState, abstract_state, init_state

BRANCH = "flow"  # of a detokenizer's parameters


@dataclass(frozen=True, kw_only=True)
class FlowSpec:
    """Where training begins.

    Attributes:
        folder: a model folder of this library with a detokenizer in it, or a detokenizer's own.
        compute: dtype of activations and products; parameters are float32.
    """

    folder: str
    compute: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What is measured beside training: the loss on recordings that are not learnt.

    Attributes:
        folder: made by `prepare_flow`.
        batches: at most so many of the size of a training batch.
        draws: noises and noise levels of each piece; the same ones every time.
    """

    folder: str
    batches: int = 16
    draws: int = 4

    def __post_init__(self):
        if self.batches < 1 or self.draws < 1:
            raise ConfigError(
                f"evaluate: expected batches and draws of at least 1, got {self.batches} and "
                f"{self.draws}"
            )


@dataclass(frozen=True, kw_only=True)
class FlowRecipe:
    """A training run of the detokenizer's flow.

    Attributes:
        flow: where it begins.
        data: what it learns from.
        teaching: how it is taught.
        optimizer: how fast, and how long; its parts are `table`, `speaker`, `encoder`, `to_mel`
            and `estimator`.
        evaluate: what is measured beside it.
        mesh: devices, such as `data=4`; by default all on `fsdp`.
        seed: of data order, noise, and what is dropped.
        pace: how often is logged, evaluated and saved.
    """

    flow: FlowSpec
    data: FlowDataConfig
    teaching: Teaching = field(default_factory=Teaching)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluate: HeldOut | None = None
    mesh: str | None = None
    seed: int = 0
    pace: Pace = field(default_factory=Pace)

    def plain(self) -> dict[str, Any]:
        """The recipe as YAML or JSON can hold it, its kind included."""
        return {"kind": FLOW, **json.loads(json.dumps(asdict(self), default=str))}


def read_flow_recipe(source: str | Path, changes: Mapping[str, Any] | None = None) -> FlowRecipe:
    """A recipe by its name or file; see `recipe.read_recipe`.

    Raises:
        ConfigError: for a key that does not exist, a value of another kind, or a recipe of one.
    """
    return build(FlowRecipe, values_of(FLOW, source, changes), str(source))


def train_flow(recipe: FlowRecipe, out: str | Path, **options: Any) -> Outcome:
    """Train as a recipe says; goes on from the last checkpoint if there is one.

    Args:
        recipe: everything that the run depends on.
        out: the run's folder, made if need be; the detokenizer will be in `out`/model.
        **options: see `loop.run`.

    Raises:
        DataError: if the data cannot be used, or was heard by another model.
        TrainError: if the folder holds another run, checkpoints do not fit, the detokenizer is not
            converted, or this is a run of several hosts.
        ShardingError: for a mesh that does not fit the devices.
        CheckpointError: if the model cannot be read or something not be written.
    """
    task = make_flow_task(recipe, Path(out))
    return loop.run(task, recipe.pace, out, steps=recipe.optimizer.steps, **options)


def make_flow_task(recipe: FlowRecipe, out: Path) -> Task:
    """What a recipe trains; of the weights nothing is kept yet.

    Args:
        recipe: everything that the run depends on.
        out: the run's folder.

    Raises:
        DataError: if the data cannot be used, or was heard by another model.
        TrainError: if nothing is trained, sizes do not fit each other, the detokenizer is not
            converted, or this is a run of several hosts.
        ShardingError: for a mesh that does not fit the devices.
        CheckpointError: if the folder has no detokenizer, or a damaged one.
    """
    if jax.process_count() > 1:
        raise TrainError(
            f"{jax.process_count()} processes: the flow is trained by one, on all devices of its "
            "host; run the command there alone, without --distributed"
        )
    mesh, flow = loop.mesh_of(recipe.mesh), open_flow(recipe.flow)
    if out.resolve().is_relative_to(flow.speech.folder.resolve()):
        raise TrainError(
            f"{out} is inside of the detokenizer's folder, which would be copied into itself: "
            "choose another --out"
        )

    # --- input --------------------------------------------------------------------------------
    loop.rows_at_once(recipe.data.rows, 0, mesh)
    data = FlowData(recipe.data, seed=recipe.seed, analysis=flow.speech.analysis)

    # --- model and update ---------------------------------------------------------------------
    optimizer = make_optimizer(recipe.optimizer)
    like = abstract_state(flow.model, optimizer, mesh)

    # --- evaluation ---------------------------------------------------------------------------
    evaluate = None
    if recipe.evaluate is not None:
        held_out = replace(recipe.data, folder=recipe.evaluate.folder, shuffle=False, epochs=1)
        measure = make_flow_evaluation(flow.model, mesh, replace(recipe.teaching, drop=0.0))
        open_held_out = partial(FlowData, held_out, seed=0, analysis=flow.speech.analysis)
        open_held_out()  # what is wrong with it comes up now, not at the end

        def evaluate(state: TrainState) -> dict[str, float]:
            total = frames = 0.0
            for key, batch in _draws(recipe.evaluate, open_held_out(), mesh):
                loss, count = jax.device_get(measure(state.params, batch, key))
                total, frames = total + float(loss) * float(count), frames + float(count)
            return {"evaluate/loss": total / frames}

    return Task(
        title=loop.describe("flow", like, optimizer, mesh),
        facts={"recipe": recipe.plain(), "model": flow.fingerprint(), "data": data.fingerprint},
        data=data, finite=recipe.data.epochs is not None, optimizer=optimizer, like=like,
        load=partial(flow.load, mesh), begin=partial(init_state, flow.model, optimizer, mesh),
        step=make_flow_step(flow.model, optimizer, recipe.teaching, mesh, seed=recipe.seed),
        place=partial(place_flow_batch, mesh=mesh), evaluate=evaluate,
        finish=partial(_write_results, flow), meter=Meter((0.0, 0.0), 0.0),
    )  # fmt: skip


def _draws(spec: HeldOut, data: FlowData, mesh: Mesh | None) -> Iterator[tuple[Any, FlowBatch]]:
    """Held-out batches, each with several keys that are always the same."""
    for number, batch in zip(range(spec.batches), data, strict=False):
        placed = place_flow_batch(batch, mesh)
        for draw in range(spec.draws):
            yield jax.random.fold_in(jax.random.key(draw), number), placed


# --- folders in and out ---------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenFlow:
    """A flow that is to be trained, without its numbers.

    Attributes:
        speech: the folder it lies in.
        cfg: its sizes.
        model: its structure.
    """

    speech: SpeechFolder
    cfg: FlowConfig
    model: Functional[Flow]

    def fingerprint(self) -> str:
        """A hash of its sizes and of its numbers on disk."""
        leaves = self._leaves()
        sizes = json.dumps(self.speech.cfg.to_dict()[BRANCH], sort_keys=True)
        try:
            numbers = checkpoint.content_hash(leaves)
        except (ValueError, OSError) as error:
            raise CheckpointError(
                f"{self.speech.folder} is damaged ({str(error).splitlines()[0][:200]}): convert "
                "the model again"
            ) from None
        return hashlib.sha256(f"{sizes} {numbers}".encode()).hexdigest()[:16]

    def load(self, mesh: Mesh | None) -> Params:
        """Its numbers on their devices.

        Raises:
            CheckpointError: if the folder is damaged.
        """
        return checkpoint.load(self.speech.folder, self.model.placed(mesh), branch=BRANCH)

    def save(self, params: Params, out: Path) -> list[str]:
        """Write the whole detokenizer with other numbers in its flow; `out` is replaced.

        Voices that were added to a detokenizer at `out` stay.

        Args:
            params: of the flow.
            out: folder to make; it appears only when it is complete.

        Returns:
            A note for each voice that was not taken along.

        Raises:
            CheckpointError: if something cannot be read or written.
        """
        source, home = self.speech.folder, self.speech.home
        leaves = checkpoint.open_leaves(source)
        forms = {n: (tuple(leaf.shape), leaf.dtype.numpy_dtype) for n, leaf in leaves.items()}
        learnt = checkpoint.flatten({BRANCH: params})
        with folders.new_folder(out, overwrite=True) as folder:
            size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in forms.values())
            folders.need_space(folder, size)
            _copy(source, folder)
            if home != source:
                for name in (VOICES, RECORDINGS):
                    if (home / name).is_dir():
                        _copy(home / name, folder / name)
            arrays = checkpoint.create(folder / checkpoint.PARAMS, forms)
            for name, leaf in leaves.items():  # one at a time in memory
                if name in learnt:
                    array = jax.device_get(learnt[name]).astype(forms[name][1])
                else:
                    array = read_stored(leaf, name)
                arrays[name].write(array).result()
            return supply_voices(folder, out)

    def _leaves(self) -> dict[str, Any]:
        leaves = checkpoint.open_leaves(self.speech.folder)
        return {name: leaf for name, leaf in leaves.items() if name.startswith(f"{BRANCH}.")}


def open_flow(spec: FlowSpec) -> OpenFlow:
    """The shapes of the flow that a recipe begins with; reads its config alone.

    Raises:
        CheckpointError: if the folder has no detokenizer.
        TrainError: if it is not converted.
    """
    speech = SpeechFolder(spec.folder)
    if speech.official:
        raise TrainError(
            f"{speech.folder} is a detokenizer as it was released: convert it first, with `sa2jax "
            f"convert {spec.folder} OUT`, and train OUT"
        )
    cfg = speech.cfg.flow
    return OpenFlow(speech, cfg, flow_model(cfg, Policy(compute=jnp.dtype(spec.compute))))


def _write_results(flow: OpenFlow, state: TrainState, out: Path, log: Log) -> dict[str, Path]:
    """The detokenizer of a run that is done."""
    results = {"model": out / "model"}
    for note in flow.save(state.params, results["model"]):
        log.say(f"note: {note}")
    return results


def _copy(source: Path, target: Path) -> None:
    """Files and folders but parameters and what is hidden."""

    def left_out(at: str, names: list[str]) -> set[str]:
        top = checkpoint.PARAMS if Path(at) == source else None
        return {name for name in names if name == top or name.startswith(".")}

    shutil.copytree(source, target, ignore=left_out, dirs_exist_ok=True)

"""Trainers of single networks: the data, loss and metrics of each.

A network's own trainer is one object in its module, named in `task.TRAINERS`. Networks that hear
speech, and have heads to teach them, are `ClipTrainer`s.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from sa2jax.audio.features import HOP
from sa2jax.evaluate.judges import require
from sa2jax.evaluate.word_errors import word_errors
from sa2jax.models.speech_tokenizer import code_length
from sa2jax.nn import Functional, Params
from sa2jax.train.data.bucketing import BucketData
from sa2jax.train.networks.batches import SoundBatch, abstract_sound_batch
from sa2jax.train.networks.model_io import DetokenizerNetwork, EncoderNetwork
from sa2jax.train.networks.recipes import NetworkRecipe
from sa2jax.train.networks.recognition import RecognitionOutput, letters_to_text, network_params
from sa2jax.train.networks.speech_data import ClipData, max_letters
from sa2jax.train.networks.step import LossFunction, make_loss_evaluation, make_loss_step
from sa2jax.train.optimizer import Optimizer
from sa2jax.train.state import TrainStep

NetworkT = TypeVar("NetworkT", bound=DetokenizerNetwork | EncoderNetwork)
RecipeT = TypeVar("RecipeT", bound=NetworkRecipe)
DataT = TypeVar("DataT", bound=BucketData[Any])
# Metrics of parameters on held-out batches.
Measure = Callable[[Params, Iterator[Any]], dict[str, float]]


class NetworkTrainer(ABC, Generic[NetworkT, RecipeT, DataT]):
    """How one network is trained.

    Attributes:
        recipe: its recipe; the recipe's `kind` is the trainer's name.
        loss: what is made small, see `networks.step`.
        open: the network of a folder, without its numbers, from the folder and the dtype of
            computation; raises CheckpointError if the folder has no such network, TrainError if
            the detokenizer is not converted.
        unit: what lengths of rows are counted in.
    """

    recipe: type[RecipeT]
    loss: LossFunction[Any]
    open: Callable[[str, str], NetworkT]
    unit: str = "frames"

    @abstractmethod
    def open_data(
        self, network: NetworkT, recipe: RecipeT, *, seed: int, training: DataT | None = None
    ) -> DataT:
        """Batches of a recipe's `data`.

        Args:
            network: what learns from them.
            recipe: which data; for held-out data a recipe of its own.
            seed: of their order.
            training: of held-out data, the data of training.

        Raises:
            DataError: if the data cannot be used.
        """

    @abstractmethod
    def abstract_batch(
        self, network: NetworkT, recipe: RecipeT, mesh: Mesh | None, rows: int
    ) -> Any:
        """Shapes and places of a batch of the longest rows, `rows` of all devices together."""

    def longest_row(self, recipe: RecipeT) -> int:
        """Length of the longest rows, in units."""
        return recipe.data.buckets[-1]

    def model(self, network: NetworkT, recipe: RecipeT) -> Functional[Any]:
        """The structure of what is trained: the network's, unless heads teach it."""
        return network.model

    def init_params(self, network: NetworkT, recipe: RecipeT, params: Params) -> Params:
        """All numbers before training, from those of the network."""
        return params

    def network_params(self, params: Params) -> Params:
        """The network's numbers among all."""
        return params

    def make_step(
        self, model: Functional[Any], optimizer: Optimizer, recipe: RecipeT, mesh: Mesh | None
    ) -> TrainStep[Any]:
        """The step of a recipe, see `networks.step`."""
        return make_loss_step(
            self.loss,
            model,
            optimizer,
            recipe.loss,
            mesh,
            seed=recipe.seed,
            unroll=recipe.unroll,
        )

    def make_measure(
        self, model: Functional[Any], recipe: RecipeT, mesh: Mesh | None = None
    ) -> Measure:
        """Compile what is measured on held-out batches: unless a network says more, the mean loss.

        The mean is over frames, each batch with several draws that are always the same.
        """
        compiled = make_loss_evaluation(self.loss, model, recipe.loss, mesh)
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


# Of what a batch of clips reports, the means over clips.
MEANS = frozenset(
    {"ctc", "mel_error", "codebook_balance", "accuracy", "same_speaker", "other_speaker"}
)


class ClipTrainer(NetworkTrainer[NetworkT, RecipeT, ClipData]):
    """How a network is trained that hears clips of speech and has heads that only teach.

    Attributes:
        forward: what the network makes of a batch, see `recognition.RecognitionOutput`.
        with_heads: the structure of network and heads, from the network's sizes and dtypes and
            the heads' sizes.
        init_with_heads: their random parameters, from the same sizes and a seed.
    """

    forward: Callable[..., RecognitionOutput]
    with_heads: Callable[..., Functional[Any]]
    init_with_heads: Callable[..., Params]

    def head_sizes(self, recipe: RecipeT) -> dict[str, int]:
        """Sizes of the heads that the data decides."""
        return {}

    def code_metrics(self, codes: Int[np.ndarray, "N"]) -> dict[str, float]:
        """Metrics of all codes that held-out clips have, of a network that makes some."""
        return {}

    def open_data(
        self, network: NetworkT, recipe: RecipeT, *, seed: int, training: ClipData | None = None
    ) -> ClipData:
        """Whole clips; the speakers are those of training."""
        speakers = None if training is None else training.speakers
        return ClipData(recipe.data, seed=seed, speakers=speakers)

    def abstract_batch(
        self, network: NetworkT, recipe: RecipeT, mesh: Mesh | None, rows: int
    ) -> SoundBatch:
        """Shapes and places of a batch of the longest clips."""
        longest = self.longest_row(recipe)
        return abstract_sound_batch(mesh, rows, HOP * longest, max_letters(longest))

    def model(self, network: NetworkT, recipe: RecipeT) -> Functional[Any]:
        """The structure of the network and its heads."""
        return self.with_heads(network.cfg, network.policy, **self.head_sizes(recipe))

    def init_params(self, network: NetworkT, recipe: RecipeT, params: Params) -> Params:
        """Loaded numbers, and fresh heads."""
        fresh = self.init_with_heads(network.cfg, seed=recipe.seed, **self.head_sizes(recipe))
        return {"model": params, "heads": fresh["heads"]}

    def network_params(self, params: Params) -> Params:
        """The network's numbers, without the heads."""
        return network_params(params)

    def make_measure(
        self, model: Functional[Any], recipe: RecipeT, mesh: Mesh | None = None
    ) -> Measure:
        """Mean loss and reports over clips; word errors, and codes, where there are some."""
        require("jiwer")
        compiled = make_loss_evaluation(self.forward, model, recipe.loss, mesh)

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
                    said += [letters_to_text(given.letters[row]) for row in real]
                    read += [letters_to_text(found.letters[row]) for row in real]
                if found.codes is not None:
                    counts = code_length(given.lengths // HOP)
                    codes += [found.codes[row][: counts[row]] for row in real]
            means = {name: value / max(clips, 1) for name, value in sums.items()}
            if said:
                errors, words = word_errors(said, read)
                means["wer"] = sum(errors) / max(sum(words), 1)
            return means | (self.code_metrics(np.concatenate(codes)) if codes else {})

        return measure

"""The recipe of a training run of the language model; see `train.recipe` for recipes in general."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sa2jax.errors import ConfigError
from sa2jax.nn import Remat
from sa2jax.train.language.data_config import DataConfig
from sa2jax.train.language.objective import LOSS_CHUNK
from sa2jax.train.lora import DECODER_MATRICES
from sa2jax.train.optimizer import OptimizerConfig
from sa2jax.train.recipe import DEFAULT_KIND, Intervals, build_config, recipe_values_of_kind


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Where training begins.

    Attributes:
        folder: a model folder of this library, or a Hugging Face one.
        preset: instead of a folder, sizes from configs/models for a model of random numbers.
        tokenizer: of a preset: a folder with tokenizer files, or `bytes` for one token a byte.
        dtype: of the parameters; `int8` (matrices) for LoRA alone.
        compute_dtype: of activations and products; by default bfloat16, on a CPU float32. With
            float32 parameters and bfloat16 here, the parameters are master weights.
        save_dtype: dtype of the model that is written at the end, by default that of the folder.
    """

    folder: str | None = None
    preset: str | None = None
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    save_dtype: Literal["float32", "bfloat16"] | None = None


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """Low-rank adaptation, see `lora.add_lora`.

    Attributes:
        rank: width of the bottleneck.
        alpha: the product is scaled by `alpha / rank`.
        targets: a regular expression for the paths of matrices.
        learning_rate: learning rate of the low-rank matrices; everything else is frozen, unless
            `optimizer.learning_rate_overrides` says otherwise.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str = DECODER_MATRICES
    learning_rate: float = 1e-4


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured beside training.

    Attributes:
        sources: data files or folders, as in `DataConfig`.
        batches: at most so many of the size of a training batch.
    """

    sources: Mapping[str, float]
    batches: int = 16


@dataclass(frozen=True, kw_only=True)
class LanguageRecipe:
    """A training run of the language model.

    Attributes:
        model: where it begins.
        data: what it learns from, and how that is packed.
        optimizer: how fast, and how long.
        lora: train low-rank additions instead of the model.
        evaluate: what is measured beside it.
        mesh: devices, such as `fsdp=8`; by default all on `fsdp`.
        remat: what the gradient computes again: `full`, `dots`, or null for nothing.
        loss_chunk: positions of each row whose logits are held at a time.
        grad_dtype: dtype in which the gradients of a batch's parts are added up.
        unroll: write out layers instead of a loop over them: faster on a CPU, longer to compile.
        seed: of data order and fresh parameters.
        intervals: how often is logged, evaluated and saved.
    """

    model: ModelSpec
    data: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraSpec | None = None
    evaluate: Evaluation | None = None
    mesh: str | None = None
    remat: Remat | None = "full"
    loss_chunk: int = LOSS_CHUNK
    grad_dtype: Literal["float32", "bfloat16"] = "float32"
    unroll: bool = False
    seed: int = 0
    intervals: Intervals = field(default_factory=Intervals)

    def __post_init__(self):
        spec = self.model
        if (spec.folder is None) == (spec.preset is None):
            raise ConfigError(
                "model: expected either a folder or a preset, got "
                f"{'both' if spec.folder else 'neither'}; --model FOLDER gives one"
            )
        if spec.preset is not None and spec.tokenizer is None:
            raise ConfigError("model.tokenizer: a preset needs a tokenizer's folder, or `bytes`")
        if spec.dtype == "int8" and self.lora is None:
            raise ConfigError("model.dtype int8 cannot be trained itself: give a `lora` section")
        if self.loss_chunk < 1:
            raise ConfigError(f"loss_chunk: expected at least 1, got {self.loss_chunk}")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as YAML or JSON can hold it."""
        return json.loads(json.dumps(asdict(self), default=str))


def read_language_recipe(
    source: str | Path, changes: Mapping[str, Any] | None = None
) -> LanguageRecipe:
    """A recipe of the language model by its name or file.

    Args:
        source: a name from configs/recipes, or a YAML file.
        changes: values by dotted key that replace those of the file.

    Raises:
        ConfigError: for a key that does not exist, or a value of another kind.
    """
    return build_config(
        LanguageRecipe, recipe_values_of_kind(DEFAULT_KIND, source, changes), str(source)
    )


def model_values(folder: Path) -> dict[str, Any]:
    """Recipe values of the command's `--model`: a folder, in place of a preset, too."""
    return {"model.folder": str(folder), "model.preset": None}


def source_values(words: Sequence[str]) -> dict[str, Any]:
    """Recipe values of the command's `--data`: `PATH=WEIGHT` words; a path alone has weight 1.

    Raises:
        ConfigError: for a weight that is no number.
    """
    weights = {}
    for word in words:
        path, equals, weight = word.rpartition("=")
        try:
            weights[path if equals else word] = float(weight) if equals else 1.0
        except ValueError:
            raise ConfigError(f"--data {word}: expected PATH or PATH=WEIGHT") from None
    return {"data.sources": weights}

"""Recipes of single networks: the fields they share, beside their `data` and `loss`.

Each network's own recipe lies in its module: `flow`, `vocoder`, `speech_tokenizer`,
`speaker_encoder`, `audio_encoder`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from sa2jax.errors import ConfigError
from sa2jax.train.optimizer import OptimizerConfig
from sa2jax.train.recipe import Intervals


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """Where training begins.

    Attributes:
        folder: a model folder of this library, or for a network of the detokenizer the latter's.
        compute_dtype: dtype of activations and products; parameters are float32.
    """

    folder: str
    compute_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class NetworkEvaluation:
    """What is measured beside training, on recordings that are not learnt.

    Attributes:
        folder: prepared as that of training.
        batches: at most so many of the size of a training batch.
        draws: draws of each batch, of what is random in a loss; the same ones every time.
    """

    folder: str
    batches: int = 16
    draws: int = 1

    def __post_init__(self):
        if self.batches < 1 or self.draws < 1:
            raise ConfigError(
                f"evaluate: expected batches and draws of at least 1, got {self.batches} and "
                f"{self.draws}"
            )


@dataclass(frozen=True, kw_only=True)
class NetworkRecipe:
    """A training run of one network; each kind adds `data` and `loss`.

    Attributes:
        network: where it begins.
        optimizer: how fast, and how long; names of parameters begin with the network's parts, or
            with `model` and `heads` where heads teach it.
        evaluate: what is measured beside it.
        mesh: devices, such as `data=4`; by default all on `fsdp`.
        unroll: write out layers instead of a loop over them: faster on a CPU, longer to compile.
        seed: of data order, noise, and what else is drawn.
        intervals: how often is logged, evaluated and saved.
    """

    kind: ClassVar[str]

    network: NetworkSpec
    data: Any
    loss: Any
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluate: NetworkEvaluation | None = None
    mesh: str | None = None
    unroll: bool = False
    seed: int = 0
    intervals: Intervals = field(default_factory=Intervals)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as YAML or JSON can hold it, its kind included."""
        return {"kind": self.kind, **json.loads(json.dumps(asdict(self), default=str))}


def folder_values(kind: str, folders: Sequence[str]) -> dict[str, Any]:
    """Recipe values of the command's `--data`: the one folder that a network of a kind learns from.

    Raises:
        ConfigError: if there are several.
    """
    if len(folders) != 1:
        command = "prepare-flow" if kind == "flow" else "prepare-speech"
        raise ConfigError(
            f"--data {' '.join(folders)}: the {kind} learns from one folder; `sa2jax data "
            f"{command}` makes one of many sources"
        )
    return {"data.folder": folders[0]}

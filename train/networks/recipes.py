"""Recipes of single networks: everything that a training run of one depends on.

Of the detokenizer that is the flow, the vocoder, the speech tokenizer or the speaker encoder; of a
model its audio encoder. What they are taught with: `task`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from sa2jax.errors import ConfigError
from sa2jax.train.networks import audio_encoder, flow, speaker_encoder, speech_tokenizer, vocoder
from sa2jax.train.networks.flow_data import FlowDataConfig
from sa2jax.train.networks.speech_data import ClipConfig, CropConfig
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


@dataclass(frozen=True, kw_only=True)
class FlowRecipe(NetworkRecipe):
    """Of the flow; its parts are `table`, `speaker`, `encoder`, `to_mel` and `estimator`."""

    kind = "flow"
    data: FlowDataConfig
    loss: flow.FlowLossConfig = field(default_factory=flow.FlowLossConfig)


@dataclass(frozen=True, kw_only=True)
class VocoderRecipe(NetworkRecipe):
    """Of the vocoder; its parts are `f0_predictor`, `merge`, `pre`, `stage0` …, `post`."""

    kind = "vocoder"
    data: CropConfig
    loss: vocoder.VocoderLossConfig = field(default_factory=vocoder.VocoderLossConfig)


@dataclass(frozen=True, kw_only=True)
class SpeechTokenizerRecipe(NetworkRecipe):
    """Of the speech tokenizer."""

    kind = "speech_tokenizer"
    data: ClipConfig
    loss: speech_tokenizer.SpeechTokenizerLossConfig = field(
        default_factory=speech_tokenizer.SpeechTokenizerLossConfig
    )


@dataclass(frozen=True, kw_only=True)
class SpeakerEncoderRecipe(NetworkRecipe):
    """Of the speaker encoder."""

    kind = "speaker_encoder"
    data: ClipConfig
    loss: speaker_encoder.SpeakerEncoderLossConfig = field(
        default_factory=speaker_encoder.SpeakerEncoderLossConfig
    )


@dataclass(frozen=True, kw_only=True)
class AudioEncoderRecipe(NetworkRecipe):
    """Of a model's audio encoder."""

    kind = "audio_encoder"
    data: ClipConfig
    loss: audio_encoder.AudioEncoderLossConfig = field(
        default_factory=audio_encoder.AudioEncoderLossConfig
    )

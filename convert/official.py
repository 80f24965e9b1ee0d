"""The released detokenizer folder (flow.yaml, flow.pt, hift.pt, two .onnx files), read by leaf."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sa2jax import checkpoint
from sa2jax.convert import flow, transfer, vocoder, voice_analysis
from sa2jax.convert.rules import Rule
from sa2jax.convert.transfer import Network
from sa2jax.convert.weights import TensorInfo
from sa2jax.errors import CheckpointError
from sa2jax.models.speaker_encoder import speaker_encoder
from sa2jax.models.speech_tokenizer import speech_tokenizer
from sa2jax.nn import Params
from sa2jax.speech.layout import ANALYSIS, YAML
from sa2jax.speech_config import Token2WavConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _NetworkFile:
    """How one of the four networks is read and described."""

    file: str
    open: Callable[[Path], Network[Any]]
    rules: Callable[[Any, Mapping[str, Any]], list[Rule]]
    shapes: Callable[[Any], dict[str, tuple[int, ...]]]
    write: Callable[..., None] | None = None  # of an .onnx


def _shapes_of(make: Callable[[Any], Any]) -> Callable[[Any], dict[str, tuple[int, ...]]]:
    return lambda cfg: {
        name: tuple(leaf.shape) for name, leaf in checkpoint.flatten(make(cfg).abstract).items()
    }


def _vocoder_rules(cfg: Any, form: Mapping[str, Any]) -> list[Rule]:
    length, direction = form["spelling"]
    return vocoder.vocoder_rules(cfg, prefix=form["prefix"], spelling=(length, direction))


# The largest first: what comes later is then read beside nothing else.
NETWORKS = {
    "speech_tokenizer": _NetworkFile(
        voice_analysis.SPEECH_TOKENIZER_FILE,
        voice_analysis.open_speech_tokenizer,
        lambda cfg, _: voice_analysis.speech_tokenizer_rules(cfg),
        _shapes_of(speech_tokenizer),
        voice_analysis.write_speech_tokenizer,
    ),
    "speaker_encoder": _NetworkFile(
        voice_analysis.SPEAKER_ENCODER_FILE,
        voice_analysis.open_speaker_encoder,
        lambda cfg, _: voice_analysis.speaker_encoder_rules(cfg),
        _shapes_of(speaker_encoder),
        voice_analysis.write_speaker_encoder,
    ),
    "flow": _NetworkFile(
        flow.WEIGHTS, flow.open_file, lambda cfg, _: flow.flow_rules(cfg), flow.leaf_shapes
    ),
    "vocoder": _NetworkFile(
        vocoder.WEIGHTS, vocoder.open_file, _vocoder_rules, vocoder.leaf_shapes
    ),
}
FILES = (YAML, *(part.file for part in NETWORKS.values()))


def load_official(folder: str | Path) -> tuple[Token2WavConfig, Params]:
    """A released detokenizer, converted in memory.

    Args:
        folder: flow.yaml, flow.pt, hift.pt and the two .onnx files.

    Returns:
        The configuration, and the parameters of all four networks as NumPy arrays in the dtypes of
        the files.

    Raises:
        ConfigError: if flow.yaml is not understood.
        CheckpointError: for missing, damaged or hostile files, another model's, or such as do not
            fit together.
    """
    official = OfficialDetokenizer(folder)
    for note in official.notes:
        log.warning("%s", note)
    return official.config, {
        name: transfer.read(network.plan) for name, network in official.networks()
    }


class OfficialDetokenizer:
    """A released detokenizer, by leaf; one network is open at a time.

    Everything is held against its table at once, so that a conversion does not fail half way.

    Args:
        folder: flow.yaml, flow.pt, hift.pt and the two .onnx files.

    Attributes:
        folder: the same.
        config: sizes of all networks.
        tensors: shape and dtype of every leaf by dotted path, such as `flow.table`.
        sources: those of every tensor, by network and released name.
        folded: leaves that a fold made.
        form: of each network, what only its file tells.
        notes: what a user should know of the files.

    Raises:
        ConfigError: if flow.yaml is not understood.
        CheckpointError: for missing, damaged or hostile files, another model's, or such as do not
            fit together.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        missing = [file for file in FILES if not (self.folder / file).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of the {len(FILES)} files of a detokenizer: "
                f"{', '.join(missing)}; copy them there from the released token2wav folder"
            )
        configs: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.sources: dict[str, TensorInfo] = {}
        self.form: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        folded: set[str] = set()
        for name, network in self.networks():
            configs[name], self.form[name] = network.config, dict(network.form)
            self.tensors |= {f"{name}.{leaf}": t for leaf, t in network.plan.leaves.items()}
            self.sources |= {f"{name}.{tensor}": t for tensor, t in network.plan.tensors.items()}
            folded |= {f"{name}.{leaf}" for leaf in network.folded}
            path = self.folder / NETWORKS[name].file
            self.notes += transfer.left_out_note(network.left_out, path)
        self.folded = frozenset(folded)
        self.config = _joined(self.folder, configs)
        self._open: tuple[str, Network[Any]] | None = None

    @property
    def bytes(self) -> int:
        """Bytes of all leaves."""
        return sum(info.nbytes for info in self.tensors.values())

    def networks(self) -> Iterator[tuple[str, Network[Any]]]:
        """Each network in turn; let go of one before the next."""
        for name, part in NETWORKS.items():
            yield name, part.open(self.folder / part.file)

    def get(self, name: str) -> np.ndarray:
        """Read one leaf; those of one network should be read together."""
        network, _, leaf = name.partition(".")
        if self._open is None or self._open[0] != network:
            self._open = None  # first let go of the other
            self._open = network, NETWORKS[network].open(self.folder / NETWORKS[network].file)
        return transfer.read_leaf(self._open[1].plan, leaf)

    def drop(self, name: str) -> None:
        """Nothing is kept but the open network."""


def _joined(folder: Path, configs: Mapping[str, Any]) -> Token2WavConfig:
    """One config of four, if they are of one detokenizer."""
    of_flow, of_vocoder = configs["flow"], configs["vocoder"]
    tokenizer, speaker = (configs[name] for name in ANALYSIS)
    st, se = (NETWORKS[name].file for name in ANALYSIS)
    pairs = (
        ("mel bands", of_flow.mels, vocoder.WEIGHTS, of_vocoder.mels),
        ("codes", of_flow.codes, st, tokenizer.codebook),
        ("numbers in a speaker vector", of_flow.speaker, se, speaker.embed),
    )
    problems = [f"{YAML} has {a} {what}, {file} {b}" for what, a, file, b in pairs if a != b]
    if problems:
        raise CheckpointError(
            f"{folder} holds files of different detokenizers: {'; '.join(problems)}. "
            "Use all five files of one release"
        )
    return Token2WavConfig(**configs)

"""Load one network of a detokenizer to train; save it in a copy of its folder.

network = open_detokenizer_network("flow", "mini")
params = network.load_params(mesh)
network.save(params, "runs/anna/model")   # a whole detokenizer: the others are as they were
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sa2jax import atomic_io, checkpoint
from sa2jax.config import AudioEncoderConfig
from sa2jax.convert.token2wav import supply_voices
from sa2jax.convert.transfer import read_stored
from sa2jax.errors import CheckpointError, TrainError
from sa2jax.models.audio_encoder import AudioEncoder
from sa2jax.models.flow import flow_model
from sa2jax.models.speaker_encoder import speaker_encoder
from sa2jax.models.speech_tokenizer import speech_tokenizer
from sa2jax.models.vocoder import vocoder
from sa2jax.nn import Functional, Params, Policy, structure_of
from sa2jax.speech.layout import ANALYSIS, KIND, RECORDINGS, VOICES
from sa2jax.speech.store import SpeechFolder
from sa2jax.speech_config import Token2WavConfig
from sa2jax.train.language.model_io import BaseModel, open_base_model
from sa2jax.train.language.recipe import ModelSpec

ENCODER = "audio_encoder"  # of a model's parameters

# The structure of each network, by its name in a detokenizer's parameters.
STRUCTURES: dict[str, Callable[[Any, Policy], Functional[Any]]] = {
    "flow": flow_model,
    "vocoder": vocoder,
    "speech_tokenizer": speech_tokenizer,
    "speaker_encoder": speaker_encoder,
}


@dataclass(frozen=True)
class DetokenizerNetwork:
    """A network that is to be trained, without its numbers.

    Attributes:
        speech: the folder it lies in.
        name: which of the four.
        cfg: its sizes.
        policy: its dtypes.
        model: its structure.
    """

    speech: SpeechFolder
    name: str
    cfg: Any
    policy: Policy
    model: Functional[Any]

    @property
    def folder(self) -> Path:
        """The detokenizer's folder."""
        return self.speech.folder

    @property
    def home(self) -> Path:
        """The model's folder that it lies in, or its own."""
        return self.speech.home

    def fingerprint(self) -> str:
        """A hash of its sizes and of its numbers on disk."""
        leaves = self._leaves()
        sizes = json.dumps(self.speech.cfg.to_dict()[self.name], sort_keys=True)
        try:
            numbers = checkpoint.content_hash(leaves)
        except (ValueError, OSError) as error:
            raise CheckpointError(
                f"{self.speech.folder} is damaged ({str(error).splitlines()[0][:200]}): convert "
                "the model again"
            ) from None
        return hashlib.sha256(f"{sizes} {numbers}".encode()).hexdigest()[:16]

    def load_params(self, mesh: Mesh | None) -> Params:
        """Its numbers on their devices.

        Raises:
            CheckpointError: if the folder is damaged.
        """
        return checkpoint.load_params(
            self.speech.folder, self.model.with_shardings(mesh), branch=self.name
        )

    def save(self, params: Params, out: Path) -> list[str]:
        """Write the whole detokenizer with other numbers in this network; `out` is replaced.

        Voices that were added to a detokenizer at `out` stay, unless this network hears: then what
        it heard means something else now.

        Args:
            params: of this network.
            out: folder to make; it appears only when it is complete.

        Returns:
            A note for each voice that was not taken along.

        Raises:
            CheckpointError: if something cannot be read or written.
        """
        source, home = self.speech.folder, self.speech.home
        leaves = checkpoint.open_leaves(source)
        forms = {n: (tuple(leaf.shape), leaf.dtype.numpy_dtype) for n, leaf in leaves.items()}
        learnt = checkpoint.flatten({self.name: params})
        with atomic_io.new_folder(out, overwrite=True, sources=(home,)) as folder:
            size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in forms.values())
            atomic_io.need_space(folder, size)
            _copy(source, folder)
            if home != source:
                for name in (VOICES, RECORDINGS):
                    if (home / name).is_dir():
                        _copy(home / name, folder / name)
            arrays = checkpoint.create(folder / checkpoint.PARAMS, forms)
            for name, leaf in leaves.items():  # one at a time in memory
                if name in learnt:
                    array = np.asarray(jax.device_get(learnt[name])).astype(forms[name][1])
                else:
                    array = read_stored(leaf, name)
                arrays[name].write(array).result()
            if self.name not in ANALYSIS:
                return supply_voices(folder, out)
            _write_analysis_hash(folder, arrays)
            shutil.rmtree(folder / VOICES, ignore_errors=True)
            return supply_voices(folder, home)

    def _leaves(self) -> dict[str, Any]:
        leaves = checkpoint.open_leaves(self.speech.folder)
        return {name: leaf for name, leaf in leaves.items() if name.startswith(f"{self.name}.")}


def open_detokenizer_network(
    name: str, folder: str | Path, compute: str = "float32"
) -> DetokenizerNetwork:
    """The shapes of a network that training begins with; reads its config alone.

    Args:
        name: `flow`, `vocoder`, `speech_tokenizer` or `speaker_encoder`.
        folder: a model folder of this library with a detokenizer in it, or a detokenizer's own.
        compute: dtype of activations and products.

    Raises:
        CheckpointError: if the folder has no detokenizer.
        TrainError: if it is not converted.
    """
    speech = SpeechFolder(folder)
    if speech.official:
        raise TrainError(
            f"{speech.folder} is a detokenizer as it was released: convert it first, with `sa2jax "
            f"convert {folder} OUT`, and train OUT"
        )
    cfg, policy = getattr(speech.cfg, name), Policy(compute=jnp.dtype(compute))
    return DetokenizerNetwork(speech, name, cfg, policy, STRUCTURES[name](cfg, policy))


@dataclass(frozen=True)
class EncoderNetwork:
    """A model's audio encoder that is to be trained, without its numbers.

    Attributes:
        base: the model it lies in.
        cfg: its sizes.
        policy: its dtypes.
        model: its structure.
    """

    base: BaseModel
    cfg: AudioEncoderConfig
    policy: Policy
    model: Functional[AudioEncoder]

    @property
    def folder(self) -> Path:
        """The model's folder."""
        return Path(str(self.base.spec.folder))

    @property
    def home(self) -> Path:
        """The same."""
        return self.folder

    def fingerprint(self) -> str:
        """A hash of the model's sizes and numbers."""
        return self.base.fingerprint()

    def load_params(self, mesh: Mesh | None) -> Params:
        """Its numbers on their devices.

        Raises:
            CheckpointError: if the folder is damaged.
        """
        return self.base.load_params(mesh, 0)[ENCODER]

    def save(self, params: Params, out: Path) -> list[str]:
        """Write the whole model with other numbers in its encoder; `out` is replaced.

        Args:
            params: of the encoder.
            out: folder to make; it appears only when it is complete.

        Returns:
            Nothing that was lost.

        Raises:
            CheckpointError: if something cannot be read or written.
        """
        self.base.save({**self.base.load_params(None, 0), ENCODER: params}, out, overwrite=True)
        return []


def open_audio_encoder(folder: str | Path, compute: str = "float32") -> EncoderNetwork:
    """The shapes of a model's encoder that training begins with; reads its config alone.

    Args:
        folder: a model folder of this library, or a Hugging Face one.
        compute: dtype of activations and products.

    Raises:
        CheckpointError: if there is no such folder.
        ConfigError: if its config is not understood.
    """
    base = open_base_model(ModelSpec(folder=str(folder)))
    cfg, policy = base.cfg.audio_encoder, Policy(compute=jnp.dtype(compute))
    model = structure_of(AudioEncoder, cfg, policy)
    return EncoderNetwork(base, cfg, policy, model)


def save_detokenizer(folder: Path, cfg: Token2WavConfig, params: Params) -> None:
    """Write a detokenizer that was never released: it can be trained, not exported.

    Args:
        folder: where, inside `atomic_io.new_folder`; made if need be.
        cfg: sizes.
        params: of all four networks.
    """
    folder.mkdir(exist_ok=True)
    checkpoint.save_params(folder / checkpoint.PARAMS, params)
    info = {"format": checkpoint.FORMAT, "kind": KIND, "config": cfg.to_dict(), "analysis": ""}
    _write_info(folder, info)
    _write_analysis_hash(folder, checkpoint.open_leaves(folder))


def _write_analysis_hash(folder: Path, leaves: dict[str, Any]) -> None:
    """Write down the hash of what analyses voices."""
    heard = {name: leaf for name, leaf in leaves.items() if name.startswith(ANALYSIS)}
    read = {name: read_stored(leaf, name) for name, leaf in heard.items()}
    analysis = checkpoint.content_hash(checkpoint.unflatten(read))
    _write_info(folder, checkpoint.read_info(folder) | {"analysis": analysis})


def _write_info(folder: Path, info: dict[str, Any]) -> None:
    text = json.dumps(info, indent=2) + "\n"
    (folder / checkpoint.INFO).write_text(text, encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    """Files and folders but parameters and what is hidden."""

    def left_out(at: str, names: list[str]) -> set[str]:
        top = {checkpoint.PARAMS, checkpoint.SINGLE} if Path(at) == source else set()
        return {name for name in names if name in top or name.startswith(".")}

    copy = partial(atomic_io.copy_file, folder=source)
    shutil.copytree(source, target, ignore=left_out, copy_function=copy, dirs_exist_ok=True)

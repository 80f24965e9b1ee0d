"""Load the model to fine-tune; save the result as a model folder.

base = open_base_model(recipe.model, recipe.lora)   # shapes only
params = base.load_params(mesh, seed)               # numbers, LoRA's included
base.save(params, "runs/talk/model")                # a folder that `from_pretrained` takes
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sa2jax import atomic_io, checkpoint
from sa2jax.assets import model_folder
from sa2jax.chat import tokenizer_files
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.checkpoint import Progress
from sa2jax.config import StepAudio2Config
from sa2jax.convert import tokenizer as tokenizers
from sa2jax.convert.transfer import copy_side_files, usual_dtype
from sa2jax.convert.weights import SafetensorsFolder
from sa2jax.errors import ConfigError, TrainError
from sa2jax.families import family_of, read_config
from sa2jax.inference import loading
from sa2jax.models.step_audio import StepAudio2Model
from sa2jax.nn import Functional, Params, Policy, functional, init_params
from sa2jax.runtime import default_dtype
from sa2jax.speech.layout import KIND as SPEECH
from sa2jax.speech.layout import VOICES
from sa2jax.train.language.model_fingerprint import weights_fingerprint
from sa2jax.train.language.recipe import LoraSpec, ModelSpec
from sa2jax.train.lora import add_lora, combine, init_lora, merge_lora

BYTES = "bytes"  # the tokenizer of one token a byte


@dataclass(frozen=True)
class BaseModel:
    """A model that is to be trained, without its numbers.

    Attributes:
        spec: where it comes from.
        lora: its low-rank additions.
        cfg: its sizes.
        policy: its dtypes.
        without_lora: its structure without additions.
        model: its structure with them.
        lora_paths: paths of the matrices that have additions.
    """

    spec: ModelSpec
    lora: LoraSpec | None
    cfg: StepAudio2Config
    policy: Policy
    without_lora: Functional[StepAudio2Model]
    model: Functional[StepAudio2Model]
    lora_paths: tuple[str, ...] = ()

    @property
    def lora_scale(self) -> float:
        """What the low-rank product is multiplied by."""
        return self.lora.alpha / self.lora.rank if self.lora else 1.0

    @property
    def is_int8(self) -> bool:
        """Whether its matrices are int8, into which nothing can be merged."""
        return self.policy.kernel is not None

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer of the folder, or the one that the recipe names for a preset.

        Raises:
            TokenizerError: if there is none, or it is not one of Step-Audio 2.
        """
        special = family_of(self.cfg).special_tokens
        if self.spec.folder is not None:
            return Tokenizer.from_folder(self.spec.tokenizer or self.spec.folder, special)
        if self.spec.tokenizer != BYTES:
            return Tokenizer.from_folder(str(self.spec.tokenizer), special)
        return Tokenizer(tokenizer_files.byte_tokenizer(*self._bytes))

    @property
    def _bytes(self) -> tuple[int, int]:
        """First id that is no text, and size, of the tokenizer of bytes."""
        vocab = self.cfg.decoder.vocab
        return (151688 if vocab >= 158720 else tokenizer_files.AUDIO_START), vocab

    def fingerprint(self) -> str:
        """A hash of its config and its numbers, wherever they lie; see `weights_fingerprint`.

        Raises:
            CheckpointError: if the folder is damaged.
        """
        digest = hashlib.sha256(json.dumps(self.cfg.to_hf(), sort_keys=True).encode())
        if self.spec.folder is not None:
            digest.update(weights_fingerprint(self.spec.folder).encode())
        return digest.hexdigest()[:16]

    def load_params(self, mesh: Mesh | None, seed: int, progress: Progress | None = None) -> Params:
        """Its numbers on their devices, with fresh low-rank matrices.

        Args:
            mesh: devices; None for one.
            seed: of what is drawn: those matrices, or all of a preset.
            progress: called with (bytes_done, bytes_total).

        Raises:
            CheckpointError: if the folder is damaged, incomplete or of another model.
        """
        if self.spec.folder is not None:
            like = self.without_lora.with_shardings(mesh)
            params = loading.read_params(self.spec.folder, like, self.policy, progress=progress)
        else:
            places = None if mesh is None else self.without_lora.shardings(mesh)
            module = family_of(self.cfg).module

            def make():
                return module(self.cfg, policy=self.policy, rngs=nnx.Rngs(seed))

            params = init_params(make, places)
        if self.lora is None:
            return params
        return combine(params, init_lora(self.model, jax.random.key(seed), mesh))

    def merged(self, params: Params) -> Params:
        """The model alone: with what was learnt added to its matrices.

        Raises:
            TrainError: if they are int8.
        """
        return params if self.lora is None else merge_lora(params, self.lora_scale)

    def save(self, params: Params, out: str | Path, *, overwrite: bool = False) -> None:
        """Write a model folder; in a multi-host run all hosts call it.

        Args:
            params: as trained; low-rank matrices are merged.
            out: folder to make; it appears only when it is complete.
            overwrite: replace a model that is there already.

        Raises:
            CheckpointError: if the folder cannot be made.
            TrainError: if low-rank matrices would have to be merged into int8 ones.
        """
        sources = [] if self.spec.folder is None else [self.spec.folder]
        with _shared_folder(out, overwrite, sources) as folder:
            self.write_into(folder, params)
            if jax.process_index() == 0:
                _copy_voices(Path(out), folder)

    def write_into(self, folder: Path, params: Params) -> None:
        """Write what a model folder has into a folder that is there; all hosts call it.

        Args:
            folder: such as `atomic_io.new_folder` gives.
            params: as trained; low-rank matrices are merged.

        Raises:
            CheckpointError: if the folder cannot be written.
            TrainError: if low-rank matrices would have to be merged into int8 ones.
        """
        dtype = self._stored_dtype()
        cast = jax.jit(lambda leaf: leaf.astype(dtype))

        def floating(leaf):
            return jnp.issubdtype(leaf.dtype, jnp.floating)

        params = jax.tree.map(
            lambda leaf: cast(leaf) if floating(leaf) and leaf.dtype != dtype else leaf,
            self.merged(params),
        )
        checkpoint.save_params(folder / checkpoint.PARAMS, params)
        if jax.process_index() == 0:
            self._write_side_files(folder, dtype)

    def _stored_dtype(self) -> np.dtype:
        if self.spec.save_dtype is not None:
            return jnp.dtype(self.spec.save_dtype)
        if self.spec.folder is None:
            return jnp.dtype(jnp.float32)
        return stored_dtype(self.spec.folder)

    def _write_side_files(self, folder: Path, dtype: np.dtype) -> None:
        info = {
            "format": checkpoint.FORMAT,
            "dtype": dtype.name,
            "source_dtypes": {"all": dtype.name, "but": {}},
        }
        if self.spec.folder is not None:
            home = Path(self.spec.folder)
            own = {checkpoint.INFO, checkpoint.PARAMS, SPEECH, VOICES}
            copy_side_files(home, folder, own | {path.name for path in home.glob("*.safetensors")})
            if (home / SPEECH).is_dir():
                link = partial(_link, folder=home)
                shutil.copytree(home / SPEECH, folder / SPEECH, copy_function=link)
            _copy_voices(home, folder)
        else:
            text = json.dumps(self.cfg.with_dtype(dtype.name).to_hf(), indent=2) + "\n"
            (folder / "config.json").write_text(text, encoding="utf-8")
            if self.spec.tokenizer == BYTES:
                start, vocab = self._bytes
                tokenizer_files.save_tokenizer_files(folder, audio_start=start, vocab=vocab)
        tokenizer = self.spec.tokenizer
        if tokenizer not in (None, BYTES):
            tokenizers.copy_tokenizer(folder, Path(str(tokenizer)), folder, self.cfg)
        text = json.dumps(info, indent=2) + "\n"
        (folder / checkpoint.INFO).write_text(text, encoding="utf-8")


def open_base_model(spec: ModelSpec, lora: LoraSpec | None = None) -> BaseModel:
    """The shapes of the model that a recipe begins with; reads its config alone.

    Raises:
        ConfigError: if config.json or the preset is not understood.
        TrainError: if LoRA fits none of its matrices, or the folder's int8 is not expected.
    """
    if spec.folder is not None:
        spec = replace(spec, folder=str(model_folder(spec.folder)))
        cfg = read_config(str(spec.folder))
    else:
        cfg = StepAudio2Config.preset(str(spec.preset))
    policy = _dtype_policy(spec)
    family = family_of(cfg)
    plain = family.model(cfg, policy)
    if lora is None:
        return BaseModel(spec, lora, cfg, policy, plain, plain)
    matrices: list[str] = []

    def make() -> StepAudio2Model:
        rngs = nnx.Rngs(0)
        net = family.module(cfg, policy=policy, rngs=rngs)
        matrices[:] = add_lora(net, lora.rank, lora.alpha, lora.targets, rngs=rngs)
        return net

    return BaseModel(spec, lora, cfg, policy, plain, functional(make), tuple(matrices))


def stored_dtype(folder: str | Path) -> np.dtype:
    """The dtype of most numbers of a model folder.

    Raises:
        CheckpointError: if it is no model folder.
    """
    if checkpoint.is_checkpoint(folder):
        return jnp.dtype(checkpoint.read_info(folder)["dtype"])
    with SafetensorsFolder(Path(folder)) as weights:
        return usual_dtype(weights.tensors)


def _dtype_policy(spec: ModelSpec) -> Policy:
    compute = jnp.dtype(spec.compute_dtype) if spec.compute_dtype else default_dtype()
    stored = None if spec.folder is None else loading.stored_int8(spec.folder)
    if stored is not None and spec.dtype != "int8":
        raise TrainError(
            f"{spec.folder} has int8 matrices: train LoRA on them with model.dtype int8, or begin "
            "with the folder it was made from"
        )
    if spec.dtype == "int8":
        if spec.folder is None:
            raise ConfigError("model.dtype int8 needs a model.folder")
        return replace(
            loading.resolve_policy("int8", stored=stored), param=compute, compute=compute
        )
    return Policy(param=jnp.dtype(spec.dtype), compute=compute)


@contextmanager
def _shared_folder(out: str | Path, overwrite: bool, sources: list[str]) -> Iterator[Path]:
    """`atomic_io.new_folder` for all hosts of a run: the first makes it and names it at the end."""
    several = jax.process_count() > 1
    meet = multihost_utils.sync_global_devices if several else lambda name: None
    if jax.process_index() > 0:
        meet("folder is there")
        yield atomic_io.partial_of(out)
        meet("folder is full")
        return
    with atomic_io.new_folder(out, overwrite=overwrite, sources=sources) as folder:
        meet("folder is there")
        yield folder
        meet("folder is full")


def _copy_voices(home: Path, folder: Path) -> None:
    """Take the voices of a model along: what heard them is not trained."""
    if (home / VOICES).is_dir():
        copy = partial(atomic_io.copy_file, folder=home)
        shutil.copytree(home / VOICES, folder / VOICES, copy_function=copy, dirs_exist_ok=True)


def _link(source: str, target: str, folder: Path) -> None:
    """A second name for a file that nobody changes, or a copy where there can be none."""
    atomic_io.require_inside(source, folder)
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)

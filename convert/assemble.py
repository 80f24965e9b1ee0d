"""Assemble one model folder of a language model, a detokenizer and voices trained separately."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sa2jax import atomic_io, checkpoint
from sa2jax.audio import AudioSource, Channel
from sa2jax.convert.token2wav import supply_voices
from sa2jax.convert.transfer import copy_side_files, read_stored
from sa2jax.convert.weights import parse_dtype
from sa2jax.errors import CheckpointError, ConfigError
from sa2jax.files.json_files import read_json
from sa2jax.speech.layout import ANALYSIS, DEFAULT_VOICE, KIND, VOICES, is_converted
from sa2jax.speech.store import SpeechFolder


def assemble(
    model: str | Path,
    speech: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    single: bool = False,
    voices: Mapping[str, str | Path] | None = None,
    channel: Channel | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Put a language model and a detokenizer into one model folder.

    Args:
        model: model folder of this library; a detokenizer in it is not taken along.
        speech: detokenizer of this library, or a model folder with one.
        out: folder to make; it appears only when it is complete.
        dtype: of all floating numbers; by default each tensor keeps its own.
        single: write the numbers of each as one file `params.safetensors`, for small models.
        voices: recordings of voices, by the names they shall have; the first becomes the default.
            The detokenizer's own voices come along if its numbers stay what they are.
        channel: the channel of these recordings that is heard, see `audio.AudioSource`.
        overwrite: replace a checkpoint at `out`.

    Returns:
        What the user should know: voices that were not taken along.

    Raises:
        CheckpointError: if a folder is damaged or of another kind, or `out` cannot be made.
        ConfigError: for another dtype.
        VoiceError: if a recording holds no voice, or a name cannot be a file's.
        AudioError: if a recording cannot be read.
    """
    cast, model, detokenizer = parse_dtype(dtype), Path(model), SpeechFolder(speech)
    if not checkpoint.is_checkpoint(model) or is_converted(model):
        raise CheckpointError(f"{model} is no model folder of this library: convert it first")
    if detokenizer.official:
        raise CheckpointError(f"{detokenizer.folder} is not converted: convert it first")
    info = checkpoint.read_info(model)
    if info.get("int8") is not None and cast is not None:
        raise ConfigError(f"{model} holds int8 matrices: they cannot become {dtype}")
    sources = model, detokenizer.home, *(voices or {}).values()
    with atomic_io.new_folder(out, overwrite=overwrite, sources=sources) as folder:
        copy_side_files(
            model,
            folder,
            {
                checkpoint.INFO,
                checkpoint.PARAMS,
                KIND,
                VOICES,
                *(path.name for path in model.glob("*.safetensors")),
            },
        )
        if cast is not None:
            info |= {"dtype": cast.name, "source_dtypes": {"all": cast.name, "but": {}}}
            _change(folder / "config.json", lambda config: _with_dtype(config, cast.name))
        _write(folder, _read(model, cast), info, single)
        (folder / KIND).mkdir()
        params = _read(detokenizer.folder, cast)
        analysis = {name: params[name] for name in ANALYSIS}
        speech_info = checkpoint.read_info(detokenizer.folder) | {
            "analysis": checkpoint.content_hash(analysis)
        }
        if voices:
            speech_info[DEFAULT_VOICE] = next(iter(voices))
        _write(folder / KIND, params, speech_info, single)
        notes = supply_voices(folder, detokenizer.home)
        speech_folder = SpeechFolder(folder)
        for name, recording in (voices or {}).items():
            speech_folder.add(name, AudioSource(recording, channel), overwrite=True)
    return notes


def _read(folder: Path, cast: np.dtype | None) -> checkpoint.Params:
    """All numbers of a folder, on the host."""
    read = {name: read_stored(leaf, name) for name, leaf in checkpoint.open_leaves(folder).items()}
    changed = {
        name: array.astype(cast)
        if cast is not None and jnp.issubdtype(array.dtype, jnp.floating)
        else array
        for name, array in read.items()
    }
    return checkpoint.unflatten(changed)


def _write(folder: Path, params: checkpoint.Params, info: Mapping[str, Any], single: bool) -> None:
    if single:
        checkpoint.save_single(folder, params)
    else:
        checkpoint.save_params(folder / checkpoint.PARAMS, params)
    text = json.dumps(info, indent=2) + "\n"
    (folder / checkpoint.INFO).write_text(text, encoding="utf-8")


def _change(path: Path, change: Any) -> None:
    config = read_json(path, dict)
    path.write_text(json.dumps(change(config), indent=2) + "\n", encoding="utf-8")


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    where = config.get("text_config", config)
    where["torch_dtype"] = dtype
    return config

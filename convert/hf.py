"""Convert Hugging Face checkpoints to model folders and back, streaming one tensor at a time.

convert(source, out)    Hugging Face folder → model folder of this library
export(source, out)     model folder → Hugging Face folder
load_hf(folder)         Hugging Face folder → (sharded) device arrays, nothing written
"""

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sa2jax import atomic_io, checkpoint
from sa2jax.checkpoint import Progress
from sa2jax.config import StepAudio2Config
from sa2jax.convert import token2wav
from sa2jax.convert import tokenizer as tokenizers
from sa2jax.convert.rules import Rule
from sa2jax.convert.transfer import (
    Report,
    StoredTensors,
    TransferPlan,
    copy_side_files,
    left_out_note,
    make_plan,
    make_report,
    pack_dtypes,
    part_progress,
    read_part,
    unpack_dtypes,
    usual_dtype,
    with_int8,
    write,
)
from sa2jax.convert.weights import (
    SafetensorsFolder,
    TensorInfo,
    parse_dtype,
    parse_size,
    write_safetensors,
)
from sa2jax.errors import CheckpointError
from sa2jax.families import family_of, read_config
from sa2jax.files.json_files import read_json
from sa2jax.nn import Policy
from sa2jax.quantize import quantized_leaves, scale_of

SPEECH = token2wav.KIND


def leaf_shapes(cfg: StepAudio2Config) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a model by dotted path; nothing is allocated."""
    leaves = checkpoint.flatten(family_of(cfg).model(cfg).abstract)
    return {name: tuple(leaf.shape) for name, leaf in leaves.items()}


def int8_kernels(cfg: StepAudio2Config, *, float_head: bool = False) -> list[str]:
    """The leaves that `dtype="int8"` quantizes."""
    policy = Policy(kernel=np.int8, head=np.float32 if float_head else None)
    return quantized_leaves(checkpoint.flatten(family_of(cfg).model(cfg, policy).abstract))


def convert(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    float_head: bool = False,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Turn a Hugging Face folder into a model folder of this library.

    Its detokenizer, a folder token2wav/, becomes one of this library inside; a folder with
    flow.yaml and no config.json is a detokenizer that stands alone.

    Args:
        source: folder with config.json and safetensors.
        out: folder to make; appears only when it is complete.
        dtype: `float32`, `bfloat16` or `float16`, of the language model; by default each tensor
            keeps its own, as those of the detokenizer always do. `int8` is that of the matrices,
            with a scale for each output; embeddings, norms, biases and convolutions are bfloat16.
        float_head: with int8, keep the matrix that makes logits in bfloat16.
        tokenizer: folder of the tokenizer files, by default `source`.
        overwrite: replace a checkpoint at `out`.
        progress: called with (bytes_done, bytes_total); see `weights.progress_bar`.

    Raises:
        CheckpointError: if the source is damaged or of another model, or `out` cannot be made.
        ConfigError: if config.json or flow.yaml is not understood.
        TokenizerError: if the tokenizer is not one of Step-Audio 2, or does not fit the model.
    """
    started, source = time.perf_counter(), Path(source)
    for folder in (source, source / SPEECH):
        if checkpoint.is_checkpoint(folder):
            raise CheckpointError(f"{folder} is converted already: expected a released folder")
    is_int8 = dtype == "int8"
    if float_head and not is_int8:
        raise CheckpointError(
            "float_head is for dtype int8: other dtypes are those of the head too"
        )
    cast = parse_dtype("bfloat16" if is_int8 else dtype)
    if token2wav.is_standalone(source):
        done = token2wav.convert(source, out, overwrite=overwrite, progress=progress)
        return replace(done, notes=(*done.notes, *_kept(cast)))
    cfg = read_config(source)
    tokenizer_folder = tokenizers.find_tokenizer(source, tokenizer, cfg)
    speaks = token2wav.is_official(source / SPEECH)
    with SafetensorsFolder(source) as weights:
        plan = _plan(source, weights, cast)
        if is_int8:
            plan = with_int8(plan, int8_kernels(cfg, float_head=float_head))
        speech = token2wav.OfficialDetokenizer(source / SPEECH) if speaks else None
        total = plan.bytes + (speech.bytes if speech else 0)
        sources = source, tokenizer
        with atomic_io.new_folder(out, overwrite=overwrite, sources=sources) as folder:
            atomic_io.need_space(folder, total)
            leaves = {name: (info.shape, info.dtype) for name, info in plan.leaves.items()}
            arrays = checkpoint.create(folder / checkpoint.PARAMS, leaves)
            write(plan, arrays, part_progress(progress, 0, total))
            left_out = copy_side_files(source, folder, _own(source, speech))
            notes = left_out_note(weights.left_out, source)
            notes += tokenizers.copy_tokenizer(source, tokenizer_folder, folder, cfg)
            if speech:
                update = part_progress(progress, plan.bytes, total)
                left_out += _inside(token2wav.convert_into(speech, folder / SPEECH, update))
                notes += speech.notes + token2wav.supply_voices(folder, Path(out))
                notes += _kept(cast)
            elif (source / SPEECH).is_dir():
                notes.append(f"{source / SPEECH} has no {token2wav.YAML}: it was not converted")
            info = {
                "format": checkpoint.FORMAT,
                "dtype": usual_dtype(plan.leaves).name,
                "source_dtypes": pack_dtypes(weights.tensors),
            }
            if is_int8:
                info |= {"dtype": "int8", "int8": {"head": not float_head}}
            text = json.dumps(info, indent=2) + "\n"
            (folder / checkpoint.INFO).write_text(text, encoding="utf-8")
    return make_report(weights.tensors | _prefixed(speech), total, started, left_out, notes)


def export(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    dequantize: bool = False,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Turn a model folder of this library into a Hugging Face folder.

    Args:
        source: folder made by `convert`; a detokenizer that stands alone is one, too.
        out: folder to make; appears only when it is complete.
        dtype: `float32`, `bfloat16` or `float16`, of the language model; by default what each
            tensor had before `convert`, as those of the detokenizer always do.
        dequantize: write the numbers that int8 matrices stand for; without it, they are refused.
        max_shard_size: largest file of the language model, in bytes or such as `"5GB"`.
        overwrite: replace a checkpoint at `out`.
        progress: called with (bytes_done, bytes_total); see `weights.progress_bar`.

    Raises:
        CheckpointError: if the source is damaged, or `out` cannot be made.
        ConfigError: if config.json is not understood.
    """
    started, source = time.perf_counter(), Path(source)
    cast, limit = parse_dtype(dtype), parse_size(max_shard_size)
    if token2wav.is_converted(source):
        done = token2wav.export(source, out, overwrite=overwrite, progress=progress)
        return replace(done, notes=(*done.notes, *_kept(cast)))
    weights = ModelFolder(source)
    if weights.int8 and not dequantize:
        raise CheckpointError(
            f"{source} has int8 matrices, which a Hugging Face checkpoint of this model cannot "
            "have: export it with --dequantize (rounded numbers in their old dtype), or export "
            "the folder it was made from"
        )
    speaks = token2wav.is_converted(source / SPEECH)
    speech = token2wav.ConvertedDetokenizer(source / SPEECH) if speaks else None
    notes = ()
    converted = _own(source, speech)
    if speech is not None and not speech.form:
        notes = (f"{source / SPEECH} {token2wav.NO_RELEASED_FORM}; it is left out",)
        speech = None
    tensors = {
        name: TensorInfo(info.shape, cast or weights.source_dtypes[name])
        for name, info in weights.tensors.items()
    }
    size = sum(info.nbytes for info in tensors.values())
    total = size + (speech.bytes if speech else 0)
    with atomic_io.new_folder(out, overwrite=overwrite, sources=(source,)) as folder:
        atomic_io.need_space(folder, total)
        write_safetensors(folder, tensors, weights, limit, part_progress(progress, 0, total))
        left_out = copy_side_files(source, folder, converted)
        if speech:
            update = part_progress(progress, size, total)
            left_out += _inside(token2wav.export_into(speech, folder / SPEECH, update))
        if cast is not None:
            _write_config_dtype(folder / "config.json", cast.name)
    if speech:
        notes = _kept(cast)
    if weights.int8:
        notes = (*notes, "the matrices were int8: their numbers are rounded")
    return make_report(tensors | _prefixed(speech), total, started, left_out, notes)


def load_hf(
    folder: str | Path,
    like: Mapping[str, Any] | None = None,
    *,
    dtype: Any = None,
    transform: checkpoint.LeafTransform | None = None,
    progress: Progress | None = None,
) -> checkpoint.Params:
    """Read a Hugging Face folder straight onto devices; host memory holds one tensor at a time.

    Args:
        folder: folder with config.json and safetensors.
        like: the wanted tree, of `jax.ShapeDtypeStruct` or of `jax.sharding.Sharding`; by default
            all leaves as stored and on the first device.
        dtype: cast to this on the way; by default as `like` says, or as stored.
        transform: what becomes of each leaf as soon as it is read.
        progress: called with (bytes_done, bytes_total).

    Returns:
        Parameters as a plain nested dict.

    Raises:
        CheckpointError: if the folder is damaged or of another model.
        ConfigError: if config.json is not understood.
    """
    folder = Path(folder)
    with SafetensorsFolder(folder) as weights:
        plan = _plan(folder, weights, None)
        wanted = checkpoint.flatten(like) if like else dict.fromkeys(plan.leaves)
        done, params = 0, {}
        for name, info in plan.leaves.items():
            kind, place = checkpoint.form_of(wanted[name], info.dtype, dtype)
            read = partial(read_part, plan, name)
            leaf = checkpoint.assemble(info.shape, kind, place, read)
            params |= {name: leaf} if transform is None else transform(name, leaf)
            done += info.nbytes
            if progress:
                progress(done, plan.bytes)
    return checkpoint.unflatten(params)


class ModelFolder(StoredTensors):
    """A model folder of this library under Hugging Face names, read one tensor at a time.

    Attributes:
        tensors: shape and stored dtype by name.
        source_dtypes: dtype of each tensor before it was converted.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        info = checkpoint.read_info(folder)
        cfg = read_config(folder)
        leaves = checkpoint.open_leaves(folder)
        shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
        int8_info = info.get("int8")
        wanted = leaf_shapes(cfg)
        if int8_info is not None:
            kernels = int8_kernels(cfg, float_head=not int8_info["head"])
            wanted |= {scale_of(name): wanted[name][:-1] for name in kernels}
        checkpoint.require_fit(folder, shapes, wanted)
        super().__init__(leaves, family_of(cfg).rules(cfg))
        self.source_dtypes = unpack_dtypes(info.get("source_dtypes"), self.tensors)


def _plan(folder: Path, weights: SafetensorsFolder, cast: np.dtype | None) -> TransferPlan:
    cfg = read_config(folder)
    rules = family_of(cfg).rules(cfg)
    problems = _resized(rules, weights, cfg.decoder.vocab)
    return make_plan(rules, weights, leaf_shapes(cfg), str(folder), cast=cast, problems=problems)


def _resized(rules: list[Rule], weights: SafetensorsFolder, vocab: int) -> list[str]:
    """What is wrong if the table of tokens has other rows than config.json says."""
    tables = [weights.tensors.get(r.sources[0]) for r in rules if r.target == "decoder.table"]
    return [
        f"the vocabulary was resized to {table.shape[0]} tokens, vocab_size says {vocab}"
        for table in tables
        if table is not None and table.shape[:1] not in ((vocab,), ())
    ]


def _own(
    source: Path, speech: token2wav.OfficialDetokenizer | token2wav.ConvertedDetokenizer | None
) -> set[str]:
    """Names in a folder that are converted and thus no side files."""
    weights = {path.name for path in source.glob("*.safetensors")}
    return {checkpoint.INFO, checkpoint.PARAMS, *weights} | ({SPEECH} if speech else set())


def _kept(cast: np.dtype | None) -> tuple[str, ...]:
    """The note on a detokenizer when a dtype was asked for."""
    return () if cast is None else ("the detokenizer keeps its dtype: codes and phases need it",)


def _inside(left_out: list[str]) -> list[str]:
    return [f"{SPEECH}/{name}" for name in left_out]


def _prefixed(
    speech: token2wav.OfficialDetokenizer | token2wav.ConvertedDetokenizer | None,
) -> dict[str, TensorInfo]:
    """The tensors of a detokenizer beside those of its model."""
    return {f"{SPEECH}.{name}": info for name, info in speech.sources.items()} if speech else {}


def _write_config_dtype(path: Path, dtype: str) -> None:
    """Let config.json say in which dtype the weights are."""
    config = read_json(path, dict)
    for section in (config, config.get("text_config", {})):
        for key in ("torch_dtype", "dtype"):
            if key in section:
                section[key] = dtype
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

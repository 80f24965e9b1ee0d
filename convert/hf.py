"""Hugging Face folders to ours and back, streaming: memory holds one tensor, not one model.

convert(source, out)    Hugging Face folder → model folder of this library
export(source, out)     model folder → Hugging Face folder
load_hf(folder)         Hugging Face folder → (sharded) device arrays, nothing written
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from sa2jax import checkpoint
from sa2jax.config import StepAudio2Config
from sa2jax.convert import tokenizer as tokenizers
from sa2jax.convert.rules import Placement, Rule, Split, Transpose, expand, match, rule
from sa2jax.convert.weights import (
    DTYPES,
    SafetensorsFolder,
    TensorInfo,
    Tick,
    Weights,
    blocks,
    parse_dtype,
    parse_size,
    peak_memory,
    write_safetensors,
)
from sa2jax.errors import CheckpointError
from sa2jax.models.step_audio import step_audio2

SIDE_FILE_BYTES = 64 << 20
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".gguf", ".h5", ".npz")
OWN = {checkpoint.INFO, checkpoint.PARAMS, "token2wav"}  # converted apart, not side files


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        tensors: tensors in Hugging Face form.
        parameters: numbers in them.
        bytes: bytes of parameters written.
        seconds: wall time.
        peak_bytes: the most memory the process ever held.
        left_out: files of the source that were not taken along.
        notes: what the user should know.
    """

    tensors: int
    parameters: int
    bytes: int
    seconds: float
    peak_bytes: int
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def llm_rules(cfg: StepAudio2Config) -> list[Rule]:
    """The table for encoder, adapter and decoder: released name, our leaf, what happens between."""
    d, e = cfg.decoder, cfg.audio_encoder
    q, kv, heads = (d.heads, d.head_dim), (d.kv_heads, d.head_dim), (e.heads, e.head_dim)
    conv = Transpose(2, 1, 0)  # torch keeps [out, in, time]
    dec, hf_dec = "decoder.layers", "model.layers.{layer}"
    enc, hf_enc = "audio_encoder.layers", "encoder.blocks.{layer}"
    return [
        rule("model.embed_tokens.weight", "decoder.table"),
        rule(f"{hf_dec}.input_layernorm.weight", f"{dec}.attn_norm.scale"),
        rule(f"{hf_dec}.self_attn.q_proj.weight", f"{dec}.attn.q.kernel", Split(0, q)),
        rule(f"{hf_dec}.self_attn.q_proj.bias", f"{dec}.attn.q.bias", Split(0, q)),
        rule(f"{hf_dec}.self_attn.k_proj.weight", f"{dec}.attn.k.kernel", Split(0, kv)),
        rule(f"{hf_dec}.self_attn.k_proj.bias", f"{dec}.attn.k.bias", Split(0, kv)),
        rule(f"{hf_dec}.self_attn.v_proj.weight", f"{dec}.attn.v.kernel", Split(0, kv)),
        rule(f"{hf_dec}.self_attn.v_proj.bias", f"{dec}.attn.v.bias", Split(0, kv)),
        rule(f"{hf_dec}.self_attn.o_proj.weight", f"{dec}.attn.o.kernel", Split(1, q)),
        rule(f"{hf_dec}.post_attention_layernorm.weight", f"{dec}.mlp_norm.scale"),
        rule(f"{hf_dec}.mlp.gate_proj.weight", f"{dec}.mlp.gate.kernel"),
        rule(f"{hf_dec}.mlp.up_proj.weight", f"{dec}.mlp.up.kernel"),
        rule(f"{hf_dec}.mlp.down_proj.weight", f"{dec}.mlp.down.kernel"),
        rule("model.norm.weight", "decoder.norm.scale"),
        rule("lm_head.weight", "decoder.head.kernel"),
        rule("encoder.conv1.weight", "audio_encoder.conv1.kernel", conv),
        rule("encoder.conv1.bias", "audio_encoder.conv1.bias"),
        rule("encoder.conv2.weight", "audio_encoder.conv2.kernel", conv),
        rule("encoder.conv2.bias", "audio_encoder.conv2.bias"),
        rule("encoder.positional_embedding.weight", "audio_encoder.positions"),
        rule(f"{hf_enc}.attn_ln.weight", f"{enc}.attn_norm.scale"),
        rule(f"{hf_enc}.attn_ln.bias", f"{enc}.attn_norm.bias"),
        rule(f"{hf_enc}.attn.query.weight", f"{enc}.attn.q.kernel", Split(0, heads)),
        rule(f"{hf_enc}.attn.query.bias", f"{enc}.attn.q.bias", Split(0, heads)),
        rule(f"{hf_enc}.attn.key.weight", f"{enc}.attn.k.kernel", Split(0, heads)),
        rule(f"{hf_enc}.attn.value.weight", f"{enc}.attn.v.kernel", Split(0, heads)),
        rule(f"{hf_enc}.attn.value.bias", f"{enc}.attn.v.bias", Split(0, heads)),
        rule(f"{hf_enc}.attn.out.weight", f"{enc}.attn.o.kernel", Split(1, heads)),
        rule(f"{hf_enc}.attn.out.bias", f"{enc}.attn.o.bias"),
        rule(f"{hf_enc}.mlp_ln.weight", f"{enc}.mlp_norm.scale"),
        rule(f"{hf_enc}.mlp_ln.bias", f"{enc}.mlp_norm.bias"),
        rule(f"{hf_enc}.mlp.0.weight", f"{enc}.mlp.up.kernel"),
        rule(f"{hf_enc}.mlp.0.bias", f"{enc}.mlp.up.bias"),
        rule(f"{hf_enc}.mlp.2.weight", f"{enc}.mlp.down.kernel"),
        rule(f"{hf_enc}.mlp.2.bias", f"{enc}.mlp.down.bias"),
        rule("encoder.after_norm.weight", "audio_encoder.norm.scale"),
        rule("encoder.after_norm.bias", "audio_encoder.norm.bias"),
        rule("adapter.conv.weight", "adapter.conv.kernel", conv),
        rule("adapter.conv.bias", "adapter.conv.bias"),
        rule("adapter.linear1.weight", "adapter.up.kernel"),
        rule("adapter.linear1.bias", "adapter.up.bias"),
        rule("adapter.linear2.weight", "adapter.down.kernel"),
        rule("adapter.linear2.bias", "adapter.down.bias"),
    ]


def leaf_shapes(cfg: StepAudio2Config) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a model by dotted path; nothing is allocated."""
    leaves = checkpoint.flatten(step_audio2(cfg).abstract)
    return {name: tuple(leaf.shape) for name, leaf in leaves.items()}


def convert(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    progress: Tick | None = None,
) -> Report:
    """Turn a Hugging Face folder into a model folder of this library.

    Args:
        source: folder with config.json and safetensors.
        out: folder to make; appears only when it is complete.
        dtype: `float32`, `bfloat16` or `float16`; by default each tensor keeps its own.
        tokenizer: folder of the tokenizer files, by default `source`.
        overwrite: replace a checkpoint at `out`.
        progress: told about bytes done and bytes in all; see `weights.progress_bar`.

    Raises:
        CheckpointError: if the source is damaged or of another model, or `out` cannot be made.
        ConfigError: if config.json is not understood.
        TokenizerError: if the tokenizer is not one of Step-Audio 2, or does not fit the model.
    """
    started, source = time.perf_counter(), Path(source)
    if checkpoint.is_checkpoint(source):
        raise CheckpointError(f"{source} is converted already: expected a Hugging Face folder")
    cast = parse_dtype(dtype)
    cfg = StepAudio2Config.from_hf(source)
    found = tokenizers.find(source, tokenizer, cfg)
    with SafetensorsFolder(source) as weights, checkpoint.new_folder(
        out, overwrite=overwrite
    ) as folder:  # fmt: skip
        placements, leaves = _plan(source, weights, cast)
        total = sum(TensorInfo(*leaf).nbytes for leaf in leaves.values())
        checkpoint.need_space(folder, total)
        arrays = checkpoint.create(folder / checkpoint.PARAMS, leaves)
        done = 0
        for p in placements:
            part = p.rule.forward([weights.get(name) for name in p.sources])
            target = arrays[p.leaf] if p.layer is None else arrays[p.leaf][p.layer]
            for index in blocks(part, _chunk(target)):
                block = np.asarray(part[index], leaves[p.leaf][1])
                target[index].write(block).result()
                for name in p.sources:
                    weights.drop(name)
                done += block.nbytes
                if progress:
                    progress(done, total)
        left_out = _copy_side_files(source, folder)
        notes = tokenizers.supply(source, found, folder, cfg)
        info = {
            "format": checkpoint.FORMAT,
            "dtype": _usual([dtype for _, dtype in leaves.values()]).name,
            "source_dtypes": _pack_dtypes({n: t.dtype for n, t in weights.tensors.items()}),
        }
        text = json.dumps(info, indent=2) + "\n"
        (folder / checkpoint.INFO).write_text(text, encoding="utf-8")
    return _report(weights.tensors, total, started, left_out, notes)


def export(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: Tick | None = None,
) -> Report:
    """Turn a model folder of this library into a Hugging Face folder.

    Args:
        source: folder made by `convert`.
        out: folder to make; appears only when it is complete.
        dtype: `float32`, `bfloat16` or `float16`; by default what each tensor had before `convert`.
        max_shard_size: largest file, in bytes or such as `"5GB"`.
        overwrite: replace a checkpoint at `out`.
        progress: told about bytes done and bytes in all; see `weights.progress_bar`.

    Raises:
        CheckpointError: if the source is damaged, or `out` cannot be made.
        ConfigError: if config.json is not understood.
    """
    started, source = time.perf_counter(), Path(source)
    cast, limit = parse_dtype(dtype), parse_size(max_shard_size)
    weights = ModelFolder(source)
    tensors = {
        name: TensorInfo(info.shape, cast or weights.source_dtypes[name])
        for name, info in weights.tensors.items()
    }
    total = sum(info.nbytes for info in tensors.values())
    with checkpoint.new_folder(out, overwrite=overwrite) as folder:
        checkpoint.need_space(folder, total)
        write_safetensors(folder, tensors, weights, limit, progress or (lambda done, total: None))
        left_out = _copy_side_files(source, folder)
        if cast is not None:
            _write_config_dtype(folder / "config.json", cast.name)
    return _report(tensors, total, started, left_out)


def load_hf(
    folder: str | Path,
    *,
    shardings: Mapping[str, Any] | None = None,
    dtype: Any = None,
    progress: Tick | None = None,
) -> checkpoint.Params:
    """Read a Hugging Face folder straight onto devices; host memory holds one tensor at a time.

    Args:
        folder: folder with config.json and safetensors.
        shardings: `jax.sharding.Sharding` of each leaf, a nested dict as the model's parameters;
            by default all on the first device.
        dtype: cast to this on the way; by default as stored.
        progress: told about bytes done and bytes in all.

    Returns:
        Parameters as a plain nested dict.

    Raises:
        CheckpointError: if the folder is damaged or of another model.
        ConfigError: if config.json is not understood.
    """
    folder = Path(folder)
    with SafetensorsFolder(folder) as weights:
        placements, leaves = _plan(folder, weights, None if dtype is None else np.dtype(dtype))
        by_leaf: dict[str, dict[int | None, Placement]] = {}
        for p in placements:
            by_leaf.setdefault(p.leaf, {})[p.layer] = p
        places = checkpoint.flatten(shardings) if shardings else dict.fromkeys(leaves)
        total = sum(TensorInfo(*leaf).nbytes for leaf in leaves.values())
        done, params = 0, {}
        for name, (shape, kind) in leaves.items():
            read = partial(_read_part, weights, by_leaf[name])
            params[name] = checkpoint.assemble(shape, kind, places[name], read)
            done += TensorInfo(shape, kind).nbytes
            if progress:
                progress(done, total)
    return checkpoint.unflatten(params)


def _read_part(
    weights: SafetensorsFolder,
    placements: Mapping[int | None, Placement],
    index: tuple[slice, ...],
    out: np.ndarray,
) -> None:
    """Fill some of a leaf from the tensors that it is made of."""
    if None in placements:
        parts = [(placements[None], index, out)]
    else:
        layers = range(index[0].start, index[0].stop)
        parts = [(placements[n], index[1:], out[i : i + 1]) for i, n in enumerate(layers)]
    for p, inner, room in parts:
        room[...] = p.rule.forward([weights.get(name) for name in p.sources])[inner]
        for name in p.sources:
            weights.drop(name)


class ModelFolder:
    """A model folder of this library under Hugging Face names, read one tensor at a time.

    Attributes:
        tensors: shape and stored dtype by name.
        source_dtypes: dtype of each tensor before it was converted.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        info = checkpoint.read_info(folder)
        cfg = StepAudio2Config.from_hf(folder)
        self._leaves = checkpoint.open_leaves(folder)
        shapes = {name: tuple(leaf.shape) for name, leaf in self._leaves.items()}
        checkpoint.require_fit(folder, shapes, leaf_shapes(cfg))
        self.tensors: dict[str, TensorInfo] = {}
        self._found: dict[str, tuple[Placement, int]] = {}
        for p in expand(llm_rules(cfg), shapes):
            for i, (name, shape) in enumerate(zip(p.sources, p.shapes, strict=True)):
                self.tensors[name] = TensorInfo(shape, self._leaves[p.leaf].dtype.numpy_dtype)
                self._found[name] = p, i
        self.tensors = dict(sorted(self.tensors.items(), key=lambda item: _natural(item[0])))
        self.source_dtypes = _unpack_dtypes(info, self.tensors)

    def get(self, name: str) -> np.ndarray:
        """Read one tensor, in its stored dtype."""
        p, i = self._found[name]
        leaf = self._leaves[p.leaf] if p.layer is None else self._leaves[p.leaf][p.layer]
        try:
            array = np.empty(leaf.shape, leaf.dtype.numpy_dtype)
            for index in blocks(array, _chunk(leaf)):
                array[index] = leaf[index].read().result()
        except (ValueError, OSError) as error:
            reason = str(error).splitlines()[0][:200]
            raise CheckpointError(
                f"{name} cannot be read ({reason}): the folder is damaged, convert it again"
            ) from None
        return p.rule.inverse(array)[i]

    def drop(self, name: str) -> None:
        """Nothing is kept."""


def open_weights(folder: str | Path) -> Weights:
    """A folder of either kind as named tensors.

    Raises:
        CheckpointError: if it is neither, or damaged.
    """
    is_ours = checkpoint.is_checkpoint(folder)
    return ModelFolder(folder) if is_ours else SafetensorsFolder(folder)


def _plan(
    folder: Path, weights: SafetensorsFolder, cast: np.dtype | None
) -> tuple[list[Placement], dict[str, tuple[tuple[int, ...], np.dtype]]]:
    """What goes where, in the order of the source's files, and each leaf's shape and dtype."""
    cfg = StepAudio2Config.from_hf(folder)
    shapes = leaf_shapes(cfg)
    tensors = {name: info.shape for name, info in weights.tensors.items()}
    placements = match(llm_rules(cfg), tensors, shapes, str(folder))
    order = {name: i for i, name in enumerate(weights.tensors)}
    placements.sort(key=lambda p: order[p.sources[0]])
    dtypes: dict[str, np.dtype] = {}
    for p in placements:
        for name in p.sources:
            own = weights.tensors[name].dtype
            dtypes[p.leaf] = np.dtype(jnp.promote_types(dtypes.get(p.leaf, own), own))
    return placements, {name: (shapes[name], cast or dtypes[name]) for name in shapes}


def _chunk(array: ts.TensorStore) -> tuple[int, ...]:
    """Shape of an array's chunks (of one layer of a stacked leaf, where that is what is open)."""
    return tuple(n or 1 for n in array.chunk_layout.write_chunk.shape or ())


def _copy_side_files(source: Path, out: Path) -> list[str]:
    """Take along what is not weights (tokenizer, config, notes, voices); name what is left."""
    left_out = []
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if any(part.startswith(".") for part in relative.parts) or not path.is_file():
            continue
        indexes_weights = path.name.endswith(".index.json")
        if relative.parts[0] in OWN - {"token2wav"} or indexes_weights:
            continue
        if path.suffix == ".safetensors" and len(relative.parts) == 1:
            continue
        too_large = path.stat().st_size > SIDE_FILE_BYTES
        if relative.parts[0] in OWN or path.suffix in WEIGHT_SUFFIXES or too_large:
            left_out.append(str(relative))
            continue
        (out / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / relative)
    return left_out


def _write_config_dtype(path: Path, dtype: str) -> None:
    """Let config.json say in which dtype the weights are."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for section in (config, config.get("text_config", {})):
        for key in ("torch_dtype", "dtype"):
            if key in section:
                section[key] = dtype
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _usual(dtypes: Sequence[np.dtype]) -> np.dtype:
    return Counter(dtypes).most_common(1)[0][0]


def _pack_dtypes(dtypes: Mapping[str, np.dtype]) -> dict[str, Any]:
    """The most common dtype, and by name those that differ."""
    usual = _usual(list(dtypes.values()))
    return {"all": usual.name, "but": {n: d.name for n, d in dtypes.items() if d != usual}}


def _unpack_dtypes(info: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, np.dtype]:
    known = {d.name: d for d in DTYPES.values()}
    try:
        packed = info["source_dtypes"]
        return {name: known[packed["but"].get(name, packed["all"])] for name in names}
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{checkpoint.INFO} is damaged: convert the model again") from None


def _natural(name: str) -> list[Any]:
    """Sort key with layer 2 before layer 10."""
    return [(int(s), "") if s.isdigit() else (-1, s) for s in name.split(".")]


def _report(
    tensors: Mapping[str, TensorInfo],
    total: int,
    started: float,
    left_out: list[str],
    notes: Sequence[str] = (),
) -> Report:
    return Report(
        tensors=len(tensors),
        parameters=sum(info.size for info in tensors.values()),
        bytes=total,
        seconds=time.perf_counter() - started,
        peak_bytes=peak_memory(),
        left_out=tuple(left_out),
        notes=tuple(notes),
    )

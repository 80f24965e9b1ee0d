"""Merge adapters of PEFT into the matrices that they were trained beside, exactly.

    adapter = read_adapter(folder)
    params = merge_adapter(adapter, params, cfg)

Tensors have their released names, from the table that converts whole models, so that each layer
may have a rank, a scale and parts of its own. A layer at a time is summed in float32 and rounded
once.

Source: PEFT 0.21 (`peft.tuners.lora`: `get_delta_weight`, `merge`; `variants` for DoRA).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from sa2jax import checkpoint
from sa2jax.config import StepAudio2Config
from sa2jax.convert.rules import Placement, Shape, expand, match, rule
from sa2jax.convert.weights import DTYPES, TAGS
from sa2jax.errors import FileError, MissingFileError, TrainError
from sa2jax.families import family_of
from sa2jax.files.safetensors_files import read_safetensors
from sa2jax.nn import Params
from sa2jax.train.language.peft import PREFIX, TENSORS
from sa2jax.train.language.peft_config import LoraConfig, read_lora_config

MISFIT = (
    "{where} does not fit the model: {problems}. Expected the tensors of a LoRA of this model that "
    "its adapter_config.json names, under their released names"
)
TABLES = (".table", ".positions")  # ends of leaves that are looked up in
_A, _B, _LENGTHS = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
_TABLE_A, _TABLE_B = "lora_embedding_A", "lora_embedding_B"
_BIAS, _ROWS = "lora_B.bias", "token_adapter.trainable_tokens_delta"
# Names that PEFT has given to one and the same tensor.
_SPELLINGS = (
    (r"\.(lora_\w+|trainable_tokens_delta)\.default(?=$|\.)", r".\1"),  # the adapter's own name
    (r"\.lora_magnitude_vector\.weight$", ".lora_magnitude_vector"),
    (r"\.modules_to_save(\.default)?\.", "."),
    (r"\.base_layer\.", "."),
)


@dataclass(frozen=True)
class Adapter:
    """An adapter as its files have it.

    Attributes:
        where: its folder.
        config: what it asks for.
        tensors: its tensors by PEFT's names.
    """

    where: str
    config: LoraConfig
    tensors: Mapping[str, np.ndarray]

    def part(self, module: str, name: str) -> np.ndarray | None:
        """One of its tensors of a module, in float32."""
        found = self.tensors.get(f"{PREFIX}{module}.{name}")
        return None if found is None else found.astype(np.float32)

    def merged(self, name: str, old: np.ndarray) -> np.ndarray:
        """What becomes of one tensor of the model, by its released name and in that form."""
        module, _, kind = name.rpartition(".")
        whole = self.part(module, kind)
        value = old if whole is None else whole
        scale = self.config.scale_of(module)
        if kind == "bias":
            bias = self.part(module, _BIAS)
            return value if bias is None else value + np.float32(scale) * bias
        a, b = self.part(module, _A), self.part(module, _B)
        axes = tuple(range(1, value.ndim))  # a length for each output
        if a is not None and b is not None:
            product = (b.reshape(len(b), -1) @ a.reshape(len(a), -1)).reshape(value.shape)
        else:
            a, b = self.part(module, _TABLE_A), self.part(module, _TABLE_B)
            product, axes = None if a is None or b is None else (b @ a).T, (0,)
        if product is not None:
            value = value + np.float32(scale) * product
        if (lengths := self.part(module, _LENGTHS)) is not None:
            norm = np.sqrt(np.square(value).sum(axes, keepdims=True))
            value = value * (lengths.reshape(norm.shape) / norm)
        if (rows := self.part(module, _ROWS)) is not None:
            value = value.copy()
            value[list(self.config.rows_of(module))] = rows
        return value


def read_adapter(folder: str | Path) -> Adapter:
    """Read an adapter of PEFT; adapters are small enough to be read whole.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.

    Raises:
        TrainError: if it is damaged, no LoRA, or asks for something that is not understood.
    """
    folder = Path(folder)
    return Adapter(str(folder), read_lora_config(folder), _read_tensors(folder / TENSORS))


def merge_adapter(adapter: Adapter, params: Params, cfg: StepAudio2Config) -> Params:
    """The model with an adapter in its numbers.

    Args:
        adapter: see `read_adapter`.
        params: of the model, layers stacked; not changed.
        cfg: its sizes.

    Returns:
        Parameters of the same dtypes.

    Raises:
        TrainError: if matrices are int8, or the sum is not finite.
        CheckpointError: if the tensors are not those of this model that the settings name.
    """
    leaves = checkpoint.flatten(params)
    if any(leaf.dtype == jnp.int8 for leaf in leaves.values()):
        raise TrainError(
            "LoRA cannot be merged into int8 matrices, whose steps are larger than what it adds: "
            "merge it into the bfloat16 or float32 model, then quantize that"
        )
    shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    places = {p.sources[0]: p for p in expand(family_of(cfg).rules(cfg), shapes)}
    _require_fit(adapter, places)
    touched: dict[str, list[str]] = {}
    for name in {_target(tensor) for tensor in adapter.tensors}:
        touched.setdefault(places[name].leaf, []).append(name)
    for leaf, names in touched.items():
        array = np.array(leaves[leaf])
        for name in names:
            place = places[name]
            part = array if place.layer is None else array[place.layer]
            old = place.rule.inverse(part)[0].astype(np.float32)
            with np.errstate(all="ignore"):
                new = adapter.merged(name, old).astype(array.dtype)
            if not np.isfinite(new.astype(np.float32)).all():
                raise TrainError(f"{adapter.where}: {name} is not finite with it: it is broken")
            part[...] = place.rule.forward([new])
        leaves[leaf] = jnp.asarray(array)
    return checkpoint.unflatten(leaves)


# --- names and shapes -------------------------------------------------------------------------


def _target(name: str) -> str:
    """The tensor of the model that a tensor of an adapter changes."""
    name = name.removeprefix(PREFIX)
    for part in (_A, _B, _LENGTHS, _TABLE_A, _TABLE_B, _ROWS):
        name = re.sub(rf"\.{re.escape(part)}$", ".weight", name)
    return re.sub(rf"\.{re.escape(_BIAS)}$", ".bias", name)


def _require_fit(adapter: Adapter, places: Mapping[str, Placement]) -> None:
    """The tensors must be those that the settings name, in the shapes that the model gives."""
    wanted: dict[str, Shape] = {}
    problems = []
    for name, place in places.items():
        module, _, kind = name.rpartition(".")
        (shape,) = place.shapes
        if f"{PREFIX}{name}" in adapter.tensors or adapter.config.saves(module):
            wanted[f"{PREFIX}{name}"] = shape
        if kind != "weight" or len(shape) < 2:  # norms have no matrix
            continue
        is_table = place.leaf.endswith(TABLES)
        rows = adapter.config.rows_of(module) if is_table else ()
        if rows:
            wanted[f"{PREFIX}{module}.{_ROWS}"] = (len(rows), shape[1])
            if max(rows) >= shape[0] or len(set(rows)) < len(rows):
                problems.append(f"trainable_token_indices are not {len(rows)} rows of {shape[0]}")
        adapted = adapter.config.adapts(module)
        if adapted is None:
            parts = (_TABLE_A, _TABLE_B) if is_table else (_A, _B)
            adapted = any(f"{PREFIX}{module}.{part}" in adapter.tensors for part in parts)
        if adapted:
            wanted |= _parts(adapter.config, module, shape, is_table)
            if adapter.config.lora_bias and f"{module}.bias" not in places:
                problems.append(f"{module} has no bias that lora_bias could be added to")
    shapes = {name: array.shape for name, array in adapter.tensors.items()}
    same = [rule(name, name) for name in wanted]
    match(same, shapes, wanted, adapter.where, wording=MISFIT, problems=problems)


def _parts(config: LoraConfig, module: str, shape: Shape, is_table: bool) -> dict[str, Shape]:
    """The tensors of one adapted module."""
    rank = config.rank_of(module)
    if is_table:
        parts = {_TABLE_A: (rank, shape[0]), _TABLE_B: (shape[1], rank), _LENGTHS: (shape[1],)}
    else:
        ones = (1,) * (len(shape) - 2)  # a convolution has its taps in A
        lengths = (1, shape[0], *ones) if ones else (shape[0],)
        parts = {_A: (rank, *shape[1:]), _B: (shape[0], rank, *ones), _LENGTHS: lengths}
        if config.lora_bias:
            parts[_BIAS] = (shape[0],)
    if not config.use_dora:
        del parts[_LENGTHS]
    return {f"{PREFIX}{module}.{part}": found for part, found in parts.items()}


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors by PEFT's present names."""
    tensors: dict[str, np.ndarray] = {}
    try:
        for name, array in read_safetensors(path)[0].items():
            for old, new in _SPELLINGS:
                name = re.sub(old, new, name)
            if name in tensors:
                raise TrainError(f"{path} has {name[:200]} twice: save the adapter again")
            if array.dtype not in TAGS:
                raise TrainError(f"{path} has dtype {array.dtype}: expected {', '.join(DTYPES)}")
            tensors[name] = array
    except MissingFileError:
        pickled = (path.parent / "adapter_model.bin").exists()
        cure = "save it as safetensors" if pickled else "expected an adapter saved by PEFT"
        raise TrainError(f"no {path.name} in {path.parent}: {cure}") from None
    except FileError as error:
        raise TrainError(f"{path} is damaged ({error.reason}): save the adapter again") from None
    if not tensors:
        raise TrainError(f"{path} is empty: save the adapter again")
    return tensors

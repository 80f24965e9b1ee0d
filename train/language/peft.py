"""LoRA adapters in the files of PEFT, which most other tools read and write.

    adapter_config.json          rank, alpha and which matrices
    adapter_model.safetensors    base_model.model.{module}.lora_A.weight [r, in], .lora_B.weight

Modules have their released names, from the table that converts whole models. Both sides add
`alpha / rank · B A`, so nothing is changed on the way but names and the stacking of layers.

Source: PEFT 0.14 (`peft.LoraConfig`, `get_peft_model_state_dict`).
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from sa2jax import atomic_io, checkpoint
from sa2jax.config import StepAudio2Config
from sa2jax.convert.hf import leaf_shapes
from sa2jax.convert.rules import Rule, Split, expand, match, rule
from sa2jax.convert.weights import DTYPES, SINGLE, Arrays, write_safetensors
from sa2jax.errors import TrainError
from sa2jax.families import family_of
from sa2jax.models.step_audio import StepAudio2Model
from sa2jax.nn import Functional, Params

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MISFIT = (
    "{where} does not fit the model: {problems}. Expected a LoRA of this model that adapts the "
    "same matrices in all layers, under their released names"
)

# What a LoraConfig may ask for that is more than `alpha / rank · B A`, and the values that do not.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
}
_OTHER_BASE = ("pissa", "olora", "corda", "loftq")  # first draws that change the base


def save_adapter(
    folder: str | Path,
    lora: Params,
    cfg: StepAudio2Config,
    *,
    rank: int,
    alpha: float,
    base: str,
    targets: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write low-rank matrices as an adapter of PEFT.

    Args:
        folder: folder to make; appears only when it is complete.
        lora: the matrices alone, as `lora.split_lora` gives them, stacked over layers.
        cfg: the model's config.
        rank: width of the bottleneck, as in `lora.add_lora`.
        alpha: the product is scaled by `alpha / rank`.
        base: path or name of the Hugging Face checkpoint that is adapted.
        targets: write only the matrices whose dotted path this regular expression matches.
        overwrite: replace a checkpoint at `folder`.

    Returns:
        The folder.

    Raises:
        TrainError: if the matrices are not those of the model, or of another rank.
        CheckpointError: if `folder` cannot be made.
    """
    leaves = {name: np.asarray(leaf) for name, leaf in checkpoint.flatten(lora).items()}
    rules, wanted = _rules(cfg), _leaves(cfg, rank)
    if targets is not None:
        leaves = {n: x for n, x in leaves.items() if re.fullmatch(targets, n.rpartition(".")[0])}
    odd = [n for n, leaf in leaves.items() if leaf.shape != wanted.get(n)]
    odd += [n for n in map(_partner, leaves) if n not in leaves]
    if odd or not leaves:
        raise TrainError(
            f"expected LoRA matrices of rank {rank} of this model, got others under "
            f"{', '.join(odd[:4]) or 'no name'}: give what `split_lora` returns, and its rank"
        )
    arrays: dict[str, np.ndarray] = {}
    for p in expand(rules, {name: wanted[name] for name in leaves}):
        leaf = leaves[p.leaf] if p.layer is None else leaves[p.leaf][p.layer]
        arrays[p.sources[0]] = p.rule.inverse(leaf)[0]
    modules = {name.removeprefix(PREFIX).rsplit(".", 2)[0] for name in arrays}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": _suffixes(modules, cfg),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
    }
    source = Arrays(arrays, "the adapter")
    with atomic_io.new_folder(folder, overwrite=overwrite) as temp:
        size = sum(info.nbytes for info in source.tensors.values())
        atomic_io.need_space(temp, size)
        write_safetensors(temp, source.tensors, source, size + 1, lambda done, total: None)
        (temp / SINGLE).rename(temp / TENSORS)
        text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
        (temp / CONFIG).write_text(text, encoding="utf-8")
    return Path(folder)


def load_adapter(
    folder: str | Path, model: Functional[StepAudio2Model]
) -> tuple[Params, int, float]:
    """Read an adapter of PEFT.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        model: the base, with or without low-rank matrices; its layers are stacked.

    Returns:
        The low-rank matrices, a tree to be joined to the base's parameters (`lora.combine`) and
        stacked as it is, in their stored dtype; the rank; and alpha, with which `alpha / rank` is
        the scale that PEFT applies, rank-stabilised or not. `targets_of` says for `lora.add_lora`
        which matrices they are of.

    Raises:
        TrainError: if it is no LoRA, or one that does more than add products to matrices.
        CheckpointError: if the tensors are not those of this model.
    """
    folder = Path(folder)
    rank, alpha = _read_config(folder)
    tensors = _read_tensors(folder / TENSORS)
    cfg = model.bind(model.abstract).cfg
    rules, leaves = _rules(cfg), _leaves(cfg, rank)
    touched = {p.leaf for p in expand(rules, leaves) if p.sources[0] in tensors}
    touched |= set(map(_partner, touched))
    leaves = {name: shape for name, shape in leaves.items() if name in touched}
    shapes = {name: array.shape for name, array in tensors.items()}
    used = [r for r in rules if r.target in leaves]
    found: dict[str, list[np.ndarray]] = {}
    for p in match(used, shapes, leaves, str(folder), wording=MISFIT):
        found.setdefault(p.leaf, []).append(p.rule.forward([tensors[p.sources[0]]]))
    stacked = {r.target for r in used if r.stacked}
    made = {
        name: jnp.asarray(np.stack(parts) if name in stacked else parts[0])
        for name, parts in found.items()
    }
    return checkpoint.unflatten(made), rank, alpha


def targets_of(lora: Params) -> str:
    """The regular expression for `lora.add_lora` that gives just these matrices."""
    paths = sorted({name.rpartition(".")[0] for name in checkpoint.flatten(lora)})
    return "|".join(map(re.escape, paths))


# --- names and shapes -------------------------------------------------------------------------


def _kernels(cfg: StepAudio2Config) -> list[Rule]:
    """The rules of the matrices that can be adapted: those whose last axis is all their inputs."""
    return [
        r
        for r in family_of(cfg).rules(cfg)
        if r.target.endswith(".kernel") and all(isinstance(op, Split) for op in r.ops)
    ]


def _rules(cfg: StepAudio2Config) -> list[Rule]:
    """The table of all pairs that a model can have."""
    rules = []
    for r in _kernels(cfg):
        module, path = (name.rpartition(".")[0] for name in (r.sources[0], r.target))
        rules.append(rule(f"{PREFIX}{module}.lora_A.weight", f"{path}.lora_a"))
        # Outputs come first in B as in the matrix, and are split into heads alike.
        rules.append(rule(f"{PREFIX}{module}.lora_B.weight", f"{path}.lora_b", *r.ops))
    return rules


def _leaves(cfg: StepAudio2Config, rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all low-rank matrices that a model can have."""
    shapes, leaves = leaf_shapes(cfg), {}
    for r in _kernels(cfg):
        path, shape = r.target.rpartition(".")[0], shapes[r.target]
        leaves[f"{path}.lora_a"] = (*shape[: int(r.stacked)], rank, shape[-1])
        leaves[f"{path}.lora_b"] = (*shape[:-1], rank)
    return leaves


def _partner(name: str) -> str:
    """The other of the two leaves of a matrix."""
    return name[:-1] + {"a": "b", "b": "a"}[name[-1]]


def _suffixes(modules: set[str], cfg: StepAudio2Config) -> list[str]:
    """The shortest ends of names that, as PEFT matches them, mean these modules and no others.

    `mlp.0` is not cut to `0`, which is the first of any list.
    """
    places = expand(family_of(cfg).rules(cfg), leaf_shapes(cfg))
    every = {name.rpartition(".")[0] for p in places for name in p.sources}
    every |= {
        ".".join(name.split(".")[:n]) for name in every for n in range(1, name.count(".") + 1)
    }
    ends = set()
    for module in modules:
        parts = module.split(".")
        for count in range(1, len(parts) + 1):
            end = ".".join(parts[-count:])
            hit = {name for name in every if name == end or name.endswith(f".{end}")}
            if hit <= modules and not end.isdigit():
                break
        ends.add(end)
    return sorted(ends)


# --- files ------------------------------------------------------------------------------------


def _read_config(folder: Path) -> tuple[int, float]:
    """Rank and alpha, if the adapter is a plain LoRA."""
    path = folder / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        kind, rank, alpha = raw["peft_type"], raw["r"], raw["lora_alpha"]
        stabilised, first = raw.get("use_rslora"), raw.get("init_lora_weights", True)
    except FileNotFoundError:
        raise TrainError(f"no {CONFIG} in {folder}: expected an adapter saved by PEFT") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainError(f"{path} is damaged ({error!r}): save the adapter again") from None
    if kind != "LORA":
        raise TrainError(f"{path}: expected peft_type 'LORA', got {kind!r}: only LoRA is supported")
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not isinstance(rank, int) or rank < 1 or not is_number:
        raise TrainError(f"{path}: expected r >= 1 and a number lora_alpha, got {rank}, {alpha!r}")
    more = [f"{key}={raw[key]!r}" for key, plain in _PLAIN.items() if raw.get(key) not in plain]
    if isinstance(first, str) and first.startswith(_OTHER_BASE):
        more.append(f"init_lora_weights={first!r} (it changes the base)")
    if more:
        raise TrainError(
            f"{path} asks for {', '.join(more)}, which is not supported: expected a plain LoRA; "
            "merge the adapter with PEFT and convert the merged model"
        )
    return rank, alpha * math.sqrt(rank) if stabilised else float(alpha)


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors by name; adapters are small enough to be read whole."""
    try:
        tensors = {}
        for name, view in safetensors.deserialize(path.read_bytes()):
            # Some versions of PEFT keep the adapter's own name.
            name = re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1.weight", name)
            array = np.frombuffer(view["data"], DTYPES[view["dtype"]])
            tensors[name] = array.reshape(view["shape"])
    except FileNotFoundError:
        pickled = path.with_suffix(".bin").exists() or (path.parent / "adapter_model.bin").exists()
        cure = "save it as safetensors" if pickled else "expected an adapter saved by PEFT"
        raise TrainError(f"no {path.name} in {path.parent}: {cure}") from None
    except KeyError as error:
        raise TrainError(f"{path} has dtype {error}: expected {', '.join(DTYPES)}") from None
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise TrainError(f"{path} is damaged ({error}): save the adapter again") from None
    if not tensors:
        raise TrainError(f"{path} is empty: save the adapter again")
    return tensors

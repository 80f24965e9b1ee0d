"""LoRA adapters written in PEFT's format.

    adapter_config.json          rank, alpha and which matrices
    adapter_model.safetensors    base_model.model.{module}.lora_A.weight [r, in], .lora_B.weight

Modules have their released names, from the table that converts whole models. Both sides add
`alpha / rank · B A`, so nothing is changed on the way but names and the stacking of layers.
`peft_merge` reads them, and those of others that do more.

Source: PEFT 0.14 (`peft.LoraConfig`, `get_peft_model_state_dict`).
"""

import json
import re
from pathlib import Path

import numpy as np

from sa2jax import atomic_io, checkpoint
from sa2jax.config import StepAudio2Config
from sa2jax.convert.hf import leaf_shapes
from sa2jax.convert.rules import Rule, Split, expand, rule
from sa2jax.convert.weights import SINGLE, Arrays, write_safetensors
from sa2jax.errors import TrainError
from sa2jax.families import family_of
from sa2jax.nn import Params
from sa2jax.train.language.peft_config import CONFIG

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."


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

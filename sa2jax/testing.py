"""Everything a test needs without a network: a tiny tokenizer, tiny models, a tiny checkpoint.

Nothing here differs from run to run; what is built twice is equal.
"""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sa2jax.chat.tokenizer_files import AUDIO_START, save_tokenizer_files
from sa2jax.config import AudioEncoderConfig, DecoderConfig, StepAudio2Config
from sa2jax.families import family_of
from sa2jax.nn import Params


def tiny_config(
    *, vocab: int = 512, layers: int = 2, max_positions: int = 1024
) -> StepAudio2Config:
    """A model of a few hundred thousand parameters that hears, for `byte_tokenizer(296, 512)`."""
    return StepAudio2Config(
        decoder=DecoderConfig(
            vocab=vocab,
            layers=layers,
            embed=32,
            mlp=48,
            heads=4,
            kv_heads=2,
            max_positions=max_positions,
        ),
        audio_encoder=AudioEncoderConfig(mels=16, layers=layers, embed=16, heads=2),
    )


def tiny_params(cfg: StepAudio2Config, *, seed: int = 0) -> Params:
    """Random float32 parameters under which greedy replies vary with every part of a prompt."""
    rng = np.random.default_rng(seed)

    def fill(name: str, tree: Any, width: int | None = None) -> Any:
        if isinstance(tree, dict):
            # What heads found weighs as much as if there were one.
            head_dim = tree["q"]["kernel"].shape[-2] if "q" in tree else width
            return {
                key: fill(key, tree[key], head_dim if key in ("o", "kernel") else None)
                for key in sorted(tree)
            }
        noise = rng.standard_normal(tree.shape, np.float32)
        plain = {"scale": 1 + noise / 10, "bias": noise / 10}
        size = width or tree.shape[-1]
        return jnp.asarray(plain.get(name, noise * np.float32(2 * size**-0.5)))

    return fill("", family_of(cfg).model(cfg).abstract)


def save_tiny_checkpoint(
    folder: str | Path,
    cfg: StepAudio2Config | None = None,
    *,
    seed: int = 0,
    dtype: str = "float32",
    shard_bytes: int = 10**9,
) -> Path:
    """Write a tiny model as a Hugging Face folder: safetensors, config.json, tokenizer files.

    Args:
        folder: where; made if need be.
        cfg: its sizes, by default `tiny_config()`.
        seed: of its parameters.
        dtype: of its tensors.
        shard_bytes: largest file.

    Returns:
        The folder.
    """
    from sa2jax import checkpoint
    from sa2jax.convert.rules import expand
    from sa2jax.convert.weights import TensorInfo, write_safetensors

    cfg = tiny_config() if cfg is None else cfg
    leaves = checkpoint.flatten(tiny_params(cfg, seed=seed))
    arrays: dict[str, np.ndarray] = {}
    shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    for place in expand(family_of(cfg).rules(cfg), shapes):
        leaf = leaves[place.leaf] if place.layer is None else leaves[place.leaf][place.layer]
        tensors = place.rule.inverse(np.asarray(leaf.astype(dtype)))
        arrays |= zip(place.sources, tensors, strict=True)
    folder = save_tokenizer_files(folder, audio_start=AUDIO_START, vocab=cfg.decoder.vocab)
    text = json.dumps(cfg.with_dtype(dtype).to_hf(), indent=2)
    (folder / "config.json").write_text(text, encoding="utf-8")
    infos = {name: TensorInfo(array.shape, array.dtype) for name, array in arrays.items()}
    write_safetensors(folder, infos, _Arrays(infos, arrays), shard_bytes, lambda done, total: None)
    return folder


class _Arrays:
    """Arrays in memory in the form that is written."""

    def __init__(self, tensors: dict[str, Any], arrays: dict[str, np.ndarray]):
        self.tensors, self.arrays = tensors, arrays

    def get(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def drop(self, name: str) -> None:
        del self.arrays[name]

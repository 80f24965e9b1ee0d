"""Everything a test needs without a network: a tiny tokenizer, tiny models, a tiny checkpoint.

Nothing here differs from run to run; what is built twice is equal.
"""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers

from sa2jax.chat.tokenizer import backend_of
from sa2jax.chat.tokenizer_files import BYTES, SPECIAL, describe, save_files
from sa2jax.config import AudioEncoderConfig, DecoderConfig, StepAudio2Config
from sa2jax.models.step_audio import step_audio2
from sa2jax.nn import Params

# ---------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------


def byte_tokenizer(audio_start: int = 151688, vocab: int = 158720) -> tokenizers.Tokenizer:
    """A tokenizer with one token per byte and the released special tokens, made in moments.

    The id of a byte is its value. Special tokens and audio codes keep their released distance from
    `<audio_start>`; ids between the bytes and `<|endoftext|>` have no token and decode to nothing,
    like the unused last rows of the released vocabulary. Otherwise it is a Qwen2 tokenizer.

    Args:
        audio_start: id of `<audio_start>`: 151688 as released, 296 in the micro checkpoints.
        vocab: vocabulary of the model: audio codes end there, at `<audio_6561>` at the latest.

    Raises:
        ValueError: if the tokens do not fit.
    """
    return backend_of(_byte_description(audio_start, vocab), where="byte_tokenizer")


def save_tokenizer_files(
    folder: str | Path, *, audio_start: int = 151688, vocab: int = 158720
) -> Path:
    """Write `byte_tokenizer` as the tokenizer files of a Hugging Face checkpoint.

    Writes tokenizer.json, tokenizer_config.json, added_tokens.json, special_tokens_map.json,
    vocab.json and merges.txt (which has no merges), and returns the folder, made if need be.
    """
    return save_files(folder, _byte_description(audio_start, vocab))


def _byte_description(audio_start: int, vocab: int) -> dict[str, Any]:
    first = audio_start - SPECIAL.index("<audio_start>")
    code_0 = first + len(SPECIAL)
    if first < BYTES or vocab <= code_0:
        raise ValueError(
            f"audio_start {audio_start} and vocab {vocab} leave no room: expected audio_start >= "
            f"{BYTES + audio_start - first} and vocab > {code_0}"
        )
    return describe(vocab - code_0, first=first)


# ---------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------

AUDIO_START = 296  # of the tiny models' tokenizer: the released ids less 151392


def tiny_config(
    *, vocab: int = 512, layers: int = 2, max_positions: int = 1024
) -> StepAudio2Config:
    """A model of a few hundred thousand parameters that hears, for `byte_tokenizer(296, 512)`."""
    return StepAudio2Config(
        decoder=DecoderConfig(
            vocab=vocab, layers=layers, embed=32, mlp=48, heads=4, kv_heads=2,
            max_positions=max_positions,
        ),
        audio_encoder=AudioEncoderConfig(mels=16, layers=layers, embed=16, heads=2),
    )  # fmt: skip


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

    return fill("", step_audio2(cfg).abstract)


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
    from sa2jax.convert.hf import llm_rules
    from sa2jax.convert.rules import expand
    from sa2jax.convert.weights import TensorInfo, write_safetensors

    cfg = tiny_config() if cfg is None else cfg
    leaves = checkpoint.flatten(tiny_params(cfg, seed=seed))
    arrays: dict[str, np.ndarray] = {}
    for place in expand(llm_rules(cfg), {name: tuple(leaf.shape) for name, leaf in leaves.items()}):
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

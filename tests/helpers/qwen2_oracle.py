"""Tiny models under released names, and their decoder in transformers to compare PEFT with."""

from typing import Any

import numpy as np

from sa2jax import checkpoint, testing
from sa2jax.config import StepAudio2Config
from sa2jax.convert.rules import expand
from sa2jax.convert.step_audio2 import llm_rules
from sa2jax.nn import Params


def released_tensors(params: Params, cfg: StepAudio2Config) -> dict[str, np.ndarray]:
    """The tensors of a model by released name."""
    leaves = checkpoint.flatten(params)
    found = {}
    for p in expand(llm_rules(cfg), {name: leaf.shape for name, leaf in leaves.items()}):
        leaf = leaves[p.leaf] if p.layer is None else leaves[p.leaf][p.layer]
        found[p.sources[0]] = p.rule.inverse(np.asarray(leaf))[0]
    return found


def qwen2_decoder(cfg: StepAudio2Config, **config: Any) -> Any:
    """The decoder of `testing.tiny_params(cfg)` as a `Qwen2ForCausalLM` of transformers.

    Args:
        cfg: sizes.
        config: of `Qwen2Config`, beside them.
    """
    import torch
    import transformers

    tensors = released_tensors(testing.tiny_params(cfg), cfg)
    sizes = cfg.decoder.to_hf()
    made = transformers.Qwen2Config(**sizes, tie_word_embeddings=False, **config)
    model = transformers.Qwen2ForCausalLM(made).eval()
    model.load_state_dict({k: torch.from_numpy(np.array(tensors[k])) for k in model.state_dict()})
    return model

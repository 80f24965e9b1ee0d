"""Small folders of Qwen2.5 and Qwen2-Audio, in the form they were released in."""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy

from sa2jax import testing
from sa2jax.chat import tokenizer_files

USED, ROWS, VOCAB = 273, 280, 512  # tokens of the tiny Qwen2.5, rows of its table, of the new one
TEXT = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "bos_token_id": 270,
    "eos_token_id": 270,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 131072,
    "max_window_layers": 2,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": ROWS,
}
AUDIO = {
    "model_type": "qwen2_audio_encoder",
    "num_mel_bins": 16,
    "encoder_layers": 3,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "encoder_layerdrop": 0.0,
    "d_model": 16,
    "dropout": 0.0,
    "activation_function": "gelu",
    "scale_embedding": False,
    "init_std": 0.02,
    "max_source_positions": 40,
}


def text_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights of `TEXT`; every dimension of table and head has its own mean and width."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    def wide():
        return draw(ROWS, 32) * np.linspace(0.1, 1, 32, dtype=np.float32) + draw(32)

    tensors = {"model.embed_tokens.weight": wide(), "lm_head.weight": wide()}
    tensors["model.norm.weight"] = 1 + draw(32) / 10
    for layer in range(2):
        at = f"model.layers.{layer}"
        for name, width in (("q", 32), ("k", 16), ("v", 16)):
            tensors[f"{at}.self_attn.{name}_proj.weight"] = draw(width, 32) / 4
            tensors[f"{at}.self_attn.{name}_proj.bias"] = draw(width)
        tensors[f"{at}.self_attn.o_proj.weight"] = draw(32, 32) / 4
        tensors[f"{at}.mlp.gate_proj.weight"] = draw(48, 32) / 4
        tensors[f"{at}.mlp.up_proj.weight"] = draw(48, 32) / 4
        tensors[f"{at}.mlp.down_proj.weight"] = draw(32, 48) / 4
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{name}.weight"] = 1 + draw(32) / 10
    return tensors


def audio_tensors(prefix: str = "audio_tower.") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    tensors = {
        "conv1.weight": draw(16, 16, 3) / 6,
        "conv1.bias": draw(16),
        "conv2.weight": draw(16, 16, 3) / 6,
        "conv2.bias": draw(16),
        "embed_positions.weight": draw(40, 16),
        "layer_norm.weight": 1 + draw(16) / 10,
        "layer_norm.bias": draw(16),
    }
    for layer in range(3):
        at = f"layers.{layer}"
        for name in ("q", "k", "v", "out"):
            tensors[f"{at}.self_attn.{name}_proj.weight"] = draw(16, 16) / 3
            if name != "k":
                tensors[f"{at}.self_attn.{name}_proj.bias"] = draw(16)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            tensors[f"{at}.{name}.weight"] = 1 + draw(16) / 10
            tensors[f"{at}.{name}.bias"] = draw(16)
        tensors |= {f"{at}.fc1.weight": draw(64, 16) / 4, f"{at}.fc1.bias": draw(64)}
        tensors |= {f"{at}.fc2.weight": draw(16, 64) / 8, f"{at}.fc2.bias": draw(16)}
    tensors = {prefix + name: value for name, value in tensors.items()}
    if prefix:
        tensors["multi_modal_projector.linear.weight"] = draw(32, 16)
        tensors["language_model.lm_head.weight"] = draw(9, 32)
    return tensors


def save(folder: Path, config: dict, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def save_tokenizer(folder: Path) -> None:
    """Qwen2.5's part of the tiny tokenizer: nothing from `<|EOT|>` on."""
    tokenizer_files.save_tokenizer_files(folder, audio_start=testing.AUDIO_START, vocab=VOCAB)
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    whole["added_tokens"] = [t for t in whole["added_tokens"] if t["id"] < USED]
    whole["model"]["vocab"] = {t: i for t, i in whole["model"]["vocab"].items() if i < USED}
    path.write_text(json.dumps(whole))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    entries = config["added_tokens_decoder"].items()
    config["added_tokens_decoder"] = {i: t for i, t in entries if int(i) < USED}
    path.write_text(json.dumps(config))
    (folder / "added_tokens.json").unlink()

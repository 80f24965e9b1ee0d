"""Records adapters as PEFT saves them, and what PEFT's own merge makes of the model.

    PYTHONPATH=.:tests python tests/golden/make_peft.py      # needs torch, transformers and peft

Each folder of tests/golden/peft has the two files of an adapter and merged.npz: the first rows of
every tensor that the merge changed, of the table rows 5 and 500, under their released names. The
model is the decoder of `testing.tiny_params`. Made with peft 0.21.2, transformers 5.24, torch 2.13.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from helpers.qwen2_oracle import qwen2_decoder

from sa2jax import testing

HERE = Path(__file__).parent
CFG = testing.tiny_config()
ROWS = 3
QV = ["q_proj", "v_proj"]
KINDS = {
    "rslora": {"target_modules": QV, "use_rslora": True},
    "dora": {"target_modules": QV, "use_dora": True},
    "lora_bias": {"target_modules": QV, "lora_bias": True},
    "bias_all": {"target_modules": QV, "bias": "all"},
    "bias_lora_only": {"target_modules": QV, "bias": "lora_only"},
    "patterns": {
        "target_modules": [*QV, "up_proj"],
        "rank_pattern": {"v_proj": 2, "^model.layers.1.self_attn.q_proj": 3},
        "alpha_pattern": {"v_proj": 32, r"layers\.0\..*_proj": 5},
        "use_rslora": True,
    },
    "modules_to_save": {"target_modules": QV, "modules_to_save": ["input_layernorm", "model.norm"]},
    "layers_to_transform": {
        "target_modules": QV,
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "regex": {"target_modules": r".*layers\.1\.self_attn\.(q|v)_proj"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "tokens": {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [5, 500]}},
}


def base() -> Any:
    """The tiny decoder as a model of transformers."""
    return qwen2_decoder(CFG)


def record(name: str, **options) -> None:
    """Make, train (by chance), save and merge one adapter."""
    folder = HERE / "peft" / name
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    before = {k: v.clone() for k, v in base().state_dict().items()}
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | options)
    model = peft.get_peft_model(base(), config).eval()
    for value in model.parameters():
        if value.requires_grad:
            value.data += 0.1 * torch.randn_like(value)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    raw = json.loads((folder / "adapter_config.json").read_text())
    if isinstance(raw["target_modules"], list):
        raw["target_modules"].sort()  # a set, in any order
    raw["base_model_name_or_path"] = "tiny"
    (folder / "adapter_config.json").write_text(json.dumps(raw, indent=1) + "\n")
    # From the file, as a user would: what it does not hold is not merged.
    model = peft.PeftModel.from_pretrained(base(), str(folder)).merge_and_unload()
    after = model.state_dict()
    changed = {k: v.numpy() for k, v in after.items() if not torch.equal(v, before[k])}
    rows = {k: [5, 500] if "embed" in k else slice(ROWS) for k in changed}
    np.savez_compressed(folder / "merged.npz", **{k: v[rows[k]] for k, v in changed.items()})
    print(name, sorted(changed), sum(f.stat().st_size for f in folder.iterdir()))


if __name__ == "__main__":
    for kind, options in KINDS.items():
        record(kind, **options)

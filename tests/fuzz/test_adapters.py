"""Adapters as strangers might make them: merged into finite numbers, or refused in one line."""

import json
import random
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.fuzzing import attempt, cases, damage_bytes, damage_json, damage_value, put
from hypothesis import given
from hypothesis import strategies as st

from sa2jax import testing
from sa2jax.nn import Params
from sa2jax.train.language.peft import TENSORS
from sa2jax.train.language.peft_config import CONFIG, read_lora_config
from sa2jax.train.language.peft_merge import merge_adapter, read_adapter

seeds = st.integers(0, 2**32 - 1)
CFG = testing.tiny_config()
RECORDED = sorted((Path(__file__).parents[1] / "golden" / "peft").iterdir())
# What settings are changed to: all that an adapter may ask for, of the right kind and of others.
SETTINGS = {
    "r": (1, 2, 4, 8, 0, 1 << 24, True),
    "lora_alpha": (1, 8, -8, 0, 1e29, 1e31, "8"),
    "use_rslora": (True, False, None, 1, "yes"),
    "use_dora": (True, False),
    "lora_bias": (True, False),
    "bias": ("all", "lora_only", "none", "x"),
    "target_modules": ("all-linear", ["q_proj"], [".*"], r".*\.(q|v)_proj", "(a*)*b", "[", None),
    "exclude_modules": (["v_proj"], r".*\.0\..*", "(x+x+)+y"),
    "rank_pattern": ({"v_proj": 8}, {"": 1}, {".*": 2}, {"(": 1}, {"v_proj": 0}),
    "alpha_pattern": ({"v_proj": 32}, {"q_proj": "x"}, [["q_proj", 1]]),
    "layers_to_transform": ([0], [1], 1, [99], [-1], [0.5], [10**18]),
    "layers_pattern": ("layers", ["layers", "x"], ""),
    "modules_to_save": (["lm_head"], ["norm"], [""], ["model"], "embed_tokens"),
    "trainable_token_indices": ({"embed_tokens": [5, 6]}, [5], {"embed_tokens": [10**9]}, {"x": 1}),
    "init_lora_weights": ("pissa", "olora", "gaussian", False),
    "alora_invocation_tokens": ([1, 2], []),
    "peft_type": ("LORA", "IA3", None),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    require_finite_merge(RECORDED[0])  # compiles what the watch would call writing
    return tmp_path_factory.mktemp("fuzz")


@cache
def base() -> Params:
    return testing.tiny_params(CFG)


def require_finite_merge(folder: Path) -> None:
    """The model with the adapter has the shapes of the model, and numbers."""
    merged = merge_adapter(read_adapter(folder), base(), CFG)
    for old, new in zip(jax.tree.leaves(base()), jax.tree.leaves(merged), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
        assert np.isfinite(np.asarray(new)).all()


@cases(150)
@given(seed=seeds)
def test_settings_of_an_adapter(folder, seed):
    rng = random.Random(seed)
    source = rng.choice(RECORDED)
    settings = json.loads((source / CONFIG).read_text("utf-8"))
    if rng.random() < 0.5:
        for key in rng.sample(list(SETTINGS), rng.choice((1, 1, 2, 4))):
            settings[key] = rng.choice(SETTINGS[key])
        put(folder / CONFIG, json.dumps(settings).encode())
    else:
        put(folder / CONFIG, damage_json(settings, rng))
    put(folder / TENSORS, (source / TENSORS).read_bytes())
    if attempt(lambda: read_lora_config(folder)) is not None:
        attempt(lambda: require_finite_merge(folder))


@cases(150)
@given(seed=seeds)
def test_tensors_of_an_adapter(folder, seed):
    """Damaged, under other names, of other shapes, with numbers that are none."""
    rng = random.Random(seed)
    source = rng.choice(RECORDED)
    put(folder / CONFIG, (source / CONFIG).read_bytes())
    data = bytearray((source / TENSORS).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    kind = rng.randrange(5)
    if kind == 0:
        data = bytearray(damage_bytes(bytes(data), rng))
    elif kind == 1:  # among the numbers: infinity, and what is not a number
        at = start + 4 * rng.randrange((len(data) - start) // 4)
        data[at : at + 4] = rng.choice((b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\xff\xff\x7f\x7f"))
    else:
        if kind == 2:
            name = rng.choice([n for n in header if n != "__metadata__"])
            shape = header[name]["shape"]
            rng.shuffle(shape)
            header[name]["shape"] = rng.choice((shape, [*shape, 1], [int(np.prod(shape))]))
            header[rng.choice((name, f"{name}.x", name.replace("lora_A", "lora_B")))] = header.pop(
                name
            )
        else:
            header = damage_value(header, rng)
        text = json.dumps(header).encode()
        data = bytearray(len(text).to_bytes(8, "little") + text + bytes(data[start:]))
    put(folder / TENSORS, bytes(data))
    attempt(lambda: require_finite_merge(folder))

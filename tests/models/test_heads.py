"""Heads spread over more shards than there are key heads: the same model, padded."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from sa2jax import testing
from sa2jax.config import DecoderConfig, StepAudio2Config
from sa2jax.errors import ShardingError
from sa2jax.inference.engine import Engine
from sa2jax.inference.requests import Request
from sa2jax.models.heads import _pad_leaf, pad_heads_for_mesh
from sa2jax.models.step_audio import step_audio2
from sa2jax.nn import Policy
from sa2jax.quantize import quantize_params
from sa2jax.sharding import MESH_AXES

DECODER = DecoderConfig(
    vocab=512, layers=2, embed=32, mlp=48, heads=14, kv_heads=2, head_dim=8, max_positions=1024
)
CFG = replace(testing.tiny_config(), decoder=DECODER)


def on(tensor):
    return AbstractMesh((1, 1, tensor), MESH_AXES)


@pytest.mark.parametrize(
    ("tensor", "heads", "kv_heads"),
    [(1, 28, 4), (2, 28, 4), (4, 28, 4), (8, 32, 8), (16, 32, 16), (28, 28, 28), (3, 28, 4)],
)
def test_heads_of_mini(tensor, heads, kv_heads):
    decoder = pad_heads_for_mesh(StepAudio2Config.preset("mini"), on(tensor)).decoder
    assert (decoder.heads, decoder.kv_heads, decoder.head_dim) == (heads, kv_heads, 128)


def test_more_shards_than_heads():
    message = "32 tensor shards for 28 heads: expected tensor=28 at most"
    with pytest.raises(ShardingError, match=message):
        pad_heads_for_mesh(StepAudio2Config.preset("mini"), on(32))


def test_without_a_mesh_nothing_is_spread():
    assert pad_heads_for_mesh(CFG, None) is CFG


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("tensor", [4, 8, 14])
def test_spread_heads_answer_alike(tensor, int8):
    policy = Policy(kernel=jnp.int8 if int8 else None)
    params = testing.tiny_params(CFG)
    if int8:
        params = quantize_params(params, step_audio2(CFG, policy).abstract)
    wide = pad_heads_for_mesh(CFG, on(tensor))
    assert wide.decoder.kv_heads == tensor
    spread = partial(_pad_leaf, cfg=CFG.decoder, wide=wide.decoder)
    attn = params["decoder"]["layers"]["attn"]
    attn = {
        name: {kind: spread(leaf, name=name, kind=kind) for kind, leaf in part.items()}
        for name, part in attn.items()
    }
    layers = params["decoder"]["layers"] | {"attn": attn}
    other = params | {"decoder": params["decoder"] | {"layers": layers}}
    model = step_audio2(wide, policy)
    assert jax.tree.map(jnp.shape, other) == jax.tree.map(lambda leaf: leaf.shape, model.abstract)
    request = Request(np.arange(40, dtype=np.int32))
    expected = Engine(step_audio2(CFG, policy), params, CFG).logits(request)
    np.testing.assert_allclose(Engine(model, other, CFG).logits(request), expected, atol=1e-4)

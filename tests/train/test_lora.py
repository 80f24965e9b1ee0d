"""Low-rank matrices: where they are, what they add, and that merging adds the same."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from sa2jax import sharding, testing
from sa2jax.errors import TrainError
from sa2jax.models.step_audio import StepAudio2Model, step_audio2, unstack_decoder
from sa2jax.nn import Functional, Policy, functional
from sa2jax.train.lora import DECODER_MATRICES, add_lora, combine, init_lora, merge_lora, split_lora

CFG = testing.tiny_config()
RANK, ALPHA = 3, 6.0


def with_lora(
    targets: str = DECODER_MATRICES, stacked: bool = True, policy: Policy | None = None
) -> Functional[StepAudio2Model]:
    def make():
        rngs = nnx.Rngs(0)
        net = StepAudio2Model(CFG, policy=policy or Policy(), rngs=rngs, stacked=stacked)
        add_lora(net, RANK, ALPHA, targets, rngs=rngs)
        return net

    return functional(make)


@pytest.fixture(scope="module")
def params():
    return testing.tiny_params(CFG)


@cache
def scorer(lora: bool):
    model = with_lora() if lora else step_audio2(CFG)

    def logits(params, ids):
        net = model.bind(params)
        return net.decoder.logits(net(ids)[0])

    return jax.jit(logits)


def logits(params, lora: bool = False):
    return scorer(lora)(params, jnp.arange(14).reshape(2, 7))


def noisy(lora):
    return jax.tree.map(lambda x: 0.1 + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), lora)


def test_shapes_and_axes():
    model = with_lora()
    attn, axes = (tree["decoder"]["layers"]["attn"] for tree in (model.abstract, model.axes))
    assert attn["q"]["lora_a"].shape == (2, RANK, 32)
    assert attn["q"]["lora_b"].shape == (2, 4, 8, RANK)
    assert attn["o"]["lora_a"].shape == (2, RANK, 32)
    assert axes["q"]["lora_a"] == (None, "embed")
    assert axes["k"]["lora_b"] == ("kv_heads", "head_dim", None)
    assert axes["o"]["lora_a"] == (None, "heads")
    base, lora = split_lora(model.abstract)
    assert jax.tree.structure(base) == jax.tree.structure(step_audio2(CFG).abstract)
    assert list(lora) == ["decoder"]
    assert len(jax.tree.leaves(lora)) == 2 * 7


def test_split_over_a_mesh_as_the_kernel_is():
    model = with_lora()
    mesh = AbstractMesh((1, 2, 2), sharding.MESH_AXES)
    places = model.shardings(mesh)["decoder"]["layers"]
    down, up = places["mlp"]["down"], places["mlp"]["up"]
    assert tuple(down["lora_a"].spec) == (None, None, "tensor")
    assert tuple(down["lora_b"].spec) == (None, "fsdp", None)
    assert tuple(up["lora_b"].spec) == (None, "tensor", None)


def test_fresh_matrices_change_nothing(params):
    model = with_lora()
    lora = init_lora(model, jax.random.key(0))
    a = lora["decoder"]["layers"]["mlp"]["down"]["lora_a"]
    assert float(a.std()) == pytest.approx(48**-0.5, rel=0.2)
    assert not np.any(lora["decoder"]["layers"]["attn"]["o"]["lora_b"])
    np.testing.assert_array_equal(logits(combine(params, lora), lora=True), logits(params))


def test_merged_equals_unmerged(params):
    whole = combine(params, noisy(init_lora(with_lora(), jax.random.key(0))))
    merged = merge_lora(whole, ALPHA / RANK)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    changed = logits(whole, lora=True)
    assert float(jnp.abs(changed - logits(params)).max()) > 0.1
    np.testing.assert_allclose(logits(merged), changed, rtol=1e-4, atol=1e-4)


def test_a_list_of_layers_has_the_same_matrices(params):
    whole = combine(params, noisy(init_lora(with_lora(), jax.random.key(0))))
    listed = with_lora(stacked=False).abstract

    def shapes(tree):
        return jax.tree.map(lambda leaf: leaf.shape, tree)

    assert shapes(listed) == shapes(unstack_decoder(whole))
    one, other = merge_lora(unstack_decoder(whole), 2.0), unstack_decoder(merge_lora(whole, 2.0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, other)


def test_targets_are_chosen_by_path():
    _, lora = split_lora(with_lora(r"decoder\.head|adapter\.up|audio_encoder\..*\.q").abstract)
    assert sorted(lora) == ["adapter", "audio_encoder", "decoder"]
    assert list(lora["decoder"]) == ["head"]
    with pytest.raises(TrainError, match=r"no matrix matches 'decoder': there are adapter\.down"):
        with_lora("decoder")


def test_int8_base_cannot_be_merged():
    model = with_lora(policy=Policy(kernel=jnp.int8))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), model.abstract)
    with pytest.raises(TrainError, match="cannot be merged into int8 matrices"):
        merge_lora(zeros, 1.0)

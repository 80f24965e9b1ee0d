"""Structures are made once; random parameters are the same numbers wherever they go."""

import jax
import numpy as np
from flax import nnx

from sa2jax.nn import Linear, Policy, functional, init_params, stack, structure_of
from sa2jax.sharding import make_mesh


class Layers(nnx.Module):
    """Two layers, and one of bfloat16 apart."""

    def __init__(self, rngs: nnx.Rngs):
        def make(rngs):
            return Linear({"embed": 6}, {"mlp": 10}, policy=Policy(), rngs=rngs)

        self.layers = stack(make, 2, rngs)
        half = Policy(param="bfloat16")
        self.out = Linear({"mlp": 10}, {"embed": 6}, bias=False, policy=half, rngs=rngs)


def test_numbers_do_not_depend_on_the_mesh():
    """On a CPU each is drawn by a program of its own, on a mesh all by one."""

    def make():
        return Layers(nnx.Rngs(0))

    alone = init_params(make)
    spread = init_params(make, functional(make).shardings(make_mesh("data=1")))
    jax.tree.map(np.testing.assert_array_equal, alone, spread)
    assert jax.tree.map(lambda x: x.dtype, alone) == jax.tree.map(lambda x: x.dtype, spread)
    assert np.std(alone["layers"]["kernel"]) > 0.1


class Square(nnx.Module):
    def __init__(self, cfg: int, *, policy: Policy, rngs: nnx.Rngs, wide: bool = False):
        self.linear = Linear({"embed": cfg}, {"mlp": cfg * (1 + wide)}, policy=policy, rngs=rngs)


def test_a_structure_is_made_once():
    model, half = structure_of(Square, 4), Policy(param="bfloat16")
    assert model is structure_of(Square, 4, Policy())
    kernel, small = (
        structure_of(Square, 4, policy, wide=wide).abstract["linear"]["kernel"]
        for policy, wide in ((None, True), (half, False))
    )
    assert (kernel.shape, kernel.dtype) == ((8, 4), "float32")
    assert (small.shape, small.dtype) == ((4, 4), "bfloat16")

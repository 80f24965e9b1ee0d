"""What only a GPU runs: cuDNN's attention against XLA's, and whole answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa2jax import testing
from sa2jax.attention.base import Mask
from sa2jax.attention.dispatch import attention
from sa2jax.attention.xla import attention_xla
from sa2jax.errors import ConfigError
from sa2jax.inference.engine import Engine
from sa2jax.inference.requests import GenerationConfig, Request
from sa2jax.models.step_audio import step_audio2

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")


def qkv(steps, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, steps, 4, 128), (2, steps, 2, 128), (2, steps, 2, 128)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("steps", [64, 200])
def test_cudnn_attends_like_xla(steps, packed):
    q, k, v = qkv(steps)
    segments = jnp.sort(jax.random.randint(jax.random.key(1), (2, steps), 1, 4)) if packed else None
    mask = Mask(causal=True, segments=segments)

    def both(attend):
        def loss(q, k, v):
            return (attend(q, k, v, mask).astype(jnp.float32) ** 2).sum()

        return attend(q, k, v, mask), *jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    text = jax.jit(lambda *x: attention(*x, mask)).lower(q, k, v).compile().as_text()
    assert ("cudnn" in text) is not packed  # it knows no segments

    def asked():
        return attention(q, k, v, mask, implementation="cudnn")

    if packed:
        with pytest.raises(ConfigError, match="'cudnn' cannot compute this: expected a causal"):
            asked()
    else:
        np.testing.assert_array_equal(*map(np.float32, (asked(), attention(q, k, v, mask))))
    exact = both(lambda q, k, v, m: attention_xla(*(x.astype("f4") for x in (q, k, v)), m))
    for ours, plain, true in zip(both(attention), both(attention_xla), exact, strict=True):

        def distance(x, true=true):
            return float(jnp.linalg.norm((x - true).astype("f4")))

        assert distance(ours) < 2 * distance(plain) + 1e-3


def test_a_generator_answers_as_on_a_cpu():
    cfg = testing.tiny_config()
    params = testing.tiny_params(cfg)
    requests = [Request(np.arange(n, dtype=np.int32)) for n in (5, 17)]
    found = []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        with jax.default_device(device):
            placed = jax.device_put(params, device)
            engine = Engine(step_audio2(cfg), placed, cfg)
            made = engine.generate(requests, GenerationConfig(max_new_tokens=24))
            found.append([list(reply.ids) for (reply,) in made])
    assert found[0] == found[1]

"""The key-value cache: what is written into it, and what is not."""

import jax.numpy as jnp
import numpy as np
import pytest

from sa2jax import testing
from sa2jax.models.decoder import KVCache

CFG = testing.tiny_config()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_cache_keeps_what_is_meant_to_be_kept(dtype):
    """Padding is not written, slots beyond the last are dropped, the rest stays as it was."""
    cache = KVCache.zeros(CFG.decoder, batch=3, size=4, dtype=dtype)
    assert cache.size == 4
    rng = np.random.default_rng(0)
    first, new = rng.standard_normal((2, 3, 3, 2, 8)).astype(np.float32)  # [B, T, K, H]
    expected = np.zeros((2, 3, 4, 2, 8), np.float32)  # [L, B, S, K, H]
    for values, start, lengths in ((first, [0, 0, 0], [2, 3, 1]), (new, [2, 3, 1], [3, 1, 0])):
        start, lengths = jnp.asarray(start), jnp.asarray(lengths)
        cache = cache.write(1, start, lengths, jnp.asarray(values), jnp.asarray(-values))
        for row in range(3):
            kept = values[row, : lengths[row]][: 4 - start[row]]
            expected[1, row, start[row] : start[row] + len(kept)] = kept
    slot_axis = cache.k.shape.index(cache.size)
    numbers = {"k": np.asarray(cache.k, np.float32), "v": np.asarray(cache.v, np.float32)}
    if dtype == "int8":
        assert cache.k.dtype == jnp.int8
        for name, scale in zip(numbers, cache.scales, strict=True):
            numbers[name] = numbers[name] * np.asarray(scale)[..., None]
    tolerance = 0.015 if dtype == "int8" else 0
    np.testing.assert_allclose(np.moveaxis(numbers["k"], slot_axis, 2), expected, atol=tolerance)
    np.testing.assert_allclose(np.moveaxis(numbers["v"], slot_axis, 2), -expected, atol=tolerance)

"""Which back end computes attention: the table, the order, and names that cannot be had."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa2jax import testing
from sa2jax.attention.base import PLATFORMS, Mask
from sa2jax.attention.dispatch import (
    FALLBACK,
    IMPLEMENTATIONS,
    PREFERENCE,
    attention,
    cached_attention,
    implementation_of,
)
from sa2jax.attention.xla import attention_per_head, attention_xla
from sa2jax.cli.common import Attention
from sa2jax.errors import ConfigError
from sa2jax.inference.loading import resolve_policy
from sa2jax.models.step_audio import step_audio2
from sa2jax.nn import Policy

CAUSAL = Mask(causal=True)
Q, K, V = (
    jax.random.normal(jax.random.key(n), (1, 8, heads, 16)) for n, heads in enumerate((4, 2, 2))
)
CACHE = jnp.zeros((1, 1, 2, 8, 16))


def test_the_table_of_implementations():
    assert set(IMPLEMENTATIONS) == {"cudnn", "decode", "per_head", "splash", "xla"}
    assert set(get_args(Attention)) == set(IMPLEMENTATIONS)
    for name, found in IMPLEMENTATIONS.items():
        assert found.attention or found.cached_attention, name
        assert set(found.platforms) <= set(PLATFORMS), name
    assert set(PREFERENCE) == set(PLATFORMS)
    for platform, names in PREFERENCE.items():
        assert all(platform in IMPLEMENTATIONS[name].platforms for name in names)


def test_the_fallback_takes_everything_everywhere():
    found = IMPLEMENTATIONS[FALLBACK]
    assert found.platforms == PLATFORMS
    for operation in (found.attention, found.cached_attention):
        assert operation is not None
        assert operation.refusal(Q) is None


@pytest.mark.parametrize(
    ("implementation", "twin"),
    [(None, attention_per_head), ("per_head", attention_per_head), ("xla", attention_xla)],
)
def test_a_name_is_what_computes_and_the_default_of_a_cpu_is_per_head(implementation, twin):
    with jax.default_matmul_precision("highest"):
        expected = twin(Q, K, V, CAUSAL)
    got = jax.jit(lambda q: attention(q, K, V, CAUSAL, implementation=implementation))
    assert ("while" in got.lower(Q).as_text()) == (twin is attention_per_head)
    np.testing.assert_allclose(got(Q), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("implementation", "message"),
    [
        ("flash", "attention 'flash': expected one of cudnn, decode, per_head, splash, xla"),
        ("splash", "attention 'splash' runs on tpu, not on cpu"),
        ("cudnn", "attention 'cudnn' runs on gpu, not on cpu"),
    ],
)
def test_a_name_that_cannot_be_had_is_refused_in_one_line(implementation, message):
    for refused in (
        lambda: attention(Q, K, V, CAUSAL, implementation=implementation),
        lambda: cached_attention(
            Q, CACHE, CACHE, 0, jnp.zeros((1, 8), int), implementation=implementation
        ),
        lambda: resolve_policy(None, attention=implementation),
    ):
        with pytest.raises(ConfigError) as error:
            refused()
        assert str(error.value) == message


def test_a_name_without_the_operation_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="'per_head' has no cached_attention: expected decode or"):
        cached_attention(Q, CACHE, CACHE, 0, jnp.zeros((1, 8), int), implementation="per_head")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(ConfigError, match="'decode' has no attention: expected cudnn or per_head"):
        attention(Q, K, V, CAUSAL, implementation="decode")


def test_operands_that_a_name_cannot_take_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(
        ConfigError, match="'splash' cannot compute this: expected tokens and heads"
    ):
        attention(Q, K, V, CAUSAL, implementation="splash")
    with pytest.raises(ConfigError, match="'decode' cannot compute this: expected one query a row"):
        cached_attention(Q, CACHE, CACHE, 0, jnp.zeros((1, 8), int), implementation="decode")


def test_a_model_asks_for_an_implementation_where_it_has_the_operation():
    assert implementation_of("splash", "attention") == "splash"
    assert implementation_of("splash", "cached_attention") is None
    assert implementation_of("xla", "cached_attention") == "xla"
    assert implementation_of(None, "attention") is None


def test_a_policy_decides_for_the_decoder():
    cfg = testing.tiny_config()
    loops = {}
    for name in (None, "xla"):
        model = step_audio2(cfg, Policy(attention=name))
        run = jax.jit(lambda params, x, model=model: model.bind(params).decoder(x)[0])
        x = jax.ShapeDtypeStruct((1, 8, cfg.decoder.embed), jnp.float32)
        loops[name] = run.lower(model.abstract, x).as_text().count("stablehlo.while")
    assert loops[None] == loops["xla"] + 1  # one head after the other

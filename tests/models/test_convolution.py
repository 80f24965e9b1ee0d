"""`Conv` against sums written out in numpy, and what it refuses."""

import jax
import numpy as np
import pytest
from flax import nnx

from sa2jax.errors import ConfigError
from sa2jax.models.convolution import Conv
from sa2jax.nn import Policy


def make(inputs, outputs, **options):
    return Conv(inputs, outputs, policy=Policy(), rngs=nnx.Rngs(0), **options)


def written_out(x, net, stride, dilation, before, after, groups):
    """One output after the other, of one dimension."""
    kernel = np.asarray(net.kernel[...])
    taps, each, outputs = kernel.shape
    x = np.pad(x, ((0, 0), (before, after), (0, 0)))
    size = (x.shape[1] - dilation * (taps - 1) - 1) // stride + 1
    y = np.zeros((len(x), size, outputs), np.float32)
    width = outputs // groups
    for t in range(size):
        seen = x[:, t * stride : t * stride + dilation * (taps - 1) + 1 : dilation]
        for g in range(groups):
            own = slice(g * width, (g + 1) * width)
            part = seen[..., g * each : (g + 1) * each]
            y[:, t, own] = np.einsum("btc,tcd->bd", part, kernel[..., own])
    return y if net.bias is None else y + np.asarray(net.bias[...])


@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ({"kernel": 3}, (1, 1)),
        ({"kernel": 5, "dilation": 2}, (4, 4)),
        ({"kernel": 3, "stride": 2}, (1, 1)),
        ({"kernel": 3, "padding": "causal"}, (2, 0)),
        ({"kernel": 3, "dilation": 3, "padding": "causal"}, (6, 0)),
        ({"kernel": 4, "padding": "none"}, (0, 0)),
        ({"kernel": 6, "stride": 3, "padding": 1}, (1, 1)),
        ({"kernel": 3, "groups": 2}, (1, 1)),
        ({"kernel": 3, "groups": 4, "bias": False}, (1, 1)),
    ],
)
def test_sums(options, ends):
    net = make(4, 8, **options)
    x = np.asarray(jax.random.normal(jax.random.key(1), (2, 13, 4)))
    expected = written_out(
        x,
        net,
        options.get("stride", 1),
        options.get("dilation", 1),
        *ends,
        options.get("groups", 1),
    )
    np.testing.assert_allclose(net(x), expected, atol=1e-5)


def test_two_dimensions():
    net = make(2, 3, kernel=(3, 1), stride=(1, 2), bias=False)
    x = np.asarray(jax.random.normal(jax.random.key(1), (2, 7, 6, 2)))
    got = net(x)
    assert got.shape == (2, 7, 3, 3)
    padded, kernel = np.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0))), np.asarray(net.kernel[...])
    at = np.einsum("btc,tcd->bd", padded[:, 4:7, 2], kernel[:, 0])
    np.testing.assert_allclose(got[:, 4, 1], at, atol=1e-5)


def test_a_causal_one_does_not_see_what_comes_later():
    net = make(2, 2, kernel=4, padding="causal")
    x = np.asarray(jax.random.normal(jax.random.key(1), (1, 9, 2)))
    other = x.copy()
    other[:, 5:] += 1
    np.testing.assert_array_equal(net(x)[:, :5], net(other)[:, :5])


def test_parameters():
    def shapes(net):
        return {name: leaf.shape for name, leaf in nnx.to_pure_dict(nnx.state(net)).items()}

    assert shapes(make(4, 6, kernel=3, groups=2)) == {"kernel": (3, 2, 6), "bias": (6,)}
    assert shapes(make(4, 6, kernel=(3, 2), bias=False)) == {"kernel": (3, 2, 4, 6)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 3}, "3 groups: expected a divisor of 4 and 8"),
        ({"padding": "valid"}, "padding 'valid': expected same, causal, none or a number"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ConfigError) as error:
        make(4, 8, kernel=3, **options)
    assert str(error.value) == message

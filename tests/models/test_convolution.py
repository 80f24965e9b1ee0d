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


def written_out(x, net, stride, dilation, before, after):
    """One output after the other, of one dimension."""
    kernel = np.asarray(net.kernel[...])
    taps, _, outputs = kernel.shape
    x = np.pad(x, ((0, 0), (before, after), (0, 0)))
    size = (x.shape[1] - dilation * (taps - 1) - 1) // stride + 1
    y = np.zeros((len(x), size, outputs), np.float32)
    for t in range(size):
        seen = x[:, t * stride : t * stride + dilation * (taps - 1) + 1 : dilation]
        y[:, t] = np.einsum("btc,tcd->bd", seen, kernel)
    return y if net.bias is None else y + np.asarray(net.bias[...])


@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ({"kernel": 3}, (1, 1)),
        ({"kernel": 5, "dilation": 2}, (4, 4)),
        ({"kernel": 3, "stride": 2}, (1, 1)),
        ({"kernel": 4, "padding": "none"}, (0, 0)),
        ({"kernel": 6, "stride": 3, "padding": 1}, (1, 1)),
        ({"kernel": 3, "dilation": 3, "padding": 2, "bias": False}, (2, 2)),
    ],
)
def test_sums(options, ends):
    net = make(4, 8, **options)
    x = np.asarray(jax.random.normal(jax.random.key(1), (2, 13, 4)))
    expected = written_out(x, net, options.get("stride", 1), options.get("dilation", 1), *ends)
    np.testing.assert_allclose(net(x), expected, atol=1e-5)


def test_two_dimensions():
    net = make(2, 3, kernel=(3, 1), stride=(1, 2), bias=False)
    x = np.asarray(jax.random.normal(jax.random.key(1), (2, 7, 6, 2)))
    got = net(x)
    assert got.shape == (2, 7, 3, 3)
    padded, kernel = np.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0))), np.asarray(net.kernel[...])
    at = np.einsum("btc,tcd->bd", padded[:, 4:7, 2], kernel[:, 0])
    np.testing.assert_allclose(got[:, 4, 1], at, atol=1e-5)


def test_parameters():
    def shapes(net):
        return {name: leaf.shape for name, leaf in nnx.to_pure_dict(nnx.state(net)).items()}

    assert shapes(make(4, 6, kernel=3)) == {"kernel": (3, 4, 6), "bias": (6,)}
    assert shapes(make(4, 6, kernel=(3, 2), bias=False)) == {"kernel": (3, 2, 4, 6)}


def test_refused():
    with pytest.raises(ConfigError) as error:
        make(4, 8, kernel=3, padding="valid")
    assert str(error.value) == "padding 'valid': expected same, none or a number"

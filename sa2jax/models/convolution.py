"""Convolutions of all networks, channels last."""

import math
from collections.abc import Sequence
from typing import Literal

import jax
from flax import nnx
from jaxtyping import Array, Float

from sa2jax.errors import ConfigError
from sa2jax.nn import Policy, param

Padding = Literal["same", "none"]


def conv(
    x: Float[Array, "B *T C"],
    kernel: Float[Array, "*W C D"],
    bias: Float[Array, "D"] | None = None,
    *,
    stride: Sequence[int] = (1,),
    dilation: Sequence[int] = (1,),
    padding: Sequence[tuple[int, int]] = ((0, 0),),
    policy: Policy,
) -> Float[Array, "B *S D"]:
    """Convolve over one or two dimensions, channels last: on every backend the fastest layout here.

    Args:
        x: input.
        kernel: taps, then inputs, then outputs.
        bias: added to each frame, if there is one.
        stride: of each dimension.
        dilation: distance of taps in each dimension.
        padding: zeros before and after each dimension.
        policy: dtypes.
    """
    space = "HW"[: kernel.ndim - 2]
    y = jax.lax.conv_general_dilated(
        x.astype(policy.compute),
        kernel.astype(policy.compute),
        window_strides=stride,
        padding=padding,
        rhs_dilation=dilation,
        dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
        precision=policy.precision,
    )
    return y if bias is None else y + bias.astype(policy.compute)


class Conv(nnx.Module):
    """Convolution over one or two dimensions, channels last.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        kernel: taps, of each dimension if there are two.
        stride: frames from one output to the next, likewise.
        dilation: distance of taps, in every dimension.
        padding: zeros at the ends. `same`: as many at both, so that a size s becomes
            `(s - 1) // stride + 1` if `dilation * (kernel - 1)` is even. `none`. Or a number
            of them at each end.
        bias: whether there is one.
        policy: dtypes.
        rngs: source of randomness.

    Raises:
        ConfigError: for another padding.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int = 1,
        padding: Padding | int = "same",
        bias: bool = True,
        policy: Policy,
        rngs: nnx.Rngs,
    ):
        taps = (kernel,) if isinstance(kernel, int) else tuple(kernel)
        self.stride = (stride,) * len(taps) if isinstance(stride, int) else tuple(stride)
        self.dilation = (dilation,) * len(taps)
        self.padding = tuple(_ends(padding, dilation * (size - 1)) for size in taps)
        self.policy = policy
        shape = (*taps, inputs, outputs)
        scale = math.prod(shape[:-1]) ** -0.5
        self.kernel = param(rngs, shape, (None,) * len(shape), dtype=policy.param, scale=scale)
        self.bias = (
            param(rngs, (outputs,), (None,), dtype=policy.param, scale=0.02) if bias else None
        )

    def __call__(self, x: Float[Array, "B *T C"]) -> Float[Array, "B *S D"]:
        """Convolve; a size s becomes `(s + zeros - dilation * (kernel - 1) - 1) // stride + 1`."""
        return conv(
            x,
            self.kernel[...],
            None if self.bias is None else self.bias[...],
            stride=self.stride,
            dilation=self.dilation,
            padding=self.padding,
            policy=self.policy,
        )


def _ends(padding: Padding | int, reach: int) -> tuple[int, int]:
    """Zeros before and after a dimension over which taps reach so far."""
    if isinstance(padding, int):
        return padding, padding
    ends = {"same": (reach // 2, reach // 2), "none": (0, 0)}
    if padding not in ends:
        raise ConfigError(f"padding {padding!r}: expected {', '.join(ends)} or a number")
    return ends[padding]

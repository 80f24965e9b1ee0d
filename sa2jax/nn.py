"""What every network here shares: parameters with named axes, Linear, norms, rotary, attention.

Modules only declare parameters and describe a forward pass. At run time a model is a pair
`(graphdef, params)` with `params` a plain nested dict; `functional` makes that pair and `bind`
joins it again inside a traced function.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sa2jax import sharding

Params = dict[Any, Any]
M = TypeVar("M", bound=nnx.Module)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Which dtype a number has where.

    Attributes:
        param: dtype of stored parameters.
        compute: dtype of activations and matrix products.
    Norms, softmax, rotary angles and losses are always float32.
    """

    param: DTypeLike = jnp.float32
    compute: DTypeLike = jnp.float32

    @property
    def precision(self) -> jax.lax.Precision:
        """Products of float32 are exact; TPUs and GPUs would otherwise round their inputs."""
        exact = jnp.dtype(self.compute) == jnp.float32
        return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT


@dataclass(frozen=True)
class Functional(Generic[M]):
    """A model without its numbers: what `jax.jit` may close over.

    Attributes:
        graphdef: the static structure of the module, hashable.
        abstract: the parameters as `jax.ShapeDtypeStruct`, a plain nested dict.
        axes: the logical axes of each parameter, in the same tree.
    """

    graphdef: Any
    abstract: Params
    axes: Params

    def bind(self, params: Params) -> M:
        """The module with these parameters; cheap, meant to be called inside a traced function."""
        return nnx.merge(self.graphdef, params)

    def shardings(self, mesh: Mesh) -> Params:
        """Where each parameter lives on a mesh, in the same tree."""
        is_axes = lambda v: isinstance(v, tuple)  # noqa: E731
        return jax.tree.map(
            lambda axes, leaf: sharding.sharding_of(leaf.shape, axes, mesh),
            self.axes, self.abstract, is_leaf=is_axes,
        )  # fmt: skip


def functional(make: Callable[[], M]) -> Functional[M]:
    """Describe the module that `make` builds without allocating any memory."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    is_param = lambda v: isinstance(v, nnx.Variable)  # noqa: E731
    axes = jax.tree.map(lambda v: v.get_metadata("axes"), state, is_leaf=is_param)
    return Functional(graphdef, nnx.to_pure_dict(state), nnx.to_pure_dict(axes))


def init_params(make: Callable[[], nnx.Module]) -> Params:
    """Random parameters of the module that `make` builds, as a plain nested dict."""
    return jax.jit(lambda: nnx.to_pure_dict(nnx.state(make())))()


def param(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    dtype: DTypeLike = jnp.float32,
    scale: float = 1.0,
    constant: float | None = None,
) -> nnx.Param:
    """A parameter that knows the logical axis of each of its dimensions.

    Args:
        rngs: source of randomness.
        shape: dimensions.
        axes: one logical name per dimension, see `sharding.RULES`.
        dtype: stored dtype.
        scale: standard deviation of the normal initial values.
        constant: fill with this instead.
    """
    if constant is not None:
        value = jnp.full(shape, constant, dtype)
    else:
        value = (scale * jax.random.normal(rngs.params(), shape)).astype(dtype)
    return nnx.Param(value, axes=axes)


def stack(make: Callable[[nnx.Rngs], M], layers: int, rngs: nnx.Rngs) -> M:
    """`layers` modules of one shape as one module whose parameters have a leading axis [L, ...]."""
    return jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), layers))


def unstack(params: Params) -> Params:
    """Stacked parameters [L, ...] as one tree per layer: `{0: ..., 1: ...}`.

    A scan on a CPU copies each layer's weights before it multiplies with them, which halves the
    speed of decoding; a loop over separate arrays does not.
    """
    layers = jax.tree.leaves(params)[0].shape[0]
    return {i: jax.tree.map(itemgetter(i), params) for i in range(layers)}


def over_layers(
    body: Callable[[Any, tuple[Any, Any]], tuple[Any, Any]], carry: Any, layers: Any
) -> tuple[Any, Any]:
    """`jax.lax.scan` of `body` over (layer, index): stacked modules in a scan, a list in a loop."""
    if isinstance(layers, nnx.List):
        outputs = []
        for index, layer in enumerate(layers):
            carry, out = body(carry, (layer, index))
            outputs.append(out)
        return carry, jax.tree.map(lambda *out: jnp.stack(out), *outputs)
    count = jax.tree.leaves(nnx.state(layers))[0].shape[0]
    return jax.lax.scan(body, carry, (layers, jnp.arange(count)))


class Linear(nnx.Module):
    """`y = kernel · x + bias` over named axes, such as `{"embed": 64}` to `{"heads": 4, ...}`.

    The kernel is stored outputs first, inputs last: one output's weights lie side by side, which is
    the layout that a matrix-vector product reads at full bandwidth on every backend, and that
    released checkpoints have.
    """

    def __init__(
        self,
        inputs: Mapping[str, int],
        outputs: Mapping[str, int],
        *,
        bias: bool = True,
        policy: Policy,
        rngs: nnx.Rngs,
    ):
        self.inputs = len(inputs)
        self.policy = policy
        sizes, axes = (*outputs.values(), *inputs.values()), (*outputs, *inputs)
        scale = math.prod(inputs.values()) ** -0.5
        self.kernel = param(rngs, sizes, axes, dtype=policy.param, scale=scale)
        shape, names = tuple(outputs.values()), tuple(outputs)
        self.bias = param(rngs, shape, names, dtype=policy.param, scale=0.02) if bias else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        """Contract the last dimensions of x with the kernel's inputs."""
        compute, kernel = self.policy.compute, self.kernel[...]
        outputs, inputs = kernel.shape[: -self.inputs], kernel.shape[-self.inputs :]
        # One plain matrix: with several axes a side XLA would transpose the kernel on every call.
        matrix = kernel.reshape(math.prod(outputs), math.prod(inputs)).astype(compute)
        x = x.reshape(*x.shape[: x.ndim - self.inputs], -1).astype(compute)
        contract = (((x.ndim - 1,), (1,)), ((), ()))
        y = jax.lax.dot_general(x, matrix, contract, precision=self.policy.precision)
        y = y.reshape(*y.shape[:-1], *outputs)
        return y if self.bias is None else y + self.bias[...].astype(compute)


class Conv1d(nnx.Module):
    """Convolution over time, channels last."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int,
        stride: int = 1,
        padding: int = 0,
        policy: Policy,
        rngs: nnx.Rngs,
    ):
        self.stride, self.padding, self.policy = stride, padding, policy
        scale = (kernel * inputs) ** -0.5
        shape = (kernel, inputs, outputs)
        self.kernel = param(rngs, shape, (None, None, None), dtype=policy.param, scale=scale)
        self.bias = param(rngs, (outputs,), (None,), dtype=policy.param, scale=0.02)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B S D"]:
        """Convolve; the output has `(T + 2·padding − kernel) // stride + 1` frames."""
        compute = self.policy.compute
        y = jax.lax.conv_general_dilated(
            x.astype(compute),
            self.kernel[...].astype(compute),
            window_strides=(self.stride,),
            padding=[(self.padding, self.padding)],
            dimension_numbers=("NTC", "TIO", "NTC"),
            precision=self.policy.precision,
        )
        return y + self.bias[...].astype(compute)


class RMSNorm(nnx.Module):
    """Root-mean-square norm with float32 statistics, as Qwen2.5 has it."""

    def __init__(self, size: int, *, eps: float, policy: Policy, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = param(rngs, (size,), (None,), dtype=policy.param, constant=1.0)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalise the last axis."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return self.scale[...].astype(x.dtype) * y.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with float32 statistics."""

    def __init__(self, size: int, *, eps: float = 1e-5, policy: Policy, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = param(rngs, (size,), (None,), dtype=policy.param, constant=1.0)
        self.bias = param(rngs, (size,), (None,), dtype=policy.param, constant=0.0)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalise the last axis."""
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        y = y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


def before(lengths: Int[Array, "B"], size: int) -> Bool[Array, "B T"]:
    """True for the places of each row that its length covers."""
    return jnp.arange(size)[None] < lengths[:, None]


def note(trace: dict[str, Array] | None, name: str, x: Array) -> Array:
    """Keep an intermediate result under its name, if anyone asked; gives it back."""
    if trace is not None:
        trace[name] = x
    return x


def rotary(
    x: Float[Array, "B T N H"], positions: Int[Array, "B T"], theta: float
) -> Float[Array, "B T N H"]:
    """Rotate halves of each head by its position (RoPE, the Llama/Qwen convention).

    Args:
        x: queries or keys.
        positions: position of each token, counted from 0.
        theta: base of the wavelengths.
    """
    half = x.shape[-1] // 2
    inverse_wavelength = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[..., None, None] * inverse_wavelength  # [B, T, 1, H/2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention with a float32 softmax; float32 inputs are multiplied exactly.

    Args:
        q: queries; N is a multiple of K, and each group of N/K queries shares one key head.
        k: keys.
        v: values.
        mask: True where a query may look. A row without any True yields a mean over all keys.
    """
    exact = "highest" if q.dtype == jnp.float32 else None
    mesh = jax.sharding.get_abstract_mesh()
    with jax.default_matmul_precision(exact):
        if not mesh.empty and mesh.size > 1:  # heads are spread over devices: no loop over them
            return _all_heads(q, k, v, mask)
        return jax.lax.platform_dependent(q, k, v, mask, cpu=_head_by_head, default=_all_heads)


def _all_heads(q: Array, k: Array, v: Array, mask: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])


def _head_by_head(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """One key head after the other: its scores stay in a CPU's cache (2-3 times faster there)."""
    B, T, N, H = q.shape
    K = k.shape[2]
    rows = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B * K, N // K * T, H)
    keys, values = (x.swapaxes(1, 2).reshape(B * K, -1, H) for x in (k, v))

    def head(index_rows_keys_values):
        index, q, k, v = index_rows_keys_values
        scores = jnp.einsum("mh,sh->ms", q, k, preferred_element_type=jnp.float32) * H**-0.5
        seen = jnp.tile(mask[index // K], (N // K, 1))  # [G*T, S]
        scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
        return jax.nn.softmax(scores, axis=-1).astype(v.dtype) @ v

    out = jax.lax.map(head, (jnp.arange(B * K), rows, keys, values))
    return out.reshape(B, N, T, H).swapaxes(1, 2)


def cached_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """`attention` over keys and values that lie heads first, as a cache holds them.

    Queries of one key head are folded into rows of one matrix, so that both products are plain
    batched matrix products and nothing of the cache is moved (on a CPU 3-4 times faster).
    """
    B, T, N, H = q.shape
    K = k.shape[1]
    exact = "highest" if q.dtype == jnp.float32 else None
    with jax.default_matmul_precision(exact):
        rows = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
        scores = jnp.einsum("bkmh,bksh->bkms", rows, k, preferred_element_type=jnp.float32)
        scores = scores.reshape(B, N, T, -1) * H**-0.5
        scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(B, K, -1, k.shape[2])
        out = jnp.einsum("bkms,bksh->bkmh", weights, v)
    return out.reshape(B, N, T, H).swapaxes(1, 2)

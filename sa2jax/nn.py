"""Building blocks of every network: parameters with logical axes, Linear, norms, RoPE.

Modules only declare parameters and describe a forward pass. At run time a model is a pair
`(graphdef, params)` with `params` a plain nested dict; `functional` makes that pair and `bind`
joins it again inside a traced function.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from operator import itemgetter
from typing import Any, Generic, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sa2jax import sharding

Params = dict[Any, Any]
Remat = Literal["full", "dots"]
M = TypeVar("M", bound=nnx.Module)
ModelT = TypeVar("ModelT", covariant=True)
ArrayT = TypeVar("ArrayT", Array, np.ndarray)
"""Arrays of a batch: `Array` on devices, `np.ndarray` as the host made them."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Which dtype a number has where, and what computes attention.

    Attributes:
        param: dtype of stored parameters.
        compute: dtype of activations and matrix products.
        kernel: dtype of the matrices of `Linear`, by default that of parameters; int8 comes with a
            float32 scale for each output, see `quantize`.
        head: dtype of the matrix that makes logits, by default that of the other matrices.
        cache: dtype of cached keys and values, by default that of activations; int8 likewise.
        attention: what computes the decoder's attention, a name of
            `attention.dispatch.IMPLEMENTATIONS`; by default chosen by platform and shapes.
    Norms, softmax, rotary angles and losses are always float32.
    """

    param: DTypeLike = jnp.float32
    compute: DTypeLike = jnp.float32
    kernel: DTypeLike | None = None
    head: DTypeLike | None = None
    cache: DTypeLike | None = None
    attention: str | None = None

    @property
    def of_head(self) -> "Policy":
        """The policy of the head alone."""
        return self if self.head is None else replace(self, kernel=self.head)

    @property
    def precision(self) -> jax.lax.Precision:
        """Products of float32 are exact; TPUs and GPUs would otherwise round their inputs."""
        exact = jnp.dtype(self.compute) == jnp.float32
        return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT


@dataclass(frozen=True)
class Functional(Generic[ModelT]):
    """A model without its numbers: what `jax.jit` may close over.

    Attributes:
        graphdef: the static structure of the module, hashable.
        abstract: the parameters as `jax.ShapeDtypeStruct`, a plain nested dict.
        axes: the logical axes of each parameter, in the same tree.
    """

    graphdef: Any
    abstract: Params
    axes: Params

    def bind(self, params: Params) -> ModelT:
        """The module with these parameters; cheap, meant to be called inside a traced function."""
        return nnx.merge(self.graphdef, params)

    def shardings(self, mesh: Mesh) -> Params:
        """Where each parameter lives on a mesh, in the same tree."""

        def is_axes(v):
            return isinstance(v, tuple)

        return jax.tree.map(
            lambda axes, leaf: sharding.sharding_of(leaf.shape, axes, mesh),
            self.axes,
            self.abstract,
            is_leaf=is_axes,
        )

    def with_shardings(self, mesh: Mesh | None) -> Params:
        """`abstract` with `shardings`: the tree that a checkpoint is read into."""
        if mesh is None:
            return self.abstract
        return sharding.with_shardings(self.abstract, self.shardings(mesh))


def functional(make: Callable[[], M]) -> Functional[M]:
    """Describe the module that `make` builds without allocating any memory."""
    graphdef, state = nnx.split(nnx.eval_shape(make))

    def is_param(v):
        return isinstance(v, nnx.Variable)

    axes = jax.tree.map(lambda v: v.get_metadata("axes"), state, is_leaf=is_param)
    return Functional(graphdef, nnx.to_pure_dict(state), nnx.to_pure_dict(axes))


def structure_of(
    module: Callable[..., M], cfg: Hashable, policy: Policy | None = None, **sizes: Hashable
) -> Functional[M]:
    """The structure of a network; allocates nothing, and is made once for the same arguments.

    Args:
        module: class of the network, made with `(cfg, policy=, rngs=, **sizes)`.
        cfg: sizes.
        policy: dtypes, float32 by default.
        **sizes: what else the class is made with, such as `stacked`: whether layers are stacked
            [L, ...], as checkpoints have them, or one tree per layer, see `unstack`.
    """
    return _structure_of(module, cfg, Policy() if policy is None else policy, **sizes)


@cache
def _structure_of(module, cfg, policy, **sizes):
    return functional(lambda: module(cfg, policy=policy, rngs=nnx.Rngs(0), **sizes))


def init_params(make: Callable[[], nnx.Module], shardings: Params | None = None) -> Params:
    """Random parameters of the module that `make` builds, as a plain nested dict.

    Args:
        make: builds the module.
        shardings: where they go, see `Functional.shardings`; by default the first device.
    """

    def draw():
        return nnx.to_pure_dict(nnx.state(make()))

    # On a CPU a program for each shape: XLA takes twice as long for one of all the draws.
    if shardings is None and jax.default_backend() == "cpu":
        return draw()
    return jax.jit(draw, out_shardings=shardings)()


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


def make_layers(
    make: Callable[[nnx.Rngs], M], layers: int, rngs: nnx.Rngs, *, stacked: bool
) -> M | nnx.List[M]:
    """`layers` modules of one shape: stacked, see `stack`, or each its own in a list."""
    if stacked:
        return stack(make, layers, rngs)
    return nnx.List([make(rngs) for _ in range(layers)])


def unstack(params: Params) -> Params:
    """Stacked parameters [L, ...] as one tree per layer: `{0: ..., 1: ...}`.

    A scan on a CPU copies each layer's weights before it multiplies with them, which halves the
    speed of decoding; a loop over separate arrays does not.
    """
    layers = jax.tree.leaves(params)[0].shape[0]
    return {i: jax.tree.map(itemgetter(i), params) for i in range(layers)}


_UNROLL: ContextVar[bool] = ContextVar("unroll", default=False)


@contextmanager
def unrolling(unroll: bool = True) -> Iterator[None]:
    """Whether `over_layers` writes out the layers of what is traced here, instead of a loop.

    Their gradients are then those of separate arrays: on a CPU a training step takes 0.85 of the
    time; it compiles longer, the more the more layers there are.
    """
    token = _UNROLL.set(unroll)
    try:
        yield
    finally:
        _UNROLL.reset(token)


def over_layers(
    body: Callable[[Any, tuple[Any, Any]], tuple[Any, Any]],
    carry: Any,
    layers: Any,
    remat: Remat | None = None,
) -> tuple[Any, Any]:
    """`jax.lax.scan` of `body` over (layer, index): stacked modules in a scan, a list in a loop.

    Stacked modules are taken one by one, too, while `unrolling`.

    Args:
        body: `(carry, (layer, index))` to the next carry and an output.
        carry: the first one.
        layers: a stacked module, or a list of modules.
        remat: what a gradient computes a second time: everything but each layer's input (`full`),
            or all but the results of matrix products (`dots`).
    """
    if remat is not None:
        saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        policy = saved if remat == "dots" else None
        body = jax.checkpoint(body, prevent_cse=False, policy=policy)
    if isinstance(layers, nnx.List):
        return _one_by_one(body, carry, layers)
    count = jax.tree.leaves(nnx.state(layers))[0].shape[0]
    if _UNROLL.get():
        return _one_by_one(body, carry, [jax.tree.map(itemgetter(i), layers) for i in range(count)])
    return jax.lax.scan(body, carry, (layers, jnp.arange(count)))


def _one_by_one(body: Callable[..., Any], carry: Any, layers: Iterable[Any]) -> tuple[Any, Any]:
    outputs = []
    for index, layer in enumerate(layers):
        carry, out = body(carry, (layer, index))
        outputs.append(out)
    return carry, jax.tree.map(lambda *out: jnp.stack(out), *outputs)


class Linear(nnx.Module):
    """`y = kernel · x + bias` over named axes, such as `{"embed": 64}` to `{"heads": 4, ...}`.

    The kernel is stored outputs first, inputs last: one output's weights lie side by side, which is
    the layout that a matrix-vector product reads at full bandwidth on every backend, and that
    released checkpoints have. Several inputs are one axis, under the name of the first: a TPU would
    move a kernel whose last two axes are heads and their width to another layout.
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
        shape, names = tuple(outputs.values()), tuple(outputs)
        width = math.prod(inputs.values())
        sizes, axes = (*shape, width), (*names, next(iter(inputs)))
        deviation = width**-0.5
        kernel = jnp.dtype(policy.param if policy.kernel is None else policy.kernel)
        is_int8 = kernel == jnp.int8
        self.kernel = param(rngs, sizes, axes, dtype=kernel, scale=32.0 if is_int8 else deviation)
        self.scale = param(rngs, shape, names, constant=deviation / 32) if is_int8 else None
        self.bias = param(rngs, shape, names, dtype=policy.param, scale=0.02) if bias else None
        # A low-rank product to be added, see `sa2jax.train.lora`.
        self.lora_a: nnx.Param | None = None
        self.lora_b: nnx.Param | None = None
        self.lora_scale = 1.0

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        """Contract the last dimensions of x with the kernel's inputs."""
        compute, kernel = self.policy.compute, self.kernel[...]
        outputs = kernel.shape[:-1]
        x = x.reshape(*x.shape[: x.ndim - self.inputs], -1).astype(compute)
        # One plain matrix: with several axes a side XLA would transpose the kernel on every call.
        y = self._product(x, kernel.reshape(math.prod(outputs), -1))
        if self.scale is not None:  # of each output: after the product it is exact, and cheaper
            y = (y * self.scale[...].reshape(-1)).astype(compute)
        if self.lora_a is not None and self.lora_b is not None:
            a, b = self.lora_a[...], self.lora_b[...]
            low = self._product(x, a)
            y = y + self.lora_scale * self._product(low, b.reshape(-1, b.shape[-1]))
        y = y.reshape(*y.shape[:-1], *outputs)
        return y if self.bias is None else y + self.bias[...].astype(compute)

    def _product(self, x: Float[Array, "*B D"], matrix: Array) -> Float[Array, "*B F"]:
        contract = (((x.ndim - 1,), (1,)), ((), ()))
        return jax.lax.dot_general(
            x, matrix.astype(x.dtype), contract, precision=self.policy.precision
        )


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


def length_mask(lengths: Int[Array, "B"], size: int) -> Bool[Array, "B T"]:
    """True at the first `lengths` of `size` positions of each row: where there is no padding."""
    return jnp.arange(size)[None] < lengths[:, None]


def tap(trace: dict[str, Array] | None, name: str, x: Array) -> Array:
    """Record an intermediate result in `trace`, if there is one; returns it."""
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

"""Low-rank adaptation (LoRA): a few small matrices are trained, the base is frozen.

Source: Hu et al. 2021 (arXiv 2106.09685): `y = (kernel + alpha/rank · b a) x`. A base of int8 makes
it QLoRA (arXiv 2305.14314) with this library's int8 in place of NF4.
"""

import math
import re

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from sa2jax.errors import TrainError
from sa2jax.nn import Functional, Linear, Params, param
from sa2jax.train.optimizer import combine, partition

DECODER_MATRICES = r"decoder\.layers\.(\d+\.)?(attn|mlp)\.\w+"  # all of its matrices
LORA_PATTERN = r".*\.lora_[ab]$"
ONLY_LORA = {LORA_PATTERN: 1e-4, "": 0.0}  # for `OptimizerConfig.learning_rate_overrides`

__all__ = [
    "DECODER_MATRICES",
    "ONLY_LORA",
    "add_lora",
    "combine",
    "init_lora",
    "merge_lora",
    "split_lora",
]


def add_lora(
    model: nnx.Module,
    rank: int,
    alpha: float,
    targets: str = DECODER_MATRICES,
    *,
    rngs: nnx.Rngs,
    dtype: DTypeLike = jnp.float32,
) -> list[str]:
    """Give every `Linear` whose dotted path matches two matrices; in `nn.functional` it is free.

    `a` is [rank, inputs], normal; `b` is [*outputs, rank], zeros: at first nothing changes. Both
    are split over a mesh as the kernel is, and have its leading axis of layers.

    Args:
        model: the module; changed in place, so call this where it is made.
        rank: width of the bottleneck.
        alpha: the product is scaled by `alpha / rank`.
        targets: a regular expression for the whole path, such as `DECODER_MATRICES`.
        rngs: source of randomness.
        dtype: of the new matrices.

    Returns:
        The paths that matched.

    Raises:
        TrainError: if the rank is no rank or nothing matches.
    """
    if rank < 1:
        raise TrainError(f"LoRA needs a rank of at least 1, got {rank}")
    linears = {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear)
    }
    found = sorted(path for path in linears if re.fullmatch(targets, path))
    if not found:
        raise TrainError(f"no matrix matches {targets!r}: there are {', '.join(sorted(linears))}")
    for path in found:
        linear = linears[path]
        shape, axes = linear.kernel.shape, linear.kernel.get_metadata("axes")
        lead = shape[: len(shape) - len(axes)]
        outputs, inputs = shape[len(lead) : -1], shape[-1]
        linear.lora_a = nnx.data(
            param(rngs, (*lead, rank, inputs), (None, axes[-1]), dtype=dtype, scale=inputs**-0.5)
        )
        linear.lora_b = nnx.data(
            param(rngs, (*lead, *outputs, rank), (*axes[:-1], None), dtype=dtype, constant=0.0)
        )
        linear.lora_scale = alpha / rank
    return found


def init_lora(model: Functional, key: jax.Array, mesh: Mesh | None = None) -> Params:
    """Fresh matrices of a model that `add_lora` has changed, to be joined to a loaded base."""
    _, like = split_lora(model.abstract)
    _, places = split_lora(model.with_shardings(mesh))

    def make():
        leaves, structure = jax.tree.flatten_with_path(like)
        made = []
        for place, (path, leaf) in enumerate(leaves):
            value = jnp.zeros(leaf.shape)
            if path[-1].key == "lora_a":
                noise = jax.random.normal(jax.random.fold_in(key, place), leaf.shape)
                value = noise * leaf.shape[-1] ** -0.5
            made.append(value.astype(leaf.dtype))
        return jax.tree.unflatten(structure, made)

    where = None if mesh is None else jax.tree.map(lambda leaf: leaf.sharding, places)
    return jax.jit(make, out_shardings=where)()


def split_lora(params: Params) -> tuple[Params, Params]:
    """The base, and the low-rank matrices; `combine` puts them together again."""
    lora, base = partition(params, lambda name: re.match(LORA_PATTERN, name) is not None)
    return base, lora


def merge_lora(params: Params, scale: float) -> Params:
    """The base with the low-rank products added to its kernels, in float32.

    Args:
        params: base and low-rank matrices.
        scale: `alpha / rank`.

    Raises:
        TrainError: if a kernel to be changed is int8.
    """
    if "lora_a" not in params:
        return {k: merge_lora(v, scale) if isinstance(v, dict) else v for k, v in params.items()}
    rest = {k: v for k, v in params.items() if k not in ("lora_a", "lora_b")}
    kernel, a, b = params["kernel"], params["lora_a"], params["lora_b"]
    if kernel.dtype == jnp.int8:
        raise TrainError(
            "LoRA cannot be merged into int8 matrices, whose steps are larger than what it adds: "
            "merge it into the bfloat16 or float32 model, then quantize that"
        )
    # A stack of layers, or one: what a's two dimensions leave in front.
    lead = a.shape[:-2]
    b = b.reshape(*lead, math.prod(kernel.shape[len(lead) : -1]), b.shape[-1])
    product = jnp.matmul(
        b.astype(jnp.float32), a.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    total = kernel.astype(jnp.float32) + scale * product.reshape(kernel.shape)
    return rest | {"kernel": total.astype(kernel.dtype)}

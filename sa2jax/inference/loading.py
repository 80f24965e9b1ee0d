"""Load a checkpoint's language model onto its devices: dtypes, int8 quantization, meshes."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sa2jax import checkpoint, quantize
from sa2jax.attention.dispatch import check_implementation
from sa2jax.checkpoint import Progress
from sa2jax.config import StepAudio2Config
from sa2jax.errors import CheckpointError, ConfigError
from sa2jax.families import family_of, read_config
from sa2jax.models.heads import loading_shardings, pad_heads_for_mesh, pad_params_for_mesh
from sa2jax.nn import Params, Policy
from sa2jax.runtime import default_dtype
from sa2jax.sharding import make_mesh, with_shardings

FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be built.

    Attributes:
        cfg: its config, as the checkpoint has it.
        policy: its dtypes.
        params: its parameters, layers stacked, as
            `family_of(cfg).model(pad_heads_for_mesh(cfg, mesh), policy)` takes them.
        mesh: what they are spread over.
    """

    cfg: StepAudio2Config
    policy: Policy
    params: Params
    mesh: Mesh | None


def resolve_policy(
    dtype: str | None,
    *,
    stored: Any = None,
    int8_cache: bool = False,
    attention: str | None = None,
) -> Policy:
    """Resolve the values of `--dtype` and `--attention` to a `Policy`.

    Args:
        dtype: of weights and computation: `int8` is that of the matrices alone. By default
            bfloat16, float32 on a CPU.
        stored: what `sa2jax.json` says of int8 matrices in a checkpoint: they stay int8.
        int8_cache: whether keys and values are cached as int8.
        attention: see `Policy`.

    Raises:
        ConfigError: for another dtype, or an attention that is not known or not for this platform.
    """
    check_implementation(attention)
    if dtype not in (None, "int8", *FLOATS):
        raise ConfigError(f"dtype {dtype!r}: expected {', '.join(FLOATS)} or int8")
    compute = default_dtype() if dtype in (None, "int8") else jnp.dtype(dtype)
    is_int8 = dtype == "int8" or stored is not None
    return Policy(
        param=compute,
        compute=compute,
        kernel=jnp.dtype(jnp.int8) if is_int8 else None,
        head=compute if stored and not stored["head"] else None,
        cache=jnp.dtype(jnp.int8) if int8_cache else None,
        attention=attention,
    )


def load_language_model(
    folder: str | Path,
    *,
    dtype: str | None = None,
    mesh: str | Mesh | None = None,
    int8_cache: bool = False,
    attention: str | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Read a model folder of this library, or a Hugging Face folder as it is.

    Every tensor goes straight into its place on the devices; host memory holds one at a time, and
    each host reads its own parts only.

    Args:
        folder: made by `sa2jax convert`, or a Hugging Face checkpoint.
        dtype: see `resolve_policy`; a float checkpoint becomes int8 on the way, if that is asked
            for.
        mesh: devices to spread over, such as `"tensor=4"`; by default one device.
        int8_cache: whether keys and values are cached as int8.
        attention: what computes the decoder's attention, see `Policy`.
        progress: called with (bytes_done, bytes_total).

    Raises:
        CheckpointError: if the folder is damaged, incomplete or of another model.
        ConfigError: if its config.json is not understood, or for another dtype or attention.
        ShardingError: for a mesh that does not fit the devices or the model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"no folder {folder}: expected a model folder")
    cfg = read_config(folder)
    policy = resolve_policy(
        dtype, stored=stored_int8(folder), int8_cache=int8_cache, attention=attention
    )
    mesh = make_mesh(mesh) if isinstance(mesh, str) else mesh
    wide = pad_heads_for_mesh(cfg, mesh)
    make = family_of(cfg).model
    narrow, model = make(cfg, policy), make(wide, policy)
    like = narrow.abstract
    if mesh is not None:
        like = with_shardings(like, loading_shardings(narrow, model, mesh))
    params = read_params(folder, like, policy, progress=progress)
    if mesh is not None:
        params = pad_params_for_mesh(params, cfg.decoder, wide.decoder, model, mesh)
    return LoadedModel(cfg, policy, params, mesh)


def stored_int8(folder: str | Path) -> Any:
    """What `sa2jax.json` of a model folder says of int8 matrices; None if it has none."""
    return checkpoint.read_info(folder).get("int8") if checkpoint.is_checkpoint(folder) else None


def read_params(
    folder: str | Path, like: Params, policy: Policy, *, progress: Progress | None = None
) -> Params:
    """Read the parameters of a model folder, each tensor straight into its place.

    Args:
        folder: of this library, or a Hugging Face checkpoint.
        like: the wanted tree of `jax.ShapeDtypeStruct`, with shardings or not.
        policy: of `like`; int8 matrices of a float checkpoint are made on the way.
        progress: called with (bytes_done, bytes_total).

    Raises:
        CheckpointError: if the folder is damaged, incomplete or of another model.
    """
    transform = None
    if policy.kernel is not None and stored_int8(folder) is None:
        transform = partial(quantize.quantize_leaf, goals=checkpoint.flatten(like))
        like = _float_twin(like, policy)
    if checkpoint.is_checkpoint(folder):
        return checkpoint.load_params(folder, like, transform=transform)
    from sa2jax.convert.hf import load_hf

    return load_hf(folder, like, transform=transform, progress=progress)


def _float_twin(like: Params, policy: Policy) -> Params:
    """What is read before it becomes int8: the same leaves without scales."""
    leaves = checkpoint.flatten(like)
    kernels = quantize.quantized_leaves(leaves)
    for name in kernels:
        leaf = leaves.pop(name)
        leaves.pop(quantize.scale_of(name))
        leaves[name] = jax.ShapeDtypeStruct(leaf.shape, policy.param, sharding=leaf.sharding)
    return checkpoint.unflatten(leaves)

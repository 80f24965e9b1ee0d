"""A checkpoint's language model on its devices: dtypes, whole numbers, meshes."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sa2jax import checkpoint, quantize
from sa2jax.checkpoint import Progress
from sa2jax.config import StepAudio2Config
from sa2jax.errors import CheckpointError, ConfigError
from sa2jax.models.heads import loading_shardings, spread_heads, spread_params
from sa2jax.models.step_audio import step_audio2
from sa2jax.nn import Params, Policy
from sa2jax.runtime import default_dtype
from sa2jax.sharding import make_mesh, placed

FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Loaded:
    """A model ready to be built.

    Attributes:
        cfg: its config, as the checkpoint has it.
        policy: its dtypes.
        params: its parameters, layers stacked, as `step_audio2(spread_heads(cfg, mesh), policy)`
            takes them.
        mesh: what they are spread over.
    """

    cfg: StepAudio2Config
    policy: Policy
    params: Params
    mesh: Mesh | None


def policy_of(dtype: str | None, *, stored: Any = None, int8_cache: bool = False) -> Policy:
    """The dtypes that a user's words stand for.

    Args:
        dtype: of weights and computation: `int8` is that of the matrices alone. By default
            bfloat16, float32 on a CPU.
        stored: what `sa2jax.json` says of int8 matrices in a checkpoint: they stay int8.
        int8_cache: whether keys and values are cached as int8.

    Raises:
        ConfigError: for another dtype.
    """
    if dtype not in (None, "int8", *FLOATS):
        raise ConfigError(f"dtype {dtype!r}: expected {', '.join(FLOATS)} or int8")
    compute = default_dtype() if dtype in (None, "int8") else jnp.dtype(dtype)
    whole = dtype == "int8" or stored is not None
    return Policy(
        param=compute,
        compute=compute,
        kernel=jnp.dtype(jnp.int8) if whole else None,
        head=compute if stored and not stored["head"] else None,
        cache=jnp.dtype(jnp.int8) if int8_cache else None,
    )


def load(
    folder: str | Path,
    *,
    dtype: str | None = None,
    mesh: str | Mesh | None = None,
    int8_cache: bool = False,
    progress: Progress | None = None,
) -> Loaded:
    """Read a model folder of this library, or a Hugging Face folder as it is.

    Every tensor goes straight into its place on the devices; host memory holds one at a time, and
    each host reads its own parts only.

    Args:
        folder: made by `sa2jax convert`, or a Hugging Face checkpoint.
        dtype: see `policy_of`; a float checkpoint becomes int8 on the way, if that is asked for.
        mesh: devices to spread over, such as `"tensor=4"`; by default one device.
        int8_cache: whether keys and values are cached as int8.
        progress: told about bytes done and bytes in all.

    Raises:
        CheckpointError: if the folder is damaged, incomplete or of another model.
        ConfigError: if its config.json is not understood, or for another dtype.
        ShardingError: for a mesh that does not fit the devices or the model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"no folder {folder}: expected a model folder")
    cfg = StepAudio2Config.from_hf(folder)
    policy = policy_of(dtype, stored=stored_int8(folder), int8_cache=int8_cache)
    mesh = make_mesh(mesh) if isinstance(mesh, str) else mesh
    wide = spread_heads(cfg, mesh)
    narrow, model = step_audio2(cfg, policy), step_audio2(wide, policy)
    like = narrow.abstract
    if mesh is not None:
        like = placed(like, loading_shardings(narrow, model, mesh))
    params = read(folder, like, policy, progress=progress)
    if mesh is not None:
        params = spread_params(params, cfg.decoder, wide.decoder, model, mesh)
    return Loaded(cfg, policy, params, mesh)


def stored_int8(folder: str | Path) -> Any:
    """What `sa2jax.json` of a model folder says of int8 matrices; None if it has none."""
    return checkpoint.read_info(folder).get("int8") if checkpoint.is_checkpoint(folder) else None


def read(
    folder: str | Path, like: Params, policy: Policy, *, progress: Progress | None = None
) -> Params:
    """The numbers of a model folder, each tensor straight into its place.

    Args:
        folder: of this library, or a Hugging Face checkpoint.
        like: the wanted tree of `jax.ShapeDtypeStruct`, with shardings or not.
        policy: of `like`; int8 matrices of a float checkpoint are made on the way.
        progress: told about bytes done and bytes in all.

    Raises:
        CheckpointError: if the folder is damaged, incomplete or of another model.
    """
    change = None
    if policy.kernel is not None and stored_int8(folder) is None:
        change = partial(quantize.quantize_leaf, goals=checkpoint.flatten(like))
        like = _float_twin(like, policy)
    if checkpoint.is_checkpoint(folder):
        return checkpoint.load(folder, like, change=change)
    from sa2jax.convert.hf import load_hf

    return load_hf(folder, like, change=change, progress=progress)


def _float_twin(like: Params, policy: Policy) -> Params:
    """What is read before it becomes int8: the same leaves without scales."""
    leaves = checkpoint.flatten(like)
    whole = quantize.quantized_leaves(leaves)
    for name in whole:
        leaf = leaves.pop(name)
        leaves.pop(quantize.scale_of(name))
        leaves[name] = jax.ShapeDtypeStruct(leaf.shape, policy.param, sharding=leaf.sharding)
    return checkpoint.unflatten(leaves)

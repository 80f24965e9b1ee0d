"""Pad and repeat attention heads that a mesh's tensor axis does not divide, as 28 and 4 over 8.

Key heads are repeated until each shard has one, and each group of queries is dealt out to the
copies of its key head, padded with heads that are zero. The result is the same to the last bit of
each head; a decoder of 28 heads with 4 key heads becomes one of 32 with 8.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from sa2jax.config import DecoderConfig, StepAudio2Config
from sa2jax.errors import ShardingError
from sa2jax.nn import Functional, Params
from sa2jax.sharding import MODEL_AXES, model_axis_size, tensor_axis_size


def pad_heads_for_mesh(cfg: StepAudio2Config, mesh: Mesh | None) -> StepAudio2Config:
    """The config whose decoder has heads for every shard of a mesh's tensor axis.

    Raises:
        ShardingError: if there are more shards than heads.
    """
    decoder, ways = cfg.decoder, tensor_axis_size(mesh)
    if ways > decoder.heads:
        raise ShardingError(
            f"{ways} tensor shards for {decoder.heads} heads: expected tensor={decoder.heads} at "
            "most; spread the rest over data or fsdp"
        )
    if ways <= decoder.kv_heads or ways % decoder.kv_heads:
        return cfg
    copies = ways // decoder.kv_heads
    each = -(-decoder.heads // decoder.kv_heads // copies)
    wide = replace(decoder, heads=ways * each, kv_heads=ways)
    return replace(cfg, decoder=wide)


def pad_params_for_mesh(
    params: Params, cfg: DecoderConfig, wide: DecoderConfig, model: Functional, mesh: Mesh
) -> Params:
    """Parameters of `cfg` as those of the decoder that `pad_heads_for_mesh` made of it.

    Args:
        params: stacked, of the whole model, where `loading_shardings` put them; used up.
        cfg: sizes of the checkpoint.
        wide: sizes of the decoder on the mesh.
        model: the model on the mesh.
        mesh: the mesh.
    """
    if cfg == wide:
        return params
    attn = params["decoder"]["layers"].pop("attn")
    places = model.shardings(mesh)["decoder"]["layers"]["attn"]
    # One leaf at a time: two copies of all of them need not fit. First on the way, where no head
    # is split and nothing is sent, then to its place.
    for name, part in attn.items():
        for kind in list(part):
            change = partial(_pad_leaf, name=name, kind=kind, cfg=cfg, wide=wide)
            here = part[kind].sharding
            part[kind] = jax.jit(change, out_shardings=here)(part[kind])
            part[kind] = jax.jit(lambda x: x, out_shardings=places[name][kind])(part[kind])
    params["decoder"]["layers"]["attn"] = attn
    return params


def loading_shardings(narrow: Functional, model: Functional, mesh: Mesh) -> Params:
    """Where the leaves of a checkpoint go.

    Those that `pad_params_for_mesh` changes are split otherwise than the model's.

    Args:
        narrow: the model as the checkpoint has it.
        model: the model on the mesh.
        mesh: the mesh.
    """
    places = model.shardings(mesh)
    if narrow == model:
        return places
    attn = narrow.abstract["decoder"]["layers"]["attn"]
    places["decoder"]["layers"]["attn"] = {
        name: {kind: _on_the_way(name, kind, leaf, mesh) for kind, leaf in part.items()}
        for name, part in attn.items()
    }
    return places


def _on_the_way(name: str, kind: str, leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> NamedSharding:
    """Split over the model's width, which no head has a part in; vectors are whole."""
    entries: list[tuple[str, str] | None] = [None] * leaf.ndim
    axis = 1 if name == "o" else leaf.ndim - 1
    if kind == "kernel" and leaf.shape[axis] % model_axis_size(mesh) == 0:
        entries[axis] = MODEL_AXES
    return NamedSharding(mesh, PartitionSpec(*entries))


def _pad_leaf(x: Array, *, name: str, kind: str, cfg: DecoderConfig, wide: DecoderConfig) -> Array:
    """One leaf of an attention layer, [L, ...]."""
    if name in "kv":  # [L, K, ...]
        return jnp.repeat(x, wide.kv_heads // cfg.kv_heads, axis=1)
    if name == "o" and kind != "kernel":  # outputs are no heads
        return x
    axis = 2 if name == "o" else 1
    width = x.shape[axis] // cfg.heads  # the heads of inputs are one axis with their width
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    groups = x.reshape(*before, cfg.kv_heads, cfg.heads // cfg.kv_heads, width, *after)
    more = wide.heads // cfg.kv_heads - groups.shape[axis + 1]
    pads = [(0, more) if i == axis + 1 else (0, 0) for i in range(groups.ndim)]
    return jnp.pad(groups, pads).reshape(*before, wide.heads * width, *after)

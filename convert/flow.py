"""The flow's table: `flow.pt` (a state dict under the released names) to parameters and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sa2jax import checkpoint
from sa2jax.convert import torch_file
from sa2jax.convert.rules import Op, Rule, Shape, Split, Transpose, expand, rule
from sa2jax.convert.transfer import (
    Network,
    TransferPlan,
    find_state_dict,
    make_plan,
    pack_dtypes,
    read,
)
from sa2jax.convert.weights import Arrays
from sa2jax.errors import CheckpointError
from sa2jax.models.flow.dit import ADALN_PARTS
from sa2jax.models.flow.flow_matching import flow_model
from sa2jax.nn import Params
from sa2jax.speech_config import FlowConfig

WEIGHTS = "flow.pt"
ANCHOR = "spk_embed_affine_layer.weight"  # each flow has it
CONV = Transpose(2, 1, 0)  # torch keeps [out, in, time]
OF_YAML = (
    "{where} does not fit its flow.yaml: {problems}. "
    "Use the flow.yaml and the flow.pt of one and the same release"
)


def flow_rules(cfg: FlowConfig) -> list[Rule]:
    """The table: released name, our leaf, what happens between."""
    est, hf_est = "estimator", "decoder.estimator"
    dit = Split(0, (cfg.estimator.heads, cfg.estimator.head_dim))
    nine, two = Split(0, (ADALN_PARTS, cfg.estimator.embed)), Split(0, (2, cfg.estimator.embed))
    block, hf_block = f"{est}.blocks", f"{hf_est}.blocks.{{layer}}"
    rules = [
        rule("input_embedding.weight", "table"),
        *_both("spk_embed_affine_layer", "speaker"),
        *_input_projection("encoder.embed", "encoder.embed"),
        *_both("encoder.pre_lookahead_layer.conv1", "encoder.look_ahead", CONV),
        *_both("encoder.pre_lookahead_layer.conv2", "encoder.look_back", CONV),
        *_conformer_layers("encoders", "layers", cfg),
        *_both("encoder.up_layer.conv", "encoder.up_conv", CONV),
        *_input_projection("encoder.up_embed", "encoder.up_embed"),
        *_conformer_layers("up_encoders", "up_layers", cfg),
        *_norm("encoder.after_norm", "encoder.norm"),
        *_both("encoder_proj", "to_mel"),
        *_both(f"{hf_est}.t_embedder.mlp.0", f"{est}.time_in"),
        *_both(f"{hf_est}.t_embedder.mlp.2", f"{est}.time_out"),
        *_both(f"{hf_est}.in_proj", f"{est}.inputs"),
        *_both(f"{hf_block}.attn.to_q", f"{block}.attn.q", dit, dit),
        *_both(f"{hf_block}.attn.to_k", f"{block}.attn.k", dit, dit),
        *_both(f"{hf_block}.attn.to_v", f"{block}.attn.v", dit, dit),
        *_norm(f"{hf_block}.attn.q_norm", f"{block}.attn.q_norm"),
        *_norm(f"{hf_block}.attn.k_norm", f"{block}.attn.k_norm"),
        *_both(f"{hf_block}.attn.proj", f"{block}.attn.o"),
        *_both(f"{hf_block}.mlp.fc1", f"{block}.up"),
        *_both(f"{hf_block}.mlp.fc2", f"{block}.down"),
        *_both(f"{hf_block}.conv.block.1", f"{block}.convs.conv1", CONV),
        *_norm(f"{hf_block}.conv.block.3", f"{block}.convs.norm"),
        *_both(f"{hf_block}.conv.block.6", f"{block}.convs.conv2", CONV),
        *_both(f"{hf_block}.adaLN_modulation.1", f"{block}.modulation", nine, nine),
        *_both(f"{hf_est}.final_layer.adaLN_modulation.1", f"{est}.modulation", two, two),
        *_both(f"{hf_est}.final_layer.linear", f"{est}.out"),
    ]
    leaves = leaf_shapes(cfg)  # a key may have no bias
    return [r for r in rules if r.target in leaves]


def leaf_shapes(cfg: FlowConfig) -> dict[str, Shape]:
    """Shape of every parameter by dotted path; nothing is allocated."""
    leaves = checkpoint.flatten(flow_model(cfg).abstract)
    return {name: tuple(leaf.shape) for name, leaf in leaves.items()}


def open_file(path: str | Path, cfg: FlowConfig | None = None) -> Network[FlowConfig]:
    """A `flow.pt` held against its sizes; no code in it is run, and no numbers are read yet.

    Args:
        path: the file, or the folder that holds it.
        cfg: sizes; by default those of the `flow.yaml` beside it.

    Raises:
        ConfigError: if flow.yaml is missing or not understood.
        CheckpointError: for a damaged or hostile file, or tensors that do not fit; all are named.
    """
    path = Path(path)
    path = path / WEIGHTS if path.is_dir() else path
    cfg = cfg or FlowConfig.from_yaml(path.parent)
    tensors, left_out = find_state_dict(torch_file.read(path), ANCHOR, str(path))
    plan = _plan(tensors, cfg, str(path))
    return Network(cfg, plan, form={"dtypes": pack_dtypes(plan.tensors)}, left_out=tuple(left_out))


def load(path: str | Path, cfg: FlowConfig | None = None) -> tuple[FlowConfig, Params]:
    """Parameters of the flow in a `flow.pt` as NumPy arrays, in the dtype of the file.

    Args and errors are those of `open_file`.
    """
    network = open_file(path, cfg)
    return network.config, read(network.plan)


def save(path: str | Path, params: Params, cfg: FlowConfig) -> None:
    """Write a `flow.pt` that the official code loads, bit for bit as it came.

    Raises:
        CheckpointError: if the parameters are of another config.
    """
    torch_file.write(path, to_official(params, cfg))


def _plan(tensors: Mapping[str, Any], cfg: FlowConfig, where: str) -> TransferPlan:
    return make_plan(
        flow_rules(cfg), Arrays(tensors, where), leaf_shapes(cfg), where, wording=OF_YAML
    )


def to_official(params: Params, cfg: FlowConfig) -> dict[str, np.ndarray]:
    """The tensors of a `flow.pt` by name.

    Raises:
        CheckpointError: if the parameters are of another config.
    """
    flat = {name: np.asarray(leaf) for name, leaf in checkpoint.flatten(params).items()}
    shapes = {name: leaf.shape for name, leaf in flat.items()}
    wrong = dict(set(shapes.items()) ^ set(leaf_shapes(cfg).items()))
    if wrong:
        raise CheckpointError(
            f"these parameters do not fit their flow config: {', '.join(sorted(wrong))}"
        )
    tensors: dict[str, np.ndarray] = {}
    for p in expand(flow_rules(cfg), shapes):
        leaf = flat[p.leaf] if p.layer is None else flat[p.leaf][p.layer]
        arrays = [np.ascontiguousarray(array) for array in p.rule.inverse(leaf)]
        tensors |= dict(zip(p.sources, arrays, strict=True))
    return tensors


def _both(source: str, target: str, kernel: Op | None = None, bias: Op | None = None) -> list[Rule]:
    """Weight and bias of a linear map or a convolution."""

    def steps(op):
        return [] if op is None else [op]

    return [
        rule(f"{source}.weight", f"{target}.kernel", *steps(kernel)),
        rule(f"{source}.bias", f"{target}.bias", *steps(bias)),
    ]


def _norm(source: str, target: str) -> list[Rule]:
    return [
        rule(f"{source}.weight", f"{target}.scale"),
        rule(f"{source}.bias", f"{target}.bias"),
    ]


def _input_projection(source: str, target: str) -> list[Rule]:
    return [
        *_both(f"{source}.out.0", f"{target}.linear"),
        *_norm(f"{source}.out.1", f"{target}.norm"),
    ]


def _conformer_layers(source: str, target: str, cfg: FlowConfig) -> list[Rule]:
    heads = (cfg.encoder.heads, cfg.encoder.head_dim)
    into = Split(0, heads)
    hf, leaf = f"encoder.{source}.{{layer}}", f"encoder.{target}"
    attn, own_attn = f"{hf}.self_attn", f"{leaf}.attn"
    return [
        *_norm(f"{hf}.norm_mha", f"{leaf}.attn_norm"),
        *_both(f"{attn}.linear_q", f"{own_attn}.q", into, into),
        *_both(f"{attn}.linear_k", f"{own_attn}.k", into, into),
        *_both(f"{attn}.linear_v", f"{own_attn}.v", into, into),
        *_both(f"{attn}.linear_out", f"{own_attn}.o"),
        rule(f"{attn}.linear_pos.weight", f"{own_attn}.position.kernel", into),
        rule(f"{attn}.pos_bias_u", f"{own_attn}.content_bias"),
        rule(f"{attn}.pos_bias_v", f"{own_attn}.position_bias"),
        *_norm(f"{hf}.norm_ff", f"{leaf}.mlp_norm"),
        *_both(f"{hf}.feed_forward.w_1", f"{leaf}.up"),
        *_both(f"{hf}.feed_forward.w_2", f"{leaf}.down"),
    ]

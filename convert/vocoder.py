"""The table for `hift.pt`: released name, our leaf, what happens between.

Most convolutions are released with weight norm: a direction v and a length g for each slice of the
first axis, kernel = g · v / |v|. The kernel is what we keep. On the way back v is the kernel and g
its norms, which is the same function.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from sa2jax import checkpoint
from sa2jax.convert import torch_file
from sa2jax.convert.rules import Join, Rule, Shape, Transpose, expand, rule
from sa2jax.convert.transfer import Network, make_plan, pack_dtypes, read
from sa2jax.convert.weights import Arrays
from sa2jax.errors import CheckpointError
from sa2jax.models.vocoder import vocoder
from sa2jax.nn import Params
from sa2jax.speech_config import VocoderConfig

WEIGHTS = "hift.pt"
PREFIX = "generator."
# How torch has named the length and the direction of a weight norm, the present way first.
SPELLINGS = (
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ("weight_g", "weight_v"),
)
MISFIT = (
    "{where} does not hold the tensors of a HiFT vocoder: {problems}. "
    "Use the hift.pt of the released token2wav folder"
)


class WeightNorm(Join):
    """Length g `[n, 1, 1]` and direction v `[n, ...]` to the kernel g · v / |v|."""

    exact = False

    def forward(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Fold, in float64."""
        length, direction = arrays
        v = direction.astype(np.float64)
        return (v * (length / np.maximum(_norm(v), np.finfo(np.float64).tiny))).astype(length.dtype)

    def inverse(self, array: np.ndarray) -> list[np.ndarray]:
        """The kernel and its norms."""
        return [_norm(array.astype(np.float64)).astype(array.dtype), array]

    def forward_shape(self, shapes: Sequence[Shape]) -> Shape:
        """The direction's."""
        return shapes[1]

    def inverse_shape(self, shape: Shape) -> list[Shape]:
        """One length per slice of the first axis."""
        return [(shape[0], *(1 for _ in shape[1:])), shape]


def _norm(v: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(v).sum(axis=tuple(range(1, v.ndim)), keepdims=True))


def vocoder_rules(
    cfg: VocoderConfig, *, prefix: str = PREFIX, spelling: tuple[str, str] = SPELLINGS[0]
) -> list[Rule]:
    """The table.

    Args:
        cfg: sizes; only the number of stages, blocks and layers matters here.
        prefix: what all names in the file begin with.
        spelling: names of length and direction of a weight norm.
    """
    forward, transposed = (
        Transpose(2, 1, 0),
        Transpose(2, 0, 1),
    )  # torch: [out, in, k], [in, out, k]

    def normed(source: str, target: str, order: Transpose) -> list[Rule]:
        pair = [f"{prefix}{source}.{part}" for part in spelling]
        return [
            rule(pair, f"{target}.kernel", WeightNorm(), order),
            rule(f"{prefix}{source}.bias", f"{target}.bias"),
        ]

    def block(source: str, target: str, layers: int) -> list[Rule]:
        rules = []
        for i, name in product(range(layers), ("first", "second")):
            side = 1 + (name == "second")
            rules += normed(f"{source}.convs{side}.{i}", f"{target}.{name}{i}", forward)
            alpha = f"{prefix}{source}.activations{side}.{i}.alpha"
            rules.append(rule(alpha, f"{target}.{name}{i}.alpha"))
        return rules

    rules = [
        rule(f"{prefix}m_source.l_linear.weight", "merge.kernel"),
        rule(f"{prefix}m_source.l_linear.bias", "merge.bias"),
        *normed("conv_pre", "pre", forward),
        *normed("conv_post", "post", forward),
        rule(f"{prefix}f0_predictor.classifier.weight", "f0_predictor.out.kernel"),
        rule(f"{prefix}f0_predictor.classifier.bias", "f0_predictor.out.bias"),
    ]
    for i in range(cfg.f0_layers):  # odd places hold the activations
        rules += normed(f"f0_predictor.condnet.{2 * i}", f"f0_predictor.conv{i}", forward)
    count = len(cfg.block_kernels)
    for i in range(len(cfg.rates)):
        rules += normed(f"ups.{i}", f"stage{i}.up", transposed)
        rules += [
            rule(f"{prefix}source_downs.{i}.weight", f"stage{i}.down.kernel", forward),
            rule(f"{prefix}source_downs.{i}.bias", f"stage{i}.down.bias"),
        ]
        rules += block(f"source_resblocks.{i}", f"stage{i}.source", len(cfg.source_dilations[i]))
        for j, dilations in enumerate(cfg.block_dilations):
            rules += block(f"resblocks.{i * count + j}", f"stage{i}.block{j}", len(dilations))
    return rules


@cache
def leaf_shapes(cfg: VocoderConfig) -> dict[str, Shape]:
    """Shape of every parameter by dotted path; nothing is allocated."""
    leaves = checkpoint.flatten(vocoder(cfg).abstract)
    return {name: tuple(leaf.shape) for name, leaf in leaves.items()}


def config_of(shapes: Mapping[str, Shape], where: str = WEIGHTS) -> VocoderConfig:
    """The released configuration with the sizes that a `hift.pt` shows.

    Rates, dilations and thresholds leave no trace in the file; they are the released ones.

    Args:
        shapes: shape of every tensor in the file.
        where: what to call the file in an error.

    Raises:
        CheckpointError: if the tensors that show the sizes are missing.
    """
    prefix, spelling = _dialect(shapes)
    direction = spelling[1]
    try:
        out, mels, _ = shapes[f"{prefix}conv_pre.{direction}"]
        f0, _, _ = shapes[f"{prefix}f0_predictor.condnet.0.{direction}"]
        harmonics = shapes[f"{prefix}m_source.l_linear.weight"][1] - 1
    except (KeyError, ValueError) as error:
        problem = f"{error} is missing, this is another model's file"
        raise CheckpointError(MISFIT.format(where=where, problems=problem)) from None
    return VocoderConfig(mels=mels, channels=out, f0_channels=f0, harmonics=harmonics)


def open_file(path: str | Path, cfg: VocoderConfig | None = None) -> Network[VocoderConfig]:
    """A `hift.pt` held against its sizes; no code in it is run, and no numbers are read yet.

    Args:
        path: the file, with or without the prefix "generator.", in either spelling of weight norm.
        cfg: sizes; by default as the file shows them.

    Raises:
        CheckpointError: for a damaged or hostile file, or tensors that do not fit; all are named.
    """
    tensors = torch_file.read(path)
    inner = tensors.get(PREFIX[:-1])  # some files keep them one level down
    if len(tensors) == 1 and isinstance(inner, Mapping):
        tensors = dict(inner)
    weights = Arrays(tensors, str(path))
    shapes = {name: info.shape for name, info in weights.tensors.items()}
    cfg = cfg or config_of(shapes, str(path))
    prefix, spelling = _dialect(shapes)
    rules = vocoder_rules(cfg, prefix=prefix, spelling=spelling)
    plan = make_plan(rules, weights, leaf_shapes(cfg), str(path), wording=MISFIT)
    folded = frozenset(r.target for r in rules if not r.exact)
    dtypes = pack_dtypes(plan.tensors)
    return Network(
        cfg, plan, folded, {"dtypes": dtypes, "prefix": prefix, "spelling": list(spelling)}
    )


def load(path: str | Path, cfg: VocoderConfig | None = None) -> tuple[VocoderConfig, Params]:
    """Parameters of the vocoder in a `hift.pt` as NumPy arrays.

    Args and errors are those of `open_file`.
    """
    network = open_file(path, cfg)
    return network.config, read(network.plan)


def save(
    path: str | Path,
    params: Params,
    cfg: VocoderConfig,
    *,
    prefix: str = PREFIX,
    spelling: tuple[str, str] = SPELLINGS[0],
) -> None:
    """Write a `hift.pt` that the official code loads.

    Tensors without weight norm come back bit for bit, folded kernels to within 1e-6.
    """
    torch_file.write(path, to_official(params, cfg, prefix=prefix, spelling=spelling))


def to_official(
    params: Params,
    cfg: VocoderConfig,
    *,
    prefix: str = PREFIX,
    spelling: tuple[str, str] = SPELLINGS[0],
) -> dict[str, np.ndarray]:
    """The tensors of a `hift.pt` by name."""
    flat = checkpoint.flatten(params)
    tensors: dict[str, np.ndarray] = {}
    for p in expand(vocoder_rules(cfg, prefix=prefix, spelling=spelling), leaf_shapes(cfg)):
        arrays = p.rule.inverse(np.asarray(flat[p.leaf]))
        tensors |= dict(zip(p.sources, arrays, strict=True))
    return tensors


def _dialect(names: Mapping[str, Any]) -> tuple[str, tuple[str, str]]:
    """Prefix and spelling of weight norm that a file uses."""
    prefix = PREFIX if any(name.startswith(PREFIX) for name in names) else ""
    old = any(re.search(r"\.weight_[gv]$", name) for name in names)
    return prefix, SPELLINGS[1] if old else SPELLINGS[0]

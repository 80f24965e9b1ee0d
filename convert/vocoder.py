"""The table for `hift.pt`: released name, our leaf, what happens between.

Most convolutions are released with weight norm: a direction v and a length g for each slice of the
first axis, kernel = g · v / |v|. The kernel is what we keep. On the way back v is the kernel and g
its norms, which is the same function.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np

from sa2jax import checkpoint
from sa2jax.convert import torch_file
from sa2jax.convert.rules import Join, Rule, Shape, Transpose, expand, rule
from sa2jax.convert.transfer import Network, find_state_dict, make_plan, pack_dtypes, read
from sa2jax.convert.weights import Arrays
from sa2jax.errors import CheckpointError, ConfigError
from sa2jax.models.vocoder import vocoder
from sa2jax.nn import Params
from sa2jax.speech_config import VocoderConfig

WEIGHTS = "hift.pt"
ANCHOR = "m_source.l_linear.weight"  # each HiFT has it
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
    """The configuration with every size that a `hift.pt` shows.

    What leaves no trace in the file is as released: dilations, thresholds, the hop of the inverse
    Fourier transform. The first rate is what the others leave of the samples of a mel frame.

    Args:
        shapes: shape of every tensor in the file.
        where: what to call the file in an error.

    Raises:
        CheckpointError: if the tensors that show the sizes are missing or contradict each other.
    """
    prefix, (_, direction) = _dialect(shapes)

    def size(name: str, axis: int) -> int:
        return shapes[f"{prefix}{name}"][axis]

    def count(pattern: str) -> int:
        found = (re.fullmatch(re.escape(prefix) + pattern, name) for name in shapes)
        return len({match[1] for match in found if match})

    def taps(block: str) -> tuple[int, tuple[int, ...]]:
        pairs = count(rf"{re.escape(block)}\.convs1\.(\d+)\.{re.escape(direction)}")
        return size(f"{block}.convs1.0.{direction}", 2), _dilations(pairs)

    released = VocoderConfig()
    try:
        stages = count(rf"ups\.(\d+)\.{re.escape(direction)}")
        if not stages:
            raise KeyError("ups.0")
        blocks, odd = divmod(count(r"resblocks\.(\d+)\..*"), stages)
        if odd:
            raise ValueError(f"{stages} upsamplings cannot share their residual blocks")
        parallel = [taps(f"resblocks.{j}") for j in range(blocks)]
        source = [taps(f"source_resblocks.{i}") for i in range(stages)]
        return VocoderConfig(
            mels=size(f"conv_pre.{direction}", 1),
            channels=size(f"conv_pre.{direction}", 0),
            harmonics=size("m_source.l_linear.weight", 1) - 1,
            rates=_rates([size(f"source_downs.{i}.weight", 2) for i in range(stages)]),
            kernels=tuple(size(f"ups.{i}.{direction}", 2) for i in range(stages)),
            n_fft=size(f"conv_post.{direction}", 0) - 2,
            hop=released.hop,
            block_kernels=tuple(kernel for kernel, _ in parallel),
            block_dilations=tuple(dilations for _, dilations in parallel),
            source_kernels=tuple(kernel for kernel, _ in source),
            source_dilations=tuple(dilations for _, dilations in source),
            f0_channels=size(f"f0_predictor.condnet.0.{direction}", 0),
            f0_layers=count(rf"f0_predictor\.condnet\.(\d+)\.{re.escape(direction)}"),
        )
    except LookupError as error:
        problem = f"{error} is missing, this is another model's file"
    except (ValueError, ArithmeticError, ConfigError) as error:
        problem = str(error)
    raise CheckpointError(MISFIT.format(where=where, problems=problem)) from None


def _dilations(pairs: int) -> tuple[int, ...]:
    """The released spacings of the convolutions of a residual block, which no tensor shows."""
    ((*known,), *_) = VocoderConfig.block_dilations
    if not 0 < pairs <= len(known):
        raise ValueError(f"expected 1 to {len(known)} pairs of convolutions a block, got {pairs}")
    return tuple(known[:pairs])


def _rates(taps: Sequence[int]) -> tuple[int, ...]:
    """The factor of each upsampling.

    Args:
        taps: of the convolution that brings the source to the rate of each stage: twice the
            product of the factors that follow, 1 for no factor.
    """
    after = [1 if n == 1 else n // 2 for n in taps]
    released = VocoderConfig()
    whole = released.samples // released.hop
    for before, step in pairwise([whole, *after]):
        if not step or before % step:
            raise ValueError(f"a frame of {whole} steps cannot become {after} by whole factors")
    return tuple(before // step for before, step in pairwise([whole, *after]))


def open_file(path: str | Path, cfg: VocoderConfig | None = None) -> Network[VocoderConfig]:
    """A `hift.pt` held against its sizes; no code in it is run, and no numbers are read yet.

    Args:
        path: the file, with or without the prefix "generator.", in either spelling of weight norm.
        cfg: sizes; by default as the file shows them.

    Raises:
        CheckpointError: for a damaged or hostile file, or tensors that do not fit; all are named.
    """
    tensors, left_out = find_state_dict(torch_file.read(path), ANCHOR, str(path))
    while tensors and all(name.startswith(2 * PREFIX) for name in tensors):  # a trainer's wrapper
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    weights = Arrays(tensors, str(path))
    shapes = {name: info.shape for name, info in weights.tensors.items()}
    cfg = cfg or config_of(shapes, str(path))
    prefix, spelling = _dialect(shapes)
    rules = vocoder_rules(cfg, prefix=prefix, spelling=spelling)
    plan = make_plan(rules, weights, leaf_shapes(cfg), str(path), wording=MISFIT)
    folded = frozenset(r.target for r in rules if not r.exact)
    dtypes = pack_dtypes(plan.tensors)
    form = {"dtypes": dtypes, "prefix": prefix, "spelling": list(spelling)}
    return Network(cfg, plan, folded, form, tuple(left_out))


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

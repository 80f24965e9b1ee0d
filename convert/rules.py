"""Conversion tables: a rule maps a source tensor to a parameter, with an invertible transform.

A rule is read in both directions, so the way back is derived, never written:

    rule("model.layers.{layer}.mlp.up_proj.weight", "decoder.layers.mlp.up.kernel", Transpose(1, 0))

`{layer}` marks stacked layers: layer i fills index i of the leaf's first axis. `match` holds a
table against a checkpoint and a model: every source tensor is used exactly once, every leaf is
filled exactly once and all shapes agree, or everything that is wrong is said in one error.
"""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sa2jax.errors import CheckpointError

Shape = tuple[int, ...]

# What `match` says of weights that came with a config.json.
CONFIG_MISMATCH = (
    "{where} does not fit its config.json: {problems}. "
    "Use the config.json and the weights of one and the same model"
)


class Op(ABC):
    """An invertible change of one array. `exact` is False where the inverse is approximate."""

    exact = True

    @abstractmethod
    def forward(self, array: np.ndarray) -> np.ndarray:
        """Source form to ours; a view wherever that is possible."""

    @abstractmethod
    def inverse(self, array: np.ndarray) -> np.ndarray:
        """Our form to the source's."""

    @abstractmethod
    def forward_shape(self, shape: Shape) -> Shape:
        """Shape of `forward`'s result."""

    @abstractmethod
    def inverse_shape(self, shape: Shape) -> Shape:
        """Shape of `inverse`'s result."""


class Join(ABC):
    """An invertible change of several arrays into one; the first step of a rule with many sources.

    `exact` is False where the inverse is approximate (a folded weight norm, say).
    """

    exact = True

    @abstractmethod
    def forward(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """All sources to one array."""

    @abstractmethod
    def inverse(self, array: np.ndarray) -> list[np.ndarray]:
        """One array to its sources."""

    @abstractmethod
    def forward_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Shape of `forward`'s result."""

    @abstractmethod
    def inverse_shape(self, shape: Shape) -> list[Shape]:
        """Shapes of `inverse`'s results."""


class Transpose(Op):
    """Reorder the axes, as `numpy.transpose` does."""

    def __init__(self, *order: int):
        self.order = order
        self.back = tuple(order.index(i) for i in range(len(order)))

    def forward(self, array: np.ndarray) -> np.ndarray:
        """Put axis `order[i]` at place i."""
        return array.transpose(self.order)

    def inverse(self, array: np.ndarray) -> np.ndarray:
        """Put the axes back."""
        return array.transpose(self.back)

    def forward_shape(self, shape: Shape) -> Shape:
        """The same sizes in the new order."""
        return tuple(shape[i] for i in self.order)

    def inverse_shape(self, shape: Shape) -> Shape:
        """The same sizes in the old order."""
        return tuple(shape[i] for i in self.back)


class Split(Op):
    """Split one axis into several, such as `[N*H]` into `[N, H]`."""

    def __init__(self, axis: int, sizes: Sequence[int]):
        self.axis, self.sizes = axis, tuple(sizes)

    def forward(self, array: np.ndarray) -> np.ndarray:
        """Split the axis."""
        return array.reshape(self.forward_shape(array.shape))

    def inverse(self, array: np.ndarray) -> np.ndarray:
        """Merge the axes."""
        return array.reshape(self.inverse_shape(array.shape))

    def forward_shape(self, shape: Shape) -> Shape:
        """`sizes` in place of the axis."""
        return (*shape[: self.axis], *self.sizes, *shape[self.axis + 1 :])

    def inverse_shape(self, shape: Shape) -> Shape:
        """The product in place of `sizes`."""
        end = self.axis + len(self.sizes)
        return (*shape[: self.axis], int(np.prod(shape[self.axis : end])), *shape[end:])


@dataclass(frozen=True)
class Rule:
    """One line of a table; build it with `rule`.

    Attributes:
        sources: names in the source checkpoint, with `{layer}` where the leaf is stacked.
        target: dotted path of the leaf.
        join: how several sources become one array.
        ops: what happens to that array, in order.
    """

    sources: tuple[str, ...]
    target: str
    join: Join | None
    ops: tuple[Op, ...]

    @property
    def stacked(self) -> bool:
        """Whether the leaf holds one slice per layer."""
        return "{layer}" in self.sources[0]

    @property
    def exact(self) -> bool:
        """Whether the way back gives the same bits."""
        return all(op.exact for op in self.ops) and (self.join is None or self.join.exact)

    def forward(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Source tensors to the leaf, or to one layer of it."""
        array = self.join.forward(arrays) if self.join else arrays[0]
        for op in self.ops:
            array = op.forward(array)
        return array

    def inverse(self, array: np.ndarray) -> list[np.ndarray]:
        """The leaf, or one layer of it, to its source tensors."""
        for op in reversed(self.ops):
            array = op.inverse(array)
        return self.join.inverse(array) if self.join else [array]

    def forward_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Shape of `forward`'s result."""
        shape = self.join.forward_shape(shapes) if self.join else shapes[0]
        for op in self.ops:
            shape = op.forward_shape(shape)
        return shape

    def inverse_shape(self, shape: Shape) -> list[Shape]:
        """Shapes of `inverse`'s results."""
        for op in reversed(self.ops):
            shape = op.inverse_shape(shape)
        return self.join.inverse_shape(shape) if self.join else [shape]


def rule(source: str | Sequence[str], target: str, *steps: Op | Join) -> Rule:
    """A rule from its source name (or names, then the first step joins them) to a leaf."""
    sources = (source,) if isinstance(source, str) else tuple(source)
    join = steps[0] if steps and isinstance(steps[0], Join) else None
    if (len(sources) > 1) != (join is not None):
        raise TypeError(f"{target}: several sources need exactly one joining first step")
    return Rule(sources, target, join, tuple(s for s in steps if isinstance(s, Op)))


@dataclass(frozen=True)
class Placement:
    """A rule applied to one layer: which tensors fill which part of which leaf.

    Attributes:
        rule: the rule.
        sources: full names of the source tensors.
        layer: index into the leaf's first axis, None if the leaf is not stacked.
        shapes: the shapes the source tensors must have.
    """

    rule: Rule
    sources: tuple[str, ...]
    layer: int | None
    shapes: tuple[Shape, ...]

    @property
    def leaf(self) -> str:
        """Dotted path of the leaf."""
        return self.rule.target


def expand(rules: Iterable[Rule], leaves: Mapping[str, Shape]) -> list[Placement]:
    """Apply a table to a model's leaves, layer by layer.

    Args:
        rules: the table.
        leaves: shape of every leaf by dotted path.

    Returns:
        One placement per rule and layer; rules whose leaf does not exist are left out.
    """
    placements = []
    for r in rules:
        if r.target not in leaves:
            continue
        shape = leaves[r.target]
        shapes = tuple(r.inverse_shape(shape[1:] if r.stacked else shape))
        for layer in range(shape[0]) if r.stacked else [None]:
            names = tuple(s.replace("{layer}", str(layer)) for s in r.sources)
            placements.append(Placement(r, names, layer, shapes))
    return placements


def match(
    rules: Sequence[Rule],
    tensors: Mapping[str, Shape],
    leaves: Mapping[str, Shape],
    where: str,
    *,
    wording: str = CONFIG_MISMATCH,
    problems: Sequence[str] = (),
) -> list[Placement]:
    """Hold a table against a checkpoint and a model.

    Args:
        rules: the table.
        tensors: shape of every tensor in the checkpoint by name.
        leaves: shape of every leaf of the model by dotted path.
        where: what to call the checkpoint in an error.
        wording: the error, with a place for `{where}` and for `{problems}`.
        problems: what is known to be wrong already.

    Returns:
        Every placement, in the order of the table.

    Raises:
        CheckpointError: naming all unknown, missing and misshapen tensors and all table faults.
    """
    _require_layers(rules, tensors, leaves, where, wording)
    placements = expand(rules, leaves)
    known = Counter(name for p in placements for name in p.sources)
    wrong: dict[str, list[str]] = {}
    for p in placements:
        for name, shape in zip(p.sources, p.shapes, strict=True):
            if name in tensors and tuple(tensors[name]) != shape:
                what = f"expected {list(shape)}, got {list(tensors[name])}"
                wrong.setdefault(what, []).append(name)
    faults = [
        *problems,
        _group("unknown tensors", [name for name in tensors if name not in known]),
        _group("missing tensors", [name for name in known if name not in tensors]),
        *(_group(f"wrong shape ({what})", names) for what, names in wrong.items()),
        *_table_faults(rules, known, leaves),
    ]
    faults = [fault for fault in faults if fault]
    if faults:
        raise CheckpointError(wording.format(where=where, problems="; ".join(faults)))
    return placements


def _require_layers(
    rules: Sequence[Rule],
    tensors: Mapping[str, Shape],
    leaves: Mapping[str, Shape],
    where: str,
    wording: str,
) -> None:
    """Each layer has a tensor of its own: a config that says more is refused before it is spelt."""
    for r in rules:
        if r.stacked and r.target in leaves and leaves[r.target][0] > len(tensors):
            source = re.escape(r.sources[0]).replace(re.escape("{layer}"), r"\d+")
            found = sum(re.fullmatch(source, name) is not None for name in tensors)
            problem = f"expected {leaves[r.target][0]} of {r.sources[0]}, got {found}"
            raise CheckpointError(wording.format(where=where, problems=problem))


def _table_faults(
    rules: Sequence[Rule], known: Mapping[str, int], leaves: Mapping[str, Shape]
) -> list[str]:
    """What is wrong with the table itself, whatever the checkpoint."""
    filled = Counter(r.target for r in rules)
    faults = [
        _group("leaves without a rule", [leaf for leaf in leaves if leaf not in filled]),
        _group("leaves filled twice", [leaf for leaf, n in filled.items() if n > 1]),
        _group("rules without a leaf", [leaf for leaf in filled if leaf not in leaves]),
        _group("tensors used twice", [name for name, n in known.items() if n > 1]),
    ]
    for r in rules:
        if r.target in leaves:
            part = leaves[r.target][1:] if r.stacked else leaves[r.target]
            shape = r.forward_shape(r.inverse_shape(part))
            if shape != part:
                faults.append(f"rule for {r.target} makes {list(shape)}, not {list(part)}")
    return faults


def fold(names: Iterable[str]) -> dict[str, list[str]]:
    """Names that differ only in their first number, under a name with all of its values.

    >>> fold(["a.0.w", "a.1.w", "a.3.w", "b"])
    {'a.{0-1,3}.w': ['a.0.w', 'a.1.w', 'a.3.w'], 'b': ['b']}
    """
    groups: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for name in names:
        match = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
        key, number = ((match[1], match[3]), int(match[2])) if match else ((name, ""), -1)
        groups.setdefault(key, []).append((number, name))
    folded = {}
    for (head, tail), members in groups.items():
        numbers = sorted(number for number, _ in members)
        pattern = head if numbers[0] < 0 else f"{head}{_ranges(numbers)}{tail}"
        folded[pattern] = [name for _, name in sorted(members)]
    return folded


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers as `{0-3,7}`, a single one as itself."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if text.isdigit() else f"{{{text}}}"


def _group(title: str, names: Sequence[str], limit: int = 24) -> str:
    """One short phrase about many names, or nothing about none."""
    if not names:
        return ""
    patterns = list(fold(names))
    more = f" and {len(patterns) - limit} more" if len(patterns) > limit else ""
    return f"{len(names)} {title}: {', '.join(patterns[:limit])}{more}"

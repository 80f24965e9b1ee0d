"""Accelerators on paper: memory, bandwidths, peak rates and interconnects.

Figures are the vendors', dense (without structured sparsity). `usable` is what is left to a
program, as libtpu's compiler states it when a program is too large.
"""

import math
import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from sa2jax.errors import PlanError

GIB = 2**30
GB, TERA = 1e9, 1e12


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator.

    Attributes:
        name: as in a topology's name.
        kind: `tpu`, for which programs are compiled, or `gpu`, which is judged on paper.
        hbm: memory, bytes.
        usable: memory that a program may fill, bytes.
        bandwidth: of the memory, bytes/s.
        bf16: peak rate of bfloat16 products (of float16 where there is no bfloat16), FLOP/s.
        int8: peak rate of int8 products, OP/s.
        network: bytes/s that the chip can send to its neighbours over all its links at once, and
            receive at the same time. 0 if it has no neighbours.
        source: where the figures are from.
    """

    name: str
    kind: str
    hbm: float
    usable: float
    bandwidth: float
    bf16: float
    int8: float
    network: float
    source: str


def _tpu(
    name: str,
    hbm: float,
    usable: float,
    bandwidth: float,
    bf16: float,
    int8: float,
    network: float,
    source: str,
) -> Chip:
    """A TPU: GiB, GiB, GB/s, TFLOP/s, TOP/s, GB/s."""
    return Chip(
        name=name,
        kind="tpu",
        hbm=hbm * GIB,
        usable=usable * GIB,
        bandwidth=bandwidth * GB,
        bf16=bf16 * TERA,
        int8=int8 * TERA,
        network=network * GB,
        source=source,
    )


def _gpu(
    name: str, hbm: float, bandwidth: float, bf16: float, int8: float, network: float, source: str
) -> Chip:
    """A GPU: GB, GB/s, TFLOP/s, TOP/s, GB/s. A program is taken to get 92 % of the memory."""
    # The CUDA context, libraries' workspaces and fragmentation take the rest.
    return Chip(
        name=name,
        kind="gpu",
        hbm=hbm * GB,
        usable=0.92 * hbm * GB,
        bandwidth=bandwidth * GB,
        bf16=bf16 * TERA,
        int8=int8 * TERA,
        network=network * GB,
        source=source,
    )


_CLOUD = "Google Cloud documentation, TPU"
_SHEET = "NVIDIA data sheet,"

# Of two links between a pair of neighbours each direction counts once: Google's "bidirectional"
# interconnect figures and NVIDIA's NVLink and PCIe totals are halved here.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        # 6 links of 50 GB/s: Jouppi et al., "TPU v4", 2023. int8 runs at the bfloat16 rate.
        _tpu("v4", 32, 30.75, 1200, 275, 275, 300, f"{_CLOUD} v4; links: arXiv:2304.01433"),
        _tpu("v5e", 16, 15.75, 819, 197, 393, 200, f"{_CLOUD} v5e"),
        _tpu("v5p", 96, 95.73, 2765, 459, 918, 600, f"{_CLOUD} v5p"),
        _tpu("v6e", 32, 31.24, 1640, 918, 1836, 400, f"{_CLOUD} v6e"),
        # No bfloat16: the rate is float16's.
        _gpu("t4", 16, 320, 65, 130, 16, f"{_SHEET} T4 (PCIe 3)"),
        _gpu("l4", 24, 300, 121, 242, 32, f"{_SHEET} L4 (PCIe 4)"),
        _gpu("a100-40gb", 40, 1555, 312, 624, 300, f"{_SHEET} A100 SXM 40 GB"),
        _gpu("a100-80gb", 80, 2039, 312, 624, 300, f"{_SHEET} A100 SXM 80 GB"),
        _gpu("h100", 80, 3350, 989, 1979, 450, f"{_SHEET} H100 SXM"),
        _gpu("h200", 141, 4800, 989, 1979, 450, f"{_SHEET} H200 SXM"),
        _gpu("b200", 180, 8000, 2250, 4500, 900, f"{_SHEET} HGX B200"),
    )
}

# Shapes that libtpu describes, in ascending number of chips.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8")
_CUBE = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")
SHAPES: dict[str, tuple[str, ...]] = {
    "v4": _CUBE,
    "v5e": _FLAT,
    "v5p": _CUBE,
    "v6e": _FLAT,
    **{name: ("1", "2", "4", "8") for name, chip in CHIPS.items() if chip.kind == "gpu"},
}
ALIASES = {"a100": "a100-80gb", "h100-sxm": "h100"}

# Without these, libtpu asks the network which TPU this machine has, says on stderr that there is
# none, and lets no second process use it.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Topology:
    """Chips of one kind and how they are joined, such as eight v5e in a 2x4 grid."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many."""
        return math.prod(self.shape)

    @property
    def network(self) -> float:
        """Bytes/s that a chip in the middle can send: not all its links have a neighbour here."""
        if self.chip.kind == "gpu":  # all of them through one switch
            return self.chip.network if self.chips > 1 else 0.0
        axes = 3 if len(SHAPES[self.chip.name][0].split("x")) == 3 else 2
        return self.chip.network / (2 * axes) * sum(min(size - 1, 2) for size in self.shape)

    @property
    def name(self) -> str:
        """As `topology` reads it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def topology(name: str) -> Topology:
    """Read a name such as `v5e:2x4` or `h100:8`; one chip if it has no shape.

    Raises:
        PlanError: if there is no such topology; the message lists those that there are.

    >>> topology("v5e:2x4").chips
    8
    """
    found = re.fullmatch(r"([a-z0-9-]+)(?::(\d+(?:x\d+)*))?", name.strip().lower())
    kind, shape = found.groups() if found else (name, None)
    kind = ALIASES.get(kind, kind)
    if kind not in CHIPS or (shape is not None and shape not in SHAPES[kind]):
        raise PlanError(f"unknown topology {name!r}; known: {known()}")
    return Topology(CHIPS[kind], tuple(map(int, (shape or SHAPES[kind][0]).split("x"))))


def topologies(kind: str) -> list[Topology]:
    """All topologies of one kind of chip, smallest first.

    Raises:
        PlanError: if there is no such chip.
    """
    kind = ALIASES.get(kind, kind)
    if kind not in CHIPS:
        raise PlanError(f"unknown chip {kind!r}; known: {', '.join(CHIPS)}")
    return [topology(f"{kind}:{shape}") for shape in SHAPES[kind]]


def known() -> str:
    """Every topology, for a message."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for kind, shapes in SHAPES.items():
        groups.setdefault(shapes, []).append(kind)
    return "; ".join(f"{'|'.join(kinds)}:{'|'.join(s)}" for s, kinds in groups.items())


def devices(of: Topology) -> list[Any]:
    """The devices of a TPU topology, none of them here: programs can be compiled for them.

    Raises:
        PlanError: if libtpu, which holds the compiler, is not installed.
    """
    if find_spec("libtpu") is None:
        raise PlanError(
            "compiling for a TPU needs libtpu, which is not installed: "
            "pip install 'sa2jax[plan]' (no TPU is needed)"
        )
    for key, value in _LIBTPU.items():  # which libtpu reads when it is loaded, by the next line
        os.environ.setdefault(key, value)
    from jax.experimental.topologies import get_topology_desc

    # A v4 chip has two cores, which would be two devices: they are used as one.
    options = {"chip_config_name": "megacore"} if of.chip.name == "v4" else {}
    try:
        found = get_topology_desc(topology_name=of.name, platform="tpu", **options)
    except Exception as error:  # whatever libtpu is of another opinion about
        raise PlanError(f"libtpu does not describe {of.name}: {error}") from error
    return list(found.devices)

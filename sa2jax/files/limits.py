"""How much a file may ask for: one budget for each kind of file, far above what real ones need."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sa2jax.errors import FileError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What reading one file may take.

    Attributes:
        bytes: size of the file, unpacked.
        nodes: values in it: containers, texts, numbers.
        depth: containers within containers.
    """

    bytes: int
    nodes: int
    depth: int


# The largest that is known: a tokenizer.json of 11 MB with 800 000 values.
JSON = Limits(bytes=64 << 20, nodes=4_000_000, depth=100)
# A recipe has 3 kB. PyYAML reads some 100 kB a second.
YAML = Limits(bytes=256 << 10, nodes=20_000, depth=40)
# A thousand tensors are 250 kB and 40 000 instructions.
PICKLE = Limits(bytes=8 << 20, nodes=500_000, depth=100)
# Two hours of sound at 16 kHz in float32.
ARRAYS = Limits(bytes=512 << 20, nodes=20_000, depth=1)
# The speech tokenizer has 0.5 GB; protobuf reads no message above 2 GB.
ONNX = Limits(bytes=2 << 30, nodes=200_000, depth=20)
# A JSON array of rows, whose items are told apart before they are read one by one.
ROWS = Limits(bytes=256 << 20, nodes=4_000_000, depth=100)
# An instruction for people: a prompt, a text to be read.
TEXT = Limits(bytes=16 << 20, nodes=1, depth=1)

MAX_AXES = 32  # of a tensor
MAX_REPEATED = 64 << 20  # bytes of a tensor that repeats the numbers of a smaller storage
MAX_INT = 2**63 - 1  # what a tensor's size or an id can be


def require_depth(value: Any, limits: Limits, where: str) -> None:
    """Refuse containers that are nested too deeply to be walked or printed.

    Args:
        value: of dicts, lists and tuples, without circles.
        limits: whose `depth` counts.
        where: what to call it in the error.

    Raises:
        FileError: for such a value.
    """
    level = [value] if isinstance(value, dict | list | tuple) else []
    for _ in range(limits.depth):
        level = [item for outer in level for item in _items(outer) if _is_container(item)]
        if not level:
            return
    raise FileError(where, f"nested more than {limits.depth} deep")


def _items(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def _is_container(value: Any) -> bool:
    return isinstance(value, dict | list | tuple)

"""Damage for files, and a watch over what reading the damaged ones does."""

import copy
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings

from sa2jax.convert.weights import peak_memory
from sa2jax.errors import Sa2jaxError

LONG = "SA2JAX_LONG" in os.environ
SECONDS, BYTES, CHARACTERS = 10, 1 << 30, 500  # the most that one case may take or say

# What a value of JSON or YAML may be replaced by; each of these once broke a reader.
VALUES: list[Any] = [
    *(None, True, "", "x", "\ud800", "é\u2028\u0085\f", [], {}, [[]], {"": None}, 0.5, -0.0),
    *(0, -1, 1, 2**31, 2**63, 10**9, 10**30, "x" * 5000, "<|EOT|>", "../../x", "/dev/zero", "a\0b"),
    *([0] * 300, {"a": {"a": {"a": []}}}, "1e999", "NaN", "2001-99-99", ["x"], [None], "٣"),
]
RAW = [
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    "9" * 5001,
    "[" * 3000,
    '"\\ud800"',
    "'x'",
    "tru",
    "1.",
]
BYTES_IN = [
    b"\0",
    b"\xff",
    b"\x80",
    b"[" * 50,
    b"{",
    b'"',
    b"*a ",
    b"&a ",
    b"!!int ",
    b"\xef\xbb\xbf",
]
BYTES_IN += [
    b"\xe2\x80\xa8",
    b"\xc2\x85",
    b"\f",
    b"\r",
    b"\n",
    b"PK\1\2",
    b"\xff\xff\xff\x7f",
    b"1e999",
]


def cases(count: int) -> settings:
    """So many cases a test: the same each time, or ten times as many new ones with SA2JAX_LONG."""
    return settings(
        max_examples=count * 10 if LONG else count,
        derandomize=not LONG,
        database=None,
        phases=[Phase.explicit, Phase.generate],  # a smaller seed is no simpler case
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, inserted, left out or doubled, or the end cut off."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        size = rng.choice((1, 1, 4, 8, 30))
        kind = rng.randrange(7)
        if kind == 0:
            out[at : at + size] = rng.randbytes(len(out[at : at + size]))
        elif kind == 1:
            del out[at : at + size]
        elif kind == 2:
            out[at:at] = rng.choice(BYTES_IN)
        elif kind == 3:
            out[at:at] = out[at : at + size] * rng.choice((1, 2, 200))
        elif kind == 4 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 5:
            del out[at:]
        else:
            out[at : at + 1] = rng.choice(BYTES_IN)
    return bytes(out)


def damage_value(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with parts replaced, left out, doubled or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return copy.deepcopy(rng.choice(VALUES))
        holder, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(("", "x", "a.b", "../x", "x" * 5000, "\ud800"))] = holder.pop(key)
        elif kind == 2 and isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), holder[key])
        elif kind == 3:
            other, name = rng.choice(places)
            if name in other if isinstance(other, dict) else name < len(other):
                holder[key] = json.loads(json.dumps(other[name]))
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def damage_json(value: Any, rng: random.Random) -> bytes:
    """The text of a damaged value, sometimes damaged itself."""
    text = json.dumps(damage_value(value, rng))
    kind = rng.randrange(6)
    if kind == 0:
        return damage_bytes(text.encode(), rng)
    if kind == 1:
        at = text.find(":", rng.randrange(len(text)))
        text = text[: at + 1] + rng.choice(RAW) + text[at + 1 :] if rng.random() < 0.5 else text
        return (text[: at + 1] + rng.choice(RAW) + "}").encode()
    if kind == 2:
        return b"\xef\xbb\xbf" + text.encode()
    return text.encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a value where something stands."""
    todo = [value]
    while todo:
        holder = todo.pop()
        keys = holder if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            yield holder, key
            if isinstance(holder[key], dict | list):
                todo.append(holder[key])


_WATCH: dict[str, Any] = {"on": False, "out": None, "seen": []}
_CHANGES = (
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
)
_RUNS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect")


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _WATCH["on"]:
        return
    if event in _CHANGES and _is_output(arguments[0]):
        return
    if event == "open":
        path, mode, flags = arguments
        writes = (
            any(c in (mode or "") for c in "wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR)
        )
        if writes and not isinstance(path, int) and not _is_output(path):
            _WATCH["seen"].append(f"writes {path}")
    elif event in _CHANGES or event in _RUNS:
        _WATCH["seen"].append(f"{event} {arguments!r:.200}")


def _is_output(path: Any) -> bool:
    out = _WATCH["out"]
    return out is not None and os.path.realpath(os.fsdecode(path)).startswith(f"{out}{os.sep}")


sys.addaudithook(_audit)


@contextmanager
def watched(out: Path | None = None) -> Iterator[None]:
    """Nothing is run or connected to while the block runs, or written but inside `out`."""
    _WATCH.update(on=True, out=out and os.path.realpath(out), seen=[])
    try:
        yield
    finally:
        _WATCH["on"] = False
    assert not _WATCH["seen"], _WATCH["seen"]


def attempt(read: Callable[[], Any], out: Path | None = None) -> Any:
    """Read a damaged file: it is taken, or refused in one short line, soon and without much memory.

    Args:
        read: reads it.
        out: where something may be written.

    Returns:
        What was read; None if it was refused.
    """
    started, before = time.process_time(), peak_memory()
    found = None
    with watched(out):
        try:
            found = read()
        except Sa2jaxError as error:
            line = f"error: {' '.join(str(error).split())}"
            assert 10 < len(line) < CHARACTERS, line
    assert time.process_time() - started < SECONDS
    assert peak_memory() - before < BYTES
    return found


def put(path: Path, data: bytes) -> Path:
    """The file, with these contents."""
    path.write_bytes(data)
    return path

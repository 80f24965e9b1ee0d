"""YAML of unknown origin: plain values and the tags that a caller knows; few aliases, no dates."""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from sa2jax.errors import FileError
from sa2jax.files.limits import MAX_INT, YAML, Limits, require_depth
from sa2jax.files.raw import read_text

TagReader = Callable[["Loader", str, yaml.Node], Any]  # gets what follows the tag's beginning


class Loader(yaml.SafeLoader):
    """Plain YAML within limits.

    What an alias (`*name`) stands for counts each time: a few lines of them can expand to more than
    any memory holds. One inside what it names is refused. A date is text, as in JSON.
    """

    limits = YAML

    def __init__(self, text: str):
        super().__init__(text)
        self._nodes = self._depth = 0
        self._sizes: dict[str, int] = {}  # nodes of what each anchor names

    def compose_node(self, parent: Any, index: Any) -> Any:
        """One more node, if there is room for it."""
        event = self.peek_event()
        anchor, before = event.anchor, self._nodes
        if is_alias := isinstance(event, yaml.AliasEvent):
            if anchor not in self._sizes:
                _refuse(f"*{anchor} stands for nothing, or inside itself", event.start_mark)
            self._nodes += self._sizes[anchor]
        self._nodes += 1
        self._depth += 1
        if self._nodes > self.limits.nodes:
            _refuse(f"more than {self.limits.nodes} values", event.start_mark)
        if self._depth > self.limits.depth:
            _refuse(f"nested more than {self.limits.depth} deep", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if anchor is not None and not is_alias:
            self._sizes[anchor] = self._nodes - before
        return node

    def construct_yaml_int(self, node: Any) -> int:
        """A whole number of 64 bits."""
        if len(node.value) > 70 or not -MAX_INT <= (value := super().construct_yaml_int(node)) <= (
            MAX_INT
        ):
            _refuse("a number that does not fit 64 bits", node.start_mark)
        return value

    def construct_yaml_float(self, node: Any) -> float:
        """A finite number."""
        if not math.isfinite(value := super().construct_yaml_float(node)):
            _refuse("a number that is not finite", node.start_mark)
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Keys, all of them text, and values."""
        values = super().construct_mapping(node, deep=deep)
        if odd := [key for key in values if not isinstance(key, str)]:
            _refuse(f"expected text as a key, got {type(odd[0]).__name__}", node.start_mark)
        return values


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
Loader.add_constructor("tag:yaml.org,2002:float", Loader.construct_yaml_float)
for _kind in ("timestamp", "binary", "omap", "pairs", "set"):
    Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", Loader.construct_undefined)
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
    for first, found in Loader.yaml_implicit_resolvers.items()
}


def read_yaml(
    path: str | os.PathLike[str],
    *,
    tags: Mapping[str, TagReader] | None = None,
    limits: Limits = YAML,
) -> Any:
    """The value in a YAML file, see `parse_yaml`.

    Raises:
        MissingFileError: if there is no file.
        FileError: if it cannot be read, or is no such YAML.
    """
    return parse_yaml(read_text(path, limits), where=str(path), tags=tags, limits=limits)


def parse_yaml(
    text: str,
    *,
    where: str = "the text",
    tags: Mapping[str, TagReader] | None = None,
    limits: Limits = YAML,
) -> Any:
    """The value that a YAML text is: of dicts with text as keys, lists, texts and numbers.

    Args:
        text: the text.
        where: what to call it in an error.
        tags: what reads a node whose tag begins so; any other tag is refused.
        limits: what it may ask for.

    Raises:
        FileError: if it is no YAML, or more than the limits allow.
    """

    class Own(Loader):
        """With these tags and limits, which PyYAML keeps with the class."""

    Own.limits = limits
    for tag, read in (tags or {}).items():
        Own.add_multi_constructor(tag, read)
    try:
        value = yaml.load(text, Own)
    except yaml.YAMLError as error:
        raise FileError(where, f"not the YAML that is read here ({_reason(error)})") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        # A scalar that its tag or its form promises to be something that it is not.
        raise FileError(where, f"a YAML value that cannot be made ({error})") from None
    except RecursionError:
        raise FileError(where, "YAML that is nested too deeply") from None
    require_depth(value, limits, where)  # of what aliases stand for, too
    return value


def _refuse(problem: str, mark: Any) -> None:
    raise yaml.constructor.ConstructorError(None, None, problem, mark)


def _reason(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    return problem if mark is None else f"{problem}, line {mark.line + 1}"

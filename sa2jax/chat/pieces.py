"""What a prompt is made of: pieces of text, ids and audio."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sa2jax.errors import PromptError


@dataclass(frozen=True)
class Text:
    """A piece of text, tokenised as one with the marks around it.

    Attributes:
        text: what somebody says: special tokens written in it are text like any other.
        prefix: marks before it: what the template writes, whose special tokens are those tokens.
        suffix: marks behind it.
    """

    text: str
    prefix: str = ""
    suffix: str = ""

    @property
    def marked(self) -> str:
        """The text with its marks."""
        return self.prefix + self.text + self.suffix


@dataclass(frozen=True)
class Ids:
    """A piece that is already ids, such as an earlier spoken reply."""

    ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Audio:
    """A piece of audio: a path, samples, anything that the caller can count tokens of."""

    source: Any


Piece = Text | Ids | Audio


def as_piece(item: Piece | str | Mapping[str, Any]) -> Piece:
    """One item of content: a piece, a text, or the official dict form.

    Raises:
        PromptError: for another type of item, or one without its value.
    """
    if isinstance(item, Piece):
        return item
    if isinstance(item, str):
        return Text(item)
    kind = item.get("type") if isinstance(item, Mapping) else None
    if not isinstance(item, Mapping) or kind not in ("text", "audio", "token"):
        raise PromptError(
            f"unsupported content item {item!r}: expected {{'type': 'text' | 'audio' | 'token', …}}"
        )
    value = item.get(kind)
    if value is None:
        raise PromptError(f"content item of type {kind!r} lacks the key {kind!r}: {item!r}")
    if kind == "audio":
        return Audio(value)
    if kind == "text":
        if not isinstance(value, str):
            raise PromptError(f"expected text in a text item, got {type(value).__name__}")
        return Text(value)
    try:
        ids = np.asarray(value)
        if isinstance(value, str) or ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError
    except ValueError:
        raise PromptError(f"expected a list of ids in a token item, got {value!r}") from None
    return Ids(tuple(ids.astype(int).tolist()))

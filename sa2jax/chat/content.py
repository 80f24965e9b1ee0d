"""Content of a user's turn: text and recordings, as pieces."""

import os
from collections.abc import Sequence
from typing import Any

from sa2jax import audio
from sa2jax.chat import template
from sa2jax.chat.template import Audio, Piece

Content = (
    str
    | os.PathLike[str]
    | bytes
    | audio.AudioSource
    | audio.Recording
    | tuple[Any, int]
    | Piece
    | Sequence[Any]
)


def as_pieces(content: Any) -> list[Piece]:
    """Pieces of a user's turn from text, recordings, or a list of both.

    A str is text whatever it says: what somebody types opens no file. Recordings are a `Path`,
    bytes, an open file, `(array, rate)`, an `AudioSource`, a `Recording` or an `Audio`.
    """
    if isinstance(content, list):
        return [piece for item in content for piece in as_pieces(item)]
    sounds = os.PathLike | bytes | tuple | audio.AudioSource | audio.Recording
    if isinstance(content, sounds) or hasattr(content, "read"):
        return [Audio(content)]
    return [template.as_piece(content)]

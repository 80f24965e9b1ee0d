"""Content of a user's turn: text and recordings, as pieces."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sa2jax import audio
from sa2jax.chat import template
from sa2jax.chat.template import Audio, Piece, Text

Content = str | audio.Audio | Piece | Sequence[Any]
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")


def as_pieces(content: Any) -> list[Piece]:
    """Pieces of a user's turn from text, recordings, or a list of both."""
    if isinstance(content, list):
        return [piece for item in content for piece in as_pieces(item)]
    if isinstance(content, str) and not _names_audio(content):
        return [Text(content)]
    if isinstance(content, str | Path | bytes | tuple) or hasattr(content, "read"):
        return [Audio(content)]
    return [template.as_piece(content)]


def _names_audio(text: str) -> bool:
    return text.lower().endswith(AUDIO_SUFFIXES) and "\n" not in text

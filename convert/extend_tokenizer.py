"""Extend a Qwen2.5 tokenizer by the tokens of Step-Audio 2, for `convert --init`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sa2jax.atomic_io import copy_file
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.chat.tokenizer_description import added_token, is_id
from sa2jax.chat.tokenizer_files import byte_tokenizer
from sa2jax.convert.tokenizer import FILES
from sa2jax.errors import FileError, TokenizerError, reason_of
from sa2jax.files.json_files import read_json

BEFORE_AUDIO = 23  # new text tokens, from <|EOT|> to the one before <audio_start>


def read_vocab(folder: Path) -> dict[str, int]:
    """Every token of a Hugging Face folder's tokenizer by its text."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise TokenizerError(
            f"no tokenizer in {folder}: expected tokenizer.json, or vocab.json with merges.txt; it "
            "tells which rows of the table are in use"
        )
    tokens: dict[str, int] = {}
    try:
        tokens |= _read_json(folder / "vocab.json") or {}
        if (raw := _read_json(folder / "tokenizer.json")) is not None:
            tokens |= raw["model"]["vocab"]
            tokens |= {token["content"]: token["id"] for token in raw["added_tokens"]}
        declared = (_read_json(folder / "tokenizer_config.json") or {}).get("added_tokens_decoder")
        tokens |= {token["content"]: int(i) for i, token in (declared or {}).items()}
        tokens |= _read_json(folder / "added_tokens.json") or {}
        if not tokens or not all(map(is_id, tokens.values())):
            raise ValueError("no tokens, or ids that are no numbers")
    except (FileError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {reason_of(error)}"
        raise TokenizerError(f"the tokenizer in {folder} is damaged ({what})") from None
    return tokens


def extend_tokenizer(source: Path, used: Mapping[str, int], out: Path, vocab: int) -> None:
    """Write a Qwen2.5 tokenizer with the released tokens behind its last."""
    first = 1 + max(used.values())
    try:
        released = byte_tokenizer(first + BEFORE_AUDIO, vocab).get_added_tokens_decoder()
    except ValueError as error:
        raise TokenizerError(f"a vocabulary of {vocab} behind {first} tokens: {error}") from None
    odd = [t.content for i, t in released.items() if i < first and used.get(t.content) != i]
    odd += [t.content for i, t in released.items() if i >= first and t.content in used]
    if odd:
        raise TokenizerError(
            f"the tokenizer in {source} is not that of Qwen2.5 ({', '.join(odd[:4])} are not where "
            "it has them): give a Step-Audio 2 tokenizer with --tokenizer"
        )
    copy_files(source, out)
    new = [
        added_token(token.content, i, special=token.special)
        for i, token in sorted(released.items())
        if i >= first
    ]
    if (merged := _read_json(out / "tokenizer.json")) is not None:
        merged["added_tokens"] += new
        write_json(out / "tokenizer.json", merged)
    config = _read_json(out / "tokenizer_config.json") or {}
    entries = config.setdefault("added_tokens_decoder", {})
    entries |= {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in new}
    write_json(out / "tokenizer_config.json", config, indent=2)
    added = _read_json(out / "added_tokens.json") or {}
    write_json(out / "added_tokens.json", added | {t["content"]: t["id"] for t in new}, indent=2)


def check_tokenizer(
    folder: Path, source: Path | str, used: Mapping[str, int], vocab: int
) -> Tokenizer:
    """The new tokenizer, if every token of the decoder has its id in it and all have a row."""
    tokenizer = Tokenizer.from_folder(folder)
    theirs = tokenizer.backend.get_vocab(with_added_tokens=True)
    moved = [token for token, i in used.items() if theirs.get(token) != i]
    if moved:
        raise TokenizerError(
            f"the tokenizer in {source} does not continue the decoder's: {len(moved)} tokens have "
            f"other ids or none, such as {moved[0]!r}; use one made from the same Qwen2.5"
        )
    if tokenizer.size > vocab:
        raise TokenizerError(
            f"the tokenizer in {source} has ids up to {tokenizer.size - 1}: expected fewer than "
            f"the {vocab} rows of the table"
        )
    return tokenizer


def copy_files(source: Path, out: Path) -> None:
    """Copy the tokenizer files of a folder into another."""
    if not source.is_dir():
        raise TokenizerError(f"no folder at {source}: expected tokenizer files")
    for name in FILES:
        if (source / name).is_file():
            copy_file(source / name, out / name, source)


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, None if there is no such file."""
    if not path.is_file():
        return None
    return read_json(path, dict)


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Write a file as JSON, any language as it is written."""
    text = json.dumps(content, ensure_ascii=False, indent=indent) + "\n"
    path.write_text(text, encoding="utf-8")

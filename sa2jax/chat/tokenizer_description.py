"""Tokenizer files, read and checked before the `tokenizers` library sees them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sa2jax.errors import FileError, TokenizerError
from sa2jax.files.json_files import read_json
from sa2jax.files.limits import JSON
from sa2jax.files.raw import read_text
from sa2jax.files.sizes import MAX_SIZE


def require_description(description: Any, where: str) -> None:
    """Refuse what is no description of a BPE tokenizer, or has ids that no model has.

    Args:
        description: the parsed JSON.
        where: names the source in errors.

    Raises:
        TokenizerError: for the first thing that is wrong.
    """
    if problem := _problem(description):
        raise TokenizerError(f"{where}: the tokenizer is damaged: {problem}")


def is_id(value: Any) -> bool:
    """Whether a value can be the id of a token."""
    return type(value) is int and 0 <= value < MAX_SIZE


def _problem(description: Any) -> str:
    model = description.get("model") if isinstance(description, Mapping) else None
    if not isinstance(model, Mapping):
        return "expected an object under 'model'"
    vocab, merges, added = model.get("vocab"), model.get("merges"), description.get("added_tokens")
    if not isinstance(vocab, Mapping):
        return f"expected tokens and their ids as its vocabulary, got {type(vocab).__name__}"
    if odd := next((f"{t!r:.80} is {i!r:.80}" for t, i in vocab.items() if not is_id(i)), None):
        return f"expected ids from 0 to {MAX_SIZE - 1}, but {odd}"
    if not isinstance(merges, list):
        return f"expected a list of merges, got {type(merges).__name__}"
    if not isinstance(added, list) or not all(isinstance(token, Mapping) for token in added):
        return "expected a list of objects under 'added_tokens'"
    for token in added:
        if not isinstance(token.get("content"), str) or not is_id(token.get("id")):
            return f"expected an added token with its content and id, got {dict(token)!r:.120}"
    return ""


def added_token(content: str, token_id: int, *, special: bool = True) -> dict[str, Any]:
    """One entry of `added_tokens` in a tokenizer.json: matched as written, spaces kept."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": content, **flags, "special": special}


def declared_tokens(folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Tokens that the files beside tokenizer.json declare, and what is wrong with them."""
    declared: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    if (path := folder / "tokenizer_config.json").is_file():
        entries = read_description(path).get("added_tokens_decoder") or {}
        try:
            for token_id, entry in entries.items():
                if not is_id(int(token_id)) or not isinstance(entry["content"], str):
                    raise ValueError(token_id)
                flags = {k: bool(v) for k, v in entry.items() if k in _FLAGS}
                declared[entry["content"]] = added_token(entry["content"], int(token_id)) | flags
        except (AttributeError, KeyError, TypeError, ValueError):
            problems.append(f"{path.name}: added_tokens_decoder is not {{id: {{content: …}}}}")
    if (path := folder / "added_tokens.json").is_file():
        for content, token_id in read_description(path).items():
            if not is_id(token_id):
                problems.append(
                    f"{path.name}: {content} has id {token_id!r:.80}, expected a number"
                )
                continue
            other = declared.setdefault(content, added_token(content, token_id))["id"]
            if other != token_id:
                problems.append(
                    f"{content} is {token_id} in {path.name}, {other} in tokenizer_config.json"
                )
    return declared, problems


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add_tokens(description: dict[str, Any], declared: Mapping[str, dict[str, Any]]) -> list[str]:
    """Add declared tokens to a tokenizer.json in place; returns contradictions."""
    known = {token["content"]: token for token in description["added_tokens"]}
    vocab = description["model"]["vocab"]
    problems = []
    for content, token in declared.items():
        have = known[content]["id"] if content in known else vocab.get(content, token["id"])
        if have != token["id"]:
            problems.append(f"{content} is {have} in the vocabulary but declared as {token['id']}")
        if content not in known:
            known[content] = token
    description["added_tokens"] = sorted(known.values(), key=lambda token: token["id"])
    return problems


def read_description(path: Path) -> dict[str, Any]:
    """The JSON object in a tokenizer file.

    Raises:
        TokenizerError: if there is none.
    """
    try:
        return read_json(path, dict)
    except FileError as error:
        raise TokenizerError(f"{path} cannot be read as JSON ({error.reason})") from None


def read_merges(path: Path) -> list[str]:
    """The lines of a merges.txt, best first.

    Raises:
        TokenizerError: if it cannot be read.
    """
    try:
        lines = read_text(path, JSON).split("\n")
    except FileError as error:
        raise TokenizerError(str(error)) from None
    return [m.rstrip("\r") for m in lines if m.strip() and not m.startswith("#version")]

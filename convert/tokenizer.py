"""Tokenizer files in a conversion: checked before the weights, copied, or made for tests."""

from pathlib import Path

from sa2jax.atomic_io import copy_file
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.chat.tokenizer_files import save_tokenizer_files
from sa2jax.config import StepAudio2Config
from sa2jax.errors import FileError, TokenizerError, reason_of
from sa2jax.families import family_of
from sa2jax.files.json_files import read_json

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
SPECIAL_IDS = "special_ids.json"  # names the special ids of a test checkpoint without a tokenizer


def find_tokenizer(source: Path, given: str | Path | None, cfg: StepAudio2Config) -> Path | None:
    """The folder to take the tokenizer from, after a check that it fits the model.

    Args:
        source: the checkpoint that is converted.
        given: a folder that the user named instead.
        cfg: the model's config.

    Returns:
        None if nobody has a tokenizer.

    Raises:
        TokenizerError: if it lacks Step-Audio 2's tokens or has more ids than the model.
    """
    folder = source if given is None else Path(given)
    if given is None and not any((folder / name).is_file() for name in FILES[:3]):
        return None
    open_tokenizer(folder, cfg)
    return folder


def open_tokenizer(folder: Path, cfg: StepAudio2Config) -> Tokenizer:
    """The tokenizer in a folder, if it fits the model.

    Raises:
        TokenizerError: if it lacks Step-Audio 2's tokens or has more ids than the model.
    """
    special = family_of(cfg).special_tokens
    return Tokenizer.from_folder(folder, special, vocab=cfg.decoder.vocab)


def added_tokens_note(tokenizer: Tokenizer) -> list[str]:
    """What a user should know of tokens that were added behind the audio codes."""
    added = tokenizer.added_tokens
    more = f" and {len(added) - 6} more" if len(added) > 6 else ""
    names = ", ".join(token[:40] for token in added[:6])
    return [f"tokens behind the audio codes are text: {names}{more}"] if added else []


def copy_tokenizer(
    source: Path, tokenizer: Path | None, out: Path, cfg: StepAudio2Config
) -> list[str]:
    """Put the tokenizer's files into a converted folder.

    Args:
        source: the checkpoint that was converted; its own files are in `out` already.
        tokenizer: what `find_tokenizer` returned.
        out: the converted folder.
        cfg: the model's config.

    Returns:
        What the user should know.
    """
    if tokenizer is not None and tokenizer != source:
        for name in FILES:
            (out / name).unlink(missing_ok=True)
            if (tokenizer / name).is_file():
                copy_file(tokenizer / name, out / name, tokenizer)
    if tokenizer is not None:
        return added_tokens_note(open_tokenizer(tokenizer, cfg))
    if not (source / SPECIAL_IDS).is_file():
        return [
            f"{source} has no tokenizer: the result can be verified and exported; to talk to it, "
            "convert with --tokenizer FOLDER or give --tokenizer to the command"
        ]
    try:
        start = int(read_json(source / SPECIAL_IDS, dict)["audio_start"])
        save_tokenizer_files(out, audio_start=start, vocab=cfg.decoder.vocab)
    except (FileError, ValueError, KeyError, TypeError) as error:
        raise TokenizerError(
            f"{source / SPECIAL_IDS} is damaged ({type(error).__name__}: {reason_of(error)})"
        ) from None
    return [
        f"{source} has no tokenizer: made a stand-in from {SPECIAL_IDS} that spells text as bytes, "
        "for tests only"
    ]

"""Tokenizer files in a conversion: checked before the weights, copied, or made for tests."""

import json
import shutil
from pathlib import Path

from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.chat.tokenizer_files import save_tokenizer_files
from sa2jax.config import StepAudio2Config
from sa2jax.errors import TokenizerError
from sa2jax.families import family_of

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
    size = Tokenizer.from_folder(folder, family_of(cfg).special_tokens).size
    if size > cfg.decoder.vocab:
        raise TokenizerError(
            f"the tokenizer in {folder} has ids up to {size - 1}, the model a vocabulary of "
            f"{cfg.decoder.vocab}: use the model's own tokenizer"
        )
    return folder


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
                shutil.copyfile(tokenizer / name, out / name)
        return []
    if tokenizer is not None:
        return []
    if not (source / SPECIAL_IDS).is_file():
        return [
            f"{source} has no tokenizer: the result can be verified and exported; to talk to it, "
            "convert with --tokenizer FOLDER or give --tokenizer to the command"
        ]
    try:
        start = int(json.loads((source / SPECIAL_IDS).read_text(encoding="utf-8"))["audio_start"])
    except (ValueError, KeyError, TypeError) as error:
        raise TokenizerError(f"{source / SPECIAL_IDS} is damaged ({error!r})") from None
    save_tokenizer_files(out, audio_start=start, vocab=cfg.decoder.vocab)
    return [
        f"{source} has no tokenizer: made a stand-in from {SPECIAL_IDS} that spells text as bytes, "
        "for tests only"
    ]

"""New tokenizers in the released layout: special tokens, BPE merges, files.

The tokens have the released order, from `<|endoftext|>` to the last audio code, behind whatever
ordinary tokens there are. So small models have small vocabularies, and nothing else differs.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from sa2jax.chat.tokenizer import (
    BYTE_ALPHABET,
    NUM_CODES,
    backend_of,
    qwen2_description,
)
from sa2jax.chat.tokenizer_description import added_token
from sa2jax.errors import TokenizerError

# The released order from `<|endoftext|>` (151643) to `<tts_pad>` (151695). What stands between
# `<|CALL_START|>` and `<audio_start>` is not known: unused names hold the places.
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
    "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> "
    "<|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <|EOT|> <|BOT|> <|CALL_START|> "
    + " ".join(f"<|unused_{n}|>" for n in range(20))
    + " <audio_start> <audio_end> <audio_patch> <audio_patch_pad> <|SC|> <tts_start> <tts_end> "
    "<tts_pad>"
).split()
AUDIO_START = 296  # of a tokenizer of bytes for small models: the released ids less 151392
BYTES = 0xF5  # bytes 0xF5 to 0xFF never occur in UTF-8


def describe(
    codes: int, *, merges: Sequence[tuple[str, str]] = (), first: int | None = None
) -> dict[str, Any]:
    """A tokenizer.json with one token per byte, tokens of merges, and the special ones.

    The id of a byte is its value; a merge's token follows.

    Args:
        codes: audio codes, the pad included if there are all.
        merges: pairs of tokens that become one, best first, in the byte-level alphabet.
        first: id of `<|endoftext|>`; by default right behind the last merge.

    Raises:
        ValueError: if it is taken.
    """
    vocab = {BYTE_ALPHABET[b]: b for b in range(BYTES)}
    for one, other in merges:
        vocab[one + other] = len(vocab)
    first = len(vocab) if first is None else first
    if first < len(vocab):
        raise ValueError(f"{first} is the id of an ordinary token")
    description = qwen2_description(vocab, [" ".join(pair) for pair in merges])
    audio = [f"<audio_{n}>" for n in range(min(NUM_CODES + 1, codes))]
    description["added_tokens"] = [
        added_token(token, first + place, special=token.startswith("<|"))
        for place, token in enumerate([*SPECIAL, *audio])
    ]
    return description


def learn_merges(texts: Iterable[str], count: int) -> list[tuple[str, str]]:
    """Byte pairs that are most often neighbours in texts, best first (BPE, arXiv 1508.07909).

    Args:
        texts: what will be said, each as one string.
        count: how many.

    Raises:
        TokenizerError: if the texts do not have so many.
    """
    backend = backend_of(describe(0), where="learn_merges")
    backend.model = tokenizers.models.BPE()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=BYTES + count,
        initial_alphabet=[BYTE_ALPHABET[b] for b in range(BYTES)],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    if len(merges) < count:
        raise TokenizerError(
            f"the texts have {len(merges)} pairs of tokens, not {count}: ask for less"
        )
    return merges[:count]


def save_files(folder: str | Path, description: Mapping[str, Any]) -> Path:
    """Write a tokenizer as the files of a Hugging Face checkpoint.

    Writes tokenizer.json, tokenizer_config.json, added_tokens.json, special_tokens_map.json,
    vocab.json and merges.txt.

    Args:
        folder: where; made if need be.
        description: see `describe`.

    Returns:
        The folder.
    """
    added = description["added_tokens"]
    model = dict(description["model"])
    ordinary = model["vocab"]
    entries = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added}
    # The library itself numbers added tokens by position unless the vocabulary holds them.
    model["vocab"] = ordinary | {t["content"]: t["id"] for t in added}
    ends = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": entries,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 16384,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    files = {
        "tokenizer.json": {**description, "model": model},
        "tokenizer_config.json": config | ends,
        "added_tokens.json": {t["content"]: t["id"] for t in added},
        "special_tokens_map.json": ends,
        "vocab.json": ordinary,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        (folder / name).write_text(text, encoding="utf-8")
    lines = ["#version: 0.2", *model["merges"]]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def byte_tokenizer(audio_start: int = 151688, vocab: int = 158720) -> tokenizers.Tokenizer:
    """A tokenizer with one token per byte and the released special tokens, made in moments.

    The id of a byte is its value. Special tokens and audio codes keep their released distance from
    `<audio_start>`; ids between the bytes and `<|endoftext|>` have no token and decode to nothing,
    like the unused last rows of the released vocabulary. Otherwise it is a Qwen2 tokenizer.

    Args:
        audio_start: id of `<audio_start>`: 151688 as released, 296 in the micro checkpoints.
        vocab: vocabulary of the model: audio codes end there, at `<audio_6561>` at the latest.

    Raises:
        ValueError: if the tokens do not fit.
    """
    return backend_of(_byte_description(audio_start, vocab), where="byte_tokenizer")


def save_tokenizer_files(
    folder: str | Path, *, audio_start: int = 151688, vocab: int = 158720
) -> Path:
    """Write `byte_tokenizer` as the tokenizer files of a Hugging Face checkpoint.

    Writes tokenizer.json, tokenizer_config.json, added_tokens.json, special_tokens_map.json,
    vocab.json and merges.txt (which has no merges), and returns the folder, made if need be.
    """
    return save_files(folder, _byte_description(audio_start, vocab))


def _byte_description(audio_start: int, vocab: int) -> dict[str, Any]:
    first = audio_start - SPECIAL.index("<audio_start>")
    code_0 = first + len(SPECIAL)
    if first < BYTES or vocab <= code_0:
        raise ValueError(
            f"audio_start {audio_start} and vocab {vocab} leave no room: expected audio_start >= "
            f"{BYTES + audio_start - first} and vocab > {code_0}"
        )
    return describe(vocab - code_0, first=first)

"""Text to ids and back: the checkpoint's own Qwen2.5 byte-level BPE, plus the tokens of speech.

No id is a constant here: all are read from the tokenizer files, so small test vocabularies and
later members of the family work the same way. The split of a reply into text and audio follows
the official pipeline (`stepaudio2.py`): text below `<audio_start>`, audio from `<audio_0>` on.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers

from sa2jax.chat.tokenizer_description import (
    add_tokens,
    declared_tokens,
    read_description,
    read_merges,
    require_description,
)
from sa2jax.errors import PromptError, TokenizerError

# 3^8 entries of the released speech codebook; `<audio_6561>` after them is the pad.
NUM_CODES = 6561

# Qwen2's way of cutting text before BPE (transformers: Qwen2Converter).
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MARK = re.compile(r"<[^<>\s]+>")  # every added token is written like this
_REQUIRED = {
    "end_of_text": "<|endoftext|>",
    "bot": "<|BOT|>",
    "eot": "<|EOT|>",
    "audio_start": "<audio_start>",
    "audio_end": "<audio_end>",
    "audio_patch": "<audio_patch>",
    "tts_start": "<tts_start>",
    "tts_end": "<tts_end>",
    "tts_pad": "<tts_pad>",
    "audio_code_0": "<audio_0>",
}
_OPTIONAL = {
    "tool_call_start": "<tool_call>",
    "tool_call_end": "</tool_call>",
    "audio_patch_pad": "<audio_patch_pad>",
}


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """The ids that carry structure, as one tokenizer has them.

    Attributes:
        end_of_text: `<|endoftext|>`, what stops the Base model; also the padding of batches.
        bot: `<|BOT|>`, opens a turn.
        eot: `<|EOT|>`, closes a turn and stops the chat models.
        audio_start: `<audio_start>`, before the patches of a clip; the first id that is not text.
        audio_end: `<audio_end>`, after them.
        audio_patch: `<audio_patch>`, the place of one 80 ms frame of heard audio.
        tts_start: `<tts_start>`, opens interleaved speech.
        tts_end: `<tts_end>`, closes it.
        tts_pad: `<tts_pad>`, an empty text slot of interleaved speech.
        audio_code_0: `<audio_0>`, the first speech code.
        num_codes: how many speech codes there are, pad excluded (6561 as released).
        audio_pad: `<audio_6561>`, an empty audio slot; None in small test vocabularies.
        tool_call_start: `<tool_call>`, if there.
        tool_call_end: `</tool_call>`, if there.
        audio_patch_pad: `<audio_patch_pad>`, if there.
        size: one more than the highest id of a token; 0 if it is not known.
    """

    end_of_text: int
    bot: int
    eot: int
    audio_start: int
    audio_end: int
    audio_patch: int
    tts_start: int
    tts_end: int
    tts_pad: int
    audio_code_0: int
    num_codes: int
    audio_pad: int | None = None
    tool_call_start: int | None = None
    tool_call_end: int | None = None
    audio_patch_pad: int | None = None
    size: int = field(default=0, compare=False)

    @classmethod
    def find(cls, id_of: Callable[[str], int | None]) -> Self:
        """Look all of them up.

        Args:
            id_of: gives the id of a token's text, or None.

        Raises:
            TokenizerError: naming every missing token at once, or if the ids are in an order that
                would break the split of replies into text and audio.
        """
        ids: dict[str, Any] = {name: id_of(text) for name, text in _REQUIRED.items()}
        codes = {n: i for n in range(NUM_CODES + 1) if (i := id_of(f"<audio_{n}>")) is not None}
        missing = [_REQUIRED[name] for name, i in ids.items() if i is None]
        last = max(codes, default=-1)
        holes = [f"<audio_{n}>" for n in range(1, last) if n not in codes]
        missing += [*holes[:3], f"… ({len(holes)} audio codes in all)"] if len(holes) > 3 else holes
        if last == NUM_CODES - 1:
            missing.append(f"<audio_{NUM_CODES}>")
        if missing:
            raise TokenizerError(
                f"not a Step-Audio 2 tokenizer: it lacks {', '.join(missing)}. Take all tokenizer "
                "files (tokenizer.json, tokenizer_config.json, added_tokens.json) from the "
                "checkpoint itself"
            )
        audio_pad = codes.pop(NUM_CODES, None)
        ids |= {name: id_of(text) for name, text in _OPTIONAL.items()}
        special = cls(**ids, num_codes=len(codes), audio_pad=audio_pad)
        special._check_order(codes)
        return special

    @property
    def code_pad(self) -> int:
        """What fills an empty audio slot: `audio_pad`, or `tts_pad` in a small test vocabulary."""
        return self.tts_pad if self.audio_pad is None else self.audio_pad

    @property
    def added_text(self) -> int:
        """The first id behind the audio codes: tokens that were added to the released ones."""
        return 1 + max(self.audio_pad or 0, self.audio_code_0 + self.num_codes - 1)

    def is_text(self, token_id: int) -> bool:
        """Whether an id is text: below `<audio_start>`, or added behind the audio codes."""
        return 0 <= token_id < self.audio_start or self.added_text <= token_id < self.size

    def _check_order(self, codes: Mapping[int, int]) -> None:
        astray = [n for n, i in codes.items() if i != self.audio_code_0 + n]
        if astray:
            raise TokenizerError(
                f"the audio codes must have consecutive ids: <audio_0> is {self.audio_code_0} but "
                f"<audio_{astray[0]}> is {codes[astray[0]]}"
            )
        text = (self.end_of_text, self.bot, self.eot)
        speech = (self.audio_end, self.audio_patch, self.tts_start, self.tts_end, self.tts_pad)
        if not max(text) < self.audio_start < min(speech) <= max(speech) < self.audio_code_0:
            raise TokenizerError(
                "expected text tokens, then <audio_start>, then the other speech tokens, then "
                f"<audio_0>; got {self}"
            )


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A Step-Audio 2 tokenizer; nothing in it changes after it was made.

    Attributes:
        backend: the `tokenizers` object that does the work.
        special: the ids that carry structure, read from it.
        special_tokens: what finds them, see `families.Family`.
    """

    backend: tokenizers.Tokenizer = field(repr=False)
    special: SpecialTokens = field(init=False)
    special_tokens: InitVar[type[SpecialTokens]] = SpecialTokens

    def __post_init__(self, special_tokens: type[SpecialTokens]):
        found = special_tokens.find(self.backend.token_to_id)
        object.__setattr__(self, "special", replace(found, size=self.size))

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        special_tokens: type[SpecialTokens] = SpecialTokens,
        *,
        vocab: int | None = None,
    ) -> Self:
        """Read a checkpoint's own tokenizer files.

        `tokenizer.json` is used if there, else the same tokenizer is built from `vocab.json` and
        `merges.txt`. Tokens that only `tokenizer_config.json` (added_tokens_decoder) or
        `added_tokens.json` declare are added. Every token gets exactly the id its file gives it
        (the `tokenizers` library on its own numbers added tokens anew).

        Args:
            path: the folder.
            special_tokens: what finds the ids that carry structure.
            vocab: size of the model's vocabulary, to be held against it.

        Raises:
            TokenizerError: if files are missing, damaged or contradict each other, or if this is
                not a Step-Audio 2 tokenizer, or has more ids than the model.
        """
        folder = Path(path)
        declared, problems = declared_tokens(folder)
        if (folder / "tokenizer.json").is_file():
            description = read_description(folder / "tokenizer.json")
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            merges = read_merges(folder / "merges.txt")
            description = qwen2_description(read_description(folder / "vocab.json"), merges)
        else:
            raise TokenizerError(
                f"no tokenizer in {folder}: expected tokenizer.json, or vocab.json with merges.txt"
            )
        try:
            problems += add_tokens(description, declared)
        except (AttributeError, KeyError, TypeError):
            problems.append("tokenizer.json holds no byte-level BPE model with added_tokens")
        if problems:
            raise TokenizerError(f"{folder}: " + "; ".join(problems))
        found = cls(backend_of(description, where=str(folder)), special_tokens)
        if vocab is not None and found.size > vocab:
            what = f"ids up to {found.size - 1}, the model a vocabulary of {vocab}"
            raise TokenizerError(f"{folder} has {what}: use the model's own tokenizer")
        return found

    @property
    def size(self) -> int:
        """One more than the highest id that has a token (a model's vocabulary may be larger)."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    @property
    def added_tokens(self) -> list[str]:
        """The tokens behind the audio codes, which are text, in the order of their ids."""
        ids = range(self.special.added_text, self.size)
        return [token for i in ids if (token := self.backend.id_to_token(i)) is not None]

    def encode(
        self, text: str, *, prefix: str = "", suffix: str = "", split_special_tokens: bool = False
    ) -> list[int]:
        """Ids of a text, tokenised as one with the marks around it.

        Args:
            text: the text.
            prefix: marks before it; special tokens written there are recognised.
            suffix: marks behind it, likewise.
            split_special_tokens: whether special tokens written in the text are text like any
                other, cut into ordinary tokens; by default they are recognised there, too.

        Raises:
            PromptError: if it is no text that UTF-8 can hold.
        """
        if not isinstance(text, str):
            raise PromptError(f"expected text to tokenise, got {type(text).__name__}")
        ids = _encode(self.backend, prefix + text + suffix)
        if not split_special_tokens:
            return ids
        before, after = _encode(self.backend, prefix), _encode(self.backend, suffix)
        special = self._special_ids.__contains__
        if [*filter(special, ids)] == [*filter(special, before + after)]:
            return ids  # the text has none
        return [*before, *_encode(self._without_special_tokens, text), *after]

    def encode_pieces(self, pieces: Iterable[str | Sequence[int]]) -> list[int]:
        """Tokenise piece by piece and join the ids; pieces of ids are taken as they are.

        Text is never merged across pieces: the model was trained that way.
        """
        ids: list[int] = []
        for piece in pieces:
            ids += self.encode(piece) if isinstance(piece, str) else (int(i) for i in piece)
        return ids

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        """Ids of the tokens that are no words: those declared as special, and marks."""
        added = self.backend.get_added_tokens_decoder().items()
        return frozenset(i for i, t in added if t.special or _MARK.fullmatch(t.content))

    @cached_property
    def _without_special_tokens(self) -> tokenizers.Tokenizer:
        """The same tokenizer, to which special tokens are text."""
        description = json.loads(self.backend.to_str())
        added = description["added_tokens"]
        description["added_tokens"] = [t for t in added if t["id"] not in self._special_ids]
        return tokenizers.Tokenizer.from_str(json.dumps(description))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens included; broken UTF-8 becomes U+FFFD."""
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id stands for; none for an id without a token (unused rows)."""
        token = self.backend.id_to_token(int(token_id)) if token_id >= 0 else None
        if token is None:
            return b""
        try:
            return bytes(_BYTE_OF[c] for c in token)
        except KeyError:  # an added token with a character outside the byte alphabet
            return token.encode("utf-8")

    def id_of(self, token: str) -> int:
        """Id of one token by its text, such as `<|EOT|>`.

        Raises:
            TokenizerError: if there is no such token.
        """
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise TokenizerError(f"the tokenizer has no token {token!r}")
        return token_id


def _encode(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        return backend.encode(text, add_special_tokens=False).ids
    except (TypeError, UnicodeEncodeError):  # which one depends on the library's version
        raise PromptError(
            f"text that UTF-8 cannot hold (half a surrogate pair): {text!a}"
        ) from None


def qwen2_description(vocab: Mapping[str, int], merges: Sequence[str]) -> dict[str, Any]:
    """A `tokenizer.json` of the Qwen2 kind: NFC, Qwen2's split, byte-level BPE, no prefix space.

    Args:
        vocab: id of every ordinary token, written in the byte-level alphabet.
        merges: lines of `merges.txt`, best first.
    """
    split = {"type": "Split", "pattern": {"Regex": _QWEN2_SPLIT}, "behavior": "Isolated"}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split | {"invert": False}, level | {"trim_offsets": True}],
        },
        "post_processor": level | {"trim_offsets": False},
        "decoder": level | {"trim_offsets": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": dict(vocab),
            "merges": list(merges),
        },
    }


def backend_of(description: Mapping[str, Any], *, where: str) -> tokenizers.Tokenizer:
    """Load a tokenizer.json given as a mapping, with every token at the id it declares.

    Args:
        description: the parsed JSON; not changed.
        where: names the source in errors.

    Raises:
        TokenizerError: if it cannot be loaded, or a token would get another id.
    """
    require_description(description, where)
    # The library numbers added tokens by its own rule (which differs between versions) unless the
    # model's vocabulary has them; there they cost nothing, as no merge leads to them.
    model = description["model"]
    added = {token["content"]: token["id"] for token in description["added_tokens"]}
    exact = {**description, "model": {**model, "vocab": {**added, **model["vocab"]}}}
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(exact, ensure_ascii=False))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, or panics, which is none
        raise TokenizerError(f"{where}: the tokenizers library cannot load it ({error})") from None
    backend.no_truncation()
    backend.no_padding()
    astray = [
        t for t, i in added.items() if (backend.token_to_id(t), backend.id_to_token(i)) != (i, t)
    ]
    if astray:
        raise TokenizerError(
            f"{where}: {len(astray)} added tokens share an id with another token or have two: "
            f"{', '.join(astray[:5])}"
        )
    return backend


def _byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte: itself if printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


BYTE_ALPHABET = tuple(_byte_alphabet())
_BYTE_OF = {char: byte for byte, char in enumerate(BYTE_ALPHABET)}

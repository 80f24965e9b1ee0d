"""Text to ids and back: the checkpoint's own Qwen2.5 byte-level BPE, plus the tokens of speech.

No id is a constant here: all are read from the tokenizer files, so small test vocabularies and
later members of the family work the same way. The split of a reply into text and audio follows
the official pipeline (`stepaudio2.py`): text below `<audio_start>`, audio from `<audio_0>` on.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, Self

import tokenizers

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
        object.__setattr__(self, "special", special_tokens.find(self.backend.token_to_id))

    @classmethod
    def from_folder(
        cls, path: str | Path, special_tokens: type[SpecialTokens] = SpecialTokens
    ) -> Self:
        """Read a checkpoint's own tokenizer files.

        `tokenizer.json` is used if there, else the same tokenizer is built from `vocab.json` and
        `merges.txt`. Tokens that only `tokenizer_config.json` (added_tokens_decoder) or
        `added_tokens.json` declare are added. Every token gets exactly the id its file gives it
        (the `tokenizers` library on its own numbers added tokens anew).

        Args:
            path: the folder.
            special_tokens: what finds the ids that carry structure.

        Raises:
            TokenizerError: if files are missing, damaged or contradict each other, or if this is
                not a Step-Audio 2 tokenizer.
        """
        folder = Path(path)
        declared, problems = _declared_tokens(folder)
        if (folder / "tokenizer.json").is_file():
            description = _read_json(folder / "tokenizer.json")
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            merges = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            merges = [m.rstrip("\r") for m in merges if m.strip() and not m.startswith("#version")]
            description = qwen2_description(_read_json(folder / "vocab.json"), merges)
        else:
            raise TokenizerError(
                f"no tokenizer in {folder}: expected tokenizer.json, or vocab.json with merges.txt"
            )
        try:
            problems += _add_tokens(description, declared)
        except (AttributeError, KeyError, TypeError):
            problems.append("tokenizer.json holds no byte-level BPE model with added_tokens")
        if problems:
            raise TokenizerError(f"{folder}: " + "; ".join(problems))
        return cls(backend_of(description, where=str(folder)), special_tokens)

    @property
    def size(self) -> int:
        """One more than the highest id that has a token (a model's vocabulary may be larger)."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Special tokens written in it are recognised, as the official code does.

        Raises:
            PromptError: if it is no text that UTF-8 can hold.
        """
        if not isinstance(text, str):
            raise PromptError(f"expected text to tokenise, got {type(text).__name__}")
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):  # which one depends on the library's version
            raise PromptError(
                f"text that UTF-8 cannot hold (half a surrogate pair): {text!a}"
            ) from None

    def encode_pieces(self, pieces: Iterable[str | Sequence[int]]) -> list[int]:
        """Tokenise piece by piece and join the ids; pieces of ids are taken as they are.

        Text is never merged across pieces: the model was trained that way.
        """
        ids: list[int] = []
        for piece in pieces:
            ids += self.encode(piece) if isinstance(piece, str) else (int(i) for i in piece)
        return ids

    def escape_special_tokens(self, text: str) -> str:
        """A text in which no special token is recognised: a space after the `<` of each.

        For what comes from elsewhere, such as the results of tools: nobody opens a turn there.
        """
        known = self.backend.token_to_id
        return _MARK.sub(lambda m: f"< {m[0][1:]}" if known(m[0]) is not None else m[0], text)

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


class Utf8Stream:
    """Text of a reply as it comes, one id at a time, never half a character.

    A character may span several text tokens with audio tokens between them: bytes are held back
    until they form valid UTF-8. Ids from `<audio_start>` on are no text and give "". Everything
    pushed and flushed, joined, equals `decode` of the text ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this id completes, often none."""
        if token_id >= self._tokenizer.special.audio_start:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    @property
    def waiting(self) -> bool:
        """Whether the beginning of a character is held back."""
        return bool(self._decoder.getstate()[0])

    def flush(self) -> str:
        """End the text: what is left of a broken character, as U+FFFD. Ready for a new text."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


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


def added_token(content: str, token_id: int, *, special: bool = True) -> dict[str, Any]:
    """One entry of `added_tokens` in a tokenizer.json: matched as written, spaces kept."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": content, **flags, "special": special}


def backend_of(description: Mapping[str, Any], *, where: str) -> tokenizers.Tokenizer:
    """Load a tokenizer.json given as a mapping, with every token at the id it declares.

    Args:
        description: the parsed JSON; not changed.
        where: names the source in errors.

    Raises:
        TokenizerError: if it cannot be loaded, or a token would get another id.
    """
    # The library numbers added tokens by its own rule (which differs between versions) unless the
    # model's vocabulary has them; there they cost nothing, as no merge leads to them.
    model = description["model"]
    added = {token["content"]: token["id"] for token in description["added_tokens"]}
    exact = {**description, "model": {**model, "vocab": {**added, **model["vocab"]}}}
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(exact, ensure_ascii=False))
    except Exception as error:  # the library raises bare Exception
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


def _declared_tokens(folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Tokens that the files beside tokenizer.json declare, and what is wrong with them."""
    declared: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    if (path := folder / "tokenizer_config.json").is_file():
        entries = _read_json(path).get("added_tokens_decoder") or {}
        try:
            for token_id, entry in entries.items():
                flags = {k: bool(v) for k, v in entry.items() if k in _FLAGS}
                declared[entry["content"]] = added_token(entry["content"], int(token_id)) | flags
        except (AttributeError, KeyError, TypeError, ValueError):
            problems.append(f"{path.name}: added_tokens_decoder is not {{id: {{content: …}}}}")
    if (path := folder / "added_tokens.json").is_file():
        for content, token_id in _read_json(path).items():
            if not isinstance(token_id, int):
                problems.append(f"{path.name}: {content} has id {token_id!r}, expected a number")
                continue
            other = declared.setdefault(content, added_token(content, token_id))["id"]
            if other != token_id:
                problems.append(
                    f"{content} is {token_id} in {path.name}, {other} in tokenizer_config.json"
                )
    return declared, problems


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _add_tokens(description: dict[str, Any], declared: Mapping[str, dict[str, Any]]) -> list[str]:
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise TokenizerError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise TokenizerError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content

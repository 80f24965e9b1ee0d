import json
import pickle
import random

import numpy as np
import pytest

from sa2jax.chat import tokenizer_files
from sa2jax.chat.interleave import deinterleave, interleave
from sa2jax.chat.reply_parser import ReplyParser
from sa2jax.chat.tokenizer import SpecialTokens, Tokenizer
from sa2jax.chat.utf8_stream import Utf8Stream
from sa2jax.convert.tokenizer import added_tokens_note
from sa2jax.errors import PromptError, TokenizerError

MICRO = {"audio_start": 296, "vocab": 512}
TEXTS = [
    "",
    "Hello world",
    "请记录下你所听到的语音内容。",
    "emoji 😀👩‍👩‍👧🇨🇳 end",
    "<|BOT|>human\nhi<|EOT|>",
    "a<audio_start><audio_patch><audio_end>b<tts_start><audio_3>",
    "<audio_pad <audio_ 9> <|EOT|",
    "tab\tand\r\nlines\n\n   spaces  ",
    "\x00\x7f\u0080\U0010ffff",
]


@pytest.fixture(scope="module")
def tok():
    return Tokenizer(tokenizer_files.byte_tokenizer(**MICRO))


@pytest.fixture(scope="module")
def full():
    return Tokenizer(tokenizer_files.byte_tokenizer())


def with_added_tokens(folder, *tokens):
    """A tokenizer with tokens behind the audio codes, as `add_tokens` of transformers makes it."""
    tokenizer_files.save_tokenizer_files(folder, **MICRO)
    new = {token: MICRO["vocab"] + n for n, token in enumerate(tokens)}
    edit(folder, "added_tokens.json", lambda content: content.update(new))
    return Tokenizer.from_folder(folder)


def test_tokens_behind_the_audio_codes_are_text(tmp_path):
    tok = with_added_tokens(tmp_path, "<sigh>", "<laugh>")
    special, (sigh, laugh) = tok.special, (MICRO["vocab"], MICRO["vocab"] + 1)
    assert tok.added_tokens == ["<sigh>", "<laugh>"]
    assert added_tokens_note(tok) == ["tokens behind the audio codes are text: <sigh>, <laugh>"]
    assert tok.encode("a<sigh>b") == [97, sigh, 98]
    assert special.added_text == sigh
    no_text = (-1, special.audio_start, special.tts_pad, special.audio_code_0, sigh - 1, laugh + 1)
    assert not any(map(special.is_text, no_text))
    stream = Utf8Stream(tok)
    assert (
        "".join(map(stream.push, [97, sigh, special.audio_code_0, laugh, 98])) == "a<sigh><laugh>b"
    )
    words = [97, sigh, 98]
    spoken = interleave(words, [3, 1, 4, 1, 5], special)
    assert deinterleave(spoken, special) == (words, [3, 1, 4, 1, 5], [])
    parser = ReplyParser(tok)
    text, codes = parser.push(spoken[1:])
    assert (text, [c for c in codes if c < special.num_codes]) == ("a<sigh>b", [3, 1, 4, 1, 5])
    assert parser.until(4) == tuple([*spoken[1:6], special.tts_end])


def test_released_vocabularies_have_no_added_text(tok, full):
    assert (tok.added_tokens, full.added_tokens) == ([], [])
    assert added_tokens_note(full) == []
    assert (tok.special.added_text, full.special.added_text) == (512, 158258)


def test_more_ids_than_the_model_has_are_refused(tmp_path):
    with_added_tokens(tmp_path, "<sigh>")
    assert Tokenizer.from_folder(tmp_path, vocab=513).size == 513
    with pytest.raises(TokenizerError, match="has ids up to 512, the model a vocabulary of 512"):
        Tokenizer.from_folder(tmp_path, vocab=512)


def edit(folder, name, change):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def forget_tokens(folder, vocab):
    """Take special tokens out of tokenizer.json, and ordinary ones from the id `vocab` on."""

    def forget(content):
        content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] < 273]
        model = content["model"]
        model["vocab"] = {t: i for t, i in model["vocab"].items() if i < vocab}

    edit(folder, "tokenizer.json", forget)


# --- ids -------------------------------------------------------------------------------------


def test_released_ids(full):
    assert full.special == SpecialTokens(
        end_of_text=151643,
        bot=151666,
        eot=151665,
        audio_start=151688,
        audio_end=151689,
        audio_patch=151690,
        tts_start=151693,
        tts_end=151694,
        tts_pad=151695,
        audio_code_0=151696,
        num_codes=6561,
        audio_pad=158257,
        tool_call_start=151657,
        tool_call_end=151658,
        audio_patch_pad=151691,
    )
    assert full.size == 158258
    assert full.id_of("<|im_start|>") == 151644
    assert full.id_of("<|im_end|>") == 151645
    assert full.id_of("<|CALL_START|>") == 151667
    assert full.id_of("<|SC|>") == 151692
    assert full.encode("<audio_6560>é") == [158256, 0xC3, 0xA9]


def test_micro_ids_are_the_released_ones_less_151392(tok):
    s = tok.special
    assert (s.end_of_text, s.bot, s.eot) == (251, 274, 273)
    assert (s.audio_start, s.audio_end, s.audio_patch) == (296, 297, 298)
    assert (s.tts_start, s.tts_end, s.tts_pad, s.audio_code_0) == (301, 302, 303, 304)
    assert (s.num_codes, s.audio_pad, s.code_pad) == (208, None, 303)
    assert tok.size == 512


def test_encode_recognises_special_tokens_in_text(tok):
    text = "hi<|EOT|>你<audio_7>"
    assert tok.encode(text) == [104, 105, 273, 0xE4, 0xBD, 0xA0, 311]


def test_encode_composes_to_nfc(tok):
    assert tok.encode("e\u0301") == [0xC3, 0xA9]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert tok.backend.decode(ids, skip_special_tokens=False) == text
    assert b"".join(tok.token_bytes(i) for i in ids) == text.encode()


def test_decode_equals_the_library_on_any_ids(tok):
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(512) for _ in range(20)]
        assert tok.decode(ids) == tok.backend.decode(ids, skip_special_tokens=False)


def test_ids_without_a_token_decode_to_nothing(full):
    assert full.decode([104, 158719, 100000, 105]) == "hi"
    assert full.token_bytes(158719) == b""
    assert full.token_bytes(-100) == b""


def test_pieces_of_text_and_ids(tok):
    pieces = ["a", [5, 6], "", np.array([7]), "<|EOT|>"]
    ids = tok.encode_pieces(pieces)
    assert ids == [97, 5, 6, 7, 273]
    assert all(type(i) is int for i in ids)


def test_pieces_are_not_merged(tmp_path):
    folder = tokenizer_files.save_tokenizer_files(tmp_path, **MICRO)
    edit(folder, "vocab.json", lambda v: v.update({"ab": 245}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    (folder / "tokenizer.json").unlink()
    tok = Tokenizer.from_folder(folder)
    assert tok.encode("ab") == [245]
    assert tok.encode_pieces(["a", "b"]) == [97, 98]
    assert tok.token_bytes(245) == b"ab"


@pytest.mark.parametrize("bad", [None, b"bytes", 3])
def test_encode_wants_text(tok, bad):
    with pytest.raises(PromptError, match="expected text"):
        tok.encode(bad)


def test_encode_refuses_half_a_surrogate_pair(tok):
    with pytest.raises(PromptError, match="surrogate"):
        tok.encode("a\ud83db")


def test_unknown_token(tok):
    with pytest.raises(TokenizerError, match="no token '<nope>'"):
        tok.id_of("<nope>")


def test_is_immutable_and_survives_pickling(tok):
    with pytest.raises(AttributeError):
        tok.special = None
    copy = pickle.loads(pickle.dumps(tok))
    assert copy.special == tok.special
    assert copy.encode("你<audio_2>") == tok.encode("你<audio_2>")


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "removed",
    [
        [],
        ["tokenizer.json"],
        ["tokenizer.json", "tokenizer_config.json"],
        ["tokenizer.json", "added_tokens.json"],
        ["added_tokens.json", "tokenizer_config.json", "vocab.json", "merges.txt"],
    ],
)
def test_any_sufficient_set_of_files_gives_the_same_tokenizer(tmp_path, tok, removed):
    folder = tokenizer_files.save_tokenizer_files(tmp_path / "made" / "here", **MICRO)
    for name in removed:
        (folder / name).unlink()
    loaded = Tokenizer.from_folder(str(folder))
    assert loaded.special == tok.special
    assert loaded.backend.get_vocab() == tok.backend.get_vocab()
    for text in TEXTS:
        assert loaded.encode(text) == tok.encode(text)


def test_full_size_files_are_small(tmp_path, full):
    folder = tokenizer_files.save_tokenizer_files(tmp_path)
    assert (folder / "tokenizer.json").stat().st_size < 2e6
    assert Tokenizer.from_folder(folder).special == full.special


def test_added_tokens_missing_in_tokenizer_json_are_added(tmp_path, tok):
    folder = tokenizer_files.save_tokenizer_files(tmp_path, **MICRO)
    forget_tokens(folder, vocab=251)
    assert Tokenizer.from_folder(folder).backend.get_vocab() == tok.backend.get_vocab()


def test_truncation_and_padding_in_the_file_are_off(tmp_path):
    folder = tokenizer_files.save_tokenizer_files(tmp_path, **MICRO)
    cut = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    edit(folder, "tokenizer.json", lambda content: content.update(truncation=cut))
    assert Tokenizer.from_folder(folder).encode("abcd") == [97, 98, 99, 100]


def test_a_plain_qwen_tokenizer_is_refused_naming_all_it_lacks(tmp_path):
    folder = tokenizer_files.save_tokenizer_files(tmp_path, **MICRO)
    forget_tokens(folder, vocab=273)
    (folder / "added_tokens.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_folder(folder)
    for token in (
        "<|BOT|>",
        "<|EOT|>",
        "<audio_start>",
        "<audio_end>",
        "<audio_patch>",
        "<tts_start>",
        "<tts_end>",
        "<tts_pad>",
        "<audio_0>",
    ):
        assert token in str(caught.value)


def test_a_released_vocabulary_needs_its_audio_pad():
    ids = Tokenizer(tokenizer_files.byte_tokenizer()).backend.get_vocab()
    del ids["<audio_6561>"]
    with pytest.raises(TokenizerError, match="lacks <audio_6561>"):
        SpecialTokens.find(ids.get)


def test_holes_and_disorder_among_the_codes_are_errors(tok):
    ids = tok.backend.get_vocab()
    with pytest.raises(TokenizerError, match="lacks <audio_5>"):
        SpecialTokens.find({t: i for t, i in ids.items() if t != "<audio_5>"}.get)
    gone = [f"<audio_{n}>" for n in (1, 2, 3, 4, 5, 6)]
    with pytest.raises(TokenizerError, match=r"<audio_2>, <audio_3>, … \(6 audio codes in all\)"):
        SpecialTokens.find({t: i for t, i in ids.items() if t not in gone}.get)
    with pytest.raises(TokenizerError, match="consecutive"):
        SpecialTokens.find({**ids, "<audio_5>": 309, "<audio_6>": 309}.get)
    with pytest.raises(TokenizerError, match="expected text tokens, then <audio_start>"):
        SpecialTokens.find({**ids, "<tts_pad>": 3}.get)


def test_contradicting_ids_are_reported_together(tmp_path):
    folder = tokenizer_files.save_tokenizer_files(tmp_path, **MICRO)

    def move(content):
        content["<|EOT|>"] = 500
        content["<tts_pad>"] = "x"

    edit(folder, "added_tokens.json", move)
    edit(folder, "tokenizer_config.json", lambda c: c["added_tokens_decoder"].pop("274"))
    edit(folder, "added_tokens.json", lambda content: content.update({"<|BOT|>": 275}))
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_folder(folder)
    assert "<|EOT|> is 500 in added_tokens.json, 273 in tokenizer_config.json" in str(caught.value)
    assert "<tts_pad> has id 'x'" in str(caught.value)
    assert "<|BOT|> is 274 in the vocabulary but declared as 275" in str(caught.value)


def test_two_tokens_on_one_id_are_an_error(tmp_path):
    folder = tokenizer_files.save_tokenizer_files(tmp_path, **MICRO)
    edit(folder, "added_tokens.json", lambda content: content.update({"<new>": 300}))
    with pytest.raises(TokenizerError, match="share an id"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokenizer.json", lambda c: c["model"].update(vocab=None), "got NoneType"),
        ("tokenizer.json", lambda c: c["model"]["vocab"].update(a=-1), "'a' is -1"),
        ("tokenizer.json", lambda c: c["model"]["vocab"].update(a=2**40), "'a' is 1099511627776"),
        ("tokenizer.json", lambda c: c["model"].update(merges=None), "list of merges"),
        ("tokenizer.json", lambda c: c.update(model=None), "no byte-level BPE"),
        ("tokenizer.json", lambda c: c["added_tokens"].append({"id": 3}), "no byte-level BPE"),
        ("added_tokens.json", lambda c: c.update({"<new>": -5}), "has id -5"),
        ("added_tokens.json", lambda c: c.update({"<new>": 1.5}), "has id 1.5"),
        (
            "tokenizer_config.json",
            lambda c: c["added_tokens_decoder"].update({"-3": {"content": "<new>"}}),
            "added_tokens_decoder is not",
        ),
    ],
)
def test_ids_and_tokens_that_no_tokenizer_has(tmp_path, name, change, message):
    folder = tokenizer_files.save_tokenizer_files(tmp_path, **MICRO)
    edit(folder, name, change)
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_folder(folder)
    assert len(str(caught.value)) < 490


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(TokenizerError, match=r"expected tokenizer.json, or vocab.json"):
        Tokenizer.from_folder(tmp_path / "nowhere")
    folder = tokenizer_files.save_tokenizer_files(tmp_path, **MICRO)
    for name, text, message in (
        ("tokenizer.json", "{", r"tokenizer.json cannot be read as JSON"),
        ("tokenizer.json", "[]", "expected a JSON object"),
        ("tokenizer.json", '{"model": {"vocab": []}}', "no byte-level BPE model"),
        (
            "tokenizer.json",
            '{"model": {"vocab": {}}, "added_tokens": []}',
            "expected a list of merges",
        ),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": 3}}',
            "added_tokens_decoder is not",
        ),
    ):
        (folder / name).write_text(text)
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.from_folder(folder)


@pytest.mark.parametrize(("audio_start", "vocab"), [(289, 512), (296, 304), (151688, 151696)])
def test_byte_tokenizer_refuses_what_does_not_fit(audio_start, vocab):
    with pytest.raises(ValueError, match="leave no room"):
        tokenizer_files.byte_tokenizer(audio_start, vocab)


# --- streams of text -------------------------------------------------------------------------


def test_characters_are_held_until_complete_across_audio(tok):
    stream = Utf8Stream(tok)
    # 你 = E4 BD A0 with audio codes and pads between its bytes, then an emoji, then plain text.
    ids = [0xE4, 304, 305, 0xBD, 303, 511, 0xA0, 0xF0, 0x9F, 310, 0x98, 0x80, 104]
    got = [stream.push(i) for i in ids]
    assert got == ["", "", "", "", "", "", "你", "", "", "", "", "😀", "h"]
    assert stream.flush() == ""


def test_broken_characters_become_replacements(tok):
    stream = Utf8Stream(tok)
    assert [stream.push(i) for i in (0xE4, 0xBD)] == ["", ""]
    assert stream.flush() == "�"
    assert stream.push(97) == "a"  # a new text starts clean
    # Half a character, then a special token.
    assert [stream.push(i) for i in (0xE4, 0xBD, 273)] == ["", "", "�<|EOT|>"]


def test_joined_stream_equals_decode(tok):
    rng = random.Random(1)
    pool = [*range(512), *[0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0x98, 0x80] * 30]
    for _ in range(300):
        ids = rng.choices(pool, k=rng.randrange(30))
        stream = Utf8Stream(tok)
        text = "".join(stream.push(i) for i in ids) + stream.flush()
        assert text == tok.decode(i for i in ids if i < 296)

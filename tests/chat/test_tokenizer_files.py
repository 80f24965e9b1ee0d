"""Tokenizers that are made here: learnt merges, the released order of special tokens."""

import json

import pytest

from sa2jax.chat.tokenizer import Tokenizer, backend_of
from sa2jax.chat.tokenizer_files import BYTES, SPECIAL, describe, learn_merges, save_files
from sa2jax.errors import TokenizerError

TEXTS = ["turn on the red light", "turn off the red lamp", "请记录下你所听到的语音内容。"] * 3


@pytest.fixture(scope="module")
def merges():
    return learn_merges(TEXTS, 30)


def test_what_is_often_said_is_short(merges):
    tokenizer = Tokenizer(backend_of(describe(9, merges=merges), where="here"))
    assert len(tokenizer.encode("turn on the red")) <= 6
    assert tokenizer.size == BYTES + 30 + len(SPECIAL) + 9
    assert tokenizer.special.num_codes == 9
    assert tokenizer.special.audio_code_0 == BYTES + 30 + len(SPECIAL)
    for text in (*TEXTS, "Zürich 42 🙂\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_same_texts_give_the_same_merges(merges):
    assert learn_merges(TEXTS, 30) == merges
    assert learn_merges(TEXTS, 10) == merges[:10]


def test_too_few_texts():
    with pytest.raises(TokenizerError, match=r"the texts have \d+ pairs of tokens, not 500"):
        learn_merges(["ab ab"], 500)


def test_files_are_read_back(merges, tmp_path):
    save_files(tmp_path / "made", describe(9, merges=merges))
    tokenizer = Tokenizer.from_folder(tmp_path / "made")
    again = Tokenizer(backend_of(describe(9, merges=merges), where="here"))
    assert tokenizer.special == again.special
    assert tokenizer.encode(TEXTS[0]) == again.encode(TEXTS[0])
    lines = (tmp_path / "made" / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 31
    ordinary = json.loads((tmp_path / "made" / "vocab.json").read_text(encoding="utf-8"))
    assert len(ordinary) == BYTES + 30


def test_a_first_id_that_is_taken(merges):
    with pytest.raises(ValueError, match="is the id of an ordinary token"):
        describe(9, merges=merges, first=BYTES + 3)

import pytest

from sa2jax.evaluate.words import normalized, number_words, one_number, word_errors


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Seven.", "seven"),
        (" 7 ", "seven"),
        ("It's 18, isn't it?", "its eighteen isnt it"),
        ("Thirty-two!", "thirty two"),
        ("266", "two hundred sixty six"),
        ("3 o'clock", "three o clock"),
        ("71143", "seven one one four three"),
        ("07", "zero seven"),
        ("Café", "cafe"),
        ("...", ""),
    ],
)
def test_texts_are_compared_as_words(text, words):
    assert normalized(text) == words


def test_numbers_are_said_as_in_the_corpus():
    corpus = pytest.importorskip("sa2jax.train.corpus")
    assert [number_words(n) for n in range(1000)] == [corpus.number(n) for n in range(1000)]


def test_only_a_lone_word_may_sound_like_a_number():
    assert [one_number(t) for t in ("For.", "Too", "ate", "for you")] == [
        "four", "two", "eight", "for you",
    ]  # fmt: skip


def test_word_errors_are_counted():
    pytest.importorskip("jiwer")
    expected = ["the red dog", "seven", "call tom", ""]
    found = ["The red dock!", "7", "call", "hello there"]
    assert word_errors(expected, found) == ([1, 0, 1, 2], [3, 1, 2, 0])

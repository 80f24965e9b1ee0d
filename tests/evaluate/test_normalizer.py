import pytest

from sa2jax.evaluate.normalizer import normalized, number_words, one_number
from sa2jax.evaluate.word_errors import word_errors


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


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "zero"),
        (10, "ten"),
        (19, "nineteen"),
        (20, "twenty"),
        (42, "forty two"),
        (100, "one hundred"),
        (305, "three hundred five"),
        (999, "nine hundred ninety nine"),
    ],
)
def test_numbers(value, words):
    assert number_words(value) == words


def test_all_numbers_differ():
    assert len({number_words(n) for n in range(1000)}) == 1000


def test_only_a_lone_word_may_sound_like_a_number():
    assert [one_number(t) for t in ("For.", "Too", "ate", "for you")] == [
        "four",
        "two",
        "eight",
        "for you",
    ]


def test_word_errors_are_counted():
    pytest.importorskip("jiwer")
    expected = ["the red dog", "seven", "call tom", ""]
    found = ["The red dock!", "7", "call", "hello there"]
    assert word_errors(expected, found) == ([1, 0, 1, 2], [3, 1, 2, 0])


@pytest.mark.parametrize(
    ("said", "heard", "errors"),
    [
        ("one two three", "one two three", 0),
        ("one two three", "one three", 1),
        ("one two three", "one two two three", 1),
        ("one two three", "won too free", 3),
        ("one two", "", 2),
        ("one two three four", "two three four five", 2),
    ],
)
def test_word_errors_are_the_fewest_changes(said, heard, errors):
    assert word_errors([said], [heard]) == ([errors], [len(said.split())])

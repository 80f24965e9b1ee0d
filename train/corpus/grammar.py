"""Grammar of a synthetic corpus: sentences, questions and their answers.

Words are lower-case, without punctuation; numbers are words.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from math import prod

import numpy as np

from sa2jax.evaluate.normalizer import DIGITS, ONES, TENS, number_words

Exchange = tuple[str, str]  # a question and its answer

# --- words --------------------------------------------------------------------------------------


def _list(words: str, separator: str | None = None) -> tuple[str, ...]:
    return tuple(words.split(separator))


DAYS = _list("monday tuesday wednesday thursday friday saturday sunday")
LOOKING = "let me look"  # said before a tool is called: a spoken turn begins with speech
AGAIN = "say it again"
WORDS: Mapping[str, tuple[str, ...]] = {
    name: _list(words)
    for name, words in {
        "color": "red green blue yellow black white brown pink",
        "size": "small big little old new long short heavy",
        "animal": "dog cat bird horse mouse cow rabbit sheep",
        "does": "sleeps sits runs waits plays sings",
        "near": "under on behind near",
        "place": "table chair bed door window tree house car bridge river",
        "thing": "book cup ball key bottle box hat shoe letter phone picture bag",
        "things": "books cups keys bottles boxes hats shoes letters apples eggs flowers tickets",
        "room": "kitchen garden bedroom bathroom office garage",
        "person": "sister brother mother father friend teacher doctor daughter",
        "name": "maria peter tom lucy emma david",
        "device": "light lamp radio heater fan",
        "switch": "on off",
        "take": "bring take find buy",
        "food": "bread milk soup rice cake tea",
        "likes": "likes wants buys",
        "goal": "school market station park beach",
        "part": "morning afternoon evening",
        "when": "today tomorrow now later",
        "weather": "hot cold warm dark quiet",
        "feel": "happy sad tired hungry late",
        "who": "he she",
        "do": "open close touch",
    }.items()
} | {"few": DIGITS[2:], "day": DAYS, "hour": ONES[1:13], "degrees": TENS}
SENTENCES = (
    "turn {switch} the {color} {device} in the {room}",
    "please turn {switch} the {device}",
    "the {size} {animal} {does} {near} the {place}",
    "the {color} {animal} {does} {near} the {size} {place}",
    "my {person} has {few} {color} {things}",
    "please {take} the {size} {color} {thing}",
    "put the {color} {thing} {near} the {size} {place}",
    "{name} {likes} {few} {things} and some {food}",
    "my {person} {likes} {food} in the {part}",
    "we go to the {goal} on {day} {part}",
    "it is {weather} in the {room} {when}",
    "call my {person} on {day}",
    "call {name} {when}",
    "i need {few} {things} for the {room}",
    "where is my {size} {thing}",
    "is the {color} {thing} {near} the {place}",
    "set the {device} to {degrees} {few}",
    "wake me up at {hour} in the {part}",
    "my {person} is {feel} {when}",
    "{who} finds the {size} {color} {thing}",
    "do not {do} the {size} {thing}",
    "{do} the {place}",
    "{color} {things}",
)
_OPPOSITES = _list(
    "hot cold,big small,up down,left right,old new,black white,day night,fast slow,happy sad,"
    "long short,high low,wet dry,early late,full empty,hard soft,loud quiet,good bad,yes no,in out,"
    "light dark,first last,clean dirty,strong weak,rich poor",
    ",",
)
_GREETINGS: tuple[Exchange, ...] = (
    ("hello", "hello how can i help you"),
    ("good morning", "good morning"),
    ("good night", "good night sleep well"),
    ("how are you", "i am fine thank you"),
    ("thank you", "you are welcome"),
    ("what is your name", "my name is nano"),
    ("goodbye", "goodbye"),
    ("can you hear me", "yes i can hear you"),
    ("what can you do", "i can listen and talk"),
)
ASK_TIME = (
    "what time is it",
    "what is the time",
    "tell me the time please",
    "can you tell me the time",
    "do you know what time it is",
)
ASK_DAY = ("what day is it today", "which day is it", "tell me what day it is")
ASK_WHO = ("who is speaking", "who am i", "whose voice is this")
ASK_NAME = "what is my name"
ASK_LOUD = ("am i loud or soft", "is my voice loud or soft")


def clock(hour: int, minute: int) -> str:
    """A time of day as it is said: "three thirty", "three oh five", "three o clock"."""
    said = number_words(hour % 12 or 12)
    if not minute:
        return f"{said} o clock"
    return f"{said} {'oh ' if minute < 10 else ''}{number_words(minute)}"


def count_sentences() -> int:
    """How many sentences the grammar has."""
    return sum(prod(len(WORDS[s]) for s in slots(form)) for form in SENTENCES)


@cache
def vocabulary() -> tuple[str, ...]:
    """All words that a corpus can hold but the names of voices, sorted."""
    texts = [*ONES, *TENS, "hundred", *ASK_TIME, *ASK_DAY, *ASK_WHO, *ASK_LOUD]
    texts += [LOOKING, AGAIN, ASK_NAME, "it is oh o clock today hello nice to meet you your this"]
    texts += [re.sub(r"\{\w+\}", " ", form) for form in SENTENCES]
    texts += [text for kind in EXCHANGES for pair in exchanges(kind) for text in pair]
    texts += [word for words in WORDS.values() for word in words]
    return tuple(sorted({word for text in texts for word in text.split()}))


@cache
def single_words() -> tuple[str, ...]:
    """Words that can be told apart when they stand alone."""
    alike = ("o", "oh", "to", "for", "know")
    return tuple(word for word in vocabulary() if word not in alike)


def sentence(
    rng: np.random.Generator,
    forms: Sequence[str] = SENTENCES,
    words: Mapping[str, Sequence[str]] = WORDS,
) -> str:
    """A sentence of a grammar; all forms are equally likely, and all words of a slot.

    Args:
        rng: what is drawn from.
        forms: sentences with slots, such as "call {name} {when}".
        words: what each slot may hold.
    """
    form = forms[int(rng.integers(len(forms)))]
    found = {slot: words[slot][int(rng.integers(len(words[slot])))] for slot in slots(form)}
    return form.format(**found)


@cache
def slots(form: str) -> tuple[str, ...]:
    """Names of what a form leaves open."""
    return tuple(re.findall(r"\{(\w+)\}", form))


# --- questions and their answers ----------------------------------------------------------------


def _sums() -> Iterator[Exchange]:
    forms = ("what is {} plus {}", "how much is {} plus {}", "{} plus {}")
    for form, (a, b) in product(forms, product(range(10), repeat=2)):
        yield form.format(DIGITS[a], DIGITS[b]), number_words(a + b)


def _opposites() -> Iterator[Exchange]:
    for pair in _OPPOSITES:
        words = _list(pair)
        for one, other in (words, words[::-1]):
            yield f"what is the opposite of {one}", other


def _counting() -> Iterator[Exchange]:
    for a, b in product(range(11), repeat=2):
        if 1 <= abs(a - b) <= 8:
            step = 1 if a < b else -1
            said = " ".join(number_words(n) for n in range(a, b + step, step))
            yield f"count from {number_words(a)} to {number_words(b)}", said
    for b in range(2, 10):
        yield f"count to {number_words(b)}", " ".join(number_words(n) for n in range(1, b + 1))


EXCHANGES: Mapping[str, Callable[[], Iterator[Exchange]]] = {
    "greeting": lambda: iter(_GREETINGS),
    "opposite": _opposites,
    "count": _counting,
    "sum": _sums,
}


@cache
def exchanges(kind: str) -> tuple[Exchange, ...]:
    """All questions of a kind (greeting, opposite, count, sum) with their answers."""
    return tuple(EXCHANGES[kind]())


# --- chance -------------------------------------------------------------------------------------


def random(seed: int, key: str) -> np.random.Generator:
    """The random numbers of one item."""
    words = np.frombuffer(hashlib.sha256(key.encode()).digest(), "<u4")
    return np.random.default_rng([seed, *words.tolist()])


def weighted(rng: np.random.Generator, weights: Mapping[str, float]) -> str:
    """One of some names, by their weights."""
    place = rng.random() * sum(weights.values())
    for name, weight in weights.items():
        place -= weight
        if place < 0:
            return name
    return max(weights, key=lambda name: weights[name])  # all was rounded away


def is_held_out(text: str, share: float) -> bool:
    """Whether an open text belongs to the held-out ones; what the tasks ask and answer does not."""
    if text.count(" ") < 2 or text in _closed():
        return False
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) < share * 2**32


@cache
def _closed() -> frozenset[str]:
    return frozenset(text for kind in EXCHANGES for pair in exchanges(kind) for text in pair)

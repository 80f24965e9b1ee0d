import random

import numpy as np
import pytest

from sa2jax.chat import tokenizer_files
from sa2jax.chat.interleave import deinterleave, interleave
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.errors import PromptError

START, END, PAD, CODE, APAD, EOT = 151693, 151694, 151695, 151696, 158257, 151665


@pytest.fixture(scope="module")
def special():
    return Tokenizer(tokenizer_files.byte_tokenizer()).special


@pytest.fixture(scope="module")
def micro():
    return Tokenizer(tokenizer_files.byte_tokenizer(296, 512)).special


# Each list is written out from the rule in SPEC section 4.
GOLDEN = {
    "empty": ([], [], [START, END]),
    "even": (
        [1, 2],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [START, 1, CODE, CODE + 1, CODE + 2, CODE + 3,
         2, CODE + 4, CODE + 5, CODE + 6, CODE + 7, END],
    ),
    "more text": (
        [1, 2, 3],
        [9, 8, 7, 6],
        [START, 1, CODE + 9, CODE + 8, CODE + 7, CODE + 6, 2, APAD, APAD, APAD, APAD,
         3, APAD, APAD, APAD, APAD, END],
    ),
    "more audio": (
        [1],
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
        [START, 1, CODE, CODE + 1, CODE + 2, CODE + 3, PAD, CODE + 4, CODE + 5, CODE + 6, CODE + 7,
         PAD, CODE + 8, APAD, APAD, APAD, END],
    ),
    "no text": ([], [5], [START, PAD, CODE + 5, APAD, APAD, APAD, END]),
    "no audio": ([7], [], [START, 7, APAD, APAD, APAD, APAD, END]),
}  # fmt: skip


@pytest.mark.parametrize("case", GOLDEN)
def test_golden(special, case):
    text, codes, ids = GOLDEN[case]
    assert interleave(text, codes, special) == ids
    assert deinterleave(ids, special) == (text, codes, [])


def cases(limit, count=200):
    rng = random.Random(0)
    for _ in range(count):
        text = [rng.randrange(0, 250) for _ in range(rng.randrange(0, 12))]
        codes = [rng.randrange(0, limit) for _ in range(rng.randrange(0, 50))]
        yield text, codes


@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_round_trip_and_shape(special, group):
    for text, codes in cases(6561):
        ids = interleave(np.array(text, int), np.array(codes, int), special, group=group)
        groups, rest = divmod(len(ids) - 2, group + 1)
        assert rest == 0
        assert groups == max(-(-len(codes) // group), len(text))
        slots = np.array(ids[1:-1], int).reshape(groups, group + 1)
        assert (slots[:, 0] <= PAD).all()
        assert (slots[:, 1:] >= CODE).all()
        assert deinterleave(ids, special) == (text, codes, [])
        # What follows the speech is kept apart, up to the stop token.
        reply = [*ids[1:], 104, 105, EOT, 106, CODE]
        assert deinterleave(reply, special) == (text, codes, [104, 105])


def test_round_trip_without_an_audio_pad(micro):
    for text, codes in cases(208):
        ids = interleave(text, codes, micro)
        assert max(ids) < 512
        assert deinterleave(ids, micro) == (text, codes, [])


def test_pads_go_last(special):
    for text, codes in cases(6561, 50):
        slots = np.array(interleave(text, codes, special)[1:-1], int).reshape(-1, 5)
        assert slots[: len(text), 0].tolist() == text
        assert (slots[len(text) :, 0] == PAD).all()
        flat = slots[:, 1:].ravel()
        assert (flat[: len(codes)] - CODE).tolist() == codes
        assert (flat[len(codes) :] == APAD).all()


def test_any_truncation_is_a_prefix(special):
    for text, codes in cases(6561, 30):
        ids = interleave(text, codes, special)
        for cut in range(len(ids)):
            got = deinterleave(ids[:cut], special)
            assert got.text_ids == text[: len(got.text_ids)]
            assert got.codes == codes[: len(got.codes)]
            assert got.trailing_text_ids == []


def test_oddities_are_read_by_kind(special):
    cases = {
        # no <tts_start>, a group of two, two texts in a row
        (1, CODE, CODE + 1, 2, 3, CODE + 2, END): ([1, 2, 3], [0, 1, 2], []),
        # doubled markers, speech resumed after text
        (START, START, 1, CODE, END, END, 2, START, 3, CODE + 1): ([1, 3], [0, 1], [2]),
        # codes after the end of speech still count
        (END, 1, CODE + 3): ([], [3], [1]),
        # a generated <audio_start>, patches, unused rows of the vocabulary, a negative id
        (151688, 151690, 151689, 158258, 158719, -1, 1, CODE): ([1], [0], []),
        # a plain text reply
        (104, 105, EOT): ([104, 105], [], []),
        # Base stops at <|endoftext|>
        (104, 151643, 105): ([104], [], []),
        # nothing but pads
        (START, PAD, APAD, APAD, APAD, APAD, END): ([], [], []),
    }
    for ids, expected in cases.items():
        assert deinterleave(ids, special) == expected


def test_agrees_with_the_official_split_on_any_ids(special):
    rng = random.Random(3)
    pool = [*range(100), START, END, PAD, APAD, 151688, *range(CODE, CODE + 50), 158700]
    for _ in range(200):
        ids = rng.choices(pool, k=rng.randrange(40))
        reply = deinterleave(iter(ids), special)
        # Official: text = ids < 151688; audio = id - 151696 for ids > 151695.
        text, codes = [i for i in ids if i < 151688], [i - CODE for i in ids if i >= CODE]
        assert reply.codes == [code for code in codes if code < special.num_codes]
        assert sorted(reply.text_ids + reply.trailing_text_ids) == sorted(text)


@pytest.mark.parametrize(
    ("text", "codes", "message"),
    [
        ([151688], [], "text id 151688 is no text"),
        ([-1], [], "text id -1"),
        ([], [6561], "no speech code 6561"),
        ([], [-1], "no speech code -1"),
    ],
)
def test_bad_inputs(special, text, codes, message):
    with pytest.raises(PromptError, match=message):
        interleave(text, codes, special)


def test_group_must_hold_something(special):
    with pytest.raises(PromptError, match="at least one audio slot"):
        interleave([1], [1], special, group=0)

"""Replies taken apart while they are made, in the released layout of ids."""

import random

import pytest

from sa2jax.chat import tokenizer_files
from sa2jax.chat.interleave import deinterleave, interleave
from sa2jax.chat.reply_parser import MarkerFilter, ReplyParser, is_code
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.chat.tools import ToolCall
from sa2jax.inference.repetition import PERIOD, RepetitionGuard

CALL = '<tool_call>function\nsearch\n{"query": "a</tool_call>b"}</tool_call>'


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer(tokenizer_files.byte_tokenizer())


def read(tok: Tokenizer, ids, size: int) -> tuple[str, list[int], ReplyParser]:
    reader, text, codes = ReplyParser(tok), "", []
    for start in range(0, len(ids), size):
        part = reader.push(ids[start : start + size])
        text, codes = text + part.text, codes + part.codes
    return text + reader.end(), codes, reader


@pytest.mark.parametrize("size", [1, 3, 5, 1000])
def test_what_is_pushed_piece_by_piece_is_what_the_whole_holds(tok, size):
    """Random ids of every kind, in any order."""
    special, rng = tok.special, random.Random(size)
    kinds = [
        lambda: rng.randrange(128),
        lambda: rng.choice("é→😀".encode()),
        lambda: special.audio_code_0 + rng.randrange(special.num_codes),
        lambda: rng.choice([special.tts_pad, special.audio_pad, special.audio_start]),
        lambda: rng.choice([special.tts_start, special.audio_end, special.audio_patch]),
    ]
    for _ in range(50):
        ids = [rng.choice(kinds)() for _ in range(rng.randrange(60))]
        if rng.random() < 0.3:
            ids.append(special.tts_end)
        text, codes, reader = read(tok, ids, size)
        whole = deinterleave(ids, special)
        assert text == tok.decode([*whole.text_ids, *whole.trailing_text_ids])
        assert reader.codes == whole.codes == [c for c in codes if c < special.num_codes]
        assert reader.ids == ids
        assert codes == [i - special.audio_code_0 for i in ids if is_code(i, special)]


def test_nothing_counts_after_the_end(tok):
    special = tok.special
    for end in (special.eot, special.end_of_text):
        text, codes, _ = read(
            tok, [*b"a", special.audio_code_0, end, *b"b", special.audio_code_0], 2
        )
        assert (text, codes) == ("a", [0])


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_calls_are_never_shown(tok, size):
    for written, shown in [
        (f"Wait.{CALL}", "Wait."),
        (f"{CALL}{CALL} and more", " and more"),
        ("a <tool", "a <tool"),  # the beginning of a call that never comes
        ("a < b <tool_cal> c", "a < b <tool_cal> c"),
        ("a <tool_call>function\n", "a "),
    ]:
        text, _, reader = read(tok, list(written.encode()), size)
        assert text == shown
        marked = tok.encode(written)
        assert read(tok, marked, size)[0] == shown
        if written.startswith("Wait"):
            assert reader.calls == [ToolCall("search", {"query": "a</tool_call>b"})]


def test_shown_stops_where_text_is_held_back(tok):
    reader = ReplyParser(tok)
    reader.push([*b"ab", "é".encode()[0]])
    assert reader.shown == 2
    reader.push(["é".encode()[1], *b"<to"])
    assert reader.shown == 4
    reader.push([*b"y"])
    assert reader.shown == 8


def test_a_reply_up_to_what_was_heard(tok):
    """Any number of codes: whole groups, real pads, and reading it again gives that many codes."""
    special = tok.special
    ids = interleave(list(b"Hello, you"), range(100, 133), special)[1:]
    for count in range(34):
        reader = ReplyParser(tok)
        reader.push(ids)
        kept = list(reader.until(count))
        assert kept[-1] == special.tts_end
        assert deinterleave(kept, special).codes == list(range(100, 100 + count))
        assert len(kept) % 5 == 1
        if count < 33:
            exact = kept[: kept.index(special.tts_end)]
            while exact and exact[-1] == special.audio_pad:
                exact.pop()
            assert exact == ids[: len(exact)]
            assert len(kept) - 1 - len(exact) == -count % 4
        else:
            assert kept == ids  # all of it, pads as they were generated


def test_a_reply_cut_before_its_end_was_made(tok):
    special = tok.special
    ids = interleave(list(b"Hello, you"), range(100, 133), special)[1:]
    reader = ReplyParser(tok)
    reader.push(ids[:18])  # three groups and a half
    assert len(reader.codes) == 14
    kept = reader.until(99)
    assert kept == (*ids[:18], special.audio_pad, special.audio_pad, special.tts_end)


def test_unspoken_text_counts_as_far_as_it_was_shown(tok):
    special = tok.special
    spoken = interleave(list(b"Hi"), range(8), special)[1:]
    reader = ReplyParser(tok)
    reader.push([*spoken, *b"see", *"é".encode()[:1]])
    assert reader.until(8) == (*spoken, *b"see")
    assert reader.until(7)[-1] == special.tts_end
    assert reader.until(7)[:-1] == (*spoken[:9], special.audio_pad)
    called = ReplyParser(tok)
    called.push([*spoken, *tok.encode(CALL)])
    assert called.until(8) == tuple(spoken)


def test_before_a_marker():
    for size in range(1, 12):
        text, before, free = "a <en <end <end> tail <end>", MarkerFilter("<end>"), ""
        for start in range(0, len(text), size):
            free += before.push(text[start : start + size])
            assert text.startswith(free)
        assert (free, before.held, before.found) == ("a <en <end ", "<end> tail <end>", True)
    open_end = MarkerFilter("<end>")
    assert open_end.push("a <en") + "|" + open_end.flush() == "a |<en"


# --- loops ---


@pytest.mark.parametrize("period", [1, 2, 5, PERIOD])
def test_loops_are_noticed(period):
    start = list(range(1000, 1100))
    ids = [*start, *[*range(period)] * 200]
    for size in (1, 5, 7):
        watch, at = RepetitionGuard(60), None
        for first in range(0, len(ids), size):
            count = watch.push(ids[first : first + size])
            if count is not None:
                at = first + count
                break
        assert at == len(start) + period + 60


def test_what_only_looks_like_a_loop():
    watch = RepetitionGuard(60)
    assert watch.push(range(10_000)) is None
    assert watch.push([7] * 60 + [8] + [7] * 60) is None
    assert watch.push([*range(PERIOD + 1)] * 10) is None  # too long a period
    assert RepetitionGuard(0).push([7] * 10_000) is None

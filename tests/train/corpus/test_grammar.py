"""What a synthetic corpus says: words, answers that are right, and texts that are kept apart."""

import json
import re
from collections import Counter

import numpy as np
import pytest

from sa2jax.chat.template import TASKS
from sa2jax.chat.toolbox import Toolbox, get_date_time
from sa2jax.errors import ConfigError, DataError
from sa2jax.evaluate.normalizer import number_words
from sa2jax.train.corpus import conversations, grammar
from sa2jax.train.corpus.conversations import DialogueConfig, Turn, plan_dialogues
from sa2jax.train.corpus.plan import CorpusPlan, read_corpus


@pytest.fixture(scope="module")
def config() -> DialogueConfig:
    return read_corpus("nano/corpus").dialogues


@pytest.fixture(scope="module")
def planned(config):
    return plan_dialogues(config, 0, 0.1)


def of(planned, file):
    return [dialogue for dialogue in planned if dialogue.file == file]


def heard(line: Turn) -> str:
    assert line.utterance is not None
    return line.utterance.text


# --- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("time", "words"),
    [
        ((0, 0), "twelve o clock"),
        ((15, 30), "three thirty"),
        ((9, 5), "nine oh five"),
        ((12, 59), "twelve fifty nine"),
    ],
)
def test_clock(time, words):
    assert grammar.clock(*time) == words


def test_grammar():
    rng = np.random.default_rng(0)
    sentences = {grammar.sentence(rng) for _ in range(5000)}
    assert grammar.count_sentences() > 100_000
    assert len(sentences) > 3000  # short forms come again
    assert all(2 <= len(text.split()) <= 10 for text in sentences)
    words = {word for text in sentences for word in text.split()}
    assert words <= {*grammar.vocabulary()}
    assert len(words) >= 150


def test_words_are_plain():
    assert all(re.fullmatch("[a-z]+", word) for word in grammar.vocabulary())
    assert {*grammar.DIGITS, *grammar.DAYS} <= {*grammar.single_words()} < {*grammar.vocabulary()}


def test_sums_are_right_and_complete():
    sums = grammar.exchanges("sum")
    assert len(sums) == 300
    values = {number_words(n): n for n in range(19)}
    for question, answer in sums:
        a, b = (values[word] for word in question.split() if word in values)
        assert values[answer] == a + b


def test_other_answers():
    opposites = dict(grammar.exchanges("opposite"))
    assert len(opposites) >= 40
    assert opposites["what is the opposite of hot"] == "cold"
    assert opposites["what is the opposite of cold"] == "hot"
    counts = dict(grammar.exchanges("count"))
    assert counts["count from two to six"] == "two three four five six"
    assert counts["count from three to one"] == "three two one"
    assert counts["count to four"] == "one two three four"
    every = [pair for kind in grammar.EXCHANGES for pair in grammar.exchanges(kind)]
    assert len(dict(every)) == len(every)
    assert max(len(answer.split()) for _, answer in every) <= 9


# --- chance -------------------------------------------------------------------------------------


def test_weighted():
    rng = np.random.default_rng(0)
    found = Counter(grammar.weighted(rng, {"a": 3, "b": 0, "c": 1}) for _ in range(4000))
    assert {*found} == {"a", "c"}
    assert 2800 < found["a"] < 3200


def test_held_out_is_a_share_of_open_texts():
    rng = np.random.default_rng(1)
    texts = {text for _ in range(5000) if len((text := grammar.sentence(rng)).split()) > 2}
    share = sum(grammar.is_held_out(text, 0.1) for text in texts) / len(texts)
    assert 0.08 < share < 0.12
    assert not grammar.is_held_out("seven eight", 1)
    assert not grammar.is_held_out("seven eight nine", 1)  # what "count from seven" is answered
    assert grammar.is_held_out("seven eight one", 1)


def test_chance_is_of_seed_and_key():
    first = grammar.random(0, "a").random()
    assert first == grammar.random(0, "a").random()
    assert first not in (grammar.random(1, "a").random(), grammar.random(0, "b").random())


# --- talks --------------------------------------------------------------------------------------


def test_same_seed_same_talks(config, planned):
    assert plan_dialogues(config, 0, 0.1) == planned
    assert plan_dialogues(config, 1, 0.1) != planned


def test_talks_do_not_depend_on_how_many(config, planned):
    some = {dialogue.key: dialogue for dialogue in plan_dialogues(config, 0, 0.02)}
    every = {dialogue.key: dialogue for dialogue in planned}
    assert all(every[key] == dialogue for key, dialogue in some.items())


def test_counts(config, planned):
    found = Counter(dialogue.file for dialogue in planned)
    assert found["talks/asr"] == 900
    assert found["heldout/asr_seen"] == found["heldout/asr_unseen"] == 40
    assert {name.split("/")[1] for name in found if name.startswith("talks/")} == {*config.counts}


def test_shapes_of_tasks(planned):
    for dialogue in of(planned, "talks/asr"):
        system, asked, answer = dialogue.turns
        assert system.text == TASKS["asr"].system
        assert heard(asked) == answer.text
        assert not answer.spoken
    prompts = Counter(dialogue.turns[0].text for dialogue in of(planned, "talks/tts"))
    assert {*prompts} == {TASKS["tts"].system, TASKS["tts"].system_en}
    for dialogue in of(planned, "talks/tts"):
        assert dialogue.turns[1].text == dialogue.turns[2].text
        assert dialogue.turns[2].spoken
    for dialogue in of(planned, "talks/repeat"):
        assert heard(dialogue.turns[1]) == dialogue.turns[2].text


def test_every_sum_is_asked(planned):
    asked = {heard(t.turns[1]).split(" is ")[-1] for t in of(planned, "talks/sums")}
    assert len(asked) >= 100
    answers = dict(grammar.exchanges("sum"))
    assert all(answers[heard(t.turns[1])] == t.turns[2].text for t in of(planned, "talks/sums"))


def test_turns_that_need_the_ones_before(planned):
    chats = [dialogue.turns for dialogue in of(planned, "talks/chat")]
    again = [lines for lines in chats if len(lines) == 5 and heard(lines[3]) == grammar.AGAIN]
    assert again
    assert all(lines[2].text == lines[4].text for lines in again)
    names = [lines for lines in chats if len(lines) == 5 and heard(lines[3]) == grammar.ASK_NAME]
    assert names
    assert all(lines[4].text.split()[-1] == heard(lines[1]).split()[-1] for lines in names)


def test_tools(planned):
    tools = of(planned, "talks/tools")
    assert all(dialogue.tools for dialogue in tools)
    called = [t.turns for t in tools if any(line.role == "tool_call" for line in t.turns)]
    assert 0.5 < len(called) / len(tools) < 0.8
    for _, asked, look, call, told, answer in called:
        assert look == Turn(role="assistant", text=grammar.LOOKING, spoken=True)
        assert json.loads(call.text) == {"name": "get_date_time", "arguments": {}}
        _, clock, name, _ = told.text.split()
        form = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [A-Z][a-z]+day UTC[+-]\d\d:00"
        assert re.fullmatch(form, told.text)
        assert re.fullmatch(form.replace(":00", r":\d\d"), get_date_time())
        hour, minute = map(int, clock.split(":")[:2])
        right = {f"it is {grammar.clock(hour, minute)}", f"today is {name.lower()}"}
        assert answer.text in right
        assert ("day" in heard(asked)) == answer.text.startswith("today")
    assert json.loads(Toolbox(["get_date_time"]).text) == conversations.TOOLS


def test_short_ones(planned):
    short = of(planned, "talks/short")
    assert all(heard(dialogue.turns[1]) == dialogue.turns[2].text for dialogue in short)
    digits = sum(dialogue.turns[2].text in grammar.DIGITS for dialogue in short) / len(short)
    assert 0.4 < digits < 0.65
    assert {dialogue.turns[2].text for dialogue in short} <= {
        *grammar.DIGITS,
        *grammar.single_words(),
    }


def test_the_clock_in_writing(planned):
    clocks = of(planned, "talks/clock")
    assert all(
        dialogue.tools and not any(line.utterance or line.spoken for line in dialogue.turns)
        for dialogue in clocks
    )
    assert len({dialogue.turns[3].text.split()[1] for dialogue in clocks}) > 0.95 * len(clocks)
    for _, asked, _, told, answer in (dialogue.turns for dialogue in clocks):
        _, clock, name, _ = told.text.split()
        hour, minute = map(int, clock.split(":")[:2])
        day = "day" in asked.text
        right = f"today is {name.lower()}" if day else f"it is {grammar.clock(hour, minute)}"
        assert answer.text == right


def test_short_answers_in_all_voices():
    config = read_corpus("nano/corpus", {"short_reply_words": 2})
    said = {name: job for name, job in CorpusPlan.of(config, 0.02).jobs.items() if "/said/" in name}
    own = {name: job for name, job in said.items() if name.count("/") == 2}
    short = {
        job.text
        for name, job in own.items()
        if name.startswith("talks/") and len(job.text.split()) <= 2
    }
    assert short
    assert len(short) < len(own)
    for voice in ("sue", "rob"):
        more = {job.text for name, job in said.items() if f"/said/{voice}/" in name}
        assert more == short
        assert {j.style.speaker for n, j in said.items() if f"/{voice}/" in n} == {voice}
    without = CorpusPlan.of(read_corpus("nano/corpus", {"short_reply_words": 0}), 0.02).jobs
    assert {name for name in without if "/said/" in name} == {*own}


def test_unseen_voice(config, planned):
    unseen, seen = of(planned, "heldout/asr_unseen"), of(planned, "heldout/asr_seen")
    assert [heard(dialogue.turns[1]) for dialogue in unseen] == [
        heard(dialogue.turns[1]) for dialogue in seen
    ]
    for dialogue in planned:
        voices = {line.utterance.voice for line in dialogue.turns if line.utterance}
        assert (config.held_out.unseen_voice in voices) == (dialogue.file == "heldout/asr_unseen")


def test_split_of_all_texts():
    plan = CorpusPlan.of(read_corpus("nano/corpus"), 0.1)
    opened = [j for path, j in plan.jobs.items() if path.startswith("heldout/clean") or j.clean]
    tested = {job.text for job in opened if job.held_out}
    learnt = {job.text for job in plan.jobs.values() if not job.held_out}
    assert tested
    assert not tested & learnt


def test_split_is_checked(monkeypatch):
    recipe = read_corpus("nano/corpus")
    monkeypatch.setattr(conversations._Sampler, "text", lambda self, transcribed=False: "a b c")
    with pytest.raises(DataError, match="held-out texts are in the training data: a b c"):
        CorpusPlan.of(recipe, 0.001)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dialogues.counts.asr_unseen": 3}, "dialogues.counts: there is no asr_unseen"),
        ({"dialogues.held_out.counts": {"asr": 3}}, "there is no asr; expected asr_seen"),
        ({"dialogues.held_out.fraction": 2}, "expected between 0 and 0.5"),
        ({"dialogues.chat.song": 1}, "dialogues.chat: there is no song"),
        ({"dialogues.voices": {"who": 0}}, "expected parts of 0 or more"),
    ],
)
def test_wrong_recipes(change, message):
    with pytest.raises(ConfigError, match=message):
        read_corpus("nano/corpus", change)


# --- other words --------------------------------------------------------------------------------


def test_words_of_ones_own():
    config = read_corpus("words/corpus").dialogues
    new = {word for words in config.slot_values.values() for word in words.split()}
    assert len(new) == 50
    assert not new & {*grammar.vocabulary()}
    planned = plan_dialogues(config, 0, 0.2)
    assert Counter(dialogue.file for dialogue in planned) == {
        "talks/asr": 500,
        "heldout/asr_seen": 60,
    }
    said = {
        file: [heard(dialogue.turns[1]) for dialogue in of(planned, file)]
        for file in ("talks/asr", "heldout/asr_seen")
    }
    assert not {*said["talks/asr"]} & {*said["heldout/asr_seen"]}
    assert all(new & {*text.split()} for texts in said.values() for text in texts)
    assert new == {word for text in said["talks/asr"] for word in text.split() if word in new}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dialogues.templates": ["play the {horn}"]}, "has a slot horn; there are animal, "),
        ({"dialogues.templates": [""]}, "expected words and {slots}, got ''"),
        ({"dialogues.templates": ["Play it!"]}, "expected words and {slots}, got 'Play it!'"),
        ({"dialogues.templates": ["play {0}  it"]}, "expected words and {slots}"),
        ({"dialogues.templates": ["play {it"]}, "expected words and {slots}"),
        ({"dialogues.slot_values": {"beast": " "}}, "dialogues.slot_values.beast: expected words"),
    ],
)
def test_bad_words(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_corpus("words/corpus", change)

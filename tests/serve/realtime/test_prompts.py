"""Items of a conversation as the turns that the model reads; answers cut where they were heard."""

import numpy as np
import pytest
from helpers.scripted import CODE_0, TTS_END, TTS_PAD, call, groups

from sa2jax import testing
from sa2jax.audio.recording import Recording
from sa2jax.chat import template, tokenizer_files
from sa2jax.chat.template import Audio, Ids, Message, Text
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.chat.toolbox import ToolAnswer
from sa2jax.serve.realtime.items import Conversation, Item, Part
from sa2jax.serve.realtime.prompts import NO_QUESTION, ModelUtterance, as_prompt
from sa2jax.serve.realtime.responder import (
    CallOutputTurn,
    CallTurn,
    SaidTurn,
    SystemTurn,
    UserTurn,
    WrittenTurn,
)

CLIP = Recording(np.ones(1600, np.float32) / 10)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_files.byte_tokenizer(testing.AUDIO_START, 512))


def written(text: str) -> Message:
    return Message("assistant", [Ids(tuple(text.encode()))])


def asked(*pieces) -> Message:
    return template.human_turn(list(pieces))


@pytest.fixture
def spoken(tokenizer):
    """`hello` in 20 codes (0.8 s), then calls of tools."""

    def make(*calls: list[int]) -> ModelUtterance:
        ids = [*groups("hello", range(10, 30)), *(i for each in calls for i in each)]
        return ModelUtterance((template.spoken_turn(ids),), True, tokenizer)

    return make


def test_what_is_said_in_a_row_is_one_turn(tokenizer):
    turns = [UserTurn(("a",)), WrittenTurn("b"), UserTurn(("c",)), UserTurn((CLIP, "d"))]
    prompt = as_prompt(turns, tokenizer)
    assert prompt.rounds == [[asked(Text("a")), written("b")]]
    first, clip, last = prompt.question
    assert (first, last) == (Text("c"), Text("d"))
    assert isinstance(clip, Audio)
    assert clip.source is CLIP


def test_instructions_in_between(tokenizer):
    turns = [SystemTurn("x"), UserTurn(("a",)), WrittenTurn("b"), SystemTurn("y"), UserTurn(("c",))]
    prompt = as_prompt(turns, tokenizer)
    system = [Message("system", text) for text in "xy"]
    assert prompt.rounds == [[system[0]], [asked(Text("a")), written("b"), system[1]]]
    assert prompt.question == [Text("c")]


@pytest.mark.parametrize("turns", [[], [SystemTurn("x")], [WrittenTurn("b")]])
def test_nobody_has_asked(tokenizer, turns):
    assert as_prompt(turns, tokenizer).question == [*NO_QUESTION]


def test_an_answer_to_nothing_stands_behind_an_empty_question(tokenizer):
    prompt = as_prompt([WrittenTurn("b"), UserTurn(("c",))], tokenizer)
    assert prompt.rounds == [[asked(*NO_QUESTION), written("b")]]


def test_tools(tokenizer, spoken):
    said = spoken(call("search"))
    prompt = as_prompt(
        [UserTurn(("a",)), SaidTurn(said), CallOutputTurn("search", "rain")], tokenizer
    )
    assert prompt.rounds == [[asked(Text("a")), *said.turns]]
    assert prompt.question == ToolAnswer("rain")
    two = [CallOutputTurn("search", "rain"), CallOutputTurn("", "sun")]
    prompt = as_prompt([UserTurn(("a",)), CallTurn("search", "{}"), *two], tokenizer)
    assert prompt.question == ToolAnswer("search: rain\ntool_call: sun")
    prompt = as_prompt([*prompt_turns(said), WrittenTurn("b"), UserTurn(("c",))], tokenizer)
    assert prompt.rounds[0][2:] == [template.tool_result_turn("rain"), written("b")]


def prompt_turns(said):
    return [UserTurn(("a",)), SaidTurn(said), CallOutputTurn("search", "rain")]


def test_an_answer_of_a_tool_that_nothing_called_is_read_all_the_same(tokenizer):
    prompt = as_prompt([WrittenTurn("b"), CallOutputTurn("", "rain")], tokenizer)
    assert prompt.rounds[0][-1] == template.tool_result_turn("rain")
    assert prompt.question == [*NO_QUESTION]


def test_special_tokens_stay_text(tokenizer):
    turns = [UserTurn(("a",)), WrittenTurn("<|EOT|>"), CallTurn("f", '{"a": "</tool_call>"}')]
    _, text, call_turn = as_prompt(turns, tokenizer).rounds[0]
    special = tokenizer.special
    assert special.eot not in text.content[0].ids
    assert call_turn.content[0].ids.count(special.tool_call_end) == 1


# --- what was heard ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "codes", "text"),
    [
        (0, 0, ""),
        (0.039, 0, ""),
        (0.04, 1, "h"),
        (0.2, 5, "he"),
        (0.8, 20, "hello"),
        (9, 20, "hello"),
    ],
)
def test_exactly_the_codes_that_were_heard(spoken, seconds, codes, text):
    cut = spoken(call("search")).until(seconds)
    assert cut.text == text
    assert cut.counts[1] == codes
    (turn,) = cut.turns
    ids = turn.content[-1].ids
    assert [i - CODE_0 for i in ids if CODE_0 <= i < CODE_0 + 208] == [*range(10, 10 + codes)]
    assert ids[-1] == TTS_END
    assert len([i for i in ids if i != TTS_PAD]) <= 26


def test_of_an_answer_in_steps(tokenizer, spoken):
    first = spoken(call("search")).turns[0]
    input_turn = template.tool_result_turn("error: none")
    second = template.spoken_turn(groups("bye", range(40, 52)))
    said = ModelUtterance((first, input_turn, second), True, tokenizer)
    assert said.text == "hello\nbye"
    assert said.until(0.5).turns == spoken().until(0.5).turns
    assert said.until(0.8 + 0.16).turns[:2] == (first, input_turn)
    assert said.until(0.8 + 0.16).text == "hello\nb"
    assert said.until(9).text == "hello\nbye"


def test_calls_can_be_left_out(tokenizer, spoken):
    assert spoken(call("search")).without_calls().turns == spoken().turns
    assert spoken().without_calls().turns == spoken().turns
    ids = tuple([*b"wait", *call("search")])
    said = ModelUtterance((Message("assistant", [Ids(ids)]),), False, tokenizer)
    assert said.text == "wait"
    assert said.without_calls().turns == (written("wait"),)


# --- items ---------------------------------------------------------------------------------------


def item(name: str, kind="function_call", **fields) -> Item:
    return Item(name, kind, name=f"tool {name}", response_id="r", arguments="{}", **fields)


@pytest.fixture
def said(spoken):
    """A conversation in which a message and two calls are one answer, with an item in between."""
    talk = Conversation()
    parts = [item("m", "message", role="assistant", parts=[Part("output_audio")]), item("a")]
    talk.add(parts[0])
    talk.add(Item("u", "message", role="user", parts=[Part("input_text", "wait")]))
    for each in [*parts[1:], item("b")]:
        talk.add(each)
        parts += [each] if each not in parts else []
    utterance = spoken(call("a"), call("b"))
    talk.keep_utterance("r", utterance, parts)
    return talk, utterance


def test_an_answer_is_one_turn(said):
    talk, utterance = said
    first, user = talk.turns()
    assert first.utterance is utterance
    assert user.parts == ("wait",)


def test_what_is_left_of_an_answer(said):
    talk, utterance = said
    talk.remove("a")
    first, call_b, _ = talk.turns()
    assert first.utterance.turns == utterance.without_calls().turns
    assert call_b == CallTurn("tool b", "{}")
    talk.get("m", "").heard = 0.2
    assert talk.turns()[0].utterance.text == "he"
    talk.remove("m")
    assert [type(turn) for turn in talk.turns()] == [UserTurn, CallTurn]


def test_old_sound_is_forgotten():
    talk = Conversation(max_heard=0.25, max_speech=1.0)
    for name in "abc":
        talk.add(Item(name, "message", role="user", parts=[Part("input_audio", recording=CLIP)]))
    assert [turn.parts for turn in talk.turns()] == [(CLIP,), (CLIP,)]
    for name in "de":
        part = Part("output_audio", speech=bytearray(48_000 * 3 // 4))
        talk.add(Item(name, "message", role="assistant", parts=[part]))
    assert [len(each.parts[0].speech) for each in talk][3:] == [0, 36_000]

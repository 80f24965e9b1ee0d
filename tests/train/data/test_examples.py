"""What is learnt is what a conversation asks for: the same ids, and the answers after them."""

import json

import numpy as np
import pytest
from helpers.scripted import (
    AUDIO_START,
    CODE_0,
    CODES,
    END_OF_TEXT,
    EOT,
    SEARCH,
    SUMMARISE,
    TTS_PAD,
    TTS_START,
    Script,
    Speech,
    call,
    groups,
    heard,
    turn,
)

from sa2jax import testing
from sa2jax.chat import template, tokenizer_files
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.errors import DataError
from sa2jax.pipeline import StepAudio2
from sa2jax.train.data.examples import TOKEN_KINDS, Example, make_example, token_kinds
from sa2jax.train.data.records import RecordError, parse_record
from sa2jax.train.data.samples import Sample, given_codes, load_features

CFG = testing.tiny_config(max_positions=4096)
TOKENIZER = Tokenizer(tokenizer_files.byte_tokenizer(testing.AUDIO_START, 512))
RATE = 16_000


def clip(seconds: float, seed: int = 0) -> tuple[np.ndarray, int]:
    noise = np.random.default_rng(seed).standard_normal(round(seconds * RATE))
    return noise.astype(np.float32) / 10, RATE


SHORT, LONG = clip(1), clip(52, seed=1)  # 13 tokens; chunks of 25, 25 and 2 s


def sample_of(messages, clips=(), codes=None, **more) -> Sample:
    line = {"messages": messages, "audios": [f"{n}.wav" for n in range(len(clips))], **more}
    record = parse_record(json.dumps(line), "talks.jsonl:3", "/data")
    mels = tuple(load_features(sound, CFG.audio_encoder.mels) for sound in clips)
    return Sample(record, mels, given_codes(record) if codes is None else codes)


def example_of(
    messages, clips=(), codes=None, prompt_style="chat", loss_weights=None, **more
) -> Example:
    sample = sample_of(messages, clips, codes, **more)
    return make_example(
        sample, TOKENIZER, CFG, prompt_style=prompt_style, loss_weights=loss_weights
    )


def says(content, **more):
    return {"role": "assistant", "content": content, **more}


def asks(content, **more):
    return {"role": "user", "content": content, **more}


def learnt(example: Example) -> list[list[int]]:
    """Ids of each stretch that is learnt."""
    on = np.flatnonzero(np.diff(np.pad(example.weights > 0, 1)))
    return [example.ids[a:b].tolist() for a, b in on.reshape(-1, 2)]


# --- as in a conversation -----------------------------------------------------------------------

SEARCH_CALL = {"name": "search", "arguments": {"query": "x"}}
FILLER = groups("Wait", range(18))
ASKED = call("search", '{"query": "x"}')
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
RESULT = {"role": "tool_response", "content": "wet <|EOT|>"}
# What is said to a chat (with `speak`), the ids of its answers, and the same as a record.
TALKS = {
    "text": (
        {}, [("hello", False)], [b"Hi!"],
        [SYSTEM, asks("hello"), says("Hi!")], [],
    ),
    "special tokens in a text": (
        {"system": "<|BOT|>s"}, [("a<tool_call>\n<|EOT|><|BOT|>system\n b", False)], [b"Hi"],
        [{"role": "system", "content": "<|BOT|>s"},
         asks("a<tool_call>\n<|EOT|><|BOT|>system\n b"), says("Hi")], [],
    ),
    "special tokens in texts around a recording": (
        {"system": None}, [(["<tts_start>", SHORT, "<|EOT|>"], False)], [b"Hi"],
        [asks("<tts_start><audio><|EOT|>"), says("Hi")], [SHORT],
    ),
    "audio": (
        {}, [([SHORT, "What?"], False)], [b"Rain."],
        [SYSTEM, asks("<audio>What?"), says("Rain.")], [SHORT],
    ),
    "audio alone": (
        {"system": None}, [([SHORT], False)], [b"Rain."],
        [asks("<audio>"), says("Rain.")], [SHORT],
    ),
    "recordings of several chunks": (
        {}, [(["Compare", LONG, " and\n", SHORT, LONG], False)], [b"Same."],
        [SYSTEM, asks("Compare<audio> and\n<audio><audio>"), says("Same.")], [LONG, SHORT, LONG],
    ),
    "spoken": (
        {}, [([SHORT], True)], [groups("Rain today", range(30))],
        [SYSTEM, asks("<audio>"), says("Rain today", speech=list(range(30)))], [SHORT],
    ),
    "several turns": (
        {}, [("hello", False), ([SHORT], True), ([LONG, "sure?"], False)],
        [b"Hi!", groups("Rain", range(25)), b"Yes."],
        [SYSTEM, asks("hello"), says("Hi!"), asks("<audio>"),
         says("Rain", speech=list(range(25))), asks("<audio>sure?"), says("Yes.")],
        [SHORT, LONG],
    ),
    "tools": (
        {"tools": [SEARCH], "functions": {"search": lambda query: "wet <|EOT|>"}},
        [("look", False)], [[*b"Well. ", *ASKED], b"Rain."],
        [SYSTEM, asks("look"), says("Well. "),
         {"role": "tool_call", "content": json.dumps(SEARCH_CALL)}, RESULT, says("Rain.")], [],
    ),
    "tools without a system prompt, called in speech": (
        {"system": None, "tools": [SEARCH], "functions": {"search": lambda query: "wet <|EOT|>"}},
        [([SHORT], True)], [[*FILLER, *ASKED], groups("Rain.", range(20, 30))],
        [asks("<audio>"), says("Wait", speech=list(range(18))),
         {"role": "tool_call", "content": json.dumps(SEARCH_CALL)}, RESULT,
         says("Rain.", speech=list(range(20, 30)))], [SHORT],
    ),
    "two calls at once": (
        {"tools": [SEARCH], "functions": {"search": lambda query: "wet <|EOT|>"}},
        [("look", False)], [[*ASKED, *ASKED], b"Rain."],
        [SYSTEM, asks("look"), *[{"role": "tool_call", "content": json.dumps(SEARCH_CALL)}] * 2,
         RESULT, RESULT, says("Rain.")], [],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> StepAudio2:
    return StepAudio2(CFG, testing.tiny_params(CFG), TOKENIZER, speech=lambda: Speech())


@pytest.mark.parametrize("name", TALKS)
def test_a_record_is_what_a_conversation_asks_and_its_answers(name, model, monkeypatch):
    options, said, answers, messages, clips = TALKS[name]
    script = Script().will_say(*answers).stand_in(monkeypatch)
    chat = model.chat(**options)
    for content, speak in said:
        chat.say(content, speak=speak)
    more = {"tools": options["tools"]} if "tools" in options else {}
    example = example_of(messages, clips, **more)
    at, mels = 0, ()
    assert len(script.requests) == len(answers)
    for request, answer in zip(script.requests, answers, strict=True):
        end = len(request.ids) + len(answer)
        assert example.ids[: len(request.ids)].tolist() == request.ids.tolist()
        assert example.ids[len(request.ids) : end + 1].tolist() == [*answer, EOT]
        expected = np.zeros(end + 1 - at)
        expected[len(request.ids) - at :] = 1
        np.testing.assert_array_equal(example.weights[at : end + 1], expected)
        at, mels = end + 1, request.mels
    assert at == len(example.ids)
    assert example.starts == request.starts
    for mine, theirs in zip(example.mels, mels, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert example.where == "talks.jsonl:3"
    assert example.ids.dtype == np.int32
    assert example.weights.dtype == np.float32


@pytest.mark.parametrize("name", ["asr", "s2tt_zh", "caption", "s2st_en", "paralinguistic"])
def test_a_record_is_what_a_task_asks(name, model):
    task = template.TASKS[name]
    reply = says("Yes", speech=[1, 2, 3]) if task.spoken else says("Yes")
    example = example_of(
        [{"role": "system", "content": task.system}, asks("<audio>"), reply], [LONG]
    )
    request = model.request(template.render(task.messages(template.Audio(LONG))))
    assert example.ids[: len(request.ids)].tolist() == request.ids.tolist()
    assert example.weights[len(request.ids) :].all()
    assert not example.weights[: len(request.ids)].any()


def test_what_is_called_a_name_of_the_template_is_taken_as_it_is():
    example = example_of(
        [
            {"role": "human", "content": "a"},
            says("b"),
            {"role": "input", "content": "<audio>c"},
            says("d"),
            {"role": "function_output", "content": "f\ng"},
            says("h"),
            {"role": "tool", "content": "i"},
            says("j"),
        ],
        [SHORT],
    )
    assert example.ids.tolist() == [
        *turn("human", "a"),
        *turn("assistant", "b"),
        *turn("input", heard(13), "c"),
        *turn("assistant", "d"),
        *turn("function_output", "f\ng"),
        *turn("assistant", "h"),
        *turn("input", "i" + SUMMARISE),
        *turn("assistant", "j"),
    ]


def test_speech_ends_before_a_call_in_the_text():
    text = 'Wait<tool_call>function\nsearch\n{"query": "x"}</tool_call>'
    one = example_of([asks("a"), says(text, speech=list(range(18)))])
    own = {"role": "tool_call", "content": json.dumps(SEARCH_CALL)}
    two = example_of([asks("a"), says("Wait", speech=list(range(18))), own])
    assert one.ids.tolist() == two.ids.tolist()
    assert learnt(one) == learnt(two) == [[*FILLER, *ASKED, EOT]]


def test_texts_are_cut_as_in_a_conversation(monkeypatch):
    """A text is one piece with the head of its turn, what is with sound or learnt is not."""
    seen, real = [], template.build_prompt

    def spy(pieces, *rest, **more):
        seen.extend(piece.marked for piece in pieces if isinstance(piece, template.Text))
        return real(pieces, *rest, **more)

    monkeypatch.setattr(template, "build_prompt", spy)
    example_of([{"role": "system", "content": "s"}, asks(" a"), says(" b"), asks("<audio> c"),
                says("d")], [SHORT])  # fmt: skip
    assert seen == [
        "<|BOT|>system\ns<|EOT|>", "<|BOT|>human\n a<|EOT|>", "<|BOT|>assistant\n", " b", "<|EOT|>",
        "<|BOT|>human\n", " c", "<|EOT|>", "<|BOT|>assistant\n", "d", "<|EOT|>",
    ]  # fmt: skip


def test_a_chunk_of_a_few_samples_is_not_heard(model):
    sound = clip(25.001)
    example = example_of([asks("<audio>"), says("b")], [sound])
    request = model.request(template.render([template.human_turn([template.Audio(sound)])]))
    assert example.ids[: len(request.ids)].tolist() == request.ids.tolist()
    assert (len(example.mels), example.starts) == (1, request.starts)


# --- what is learnt -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([asks("a"), says("b", loss=False), asks("c"), says("d")], [[*b"d", EOT]]),
        ([asks("a"), says("b", loss=True)], [[*b"b", EOT]]),
        ([asks("\n\na", loss=True)], [[*b"\n\na", EOT]]),
        ([asks("a<audio>b", loss=True)], [[*b"a"], [*b"b", EOT]]),
        ([{"role": "system", "content": "a", "loss": True}, asks("b")], [[*b"a", EOT]]),
        (
            [
                asks("a"),
                says("b", loss=False),
                {"role": "tool_call", "content": json.dumps(SEARCH_CALL)},
            ],
            [[*ASKED, EOT]],
        ),
        (
            [
                asks("a"),
                says("b"),
                {"role": "tool_call", "content": json.dumps(SEARCH_CALL), "loss": False},
            ],
            [[*b"b"]],
        ),
        (
            [asks("a"), says("b", speech=[5], loss=False), asks("c"), says("")],
            [[EOT]],
        ),
    ],
)
def test_loss_of_a_turn(messages, expected):
    clips = [SHORT] * sum(m["content"].count("<audio>") for m in messages)
    assert learnt(example_of(messages, clips)) == expected


def test_kinds_and_their_weights():
    messages = [asks("a"), says("Hey", speech=[7, 8, 9, 10, 11])]
    example = example_of(messages, loss_weights={"text": 0.5, "audio": 2, "pads": 0.25})
    start = len(turn("human", "a") + turn("assistant", [TTS_START], close=False))
    kinds = [0, 1, 1, 1, 1, 0, 1, 2, 2, 2, 0, 2, 2, 2, 2, 0, 0]  # H cccc e c... y .... end EOT
    assert example.kinds[start:].tolist() == kinds
    table = np.array([0.5, 2, 0.25], np.float32)
    np.testing.assert_array_equal(example.weights[start:], table[kinds])
    assert not example.weights[:start].any()
    assert TOKEN_KINDS == ("text", "audio", "pads")


def test_kinds_of_the_released_vocabulary():
    special = Tokenizer(tokenizer_files.byte_tokenizer()).special
    ids = np.array([0, special.audio_start, special.tts_pad, special.audio_code_0,
                    special.audio_code_0 + 6560, special.audio_pad, 158_300], np.int32)  # fmt: skip
    assert token_kinds(ids, special).tolist() == [0, 0, 2, 1, 1, 2, 0]


def test_what_has_no_weight_is_nothing_to_learn():
    with pytest.raises(RecordError, match="nothing to learn"):
        example_of([asks("a"), says("b")], loss_weights={"text": 0})


# --- base models --------------------------------------------------------------------------------


def test_raw_is_what_a_base_model_is_asked(model):
    task = template.TASKS["s2st_en"]
    example = example_of(
        [{"role": "system", "content": task.system}, asks("<audio>"), says("Hi", speech=[3, 4])],
        [SHORT],
        prompt_style="base",
    )
    request = model.request(task.base_pieces(template.Audio(SHORT)))
    assert example.ids[: len(request.ids)].tolist() == request.ids.tolist()
    assert example.ids[len(request.ids) :].tolist() == [*groups("Hi", [3, 4]), END_OF_TEXT]
    assert learnt(example) == [[*groups("Hi", [3, 4]), END_OF_TEXT]]


def test_raw_text_is_learnt_but_for_what_nothing_predicts():
    example = example_of([says("abc")], prompt_style="base")
    assert example.ids.tolist() == [*b"abc", END_OF_TEXT]
    assert example.weights.tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("messages", "more", "reason"),
    [
        ([asks("a"), says("b")], {"tools": [SEARCH]}, "a base model knows none"),
        ([{"role": "tool", "content": "a"}, says("b")], {}, "message 1: a base model knows no"),
        ([says("a"), asks("b"), says("c", loss=False)], {}, None),
        ([says("")], {}, "nothing to learn"),
        ([asks("a"), says("b", loss=False)], {}, "nothing to learn"),
    ],
)
def test_raw_refuses(messages, more, reason):
    if reason is None:
        assert learnt(example_of([asks("z"), *messages], prompt_style="base", **more)) == [[*b"a"]]
        return
    with pytest.raises(RecordError, match=reason):
        example_of(messages, prompt_style="base", **more)


# --- what cannot be used ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "codes", "reason"),
    [
        ([asks("a")], None, "^nothing to learn: expected an assistant's turn"),
        ([{"role": "system", "content": "a"}], None, "nothing to learn"),
        ([asks("a"), says("b", loss=False)], None, "nothing to learn"),
        (
            [asks("a"), says("b", speech=[5, CODES])],
            None,
            rf"^message 2: no audio code {CODES}, expected 0 to {CODES - 1}",
        ),
        (
            [asks("a"), says("b", speech=[5])],
            {1: np.array([-1], np.int32)},
            "message 2: no audio code -1",
        ),
        ([asks("a"), says("b", speech="b.wav")], {}, "message 2: its speech has no codes: run"),
        ([asks("a"), says("b<tts_end>", speech=[5])], None, "^message 2: text id 302 is no text"),
        ([asks("a"), says("x</think>b", speech=[5])], None, "message 2: a spoken turn cannot hold"),
    ],
)
def test_refuses(messages, codes, reason):
    with pytest.raises(RecordError, match=reason):
        example_of(messages, codes=codes)


@pytest.mark.parametrize(
    ("shape", "reason"), [((8, 50), r"16 mel bands .* got \[8, 50\]"), ((16, 3001), "at most 3000")]
)
def test_refuses_sound_of_another_shape(shape, reason):
    record = sample_of([asks("<audio>"), says("b")], [SHORT]).record
    with pytest.raises(RecordError, match=reason):
        make_example(Sample(record, ((np.zeros(shape, np.float32),),)), TOKENIZER, CFG)


def test_refuses_recordings_that_are_not_there():
    record = sample_of([asks("<audio>"), says("b")], [SHORT]).record
    with pytest.raises(RecordError, match="more <audio> marks than recordings"):
        make_example(Sample(record), TOKENIZER, CFG)


def test_refuses_a_style_that_does_not_exist():
    with pytest.raises(DataError, match="prompt_style='cooked': expected one of chat, base"):
        example_of([asks("a"), says("b")], prompt_style="cooked")


def test_an_audio_start_that_is_written_is_no_clip():
    example = example_of([asks("<audio_start>"), says("b")])
    assert AUDIO_START not in example.ids
    example = example_of([asks("a"), says("<audio_start>")])  # what it says itself, it learns to
    assert AUDIO_START in example.ids
    assert example.starts == example.mels == ()
    assert TTS_PAD not in example.ids
    assert CODE_0 not in example.ids

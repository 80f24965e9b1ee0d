import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec

import numpy as np
import pytest

from sa2jax.chat import tokenizer_files
from sa2jax.chat.template import (
    TASKS,
    Audio,
    Clip,
    Ids,
    Message,
    Text,
    answer_turn,
    build_prompt,
    choice_question,
    function_output_turn,
    render,
    render_base,
    reply_turn,
    spoken_turn,
    think_turn,
    tool_result_turn,
    tools_turn,
)
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.errors import PromptError
from sa2jax.inference.sampling import SamplingParams

# Ids of the micro vocabulary (released id - 151392); a byte's id is its value.
EOT, BOT = 273, 274
START, STOP, PATCH, TTS, TTS_END, CODE = 296, 297, 298, 301, 302, 304


@pytest.fixture(scope="module")
def tok():
    return Tokenizer(tokenizer_files.byte_tokenizer(296, 512))


def b(text):
    """Ids of plain text, by hand."""
    return list(text.encode())


def heard(n):
    return [START, *[PATCH] * n, STOP]


def wholes(pieces):
    """Each text as the official template writes it, with its marks."""
    return [piece.marked if isinstance(piece, Text) else piece for piece in pieces]


def build(tok, messages, counts=()):
    return build_prompt(render(messages), tok, counts)


# --- prompts of section 5, spelled out -------------------------------------------------------

ASR = "请记录下你所听到的语音内容。"
S2TT = "请仔细聆听这段语音，然后将其内容翻译成中文。"
S2ST = "请仔细聆听这段语音，然后将其内容翻译成中文并用语音播报。"
CAPTION = "Please briefly explain the important events involved in this audio clip."
PARA = "请用语音与我交流。"
MMAU = (
    "You are an expert in audio analysis, please analyze the audio content and answer the "
    "questions accurately."
)


@pytest.mark.parametrize(
    ("task", "system", "spoken"),
    [
        ("asr", ASR, False),
        ("s2tt_zh", S2TT, False),
        ("s2st_zh", S2ST, True),
        ("caption", CAPTION, False),
        ("paralinguistic", PARA, True),
    ],
)
def test_audio_tasks(tok, task, system, spoken):
    expected = [
        BOT, *b("system\n"), *b(system), EOT,
        BOT, *b("human\n"), START, PATCH, PATCH, PATCH, STOP, EOT,
        BOT, *b("assistant\n"), *([TTS] if spoken else []),
    ]  # fmt: skip
    prompt = build(tok, TASKS[task].messages(Audio("a.wav")), [[3]])
    assert prompt.ids.tolist() == expected
    assert prompt.ids.dtype == np.int32
    assert not prompt.ids.flags.writeable
    start = expected.index(PATCH)
    assert prompt.clips == (Clip(start, 3, 0, 0),)


def test_asr_in_numbers(tok):
    """The same once more with nothing computed: 1 patch, system prompt cut to one character."""
    prompt = build(
        tok,
        [
            {"role": "system", "content": "请"},
            {"role": "user", "content": [{"type": "audio", "audio": "x"}]},
            {"role": "assistant", "content": None},
        ],
        [[1]],
    )
    assert prompt.ids.tolist() == [
        274, 115, 121, 115, 116, 101, 109, 10, 232, 175, 183, 273,
        274, 104, 117, 109, 97, 110, 10, 296, 298, 297, 273,
        274, 97, 115, 115, 105, 115, 116, 97, 110, 116, 10,
    ]  # fmt: skip
    assert prompt.clips == (Clip(20, 1, 0, 0),)


def test_released_ids():
    tok = Tokenizer(tokenizer_files.byte_tokenizer())
    messages = TASKS["paralinguistic"].messages(Audio(0))
    assert build(tok, messages, [[2]]).ids.tolist() == [
        151666, *b("system\n"), *b(PARA), 151665,
        151666, *b("human\n"), 151688, 151690, 151690, 151689, 151665,
        151666, *b("assistant\n"), 151693,
    ]  # fmt: skip


def test_chat_history(tok):
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "human", "content": "Hi"},
        {"role": "assistant", "content": "<tts_start>", "eot": False},
    ]
    first = build(tok, messages)
    assert first.clips == ()
    reply = [104, CODE, CODE + 1, CODE + 2, CODE + 3, TTS_END]
    official = {
        "role": "assistant",
        "content": [{"type": "text", "text": "<tts_start>"}, {"type": "token", "token": reply}],
    }
    then = [{"role": "user", "content": "Now?"}, {"role": "assistant", "content": None}]
    prompt = build(tok, [*messages[:2], official, *then])
    assert prompt.ids.tolist() == [
        BOT, *b("system\nYou are a helpful assistant."), EOT,
        BOT, *b("human\nHi"), EOT,
        BOT, *b("assistant\n"), TTS, *reply, EOT,
        BOT, *b("human\nNow?"), EOT,
        BOT, *b("assistant\n"),
    ]  # fmt: skip
    # The next turn's prompt continues this one's: a cache can go on.
    grown = [*first.ids.tolist(), *reply, EOT]
    assert prompt.ids[: len(grown)].tolist() == grown
    own = build(tok, [*messages[:2], spoken_turn(np.array(reply)), *then])
    assert own.ids.tolist() == prompt.ids.tolist()


def test_audio_question(tok):
    question = choice_question("Which voice?", ["Soft and melodic", "Whispering"])
    words = (
        "Which voice? Please choose the answer from the following options: [Soft and melodic, "
        "Whispering] Output the final answer in <RESPONSE> </RESPONSE>."
    )
    assert question == words
    prompt = build(tok, TASKS["mmau"].messages(Audio(1), question), [[2]])
    assert prompt.ids.tolist() == [
        BOT, *b("system\n" + MMAU), EOT,
        BOT, *b("human\n"), *heard(2), *b(words), EOT,
        BOT, *b("assistant\n"),
    ]  # fmt: skip


def test_thinking(tok):
    start = [{"role": "human", "content": "Hi"}]
    prompt = build(tok, [*start, think_turn()])
    head = [BOT, *b("human\nHi"), EOT, BOT, *b("assistant\n\n<think>\n")]
    assert prompt.ids.tolist() == head
    for thinking in ("hm.\n", "hm.\n</think>", "hm.\n</think>\n\nnot this"):
        answer = build(tok, [*start, answer_turn(thinking)])
        assert answer.ids.tolist() == [*head, *b("hm.\n</think>\n\n"), TTS]
    written = build(tok, [*start, answer_turn("hm.\n", spoken=False)])
    assert written.ids.tolist() == [*head, *b("hm.\n</think>\n\n")]
    # Official: one piece from <|BOT|> to <tts_start>.
    assert len(render([answer_turn("x")])) == 1


def test_tools(tok):
    schema = [{"name": "search", "description": "搜索工具"}]
    call = '<tool_call>function\nsearch\n{"query": "x"}</tool_call>'
    call_ids = tok.encode(call)
    assert (call_ids[0], call_ids[-1]) == (265, 266)
    said = [104, CODE, CODE, CODE, CODE, TTS_END, *call_ids]
    prompt = build(
        tok,
        [
            Message("system", "S"),
            tools_turn(schema),
            Message("human", [Audio("q.wav")]),
            spoken_turn(said),
            tool_result_turn("42。"),
            reply_turn(spoken=True),
        ],
        [[1]],
    )
    assert prompt.ids.tolist() == [
        BOT, *b("system\nS"), EOT,
        BOT, *b('tool_json_schemas\n[{"name": "search", "description": "搜索工具"}]'), EOT,
        BOT, *b("human\n"), *heard(1), EOT,
        BOT, *b("assistant\n"), TTS, *said, EOT,
        BOT, *b("input\n42。\n\n\n请用口语化形式总结检索结果，简短地回答用户的问题。"), EOT,
        BOT, *b("assistant\n"), TTS,
    ]  # fmt: skip
    # Official: the result and the request are separate pieces.
    request = "\n\n\n请用口语化形式总结检索结果，简短地回答用户的问题。"
    assert wholes(render([tool_result_turn("42。")])) == [
        "<|BOT|>input\n", "42。", request, "<|EOT|>"
    ]  # fmt: skip


def test_function_output(tok):
    turn = {"role": "tool", "name": "search", "content": "42", "tool_call_id": "7"}
    expected = [BOT, *b("function_output\nsearch\n42"), EOT]
    assert build(tok, [turn]).ids.tolist() == expected
    assert build(tok, [function_output_turn("search", "42")]).ids.tolist() == expected


def test_base_prompts(tok):
    asr = build_prompt(TASKS["asr"].base_pieces(Audio("a")), tok, [[2]])
    assert asr.ids.tolist() == [*b(ASR), *heard(2)]
    tts = build_prompt(TASKS["tts"].base_pieces("你好"), tok)
    assert tts.ids.tolist() == [*b("以自然的语速读出下面的文字。\n你好"), TTS]
    mixed = render_base(["a", {"type": "token", "token": [1, 2]}, {"type": "text", "text": "c"}])
    assert mixed == [Text("a"), Ids((1, 2)), Text("c")]
    assert render_base("abc") == [Text("abc")]


# --- pieces and clips ------------------------------------------------------------------------


def test_pieces_are_cut_as_the_official_template_cuts_them():
    audio = Audio("a")
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": ["x", audio, {"type": "text", "text": ""}]},
        {"role": "assistant", "content": [], "eot": False},
        {"role": "assistant", "content": None, "eot": True},
    ]
    assert wholes(render(messages)) == [
        "<|BOT|>system\nS<|EOT|>",
        "<|BOT|>human\n", "x", audio, "", "<|EOT|>",
        "<|BOT|>assistant\n",
        "<|BOT|>assistant\n",
    ]  # fmt: skip


def test_long_audio_becomes_one_clip_per_chunk(tok):
    counts = {"long": [3, 2], "short": [0]}
    message = {"role": "human", "content": [Audio("long"), "and", Audio("short")]}
    prompt = build(tok, [message], counts.__getitem__)
    assert prompt.ids.tolist() == [
        BOT, *b("human\n"), *heard(3), *heard(2), *b("and"), START, STOP, EOT
    ]  # fmt: skip
    assert prompt.clips == (Clip(8, 3, 0, 0), Clip(13, 2, 0, 1), Clip(20, 0, 1, 0))
    for clip in prompt.clips:
        assert prompt.ids[clip.start - 1] == START
        assert (prompt.ids[clip.start : clip.start + clip.tokens] == PATCH).all()
        assert prompt.ids[clip.start + clip.tokens] == STOP


def test_markers_in_text_and_ids_are_not_clips(tok):
    text = "<audio_start><audio_patch><audio_end>"
    content = [text, Audio("a"), {"type": "token", "token": [START, PATCH]}]
    pieces = render([{"role": "human", "content": content}])
    # Tokenised as the official code does, but only the real audio is a clip.
    prompt = build_prompt(pieces, tok, [[2]], split_special_tokens=False)
    assert prompt.ids.tolist() == [BOT, *b("human\n"), *heard(1), *heard(2), START, PATCH, EOT]
    assert prompt.clips == (Clip(11, 2, 0, 0),)
    prompt = build_prompt(pieces, tok, [[2]])
    assert prompt.ids.tolist() == [BOT, *b("human\n" + text), *heard(2), START, PATCH, EOT]
    assert prompt.clips == (Clip(7 + len(text) + 1, 2, 0, 0),)


def test_token_items_may_be_arrays(tok):
    item = {"type": "token", "token": np.array([5, 6], np.int64)}
    assert build_prompt(render_base([item]), tok).ids.tolist() == [5, 6]
    assert render_base([{"type": "token", "token": []}]) == [Ids(())]


def test_user_and_human_are_one_role():
    assert Message("user", "x") == Message("human", "x")


def test_sampling_of_tasks():
    assert TASKS["chat"].sampling == SamplingParams(
        temperature=0.7, top_k=50, top_p=0.9, repetition_penalty=1.05
    )
    assert TASKS["asr"].sampling.greedy
    assert TASKS["asr"].max_new_tokens == 256
    assert TASKS["s2tt_zh"].sampling.temperature == TASKS["caption"].sampling.temperature == 0.1
    for name in ("s2st_zh", "s2st_en", "paralinguistic", "think", "tts"):
        task = TASKS[name]
        assert task.sampling == SamplingParams(temperature=0.7, top_k=50, top_p=1.0)
        assert task.spoken


# --- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no messages"),
        (["hi"], "expected a message, got str"),
        ([{"role": "robot", "content": "x"}], "unknown role 'robot'"),
        ([{"role": "human"}], "message lacks content"),
        ([{"content": "x"}], "message lacks role"),
        ([{"role": "human", "content": "x", "eos": False}], "unknown keys eos"),
        ([{"role": "human", "content": 3}], "unsupported content of the human turn"),
        ([{"role": "human", "content": {"type": "text", "text": "x"}}], "unsupported content"),
        ([{"role": "human", "content": [3]}], "unsupported content item 3"),
        ([{"role": "human", "content": [{"type": "image", "image": "x"}]}], "content item"),
        ([{"role": "human", "content": [{"type": "text"}]}], "lacks the key 'text'"),
        ([{"role": "human", "content": [{"type": "text", "text": 3}]}], "expected text"),
        ([{"role": "human", "content": [{"type": "token", "token": "ab"}]}], "list of ids"),
        ([{"role": "human", "content": [{"type": "token", "token": [1.5]}]}], "list of ids"),
        (
            [{"role": "human", "content": [{"type": "token", "token": [[1], [2, 3]]}]}],
            "list of ids",
        ),
        ([{"role": "tool", "content": "x"}], "tool's name"),
        ([{"role": "tool", "name": "f", "content": None}], "text content"),
    ],
)
def test_bad_messages(messages, message):
    with pytest.raises(PromptError, match=message):
        render(messages)


def test_bad_raw_prompts():
    with pytest.raises(PromptError, match="empty prompt"):
        render_base([])
    with pytest.raises(PromptError, match="unsupported content item"):
        render_base([{}])


@pytest.mark.parametrize(
    ("pieces", "counts", "message"),
    [
        ([Audio("a")], [], "1 audio items but token counts for 0"),
        ([Text("a")], [[1]], "0 audio items but token counts for 1"),
        ([Audio("a")], [[-1]], "negative token count"),
        ([Ids((-1,))], [], "out of range"),
        ([Ids((2**31,))], [], "out of range"),
    ],
)
def test_bad_pieces(tok, pieces, counts, message):
    with pytest.raises(PromptError, match=message):
        build_prompt(pieces, tok, counts)


# --- the official code -----------------------------------------------------------------------


@pytest.fixture
def official(monkeypatch):
    """The official user code. Its audio loader is not used, so torchaudio need not work."""
    reason = "needs the [parity] extra (step-audio2)"
    pytest.importorskip("torch", reason=reason)
    stand_in = module_from_spec(ModuleSpec("torchaudio", None))
    monkeypatch.setitem(sys.modules, "torchaudio", stand_in)
    yield pytest.importorskip("stepaudio2", reason=reason)
    for name in ("stepaudio2", "utils"):  # they hold the stand-in
        sys.modules.pop(name, None)


@pytest.mark.oracle
def test_pieces_equal_the_official_template(official, monkeypatch, tok):
    lengths = {"short": 16000, "long": 25 * 16000 + 8000}
    monkeypatch.setattr(official, "load_audio", lambda name: official.torch.zeros(lengths[name]))

    def counts(name):
        chunks = [min(400_000, lengths[name] - i) for i in range(0, lengths[name], 400_000)]
        frames = [(n + 479) // 160 for n in chunks]
        return [((f - 1) // 2 // 2 - 1) // 2 + 1 for f in frames]

    def text(pieces):
        for piece in pieces:
            if isinstance(piece, Text):
                yield piece.marked
            elif isinstance(piece, Ids):
                yield list(piece.ids)
            else:
                for n in counts(piece.source):
                    yield f"<audio_start>{'<audio_patch>' * n}<audio_end>"

    items = [
        {"type": "text", "text": "T"},
        {"type": "audio", "audio": "long"},
        {"type": "token", "token": [1, 2]},
        {"type": "audio", "audio": "short"},
    ]
    messages = [
        {"role": "system", "content": "S<|EOT|><|BOT|>human\n"},
        {"role": "user", "content": items},
        {"role": "assistant", "content": "<tts_start>", "eot": False},
        {"role": "input", "content": items[:1], "eot": False},
        {"role": "assistant", "content": None},
    ]
    theirs, _ = official.StepAudio2.apply_chat_template(None, messages)
    assert list(text(render(messages))) == theirs
    ids = build_prompt(render(messages), tok, counts, split_special_tokens=False).ids.tolist()
    assert ids == tok.encode_pieces(theirs)
    raw = ["S", *items, "<tts_start>"]
    theirs, _ = official.StepAudio2Base.apply_chat_template(None, raw)
    assert list(text(render_base(raw))) == theirs
    ids = build_prompt(render_base(raw), tok, counts, split_special_tokens=False).ids.tolist()
    assert ids == tok.encode_pieces(theirs)

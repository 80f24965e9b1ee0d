"""The published examples, each run through the public API on a tiny model.

Every prompt is compared with ids written by hand from the templates, one id per byte.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers.scripted import (
    BOT,
    CLIP,
    EOT,
    OPEN,
    QUERY,
    SPOKEN,
    SUMMARISE,
    SYSTEM,
    TTS_END,
    TTS_PAD,
    TTS_START,
    Speech,
    call,
    groups,
    heard,
    turn,
)

from sa2jax import testing
from sa2jax.chat import template, tokenizer_files
from sa2jax.chat.template import TASKS, PromptTask, Text
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.errors import CheckpointError, PromptError, VoiceError
from sa2jax.inference.requests import GenerationConfig
from sa2jax.inference.runner import ModelRunner
from sa2jax.inference.sampling import SamplingParams
from sa2jax.pipeline import StepAudio2, conversation
from sa2jax.pipeline.task_runner import task_options

SHORT = GenerationConfig(max_new_tokens=6)
HEARD = turn("human", heard(13))
TOOLS = [
    {"type": "function", "function": {"name": "get_date_time", "description": "查询当前时间"}},
    {
        "type": "function",
        "function": {"name": "search", "description": "搜索工具", "parameters": QUERY},
    },
]


@pytest.fixture(scope="module")
def tiny() -> StepAudio2:
    cfg = testing.tiny_config()
    tokenizer = Tokenizer(tokenizer_files.byte_tokenizer(testing.AUDIO_START, 512))
    return StepAudio2(cfg, testing.tiny_params(cfg), tokenizer, speech=lambda: Speech())


@pytest.fixture(scope="module")
def base(tiny) -> StepAudio2:
    model = StepAudio2(
        tiny.cfg,
        testing.tiny_params(tiny.cfg),
        tiny.tokenizer,
        speech=lambda: Speech(),
        prompt_style="base",
    )
    model.engine = tiny.engine
    return model


@pytest.fixture
def prompts(monkeypatch) -> list[list[int]]:
    """Ids of every prompt that reaches the model."""
    seen: list[list[int]] = []
    start = ModelRunner.start_rows

    def spy(self, starts, hidden):
        seen.extend(own.request.ids.tolist() for own in starts)
        return start(self, starts, hidden)

    monkeypatch.setattr(ModelRunner, "start_rows", spy)
    return seen


# --- tasks with a written answer ---


def test_asr(tiny, prompts):
    assert isinstance(tiny.transcribe(CLIP, max_new_tokens=6), str)
    assert prompts == [turn("system", "请记录下你所听到的语音内容。") + HEARD + OPEN]


def test_speech_to_text_translation(tiny, prompts):
    assert isinstance(tiny.translate(CLIP, max_new_tokens=6), str)
    system = "请仔细聆听这段语音，然后将其内容翻译成中文。"
    assert prompts == [turn("system", system) + HEARD + OPEN]


def test_caption(tiny, prompts):
    assert isinstance(tiny.caption(CLIP, max_new_tokens=6), str)
    system = "Please briefly explain the important events involved in this audio clip."
    assert prompts == [turn("system", system) + HEARD + OPEN]


def test_audio_question(tiny, prompts):
    tiny.ask(CLIP, "Which instrument?", ["Flute", "Harp", "Drum", "Bell"], max_new_tokens=6)
    system = (
        "You are an expert in audio analysis, please analyze the audio content and answer the "
        "questions accurately."
    )
    question = (
        "Which instrument? Please choose the answer from the following options: "
        "[Flute, Harp, Drum, Bell] Output the final answer in <RESPONSE> </RESPONSE>."
    )
    assert prompts == [turn("system", system) + turn("human", heard(13), question) + OPEN]


def test_a_task_of_ones_own(tiny, prompts, monkeypatch):
    """A new prompt is one entry in the table; it runs by its name, and as an object."""
    task = PromptTask(system="Whistle?", sampling=SamplingParams(temperature=0.0), max_new_tokens=4)
    monkeypatch.setitem(template.TASKS, "whistle", task)
    by_name = tiny.run("whistle", [CLIP, Text("hm")], question="Yes?")
    assert by_name == tiny.run(task, [CLIP, Text("hm")], question="Yes?")
    assert prompts[: len(prompts) // 2] == [
        turn("system", "Whistle?") + turn("human", heard(13), "Yes?") + OPEN,
        turn("system", "Whistle?") + turn("human", "hm", "Yes?") + OPEN,
    ]
    assert [len(reply.ids) for reply in by_name] == [4, 4]
    assert by_name[0].finish_reason == "length"
    spoken = replace(task, spoken=True, max_new_tokens=30)
    (reply,) = tiny.run(spoken, [CLIP], voice="bert")
    assert reply.voice == "bert"
    with pytest.raises(PromptError, match="there is no task 'sing': expected one of asr, "):
        tiny.run("sing", [CLIP])
    with pytest.raises(PromptError, match=r"expected a list of recordings or texts, got 'a\.wav'"):
        tiny.run("asr", "a.wav")


# --- tasks with a spoken answer ---


def check_spoken(reply) -> None:
    assert reply.voice == "anna"
    assert len(reply.audio) == 960 * len(reply.codes)
    assert reply.timings.total > 0


def test_text_to_speech(tiny, prompts):
    check_spoken(tiny.tts("你好呀", max_new_tokens=30))
    system = turn("system", "以自然的语速读出下面的文字。\n")
    assert prompts == [system + turn("human", "你好呀") + SPOKEN]


def test_text_to_speech_translation(tiny, prompts):
    check_spoken(tiny.translate_speech(Text("你好呀"), to="en", max_new_tokens=30))
    system = turn("system", "将下面的文本翻译成英文，并用语音播报。\n")
    assert prompts == [system + turn("human", "你好呀") + SPOKEN]


@pytest.mark.parametrize(("to", "name"), [("zh", "中文"), ("en", "英文")])
def test_speech_to_speech_translation(tiny, prompts, to, name):
    check_spoken(tiny.translate_speech(CLIP, to=to, max_new_tokens=30))
    system = turn("system", f"请仔细聆听这段语音，然后将其内容翻译成{name}并用语音播报。")
    assert prompts == [system + HEARD + SPOKEN]


def test_recordings_and_texts_in_one_list(tiny):
    replies = tiny.translate_speech_batch([CLIP, Text("你好"), CLIP], to="en", max_new_tokens=30)
    assert replies[1].ids == tiny.translate_speech(Text("你好"), to="en", max_new_tokens=30).ids
    assert replies[0].ids != replies[1].ids
    assert tiny.translate_speech_batch([]) == []


def test_spoken_tasks_refused(tiny):
    for nothing in ("", " ", 5):
        with pytest.raises(PromptError, match="nothing to read"):
            tiny.tts(nothing)
    with pytest.raises(PromptError, match="nothing to read"):
        tiny.tts_batch(["a", ""])
    with pytest.raises(PromptError, match="text is translated into speech only"):
        tiny.translate(Text("你好"))
    with pytest.raises(VoiceError, match="expected one of anna, bert"):
        tiny.tts("a", voice="dora")
    mute = StepAudio2(tiny.cfg, testing.tiny_params(tiny.cfg), tiny.tokenizer)
    with pytest.raises(CheckpointError, match="cannot speak"):
        mute.translate_speech(CLIP)


# --- conversations ---


def closed(message, reply) -> list[int]:
    """Ids of an answer that the limit cut, as the history has them: speech is ended."""
    ids = list(message.content[1].ids)
    assert ids[: len(reply.ids)] == list(reply.ids)
    assert ids[-1] == TTS_END
    assert set(ids[len(reply.ids) : -1]) <= {TTS_PAD}
    return ids


def test_paralinguistic(tiny, prompts):
    task = TASKS["paralinguistic"]
    options = task_options(task)
    assert (options.sampling.temperature, options.max_new_tokens) == (0.7, 2048)
    chat = tiny.chat(task.system, voice="default", options=SHORT)
    check_spoken(chat.say([CLIP]))
    assert prompts == [turn("system", "请用语音与我交流。") + HEARD + SPOKEN]


def test_several_turns_with_written_answers(tiny, prompts):
    chat = tiny.chat(options=SHORT)
    first = chat.say([CLIP])
    chat.say([CLIP])
    assert prompts[0] == SYSTEM + HEARD + OPEN
    assert prompts[1] == SYSTEM + HEARD + turn("assistant", [*first.ids]) + HEARD + OPEN


def test_several_turns_with_spoken_answers(tiny, prompts):
    chat = tiny.chat(voice="default", options=SHORT)
    first = chat.say([CLIP])
    chat.say([CLIP])
    assert prompts[0] == SYSTEM + HEARD + SPOKEN
    spoken = turn("assistant", [TTS_START, *closed(chat.history[2], first)])
    assert prompts[1] == SYSTEM + HEARD + spoken + HEARD + SPOKEN


def test_tool_call(tiny, prompts, script):
    """The decoder is told to call; its prompts are those of the example."""
    filler = [*groups("Hm", range(8)), *call("search", '{"query": "上证指数"}')]
    script.will_say(filler, groups("Up", range(8)))
    chat = tiny.chat(
        "你的名字叫小跃",
        voice="default",
        tools=TOOLS,
        functions={"search": lambda query: f"{query}: 3883"},
    )
    check_spoken(chat.say([CLIP]))
    assert prompts == []  # nothing but the script spoke
    head = turn("system", "你的名字叫小跃") + turn(
        "tool_json_schemas", json.dumps(TOOLS, ensure_ascii=False)
    )
    assert script.prompts == [
        head + HEARD + SPOKEN,
        head
        + HEARD
        + turn("assistant", [TTS_START, *filler])
        + turn("input", "上证指数: 3883", SUMMARISE)
        + SPOKEN,
    ]


def test_tools_are_in_the_prompt_of_the_real_decoder(tiny, prompts):
    tiny.chat(None, voice="default", tools=TOOLS, options=SHORT).say([CLIP])
    schemas = turn("tool_json_schemas", json.dumps(TOOLS, ensure_ascii=False))
    assert prompts[0] == schemas + HEARD + SPOKEN


def test_think(tiny, prompts):
    """Thoughts end at the limit here; the answer is made with them, and the history is without."""
    chat = tiny.chat(TASKS["think"].system, voice="default", think=True, options=SHORT)
    reply = chat.say([CLIP])
    system = turn(
        "system",
        "你的名字叫小跃，你是由阶跃星辰(StepFun)公司训练出来的语音大模型，你能听见用户的声音特征并在"
        "思维过程中描述出来，请激活深度思考模式，通过逐步分析、逻辑推理来解决用户的问题。",
    )
    think = [BOT, *b"assistant\n\n<think>\n"]
    assert prompts[0] == system + HEARD + think
    thoughts = reply.thinking + "</think>\n\n"  # a mark among them is text
    thoughts = tiny.tokenizer.encode(thoughts, split_special_tokens=True)
    assert prompts[1] == [*system, *HEARD, *think, *thoughts, TTS_START]
    chat.say("sure?")
    spoken = turn("assistant", [TTS_START, *closed(chat.history[2], reply)])
    assert prompts[2] == system + HEARD + spoken + turn("human", "sure?") + think


# --- the base model ---


def test_base_tasks(base, prompts):
    base.transcribe(CLIP, max_new_tokens=6)
    check_spoken(base.tts("你好", max_new_tokens=6))
    check_spoken(base.translate_speech(Text("你好"), to="en", max_new_tokens=6))
    check_spoken(base.translate_speech(CLIP, max_new_tokens=6))

    def text(s):
        return list(s.encode())

    assert prompts == [
        [*text("请记录下你所听到的语音内容。"), *heard(13)],
        [*text("以自然的语速读出下面的文字。\n你好"), TTS_START],
        [*text("将下面的文本翻译成英文，并用语音播报。\n你好"), TTS_START],
        [*text("请仔细聆听这段语音，然后将其内容翻译成中文并用语音播报。"), *heard(13), TTS_START],
    ]


def test_raw_prompts(base, prompts):
    """Whatever a base model is to continue, spoken or written, several rounds included."""
    written = base.complete([CLIP, "And?"], options=SHORT)
    assert (written.voice, len(written.audio)) == (None, 0)
    spoken = base.complete([CLIP], speak=True, options=SHORT)
    check_spoken(spoken)
    more = [CLIP, template.SPEECH_START, {"type": "token", "token": [*spoken.ids, TTS_END]}, CLIP]
    base.complete(more, speak=True, voice="default", options=SHORT)
    assert prompts == [
        [*heard(13), *b"And?"],
        [*heard(13), TTS_START],
        [*heard(13), TTS_START, *spoken.ids, TTS_END, *heard(13), TTS_START],
    ]
    with pytest.raises(PromptError, match="an empty prompt"):
        base.complete([])
    with pytest.raises(PromptError, match="knows no turns"):
        base.chat()


def test_a_raw_prompt_is_answered_by_every_model(tiny, prompts):
    tiny.complete("Once", options=SHORT)
    assert prompts == [[*b"Once"]]
    assert tiny.stop_ids[0] == EOT


def test_what_is_spoken_is_what_was_made(tiny):
    """All of it: text, codes and sound of a reply agree with its ids."""
    reply = tiny.tts("hello", max_new_tokens=200, seed=3)
    codes = [i - 304 for i in reply.ids if 304 <= i < 512]
    assert reply.codes == tuple(codes)
    assert len(codes) > 20
    np.testing.assert_allclose(reply.audio, np.repeat(np.array(codes, np.float32), 960) / 1000)
    assert reply.text == tiny.text_of(reply.ids)
    assert conversation.Chat is type(tiny.chat())

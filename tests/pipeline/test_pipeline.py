"""Tasks and conversations as a user calls them, on a tiny model with one token per byte."""

import io
import shutil
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from helpers.scripted import (
    AUDIO_END,
    AUDIO_START,
    BOT,
    CODE_0,
    END_OF_TEXT,
    EOT,
    TTS_END,
    heard,
    turn,
)
from helpers.sound import voice

import sa2jax
from sa2jax import audio, testing
from sa2jax.chat import tokenizer_files
from sa2jax.chat.template import TASKS
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.convert.hf import convert
from sa2jax.errors import (
    AudioError,
    CheckpointError,
    ConfigError,
    PromptError,
    ShardingError,
    TokenizerError,
)
from sa2jax.inference.programs import TRACES
from sa2jax.inference.requests import Completion, GenerationConfig
from sa2jax.pipeline import StepAudio2, conversation, reply
from sa2jax.pipeline import model as pipeline

RATE = audio.SAMPLE_RATE
SHORT = GenerationConfig(max_new_tokens=8)


def speech(seconds: float, number: int = 0, extra: int = 0) -> np.ndarray:
    return voice(seconds + extra / RATE, start=1.3 * number)


@pytest.fixture(scope="module", autouse=True)
def no_cache_on_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "enable_compilation_cache", lambda: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    cfg = testing.tiny_config(max_positions=2048)
    return testing.save_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model", cfg)


@pytest.fixture(scope="module")
def model(folder) -> StepAudio2:
    return StepAudio2.from_pretrained(folder)


class Script:
    """Stands in for the engine: records requests, replies as told."""

    def __init__(self, *replies: bytes | list[int]):
        self.replies = [list(reply) for reply in replies]
        self.requests, self.options, self.prompt_indices = [], [], []

    def generate(self, requests, options, *, prompt_indices, decode_text, progress):
        self.requests += requests
        self.options.append(options)
        self.prompt_indices.append(list(prompt_indices))
        made = [self.replies.pop(0) if self.replies else b"" for _ in requests]
        if progress is not None:
            progress(len(made), len(made))
        return [[Completion(tuple(ids), "stop")] for ids in made]

    @property
    def prompts(self) -> list[list[int]]:
        return [request.ids.tolist() for request in self.requests]


@pytest.fixture
def scripted(model, monkeypatch):
    """Makes the model reply as told; gives what it was asked."""

    def use(*replies, model=model) -> Script:
        script = Script(*replies)
        monkeypatch.setattr(model, "engine", script)
        return script

    return use


# --- real replies ---


@pytest.fixture(scope="module")
def recordings() -> list[tuple[np.ndarray, int]]:
    """1 s, 30 s, 95 s, and 25 s with a few samples more."""
    clips = speech(1), speech(30, 1), speech(95, 2), speech(25, 3, extra=5)
    return [(clip, RATE) for clip in clips]


@pytest.fixture(scope="module")
def texts(model, recordings) -> list[str]:
    return model.transcribe_batch(recordings, max_new_tokens=8)


def test_transcribe_recordings_of_any_length(texts):
    assert len(texts) == 4
    assert all(isinstance(text, str) and text for text in texts)
    assert len(set(texts)) == 4


def test_transcribe_one_recording_as_in_a_list(model, recordings, texts):
    assert model.transcribe(recordings[0], max_new_tokens=8) == texts[0]


def test_repeated_calls_trace_nothing(model, recordings, texts):
    first = model.transcribe(recordings[0], max_new_tokens=8)
    before = Counter(TRACES)
    assert model.transcribe((speech(1, 7), RATE), max_new_tokens=8) != first
    assert model.transcribe((speech(0.9), RATE), max_new_tokens=5)
    assert before == TRACES


# --- sources ---


def test_every_form_of_a_recording_is_heard_alike(scripted, model, tmp_path):
    samples = speech(1)
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    data = (tmp_path / "a.wav").read_bytes()
    stereo = np.stack([samples, speech(1, 9)])  # the first channel counts
    forms = [
        tmp_path / "a.wav",
        str(tmp_path / "a.wav"),
        data,
        io.BytesIO(data),
        (samples, RATE),
        (stereo, RATE),
    ]
    script = scripted()
    model.transcribe_batch(forms)
    for request in script.requests:
        np.testing.assert_array_equal(request.ids, script.requests[0].ids)
        np.testing.assert_array_equal(request.mels[0], script.requests[0].mels[0])


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
def test_other_rates(scripted, model, rate):
    time = np.arange(rate) / rate
    tone = np.sin(2 * np.pi * 440 * time).astype(np.float32)
    script = scripted()
    model.run("caption", [(np.stack([tone, -tone]), rate), (tone, rate)])
    first, second = script.requests
    assert first.counts == (int(audio.num_tokens(audio.num_frames(RATE))),)
    np.testing.assert_array_equal(first.mels[0], second.mels[0])
    assert first.mels[0].shape == (model.cfg.audio_encoder.mels, audio.num_frames(RATE))


def test_few_samples_after_25_seconds(scripted, model):
    """The tail has its markers in the prompt, as in the official code, but no frames."""
    script = scripted()
    model.caption((speech(25, extra=5), RATE))
    (request,) = script.requests
    head = len(turn("system", TASKS["caption"].system))
    assert request.ids.tolist()[head:][: 7 + 315 + 2] == [BOT, *b"human\n", *heard(313), *heard(0)]
    assert (request.counts, len(request.mels)) == ((313,), 1)
    assert request.ids[request.starts[0] - 1] == AUDIO_START


def test_chunks_stand_one_after_the_other(scripted, model):
    script = scripted()
    model.caption((speech(30), RATE))
    (request,) = script.requests
    first = len(turn("system", TASKS["caption"].system)) + 8
    assert request.counts == (313, 63)
    assert request.starts == (first, first + 313 + 2)
    assert [request.ids[s - 1] for s in request.starts] == [AUDIO_START] * 2
    assert [request.ids[s + c] for s, c in zip(request.starts, request.counts, strict=True)] == [
        AUDIO_END
    ] * 2
    assert [mel.shape[1] for mel in request.mels] == [2502, 502]


@pytest.mark.parametrize(
    ("context", "seconds"), [(2048, [75, 20]), (1024, [25, 25, 25, 20]), (4096, [95])]
)
def test_long_recordings_are_cut_to_fit_the_context(
    scripted, folder, model, tmp_path, context, seconds
):
    cfg = testing.tiny_config(max_positions=context)
    other = StepAudio2(cfg, model.engine.params, model.tokenizer)
    script = scripted(b"one", b" ", b"two ", b"three", model=other)
    (reply,) = other.run("caption", [(speech(95), RATE)])
    chunks = [-(-s // 25) for s in seconds]
    by_number = dict(zip(script.prompt_indices[0], script.requests, strict=True))
    assert [len(by_number[i].mels) for i in range(len(seconds))] == chunks
    assert script.options[0].max_new_tokens == 256 * max(chunks)
    assert all(len(ids) + 256 * max(chunks) <= context for ids in script.prompts)
    replies = dict(zip(script.prompt_indices[0], ["one", "", "two", "three"], strict=False))
    assert reply.text == " ".join(replies[i] for i in range(len(seconds)) if replies[i])
    assert [segment.end - segment.start for segment in reply.segments] == seconds


def test_a_context_too_short_for_a_chunk(model):
    cfg = testing.tiny_config(max_positions=600)
    other = StepAudio2(cfg, model.engine.params, model.tokenizer)
    with pytest.raises(PromptError, match="600 tokens is too short for 25 s of audio"):
        other.transcribe((speech(1), RATE))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ((np.zeros(0, np.float32), RATE), "holds no samples"),
        ((np.array([0.1, np.nan], np.float32), RATE), "NaN or Inf"),
        ("nowhere.wav", "does not exist"),
        (b"RIFF not really", "cannot be read"),
    ],
)
def test_bad_audio(scripted, model, source, message):
    script = scripted()
    with pytest.raises(AudioError, match=message):
        model.transcribe_batch([(speech(1), RATE), source])
    assert script.requests == []  # noticed before anything is computed


# --- tasks ---


def test_asr_prompt(scripted, model):
    script = scripted(b" hi \n")
    assert model.transcribe((speech(1), RATE)) == "hi"
    assert script.prompts == [
        turn("system", "请记录下你所听到的语音内容。")
        + turn("human", heard(13))
        + turn("assistant", close=False)
    ]
    (options,) = script.options
    assert options.sampling.greedy
    assert (options.max_new_tokens, options.stop_ids) == (256, (EOT,))


@pytest.mark.parametrize(
    ("run", "system", "after", "temperature"),
    [
        (lambda m, a: m.translate(a), "请仔细聆听这段语音，然后将其内容翻译成中文。", "", 0.1),
        (
            lambda m, a: m.translate(a, to="en"),
            "请仔细聆听这段语音，然后将其内容翻译成英文。",
            "",
            0.1,
        ),
        (
            lambda m, a: m.caption(a),
            "Please briefly explain the important events involved in this audio clip.",
            "",
            0.1,
        ),
        (
            lambda m, a: m.ask(a, "Who speaks?"),
            "You are an expert in audio analysis, please analyze the audio content and answer the "
            "questions accurately.",
            "Who speaks?",
            0,
        ),
        (
            lambda m, a: m.ask(a, "Who speaks?", ["A man", "A dog"]),
            "You are an expert in audio analysis, please analyze the audio content and answer the "
            "questions accurately.",
            "Who speaks? Please choose the answer from the following options: [A man, A dog] "
            "Output the final answer in <RESPONSE> </RESPONSE>.",
            0,
        ),
    ],
)
def test_task_prompts(scripted, model, run, system, after, temperature):
    script = scripted(b"fine")
    assert run(model, (speech(1), RATE)) == "fine"
    human = turn("human", heard(13), after)
    assert script.prompts == [turn("system", system) + human + turn("assistant", close=False)]
    sampling = script.options[0].sampling
    assert sampling.temperature == temperature
    assert sampling.greedy == (temperature == 0)
    assert (sampling.top_k, sampling.top_p, sampling.repetition_penalty) == (50, 1, 1)


def test_translate_to_an_unknown_language(model):
    with pytest.raises(PromptError, match="cannot translate to 'fr': expected zh or en"):
        model.translate((speech(1), RATE), to="fr")


def test_limits_seeds_and_progress(scripted, model):
    script, told = scripted(), []
    sources = [(speech(1), RATE)] * 3
    model.translate_batch(
        sources, max_new_tokens=7, seed=5, progress=lambda *done: told.append(done)
    )
    assert (script.options[0].max_new_tokens, script.options[0].seed) == (7, 5)
    assert told == [(3, 3)]
    with pytest.raises(PromptError, match="max_new_tokens=0"):
        model.transcribe_batch(sources, max_new_tokens=0)
    assert model.transcribe_batch([]) == []


def test_answers_return_to_their_recordings(scripted, model, monkeypatch):
    """Whatever their lengths; no more prompts are held than a few batches have."""
    monkeypatch.setattr(model, "batch_size", 1)
    script, told = scripted(), []
    lengths = [3, 1, 9, 5, 2]

    def by_length(requests, options, **kwargs):
        script.prompt_indices.append(list(kwargs["prompt_indices"]))
        kwargs["progress"](len(requests), len(requests))
        return [[Completion(tuple(str(sum(r.counts)).encode()), "stop")] for r in requests]

    script.generate = by_length
    sources = [(speech(seconds), RATE) for seconds in lengths]
    texts = model.transcribe_batch(sources, progress=lambda *done: told.append(done))
    counts = [audio.num_tokens(audio.num_frames(seconds * RATE)) for seconds in lengths]
    assert texts == [str(int(count)) for count in counts]
    # What a prompt draws hangs on its own number.
    assert script.prompt_indices == [[0, 1, 2, 3], [4]]
    assert told == [(4, 5), (5, 5)]


def test_text_is_without_audio_and_stops_at_the_end(model):
    ids = [*b"a", CODE_0, *b"b", CODE_0 + 5, 303, TTS_END, *b"c", EOT, *b"d"]
    assert model.text_of(ids) == "abc"


# --- the base model ---


def test_base_model(folder, scripted):
    base = StepAudio2.from_pretrained(folder, prompt_style="base")
    script = scripted(b"hello", model=base)
    assert base.transcribe((speech(1), RATE)) == "hello"
    assert script.prompts == [[*"请记录下你所听到的语音内容。".encode(), *heard(13)]]
    assert script.options[0].stop_ids == (END_OF_TEXT,)
    with pytest.raises(PromptError, match="knows no turns"):
        base.chat()
    with pytest.raises(PromptError, match="prompt_style='raw': expected one of chat, base"):
        StepAudio2.from_pretrained(folder, prompt_style="raw")


# --- loading ---


def test_default_dtype_is_float32_on_a_cpu(model):
    leaves = jax.tree.leaves(model.engine.params)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("kind", ["hf", "ours"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_choice(folder, tmp_path, dtype, kind):
    source = folder
    if kind == "ours":
        convert(folder, source := tmp_path / "ours")
    params = StepAudio2.from_pretrained(source, dtype=dtype).engine.params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}


def test_converted_folder_loads_the_same_numbers(folder, model, tmp_path):
    convert(folder, tmp_path / "ours")
    converted = StepAudio2.from_pretrained(tmp_path / "ours")
    jax.tree.map(np.testing.assert_array_equal, converted.engine.params, model.engine.params)
    assert converted.cfg == model.cfg
    assert converted.tokenizer.special == model.tokenizer.special


def test_loading_tells_its_progress(folder):
    told = []
    StepAudio2.from_pretrained(folder, progress=lambda *done: told.append(done))
    assert told[-1][0] == told[-1][1] > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"dtype": "int4"},
            ConfigError,
            "dtype 'int4': expected float32, bfloat16, float16 or int8",
        ),
        ({"mesh": "tensor=5"}, ShardingError, "5 devices, but"),
        ({"dtype": "big"}, ConfigError, "dtype 'big'"),
        ({"mesh": "tensor=1024"}, ShardingError, "needs 1024 devices"),
        ({"mesh": "model=1"}, ShardingError, "expected sizes of at least 1 for data"),
    ],
)
def test_bad_options(folder, options, error, message):
    with pytest.raises(error, match=message):
        StepAudio2.from_pretrained(folder, **options)


def test_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match="expected a model folder"):
        StepAudio2.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        StepAudio2.from_pretrained(tmp_path)


def test_missing_tokenizer(folder, model, tmp_path):
    """Loading works without; the tokenizer is missed when it is needed, and may lie elsewhere."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in folder.iterdir():
        if path.suffix == ".safetensors" or path.name == "config.json":
            shutil.copy(path, bare)
    lost = StepAudio2.from_pretrained(bare)
    with pytest.raises(TokenizerError, match=r"no tokenizer in .*bare: expected tokenizer.json"):
        lost.transcribe((speech(1), RATE))
    found = StepAudio2.from_pretrained(bare, tokenizer=folder)
    assert found.tokenizer.special == model.tokenizer.special


def test_tokenizer_object(model):
    given = Tokenizer(tokenizer_files.byte_tokenizer(testing.AUDIO_START, 512))
    assert StepAudio2(model.cfg, model.engine.params, given).tokenizer is given


def test_names_at_the_top():
    assert sa2jax.StepAudio2 is StepAudio2
    assert (sa2jax.Chat, sa2jax.Reply) == (conversation.Chat, reply.Reply)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = sa2jax.Nothing


@pytest.mark.slow
def test_a_long_neighbour_does_not_lengthen_an_answer(model):
    """The default limit follows each recording's own length."""
    rng = np.random.default_rng(5)
    short, long = ((rng.standard_normal(16_000 * n) / 10, 16_000) for n in (1, 30))
    assert model.transcribe_batch([short, long])[0] == model.transcribe(short)
    assert len(model.transcribe(long)) != len(model.transcribe(long, max_new_tokens=5))

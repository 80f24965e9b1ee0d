"""Recordings to text, as a user types it, and what cannot be heard or used."""

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import soundfile
from helpers.sound import voice

from sa2jax.chat import tokenizer_files
from sa2jax.errors import ConfigError
from sa2jax.inference.engine import Engine
from sa2jax.inference.requests import Completion

pytestmark = pytest.mark.usefixtures("leave_no_traces")
RATE = 16_000


class Scripted:
    """Stands in for the engine: replies as told, remembers what it was asked."""

    replies: ClassVar[list[bytes]] = []
    asked: ClassVar[list] = []

    def __init__(self, model, params, cfg, *, mesh=None, parity=False):
        pass

    def generate(self, requests, options, *, prompt_indices, decode_text):
        self.asked.append((requests, options))
        replies = {number: self.replies[number] for number in sorted(prompt_indices)}
        return [[Completion(tuple(replies[number]), "stop")] for number in prompt_indices]


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr("sa2jax.pipeline.base.Engine", Scripted)
    monkeypatch.setattr(Scripted, "asked", [])

    def use(*replies: str) -> type[Scripted]:
        monkeypatch.setattr(Scripted, "replies", [reply.encode() for reply in replies])
        return Scripted

    return use


# --- listening ---


@pytest.mark.both_pairs
def test_asr(run, ours, recordings):
    """The whole way, from files to texts."""
    code, out, err = run("asr", *recordings, "--model", ours, "--max-new-tokens", 24, "--json")
    found = json.loads(out)
    assert code == 0
    assert [entry["file"] for entry in found] == [str(path) for path in recordings]
    cut = [entry for entry in found if entry["finish_reason"] == "length"]
    assert err.count("the answer was cut at its limit of 24 tokens") == len(cut)
    assert [len(entry["segments"]) for entry in found] == [1, 1, 1]
    texts = [entry["text"] for entry in found]
    assert all(texts)
    assert len(set(texts)) == 3


def test_an_attention_that_does_not_run_here_is_refused(run, ours, recordings):
    code, out, err = run("asr", recordings[0], "--model", ours, "--attention", "splash")
    assert (code, out) == (2, "")
    assert err.strip() == "error: attention 'splash' runs on tpu, not on cpu"


def test_an_attention_that_is_asked_for_reaches_the_decoder(run, ours, recordings, monkeypatch):
    asked = []

    class Watching(Engine):
        def generate(self, *args, **options):
            asked.append(self.model.bind(self.model.abstract).decoder.policy.attention)
            raise ConfigError("seen")

    monkeypatch.setattr("sa2jax.pipeline.base.Engine", Watching)
    code, *_ = run("asr", recordings[0], "--model", ours, "--attention", "xla")
    assert (code, asked) == (2, ["xla"])


def test_a_benchmark_of_speech_has_no_attention_to_choose(run):
    code, _, err = run("bench", "token2wav", "--attention", "xla")
    assert (code, err.count("\n")) == (2, 1)
    assert "--attention is for language models" in err


@pytest.mark.both_pairs
@pytest.mark.parametrize("command", ["asr", "translate", "caption"])
def test_text_of_several_files(run, scripted, ours, recordings, command):
    scripted("eins", "zwei", "drei")
    code, out, err = run(command, *recordings, "--model", ours)
    assert (code, err) == (0, "")
    names = [str(path) for path in recordings]
    assert out == "".join(
        f"{n}\t{t}\n" for n, t in zip(names, ["eins", "zwei", "drei"], strict=True)
    )
    assert run(command, recordings[0], "--model", ours) == (0, "eins\n", "")


def test_options_reach_the_model(run, scripted, ours, recordings):
    script = scripted("ja")
    code, out, err = run(
        "translate",
        recordings[0],
        "--model",
        ours,
        "--to",
        "en",
        "--max-new-tokens",
        7,
        "--seed",
        3,
        "--json",
    )
    assert (code, err) == (0, "")
    segment = {"start": 0.0, "end": 1.0, "text": "ja", "finish_reason": "stop"}
    (found,) = json.loads(out)
    assert found == {
        "file": str(recordings[0]),
        "text": "ja",
        "finish_reason": "stop",
        "notes": [],
        "segments": [segment],
    }
    ((request,), options), *_ = script.asked
    assert bytes(i for i in request.ids.tolist() if i < 245).startswith("system\n请仔细".encode())
    assert (options.max_new_tokens, options.seed, options.sampling.temperature) == (7, 3, 0.1)


def test_any_task_by_name(run, refused, scripted, ours, recordings):
    """As the command of its own, and tasks that have none."""
    scripted("eins", "zwei", "drei")
    assert run("run", "asr", *recordings, "--model", ours) == run(
        "asr", *recordings, "--model", ours
    )
    script = scripted("ja")
    code, out, err = run("run", "mmau", recordings[0], "--question", "Who?", "--model", ours)
    assert (code, out, err) == (0, "ja\n", "")
    *_, ((request,), _) = script.asked
    assert b"Who?" in bytes(i for i in request.ids.tolist() if i < 245)
    assert run("run", "caption", "--text", "hi", "--model", ours) == (0, "ja\n", "")
    for arguments, message in (
        (("sing", recordings[0]), "there is no task 'sing': expected one of asr, "),
        (("asr", recordings[0], "--text", "x"), "expected recordings or --text, not both"),
        (("asr", recordings[0], "--voice", "anna"), "the task asr is written"),
        (("tts", "--text", "x"), "no file for the spoken answer: give -o"),
        (("tts", *recordings[:2], "-o", "x.wav"), "expected one recording, or --text"),
    ):
        assert message in refused("run", *arguments, "--model", ours)


def test_base_style(run, scripted, source, recordings):
    script = scripted("ja")
    assert run("asr", recordings[0], "--model", source, "--prompt-style", "base")[0] == 0
    ((request,), _), *_ = script.asked
    assert request.ids.tolist()[:3] == list("请".encode())


def test_hugging_face_folder_is_taken_as_it_is(run, scripted, source, recordings):
    scripted("ja")
    assert run("asr", recordings[0], "--model", source) == (0, "ja\n", "")


# --- chat ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--text", "x" * 2000), "expected 1 to 1023, since the model's context of 1024 must also"),
        (("--text", "x", "--temperature", "-1"), "temperature=-1.0: expected at least 0"),
        (("--text", "x", "--max-new-tokens", "0"), "max_new_tokens=0, samples=1: expected at lea"),
        (("--text", "x", "--prompt-style", "base"), "a base model knows no turns"),
        (("--text", "x", "--mesh", "tensor=999"), "needs 999 devices"),
        (("nowhere.wav",), "no such file: nowhere.wav"),
    ],
)
def test_refused_chat(refused, ours, options, message):
    assert message in refused("chat", *options, "--model", ours)


# --- recordings that cannot be heard ---


def empty(path: Path) -> None:
    soundfile.write(path, np.zeros(0), RATE)


def not_a_number(path: Path) -> None:
    soundfile.write(path, np.array([0.1, np.nan, 0.2], np.float32), RATE, subtype="FLOAT")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("not audio"), "bad.wav cannot be read"),
        (lambda path: path.write_bytes(b""), "bad.wav cannot be read"),
        (empty, "bad.wav holds no samples"),
        (not_a_number, "bad.wav holds NaN or Inf"),
        (lambda path: path.mkdir(), "no such file"),
        (lambda path: None, "no such file"),
    ],
)
def test_bad_recording(refused, ours, recordings, tmp_path, make, message):
    path = tmp_path / "bad.wav"
    make(path)
    assert message in refused("asr", path, "--model", ours)


def test_one_bad_recording_of_many(run, scripted, ours, recordings, tmp_path):
    """The others are answered; the bad ones, there or not, are named."""
    scripted("eins", "zwei")
    nan, gone = tmp_path / "nan.wav", tmp_path / "gone.wav"
    not_a_number(nan)
    files = [nan, recordings[0], gone, recordings[1]]
    for command in ("asr", "caption"):
        code, out, err = run(command, *files, "--model", ours)
        assert (code, out) == (1, f"{recordings[0]}\teins\n{recordings[1]}\tzwei\n")
        assert err.count("\n") == err.count("error: ") == 2
        assert f"no such file: {gone}" in err
        assert f"{nan} holds NaN or Inf" in err
    code, out, _ = run("asr", *files, "--model", ours, "--json")
    found = json.loads(out)
    assert code == 1
    assert [list(entry)[1] for entry in found] == ["error", "text", "error", "text"]
    code, out, err = run("asr", nan, gone, "--model", ours)  # nothing to answer
    assert (code, out, err.count("error: ")) == (2, "", 2)


def test_silence_has_no_words(run, scripted, ours, tmp_path):
    """Nor has a click; nobody is asked."""
    script = scripted("thank you for watching")
    silent, click = tmp_path / "silent.wav", tmp_path / "click.wav"
    soundfile.write(silent, np.zeros(3 * RATE), RATE)
    soundfile.write(click, np.ones(80) / 2, RATE)
    code, out, err = run("asr", silent, click, "--model", ours)
    assert (code, out) == (0, f"{silent}\t\n{click}\t\n")
    assert f"{silent}: no speech: its 3.00 s are silent" in err
    assert f"{click}: no speech: 5 ms are too short" in err
    assert script.asked == []
    code, out, err = run("translate", silent, "--model", ours, "--json")
    assert (code, json.loads(out)[0]["text"], script.asked) == (0, "", [])


@pytest.mark.both_pairs
@pytest.mark.parametrize("command", ["asr", "translate"])
def test_noise_has_no_words(run, scripted, ours, tmp_path, command):
    """A room in which nobody speaks: nobody is asked, and it is said why."""
    script, path = scripted("thank you for watching"), tmp_path / "room.wav"
    soundfile.write(path, np.random.default_rng(0).standard_normal(2 * RATE) / 50, RATE)
    code, out, err = run(command, path, "--model", ours)
    assert (code, out, script.asked) == (0, "\n", [])
    assert f"{path}: no speech: no voice is heard in its 2.00 s of sound" in err


def test_the_other_side_of_a_call(run, scripted, ours, tmp_path):
    script = scripted("hello")
    path = tmp_path / "call.wav"
    soundfile.write(path, np.stack([np.zeros(RATE), voice(1)], axis=1), RATE)
    code, out, err = run("asr", path, "--model", ours)
    assert (code, out, script.asked) == (0, "\n", [])
    assert "channel 0 is silent or nearly so, channel 1 is not: choose it with --channel 1" in err
    for channel in (1, "mean"):
        assert run("asr", path, "--channel", channel, "--model", ours) == (0, "hello\n", "")
    code, _, err = run("asr", path, "--channel", 2, "--model", ours)
    assert (code, "has 2 channels: expected a channel from 0 to 1" in err) == (2, True)
    code, _, err = run("asr", path, "--max-seconds", 0.5, "--model", ours)
    assert (code, "is longer than 0.5 s" in err) == (2, True)


def test_no_recording(refused, ours):
    assert "no recordings: expected at least one" in refused("asr", "--model", ours)


# --- models that cannot be used ---


def test_no_model(refused, recordings, tmp_path):
    line = refused("asr", recordings[0], "--model", tmp_path / "nowhere")
    assert "expected a model folder" in line
    assert "no config.json" in refused("asr", recordings[0], "--model", tmp_path)


def test_no_tokenizer(refused, broken, recordings):
    for path in [*broken.glob("*token*"), *broken.glob("*vocab*"), broken / "merges.txt"]:
        path.unlink()
    assert "no tokenizer in" in refused("asr", recordings[0], "--model", broken)


def strip_audio_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())

    def keep(token):
        return not token.startswith("<audio_")

    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {token: i for token, i in vocab.items() if keep(token)}
    content["added_tokens"] = [t for t in content["added_tokens"] if keep(t["content"])]
    path.write_text(json.dumps(content))
    for name in ("tokenizer_config.json", "added_tokens.json"):
        (folder / name).unlink()


def test_tokenizer_without_audio_tokens(refused, broken, recordings, tmp_path):
    strip_audio_tokens(broken)
    expected = "not a Step-Audio 2 tokenizer: it lacks <audio_start>, <audio_end>, <audio_patch>"
    assert expected in refused("asr", recordings[0], "--model", broken)
    assert expected in refused("convert", broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokenizer_of_another_model(refused, ours, recordings, tmp_path):
    """Its ids lie outside the vocabulary."""
    tokenizer_files.save_tokenizer_files(tmp_path / "large")
    line = refused("asr", recordings[0], "--model", ours, "--tokenizer", tmp_path / "large")
    assert "has ids up to 158257, the model a vocabulary of 512: use the model's own" in line

"""Answers and speech at the command line: `chat`, `tts`, `translate --speech`."""

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers.scripted import CTRL_C, HELLO, SAMPLES, TOOLS, WHERE, call, groups, pcm16, sound
from helpers.small_speech import SPEAKER, save_networks
from matplotlib import image

from sa2jax import cli, testing
from sa2jax.cli import options
from sa2jax.pipeline import StepAudio2
from sa2jax.pipeline import model as pipeline

# --- the real model ---


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> StepAudio2:
    """Random weights; compiled once for all commands."""
    cfg, home = testing.tiny_config(max_positions=2048), tmp_path_factory.mktemp("real")
    folder = testing.save_tiny_checkpoint(home / "model", cfg)
    speaker = save_networks(home / "speaker", SPEAKER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "enable_compilation_cache", lambda: None)
        patch.setattr("sa2jax.speech.api.enable_compilation_cache", lambda: None)
        model = options.ModelOptions(model=folder, detokenizer=speaker).load()
        assert model.speech.sample_rate == 24_000
    return model


@pytest.fixture
def speaks(real, golden, monkeypatch, tmp_path) -> tuple:
    """Options with which commands use the real model."""
    monkeypatch.setattr(options.ModelOptions, "load", lambda self: real)
    monkeypatch.chdir(tmp_path)
    voice = golden / "t2w_golden" / "prompt.wav"
    return ("--voice", voice, "--max-new-tokens", 30, *WHERE)


@pytest.mark.slow
def test_spoken_answer(run, speaks, pcm):
    ask = ("chat", "--text", "hello", *speaks, "-o")
    code, out, err = run(*ask, "x.wav", "--json")
    reply = json.loads(out)
    assert (code, err) == (0, "")
    assert list(reply) == [
        "text",
        "ids",
        "finish_reason",
        "thinking",
        "codes",
        "notes",
        "tool_calls",
        "timings",
        "file",
    ]
    assert (len(reply["ids"]), reply["finish_reason"], reply["file"]) == (30, "length", "x.wav")
    samples = pcm("x.wav")
    assert len(samples) == SAMPLES * len(reply["codes"]) > 0
    assert reply["timings"]["speech"] == len(samples) / 24_000
    code, out, err = run(*ask, "y.wav", "--stream")
    assert (code, out) == (0, reply["text"] + "\n")
    assert err.startswith("the answer was cut at its limit of 30 tokens")
    assert "\ny.wav: first sound " in err
    assert f"{len(samples) / 24_000:.2f} s of speech in" in err
    assert Path("x.wav").read_bytes() == Path("y.wav").read_bytes()
    assert sorted(os.listdir()) == ["x.wav", "y.wav"]


@pytest.mark.slow
def test_raw_samples_are_those_of_the_file(speaks, capsysbinary, pcm):
    ask = ["chat", "--text", "hello", *map(str, speaks), "--stream", "-o"]
    cli.main([*ask, "x.wav"])
    text = capsysbinary.readouterr().out
    cli.main([*ask, "-"])
    raw, err = capsysbinary.readouterr()
    np.testing.assert_array_equal(np.frombuffer(raw, "<i2"), pcm("x.wav"))
    assert err.startswith(text)
    assert b"\nfirst sound " in err


@pytest.mark.slow
def test_read_aloud(run, speaks, pcm):
    code, out, err = run("tts", "--text", "Good morning!", "-o", "x.wav", *speaks)
    assert (code, err.count("\n")) == (0, 1)
    assert err.startswith("the answer was cut at its limit of 30 tokens")
    seconds = len(pcm("x.wav")) / 24_000
    assert out.startswith(f"x.wav: {seconds:.2f} s in the voice prompt, made in ")
    Path("words.txt").write_text("Good morning!")
    code, out, again = run("tts", "words.txt", "--stream", "-o", "y.wav", *speaks)
    assert (code, again) == (0, err)
    assert pcm("y.wav").shape == pcm("x.wav").shape  # the same ids: one task, one seed


@pytest.mark.slow
def test_spoken_translation(run, speaks, recording, pcm):
    code, out, err = run("translate", recording, "--speech", "-o", "x.wav", *speaks)
    assert (code, out.endswith("\n")) == (0, True)
    seconds = len(pcm("x.wav")) / 24_000
    assert f"\nx.wav: {seconds:.2f} s in the voice prompt, made in " in f"\n{err}"
    out = run("translate", "--text", "Hi", "--speech", "-o", "y.wav", "--json", *speaks)[1]
    assert (json.loads(out)["file"], len(json.loads(out)["ids"])) == ("y.wav", 30)
    assert len(pcm("y.wav")) == SAMPLES * len(json.loads(out)["codes"])


# --- one question ---


@pytest.mark.both_pairs
def test_text(run, script):
    script.will_say("Hi", "Hi")
    ask = ("chat", "--text", "hello", *WHERE)
    assert run(*ask) == (0, "Hi\n", "")
    code, out, err = run(*ask, "--stream")
    assert (code, out) == (0, "Hi\n")
    assert err.startswith("first text 0.")
    assert err.endswith(" s in all, 61 prompt tokens, 2 generated\n")
    assert [options.max_new_tokens for options in script.options] == [1024, 1024]


@pytest.mark.both_pairs
def test_speech(run, script, pcm):
    script.will_say(HELLO, groups("bye", []))
    code, out, err = run("chat", "--text", "hello", "--voice", "bert", "-o", "x.wav", *WHERE)
    assert (code, out) == (0, "hello\n")
    assert err.startswith("x.wav: first sound ")
    np.testing.assert_array_equal(pcm("x.wav"), pcm16(sound(range(10, 30))))
    assert script.options[0].max_new_tokens == 4096
    code, out, err = run("chat", "--text", "hello", "-o", "y.wav", *WHERE)
    assert (code, out) == (0, "bye\n")
    assert err.endswith("this answer has no sound\n")
    assert not Path("y.wav").exists()


def test_recording_and_text(run, script, recording):
    script.will_say("Hello.")
    code, out, err = run("chat", recording, "--text", "play a.wav", *WHERE)
    assert (code, out, err) == (0, "Hello.\n", "")
    (request,), (options,) = script.requests, script.options
    assert len(request.mels) == 1  # the text is text, whatever it ends in
    assert b"play a.wav" in bytes(i for i in request.ids.tolist() if i < 245)
    assert options.sampling.temperature == 0.7


def test_thoughts_go_to_stderr(run, script):
    script.will_say("well\n</think>", "four", "well\n</think>", "four")
    ask = ("chat", "--text", "2+2?", "--think", *WHERE)
    assert run(*ask) == (0, "four\n", "well\n")
    code, out, err = run(*ask, "--stream")
    assert (code, out) == (0, "four\n")
    assert err.startswith("well\n\nfirst text ")


def test_interrupted_speech_leaves_nothing(run, script):
    script.will_say([*HELLO, ord(CTRL_C)])
    ask = ("chat", "--text", "hello", "--stream", "-o", "x.wav", "--history", "talk.json")
    assert run(*ask, *WHERE) == (130, f"hello{CTRL_C}\n", "interrupted\n")
    assert os.listdir() == []


def test_full_disk_leaves_nothing(refused, script, monkeypatch):
    script.will_say(HELLO)
    error = soundfile.LibsndfileError(2, "No space. ")
    monkeypatch.setattr(soundfile.SoundFile, "write", lambda *_: (_ for _ in ()).throw(error))
    line = refused("chat", "--text", "hello", "-o", "x.wav", *WHERE)
    assert "cannot write x.wav (No space. " in line
    assert os.listdir() == []


def test_tools(run, script):
    Path("tools.json").write_text(json.dumps(TOOLS))
    script.will_say(call("get_date_time"), "It is late.", call("search", '{"query": "x"}'))
    ask = ("chat", "--text", "hi", "--tools", "tools.json", "--stream", *WHERE)
    code, out, err = run(*ask)
    assert (code, out) == (0, "It is late.\n")
    assert err.startswith("[get_date_time] 20")
    code, out, err = run(*ask)
    assert (code, out) == (0, '<tool_call>function\nsearch\n{"query": "x"}</tool_call>\n')
    assert err.startswith("nobody ran these calls")
    script.will_say(call("search", '{"query": "x"}'))
    reply = json.loads(run(*ask, "--json")[1])
    assert reply["tool_calls"] == [{"name": "search", "arguments": {"query": "x"}}]
    assert reply["finish_reason"] == "tool_calls"


def test_history(run, refused, script, recording):
    script.will_say("Hi", HELLO, "no")
    ask = ("chat", "--history", "talk.json", *WHERE)
    assert run(*ask, "--text", "first")[:2] == (0, "Hi\n")
    assert run(*ask, recording, "--text", "second", "--voice", "bert", "-o", "x.wav")[0] == 0
    assert run(*ask, "--text", "third") == (0, "no\n", "")  # written, though bert spoke before
    for word in (b"first", b"Hi", b"second", b"third"):
        assert word in bytes(i for i in script.prompts[2] if i < 245)
    Path("talk.json").write_text(Path("talk.json").read_text()[:-20])
    before = Path("talk.json").read_bytes()
    assert "talk.json cannot be read as JSON" in refused(*ask, "--text", "fourth")
    assert Path("talk.json").read_bytes() == before


def test_an_answer_is_not_lost_where_history_cannot_be_kept(run, script):
    script.will_say("Hi")
    Path("talk").write_text("mine")
    code, out, err = run("chat", "--text", "a", "--history", "talk/a.json", *WHERE)
    assert (code, out) == (2, "Hi\n")
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "tools.json cannot be read (No such file or directory)"),
        (b"\xff", "tools.json cannot be read (not UTF-8 (invalid start byte"),
        (b"[{", "tools.json: tools must be a list of JSON schemas (not valid JSON (Expecting"),
        (b"{}", "tools.json: tools must be a list of JSON schemas, got"),
        (b"[]", "tools.json: an empty list of tools"),
        (
            b"[" * 100_000,
            "tools.json: tools must be a list of JSON schemas (not valid JSON (nested",
        ),
    ],
)
def test_bad_tools(refused, script, text, message):
    if text is not None:
        Path("tools.json").write_bytes(text)
    assert message in refused("chat", "--text", "hi", "--tools", "tools.json", *WHERE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("chat --text hi --voice anna", "give -o"),
        ("chat --text hi -o -", "add --stream"),
        ("chat --text hi -o - --stream --json", "--json is for one answer"),
        ("chat --json", "--json is for one answer"),
        ("chat --text hi -o x.mp3", "ending in .wav"),
        ("chat --text hi -o no/x.wav", "no folder no"),
        ("chat --text hi -o x.wav --voice nobody", "no voice 'nobody': expected one of anna, bert"),
        ("chat --text hi -o x.wav --first 0", "at least 1 code, got 0"),
        ("chat --text hi --plot x.png", "is of one spoken answer"),
        ("chat -o x.wav --plot x.png", "is of one spoken answer"),
        ("chat --text hi -o x.wav --plot x.jpg", "to end in .png, got x.jpg"),
        ("chat --text hi -o x.wav --plot no/x.png", "no folder no"),
        ("chat --text hi --history talk.txt", "to end in .json, got talk.txt"),
        ("chat --text hi --max-new-tokens 0", "max_new_tokens=0"),
        ("tts -o x.wav", "expected one text"),
        ("tts a.txt --text hi -o x.wav", "expected one text"),
        ("tts a.txt -o x.wav", "a.txt cannot be read (No such file"),
        ("tts --text hi -o x.mp3", "ending in .wav"),
        ("tts --text hi -o -", "add --stream"),
        (
            "tts --text hi -o x.wav --stream --prompt-style base",
            "a base model cannot read aloud with",
        ),
        ("tts --text hi -o x.wav --voice nobody", "expected one of anna, bert"),
        ("translate a.wav -o x.wav", "add --speech"),
        ("translate --text hi", "add --speech"),
        ("translate a.wav --speech", "give -o"),
        ("translate a.wav --text hi --speech -o x.wav", "expected one recording, or --text"),
        ("translate --speech -o x.wav", "expected one recording, or --text"),
        ("translate a.wav --speech -o x.wav", "no such file: a.wav"),
        ("translate --text hi --speech -o x.mp3", "ending in .wav"),
    ],
)
def test_refused(refused, script, arguments, message):
    assert message in refused(*arguments.split(), *WHERE)
    assert os.listdir() == []


def test_raw_samples_are_not_for_a_terminal(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with pytest.raises(SystemExit):
        cli.main(["chat", "--text", "hi", "-o", "-", "--stream", *WHERE])
    assert "pipe them into a player" in capsys.readouterr().err


def test_plot(run, refused, script, recording, monkeypatch):
    script.will_say(HELLO)
    code, _, err = run("chat", recording, "-o", "x.wav", "--plot", "x.png", *WHERE)
    assert code == 0
    assert err.endswith("plot: x.png\n")
    panels = image.imread("x.png")
    height, width, _ = panels.shape
    for half in (panels[:, : width // 2], panels[:, width // 2 :]):  # both have a spectrum
        assert len(np.unique(half[height // 2 :].reshape(-1, 4), axis=0)) > 50
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'sa2jax[train]'" in refused(
        "chat", recording, "-o", "y.wav", "--plot", "y.png", *WHERE
    )


def test_nothing_spoken(refused, run, script):
    script.will_say(groups("bye", []))
    assert "spoke no words" in refused("tts", "--text", "hi", "-o", "x.wav", "--stream", *WHERE)
    assert os.listdir() == []


@pytest.mark.both_pairs
def test_tts_from_stdin(run, script, monkeypatch):
    script.will_say(HELLO)
    monkeypatch.setattr("sys.stdin", io.StringIO("Good morning!"))
    code, out, _ = run("tts", "-", "-o", "x.wav", "--stream", *WHERE)
    assert (code, out[:39]) == (0, "x.wav: 0.80 s in the voice anna, made i")
    assert b"Good morning!" in bytes(i for i in script.prompts[0] if i < 245)

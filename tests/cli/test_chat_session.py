"""Conversations held at the command line: `chat` without a question."""

import io
import json
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers.scripted import CTRL_C, HELLO, SAMPLES, TOOLS, WHERE, call, groups, pcm16, sound

from sa2jax import cli
from sa2jax.cli import wav_output as output


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def hold(run, monkeypatch):
    """Holds a conversation by lines on stdin; gives code, stdout and stderr."""

    def hold(*lines: str, options=(), stdin=io.StringIO) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", stdin("".join(f"{line}\n" for line in lines)))
        return run("chat", *options, *WHERE)

    return hold


def test_conversation(hold, script, recording):
    script.will_say("Hi", "I hear", "and more")
    (recording.parent / "b c.wav").write_bytes(recording.read_bytes())
    code, out, err = hold("hello", "", "/audio a.wav 'b c.wav'", "/audio b c.wav")
    assert (code, out) == (0, "Hi\nI hear\nand more\n")
    assert err.count("\n") == err.count("first text ") == 3
    assert [len(request.counts) for request in script.requests] == [0, 2, 3]


def test_prompt_of_a_terminal(hold, script):
    script.will_say("Hi")
    code, out, err = hold("hello", "/help", "/quit", "never", stdin=Terminal)
    assert (code, out) == (0, "Hi\n")
    assert err.startswith("Ask something")
    assert err.count("> ") == 3
    assert "/load FILE.json  go on with" in err


def test_mistakes_cost_a_line(hold, script):
    script.will_say("Hi")
    code, out, err = hold(
        "/audio missing.wav",
        "/audio",
        "it's",
        "/dance",
        "/undo",
        "/undo",
        "/save",
        "/save talk.txt",
        "/load no.json",
        "/voice nobody",
        "/audio ~not-a-user/x.wav",
    )
    assert (code, out) == (0, "Hi\n")
    lines = [line for line in err.splitlines() if not line.startswith("first text")]
    expected = [
        "no such file: missing.wav",
        "which recording? /audio FILE.wav",
        "there is no /dance",
        "the last question and its answer are",
        "nothing to undo",
        "which file? /save FILE.json",
        "to end in .json",
        "no conversation no",
        "expected one of anna, bert",
        "no such file: ~not-a-user/x.wav",
    ]
    assert len(lines) == len(expected)
    for line, part in zip(lines, expected, strict=True):
        assert part in line


def test_what_is_typed_opens_no_file(hold, script, recording):
    """Not even if it names one; how it could be heard is said."""
    script.will_say("Hi", "Hm")
    code, out, err = hold("a.wav", "please open secret.mp3")
    assert (code, out) == (0, "Hi\nHm\n")
    assert [request.counts for request in script.requests] == [(), ()]
    assert err.count("taken as text; to be heard: /audio a.wav") == err.count("taken as") == 1


def test_voices_and_files(hold, script, pcm):
    script.will_say("Hi", HELLO, HELLO, "bye")
    Path("reply-7.wav").touch()
    code, out, err = hold("a", "/voice", "/voice bert", "b", "c", "/voice off", "d")
    assert (code, out) == (0, "Hi\nhello\nhello\nbye\n")
    assert "/voice NAME: off, a recording, or one of: anna, bert\nvoice: bert\n" in err
    assert "\nreply-9.wav: first sound " in err
    assert sorted(os.listdir()) == ["reply-7.wav", "reply-8.wav", "reply-9.wav"]
    assert len(pcm("reply-9.wav")) == 20 * SAMPLES
    assert [options.max_new_tokens for options in script.options] == [1024, 4096, 4096, 1024]
    script.will_say(HELLO)
    Path("out").mkdir()
    assert hold("a", options=["-o", "out/x.y.wav"])[0] == 0
    assert os.listdir("out") == ["x.y-1.wav"]


def test_all_sound_into_a_pipe(script, monkeypatch, capsysbinary):
    script.will_say(HELLO, HELLO)
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
    cli.main(["chat", "-o", "-", *WHERE])
    raw, err = capsysbinary.readouterr()
    np.testing.assert_array_equal(
        np.frombuffer(raw, "<i2"), np.tile(pcm16(sound(range(10, 30))), 2)
    )
    assert err.count(b"hello\n") == 2


def test_save_load_undo(hold, script):
    script.will_say("Hi", HELLO, "go", "on")
    code, _, err = hold("a", "/voice bert", "b", "/save talk.json")
    assert (code, "saved as talk.json" in err) == (0, True)
    code, out, err = hold("/load talk.json", "/undo", "/voice off", "c")
    assert (code, out) == (0, "go\n")
    assert "talk.json: 2 questions so far, in the voice bert\n" in err
    assert bytes(i for i in script.prompts[2] if i < 245).count(b"human") == 2
    code, out, err = hold("d", "/undo", options=["--history", "talk.json", "--voice", "anna"])
    assert (code, out) == (0, "on\n")
    assert err.startswith("talk.json: 2 questions so far, in the voice anna\n")
    assert len(json.loads(Path("talk.json").read_text())["turns"]) == 5  # d is gone there too


def test_interrupt_an_answer(hold, script):
    script.will_say(f"one two{CTRL_C}", "fine")
    code, out, err = hold("a", "b")
    assert (code, out) == (0, f"one two{CTRL_C}\nfine\n")
    assert err.startswith("interrupted\nfirst text ")
    assert b"one two" in bytes(i for i in script.prompts[1] if i < 245)


def test_interrupt_speech(hold, script, monkeypatch, pcm):
    """What was heard stays: in the file and in the history."""
    real = output.sink

    @contextmanager
    def sink(out, model):
        def once(samples):
            write(samples)
            raise KeyboardInterrupt

        with real(out, model) as write:
            yield once

    monkeypatch.setattr(output, "sink", sink)
    script.will_say(groups("a", range(60)), groups("b", range(10)))
    code, _, err = hold("a", "b", options=["--voice", "anna"])
    assert (code, err.count("interrupted")) == (0, 2)
    np.testing.assert_array_equal(pcm("reply-1.wav"), pcm16(sound(range(25))))
    assert sum(i >= 304 for i in script.prompts[1]) == 25


def test_interrupt_the_prompt(hold, script):
    class CtrlC(Terminal):
        def readline(self, *_):
            raise KeyboardInterrupt

    assert hold(stdin=CtrlC)[:2] == (0, "")


def test_a_failing_answer_is_taken_back(hold, script, monkeypatch):
    script.will_say(HELLO, "fine")
    monkeypatch.setattr(soundfile.SoundFile, "write", lambda *_: Path("no/such/file").read_bytes())
    code, _, err = hold("first", "/voice off", "second", options=["--voice", "anna"])
    assert (code, "error: cannot write reply-1.wav" in err) == (0, True)
    assert b"first" not in bytes(i for i in script.prompts[1] if i < 245)


def test_results_of_tools(hold, script):
    Path("tools.json").write_text(json.dumps(TOOLS))
    script.will_say(
        call("search", '{"query": "x"}'),
        "found",
        call("search") + call("get_date_time"),
        "both",
        call("search"),
    )
    code, out, err = hold("a", "it is y", "b", "z", "c", options=["--tools", "tools.json"])
    assert (code, out) == (0, "found\nboth\n")
    assert 'result of search {"query": "x"}: \n' in err
    texts = [bytes(i for i in prompt if i < 245) for prompt in script.prompts]
    assert b"input\nit is y" in texts[1]
    assert b"input\nsearch: z\nget_date_time: 20" in texts[3]


def test_lines_that_are_no_text(hold, script):
    script.will_say("fine")

    def stdin(text):
        return io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8")

    code, out, err = hold(stdin=stdin)
    assert (code, out) == (0, "")
    assert err == "error: expected a line of text in UTF-8 (invalid start byte)\n"

"""The command line as a user meets it: results on stdout, one line for a mistake."""

import os
import subprocess
import sys
import textwrap

import pytest

from sa2jax import cli

pytestmark = pytest.mark.usefixtures("leave_no_traces")


# --- real processes ---


def process(*arguments: object, script: str = "") -> subprocess.CompletedProcess[str]:
    head = ["-c", textwrap.dedent(script)] if script else ["-m", "sa2jax.cli"]
    return subprocess.run(
        [sys.executable, *head, *map(str, arguments)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.both_pairs
def test_process_asr(source, recordings):
    """What a shell sees: text alone on stdout, only notes on stderr."""
    command = ["asr", *recordings[:2], "--model", source, "--max-new-tokens", 4]
    run = process(*command)
    assert run.returncode == 0
    assert all("cut at its limit of 4 tokens" in note for note in run.stderr.splitlines())
    lines = run.stdout.rstrip("\n").split("\n")
    assert lines[0].startswith(f"{recordings[0]}\t")


def test_process_mistake(tmp_path):
    run = process("convert", tmp_path / "nowhere", tmp_path / "out")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: no config.json at ")
    assert run.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_process_interrupted(run, source, tmp_path):
    """Ctrl-C in the middle of a conversion; the next run starts clean."""
    script = """
        import os, signal, sys
        from contextlib import contextmanager
        from sa2jax import cli
        from sa2jax.cli import common

        @contextmanager
        def bar(title, unit="bytes"):
            yield lambda done, total: done > total / 2 and os.kill(os.getpid(), signal.SIGINT)

        common.progress_bar = bar
        cli.main(sys.argv[1:])
    """
    stopped = process("convert", source, tmp_path / "out", script=script)
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (130, "", "interrupted\n")
    assert os.listdir(tmp_path) == []
    assert run("convert", source, tmp_path / "out")[0] == 0


def test_an_interrupt_in_a_callback_of_the_garbage_collector_counts(tmp_path):
    """Python itself would drop it there."""
    script = """
        import gc, os, signal, time
        from sa2jax import cli

        def _xla_gc_callback(*args):
            gc.callbacks.remove(_xla_gc_callback)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)  # it is handled in here

        def command():
            gc.callbacks.append(_xla_gc_callback)
            gc.collect()
            time.sleep(20)

        cli.COMMANDS = {"a": command, "b": command}
        cli.main(["a"])
    """
    stopped = process(script=script)
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (130, "", "interrupted\n")


# --- help and mistyped commands ---


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help(run, command):
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert f"usage: sa2jax {command}" in out
    summary = (cli.COMMANDS[command].__doc__ or "").splitlines()[0]
    assert summary in out.replace("\n", " ")


@pytest.mark.parametrize("command", [[], ["eval", "nano"]])
def test_help_does_not_import_jax(command):
    script = f"""
        import sys
        from sa2jax import cli
        try:
            cli.main({[*command, "--help"]})
        except SystemExit:
            print("jax" in sys.modules)
    """
    assert process(script=script).stdout.endswith("False\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Expected one of {asr"),
        (["transcribe"], "transcribe"),
        (["asr", "a.wav", "--model", "m", "--beams", "4"], "--beams"),
        (["convert", "a", "b", "--dtype", "int4"], "int4"),
    ],
)
def test_mistyped_command(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "{}"),
        ("convert", "{}", "out"),
        ("verify", "{}", "{}"),
        ("train", "--recipe", "{}.yaml"),
        ("vocode", "{}", "-o", "x.wav"),
        ("data", "show", "{}"),
        ("asr", "{}.wav"),
    ],
)
@pytest.mark.parametrize("name", ["x" * 5000, "loop"])
def test_names_that_the_system_refuses(run, arguments, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for suffix in ("", ".yaml", ".wav"):
        (tmp_path / f"loop{suffix}").symlink_to(f"loop{suffix}")
    code, _, err = run(*(word.format(name) for word in arguments))
    assert code == 2
    assert "Traceback" not in err
    assert all(len(line) < 500 for line in err.splitlines())
    assert not (tmp_path / "out").exists()

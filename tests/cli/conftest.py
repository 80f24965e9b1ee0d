from pathlib import Path

import numpy as np
import pytest
import soundfile
from scripted import Script, Speech

from sa2jax import cli, conversation, testing
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.cli import hear
from sa2jax.pipeline import StepAudio2

CTRL_C = "\a"  # an answer with this is interrupted


@pytest.fixture
def run(capsys):
    """Runs a command; gives its exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = 0
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def refused(run):
    """Runs a command that must end with one line and exit code 2; gives the line."""

    def call(*arguments: object) -> str:
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    return call


@pytest.fixture(scope="module")
def tiny() -> StepAudio2:
    """A model that is told what to say, in the voices of anna and bert."""
    cfg = testing.tiny_config(max_positions=2048)
    tokenizer = Tokenizer(testing.byte_tokenizer(testing.AUDIO_START, 512))
    return StepAudio2(cfg, testing.tiny_params(cfg), tokenizer, speech=lambda: Speech())


@pytest.fixture
def script(monkeypatch, tiny, tmp_path) -> Script:
    """What the model says; commands run in a folder of their own."""
    script = Script()

    def session(generator):
        made = script.session(generator)
        reply = made.reply

        def interrupted(request, options, **others):
            for ids in reply(request, options, **others):
                yield ids
                if ord(CTRL_C) in ids:
                    raise KeyboardInterrupt

        made.reply = interrupted
        return made

    monkeypatch.setattr(conversation, "Session", session)
    monkeypatch.setattr(hear.ModelOptions, "load", lambda self: tiny)
    monkeypatch.chdir(tmp_path)
    return script


@pytest.fixture
def recording(tmp_path) -> Path:
    path = tmp_path / "a.wav"
    soundfile.write(path, np.random.default_rng(0).standard_normal(16_000) / 10, 16_000)
    return path


@pytest.fixture
def pcm():
    """Reads what a command spoke."""

    def read(path: str | Path) -> np.ndarray:
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype) == (24_000, 1, "PCM_16")
        return soundfile.read(path, dtype="int16")[0]

    return read

"""`--parity`: every command that loads a model, or its detokenizer, can be the official one."""

import json
from pathlib import Path

import numpy as np
import pytest

from sa2jax import audio
from sa2jax.cli import wav_output
from sa2jax.errors import ConfigError
from sa2jax.pipeline import StepAudio2
from sa2jax.speech import Speech

HELD_OUT = Path(__file__).parent.parent / "golden" / "nano"


@pytest.fixture
def opened(monkeypatch):
    """What is opened, and with what parity; nothing is."""
    found = []

    def refuse(folder, **options):
        found.append(options["parity"])
        raise ConfigError("enough")

    monkeypatch.setattr(StepAudio2, "from_pretrained", refuse)
    monkeypatch.setattr(Speech, "from_pretrained", refuse)
    return found


@pytest.mark.parametrize(
    "command",
    [
        ["asr", "a.wav"],
        ["translate", "a.wav"],
        ["caption", "a.wav"],
        ["run", "asr", "a.wav"],
        ["chat", "--text", "hello"],
        ["tts", "--text", "hello", "-o", "b.wav"],
        ["eval", "nano", "--metric", "sums", "--data", HELD_OUT],
        ["tokenize", "a.wav"],
        ["reconstruct", "a.wav", "-o", "b.wav"],
        ["vocode", "codes.json", "-o", "b.wav"],
        ["voice", "add", "anna", "a.wav"],
    ],
)
def test_parity_reaches_what_is_loaded(opened, refused, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    audio.write_wav("a.wav", np.zeros(1600, np.float32), 16_000)
    (tmp_path / "codes.json").write_text(json.dumps([1, 2]))
    for switch in ([], ["--parity"]):
        assert refused(*command, "--model", "nano", *switch) == "error: enough\n"
    assert opened == [False, True]


@pytest.mark.parametrize("parity", [False, True])
def test_a_sink_writes_them(tiny, tmp_path, monkeypatch, pcm, parity):
    monkeypatch.setattr(tiny, "parity", parity)
    samples = np.array([0.5, -0.5], np.float32)
    with wav_output.sink(tmp_path / "a.wav", tiny) as write:
        write(samples)
    assert pcm(tmp_path / "a.wav").tolist() == ([16383, -16383] if parity else [16384, -16384])

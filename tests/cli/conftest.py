import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers.scripted import CTRL_C, Script, Speech
from helpers.sound import voice

from sa2jax import cli, testing
from sa2jax.audio import resample
from sa2jax.chat import tokenizer_files
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.cli import options
from sa2jax.pipeline import StepAudio2
from sa2jax.pipeline import model as pipeline


@pytest.fixture(scope="module")
def leave_no_traces(tmp_path_factory):
    """No compilation cache in the home folder; what a command puts into the environment goes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "enable_compilation_cache", lambda: None)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS", "cpu"))
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A Hugging Face folder of several shards in bfloat16."""
    folder = tmp_path_factory.mktemp("models") / "source"
    return testing.save_tiny_checkpoint(folder, dtype="bfloat16", shard_bytes=200_000)


@pytest.fixture(scope="module")
def ours(source) -> Path:
    """The same, converted."""
    out = source.parent / "ours"
    cli.main(["convert", str(source), str(out)])
    return out


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> list[Path]:
    """a.wav: 1 s at 16 kHz, mono. b.flac: 1 s at 48 kHz, stereo. c.ogg: 2 s at 8 kHz."""
    folder = tmp_path_factory.mktemp("recordings")
    one, two = voice(1), voice(2, start=1)
    soundfile.write(folder / "a.wav", one, 16_000)
    wide = resample(np.stack([one, one[::-1]]), 16_000, 48_000)
    soundfile.write(folder / "b.flac", wide.T, 48_000)
    soundfile.write(folder / "c.ogg", resample(two, 16_000, 8_000), 8_000)
    return [folder / name for name in ("a.wav", "b.flac", "c.ogg")]


@pytest.fixture
def broken(tmp_path) -> Path:
    """A folder with one float32 file that a test may damage."""
    return testing.save_tiny_checkpoint(tmp_path / "broken")


@pytest.fixture(scope="module")
def tiny() -> StepAudio2:
    """A model that is told what to say, in the voices of anna and bert."""
    cfg = testing.tiny_config(max_positions=2048)
    tokenizer = Tokenizer(tokenizer_files.byte_tokenizer(testing.AUDIO_START, 512))
    return StepAudio2(cfg, testing.tiny_params(cfg), tokenizer, speech=lambda: Speech())


class Interruptible(Script):
    """Says what it is told; Ctrl-C is pressed where that holds `CTRL_C`."""

    def submit(self, *args, **more):
        reply = super().submit(*args, **more)
        pieces = reply.pieces

        def interrupted():
            for ids in pieces:
                yield ids
                if ord(CTRL_C) in ids:
                    raise KeyboardInterrupt

        reply.pieces = interrupted()
        return reply


@pytest.fixture
def script(monkeypatch, tiny, tmp_path) -> Script:
    """What the model says; commands run in a folder of their own."""
    script = Interruptible().stand_in(monkeypatch)
    monkeypatch.setattr(options.ModelOptions, "load", lambda self: tiny)
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

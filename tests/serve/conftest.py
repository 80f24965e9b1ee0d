"""Servers on this machine: one with nano for all tests, others that say what they are told."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers.scripted import Script, Speech

from sa2jax import testing
from sa2jax.chat import tokenizer_files
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.pipeline import StepAudio2

if TYPE_CHECKING:  # without the extra [serve], tests skip and this folder has to be readable
    from sa2jax.serve.settings import Settings
    from sa2jax.serve.state import ServerState


@dataclass
class Served:
    """A server that runs in a thread of this process.

    Attributes:
        url: where it listens.
        state: what its requests share.
    """

    url: str
    state: "ServerState"

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def settle(self, seconds: float = 5.0) -> None:
        """Wait until nothing runs and nothing waits."""
        end = time.monotonic() + seconds
        while self.state.admission.running or self.state.admission.waiting:
            assert time.monotonic() < end, "a slot was not given back"
            time.sleep(0.01)


@contextmanager
def serve(model: StepAudio2, settings: "Settings", *, warm: bool = False) -> Iterator[Served]:
    from helpers.servers import run_app

    from sa2jax.serve.app import create_app

    app = create_app(model, settings, warm=warm)
    with run_app(app) as port:
        yield Served(f"http://127.0.0.1:{port}", app.state.server)


@pytest.fixture(scope="session")
def nano() -> StepAudio2:
    return StepAudio2.from_pretrained("nano")


@pytest.fixture(scope="session")
def nano_voices(tmp_path_factory) -> Path:
    """Folder of the voices that clients add."""
    return tmp_path_factory.mktemp("voices")


@pytest.fixture(scope="session")
def nano_server(nano, nano_voices) -> Iterator[Served]:
    """A server that really hears and speaks; it is slow to start, so it is one for all."""
    from sa2jax.serve.settings import Settings

    with serve(nano, Settings(model_id="nano", rows=2, voices=nano_voices)) as served:
        yield served


@pytest.fixture(scope="module")
def tiny() -> StepAudio2:
    """A model that is told what to say, in the voices of anna and bert."""
    cfg = testing.tiny_config(max_positions=2048)
    tokenizer = Tokenizer(tokenizer_files.byte_tokenizer(testing.AUDIO_START, 512))
    return StepAudio2(cfg, testing.tiny_params(cfg), tokenizer, speech=lambda: Speech())


@pytest.fixture
def script(monkeypatch) -> Script:
    """What the model says."""
    return Script().stand_in(monkeypatch)


@pytest.fixture
def scripted_server(tiny, script, request) -> Iterator[Served]:
    """A server that says what `script` tells it; its settings are the parameter's."""
    from sa2jax.serve.settings import Settings

    settings = {"model_id": "tiny", "rows": 2} | getattr(request, "param", {})
    with serve(tiny, Settings(**settings)) as served:
        yield served


@pytest.fixture
def access_log(caplog):
    """Gives the lines of the access log once there are so many: each follows its answer."""
    caplog.set_level(logging.INFO, logger="sa2jax.access")

    def read(count: int) -> list[dict]:
        end = time.monotonic() + 5
        while True:
            messages = [r.message for r in caplog.records if r.name == "sa2jax.access"]
            if len(messages) == count:
                return [json.loads(message) for message in messages]
            assert time.monotonic() < end, messages
            time.sleep(0.01)

    return read


@pytest.fixture(scope="session")
def question() -> Path:
    """A spoken question."""
    return Path(__file__).parents[2] / "examples" / "question.flac"

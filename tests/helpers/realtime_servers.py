"""Realtime servers that say what they are told, and a plain client of them."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import websockets.sync.client

from helpers.realtime import Loudness, ScriptedResponder, as_openai_reads
from helpers.scripted import Speech
from helpers.servers import run_app
from sa2jax.serve.app import create_app
from sa2jax.serve.realtime.routes import Realtime
from sa2jax.serve.realtime.settings import RealtimeSettings
from sa2jax.serve.settings import Settings


class Client:
    """A client that reads and writes plain events."""

    def __init__(self, socket):
        self.socket = socket

    def send(self, type: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": type, **fields}))

    def next(self, timeout: float = 10) -> dict[str, Any]:
        return as_openai_reads(json.loads(self.socket.recv(timeout)))

    def until(self, type: str) -> list[dict[str, Any]]:
        """All events up to the next of a type."""
        found = [self.next()]
        while found[-1]["type"] != type:
            found.append(self.next())
        return found


@dataclass
class Served:
    """A realtime server.

    Attributes:
        port: where it listens.
        realtime: its sessions.
        script: what answers.
    """

    port: int
    realtime: Realtime
    script: ScriptedResponder = field(default_factory=ScriptedResponder)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def connect(self, **options: Any):
        """A socket."""
        options = {"max_size": None, "compression": None} | options
        query = options.pop("query", "")
        return websockets.sync.client.connect(
            f"ws://127.0.0.1:{self.port}/v1/realtime{query}", **options
        )

    def settle(self, seconds: float = 5.0) -> None:
        """Wait until no session is open and no answer runs."""
        end = time.monotonic() + seconds
        while self.realtime.sessions or self.script.running:
            assert time.monotonic() < end, (self.realtime.sessions, self.script.running)
            time.sleep(0.01)


@contextmanager
def serve_script(settings: dict[str, Any], realtime: dict[str, Any]) -> Iterator[Served]:
    script = ScriptedResponder()
    sessions = Realtime(
        RealtimeSettings(**realtime),
        make_responder=lambda state: script,
        make_detector=Loudness,
    )
    model: Any = SimpleNamespace(
        speech=Speech(), cfg=SimpleNamespace(decoder=SimpleNamespace(max_positions=4096))
    )
    app = create_app(model, Settings(model_id="small", **settings), warm=False, realtime=sessions)
    with run_app(app) as port:
        yield Served(port, sessions, script)

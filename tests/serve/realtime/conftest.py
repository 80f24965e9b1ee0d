"""Realtime servers: one that says what it is told, and clients of them."""

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi", reason="needs the extra [serve]")
pytest.importorskip("uvicorn", reason="needs the extra [serve]")
pytest.importorskip("websockets", reason="needs the extra [serve]")

from helpers.realtime import Talk
from helpers.realtime_servers import Client, Served, serve_script

from sa2jax.serve.realtime.session_config import SessionConfig, TurnDetection


@pytest.fixture(scope="module")
def _open_server() -> Iterator[Served]:
    with serve_script({}, {"max_lead": 3.0}) as served:
        yield served


@pytest.fixture
def server(_open_server) -> Iterator[Served]:
    """A server that needs no key; what it says is `server.script`."""
    _open_server.script.__init__()
    yield _open_server
    _open_server.settle()


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    """A server that needs a key, and has room for two sessions."""
    bounds = {"max_sessions": 2, "max_secrets": 2}
    with serve_script({"api_keys": ("right",)}, bounds) as served:
        yield served


@pytest.fixture
def client(server) -> Iterator[Client]:
    """A client that ends the user's turns itself."""
    with server.connect() as socket:
        made = Client(socket)
        made.until("session.created")
        off = {"type": "realtime", "audio": {"input": {"turn_detection": None}}}
        made.send("session.update", session=off)
        made.until("session.updated")
        yield made


@pytest.fixture
def talk() -> Talk:
    return Talk()


@pytest.fixture
def listening() -> Talk:
    return Talk(SessionConfig(turn_detection=TurnDetection()))

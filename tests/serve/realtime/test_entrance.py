"""Who may open a session: keys, client secrets, origins, models, room."""

import contextlib
import json

import httpx
import pytest
from helpers.realtime_servers import Client, Served
from websockets.exceptions import InvalidStatus

from sa2jax.serve.realtime.client_secrets import ClientSecrets
from sa2jax.serve.realtime.session_config import SessionConfig

RIGHT = {"Authorization": "Bearer right"}


def status(server: Served, **options) -> int | dict:
    """The HTTP status of a connection that is refused, or the session of one that is not."""
    try:
        with server.connect(**options) as socket:
            return Client(socket).next()["session"]
    except InvalidStatus as refusal:
        response = refusal.response
    assert json.loads(response.body)["error"]["message"]
    return response.status_code


def make_secret(server: Served, **body) -> httpx.Response:
    return httpx.post(f"{server.url}/realtime/client_secrets", json=body, headers=RIGHT)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"additional_headers": {"Authorization": "Bearer wrong"}},
        {"additional_headers": {"Authorization": "right"}},
        {"subprotocols": ["realtime", "openai-insecure-api-key.wrong"]},
        {"subprotocols": ["realtime", "openai-insecure-api-key.ek_wrong"]},
        {"query": "?api_key=right"},
    ],
)
def test_without_the_key(locked, options):
    assert status(locked, **options) == 401


def test_with_the_key(locked):
    assert status(locked, additional_headers=RIGHT)["model"] == "small"


def test_a_browser_brings_the_key_as_a_subprotocol(locked):
    offered = ["realtime", "openai-insecure-api-key.right"]
    with locked.connect(subprotocols=offered) as socket:
        assert socket.subprotocol == "realtime"
        assert Client(socket).next()["type"] == "session.created"


def test_models(locked):
    assert status(locked, additional_headers=RIGHT, query="?model=small")["model"] == "small"
    assert status(locked, additional_headers=RIGHT, query="?model=other") == 404


def test_room(locked):
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            socket = stack.enter_context(locked.connect(additional_headers=RIGHT))
            socket.recv(5)
        assert status(locked, additional_headers=RIGHT) == 503
    locked.settle()
    assert status(locked, additional_headers=RIGHT)["id"]


def test_pages_of_other_sites(server):
    """Any page could talk to a server on its visitor's machine."""
    assert status(server, origin="https://evil.example") == 403
    assert status(server, origin=f"http://127.0.0.1:{server.port}")["id"]


def test_client_secrets(locked):
    assert httpx.post(f"{locked.url}/realtime/client_secrets", json={}).status_code == 401
    session = {"type": "realtime", "instructions": "Sing.", "audio": {"output": {"voice": "anna"}}}
    made = make_secret(locked, session=session, expires_after={"seconds": 60}).json()
    assert made["value"].startswith("ek_")
    assert made["session"]["instructions"] == "Sing."
    offered = ["realtime", f"openai-insecure-api-key.{made['value']}"]
    session = status(locked, subprotocols=offered)
    assert session["instructions"] == "Sing."
    assert session["audio"]["output"]["voice"] == "anna"
    # It opens sessions and nothing else.
    bearer = {"Authorization": f"Bearer {made['value']}"}
    secrets = f"{locked.url}/realtime/client_secrets"
    assert httpx.post(secrets, json={}, headers=bearer).status_code == 401
    assert make_secret(locked).status_code == 200
    assert make_secret(locked).status_code == 503


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"session": {"voice": "anna"}}, "session.voice"),
        ({"session": {"model": "other"}}, "model"),
        ({"expires_after": {"seconds": 1}}, "expires_after.seconds"),
        ({"extra": 1}, "extra"),
    ],
)
def test_secrets_that_are_refused(locked, body, param):
    answer = make_secret(locked, **body)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


def test_a_secret_expires_and_is_not_kept():
    now = 1000.0
    store = ClientSecrets(2, clock=lambda: now)
    config = SessionConfig(instructions="Sing.")
    secret = store.make(config, 60)
    assert store.find(secret.value) == config
    assert store.find(secret.value[:-1]) is store.find("ek_") is store.find(None) is None
    assert secret.value not in repr(vars(store))
    now += 60
    assert store.find(secret.value) is None
    for _ in range(2):
        store.make(config, 60)  # those that have expired make room

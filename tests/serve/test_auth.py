"""Keys, request ids and the access log."""

import hmac

import pytest

from sa2jax.errors import ConfigError

pytest.importorskip("fastapi", reason="needs the extra [serve]")
httpx = pytest.importorskip("httpx", reason="needs the package httpx")

from sa2jax.serve import auth
from sa2jax.serve.auth import Keys, bearer
from sa2jax.serve.settings import Settings

KEYED = {"api_keys": ("first-key", "second-key")}


def test_every_key_is_compared_in_constant_time(monkeypatch):
    """However early a key differs, and wherever the right one stands."""
    compared, really = [], hmac.compare_digest

    def compare(a, b):
        compared.append((a, b))
        return really(a, b)

    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    keys = Keys(["first-key", "second-key"])
    for key, right in (("first-key", True), ("second-key", True), ("x", False), (None, False)):
        compared.clear()
        assert keys.accepts(key) is right
        assert len(compared) == 2
        assert {len(part) for pair in compared for part in pair} == {32}


def test_no_key_opens_to_all():
    assert Keys().accepts(None)
    assert not Keys([""]).accepts(None)


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ("Bearer abc", "abc"),
        ("bearer  abc ", "abc"),
        ("Basic abc", None),
        ("Bearer ", None),
        ("abc", None),
        ("", None),
        (None, None),
    ],
)
def test_the_key_in_a_header(header, key):
    assert bearer(header) == key


@pytest.mark.parametrize("scripted_server", [KEYED], indirect=True)
def test_what_needs_a_key(scripted_server, script):
    script.will_say("x")
    with httpx.Client(base_url=scripted_server.url) as client:
        for path in ("/health", "/healthz", "/readyz", "/metrics", "/version"):
            assert client.get(path).status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "first-key"}):
            for path in ("/v1/models", "/v1/audio/voices", "/nothing"):
                response = client.get(path, headers=headers)
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        key = {"authorization": "Bearer second-key"}
        body = {"messages": [{"role": "user", "content": "hi"}]}
        assert client.post("/v1/chat/completions", json=body).status_code == 401
        assert client.post("/v1/chat/completions", json=body, headers=key).status_code == 200
        assert client.get("/v1/models", headers=key).status_code == 200


@pytest.mark.parametrize("scripted_server", [KEYED | {"public_operations": False}], indirect=True)
def test_operations_may_need_a_key(scripted_server):
    assert httpx.get(f"{scripted_server.url}/metrics").status_code == 401
    key = {"authorization": "Bearer first-key"}
    assert httpx.get(f"{scripted_server.url}/metrics", headers=key).status_code == 200


def test_keys_are_printed_nowhere():
    settings = Settings(**KEYED)
    assert "first-key" not in repr(settings)
    with pytest.raises(ConfigError, match="printable ASCII"):
        Settings(api_keys=("snow\u2603",))


def test_ids_of_requests_are_echoed_if_they_are_harmless(scripted_server, access_log):
    def id_of(given):
        headers = {} if given is None else {"x-request-id": given}
        return httpx.get(f"{scripted_server.url}/health", headers=headers).headers["x-request-id"]

    assert id_of("trace-1:2") == "trace-1:2"
    assert id_of(None) != id_of(None)
    for odd in ("a b", 'x"}', "x" * 200):
        assert id_of(odd).startswith("req_")
    lines = access_log(6)
    assert lines[0] == lines[0] | {
        "request_id": "trace-1:2",
        "method": "GET",
        "path": "/health",
        "status": 200,
        "client": "127.0.0.1",
    }

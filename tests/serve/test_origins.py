"""Pages of others that have a browser send requests here."""

import pytest

pytest.importorskip("fastapi", reason="needs the extra [serve]")
httpx = pytest.importorskip("httpx", reason="needs the package httpx")

from sa2jax.serve.errors import ApiError
from sa2jax.serve.origins import Origins
from sa2jax.serve.settings import Settings


@pytest.mark.parametrize(
    ("origin", "host", "is_allowed"),
    [
        (None, "localhost:8000", True),
        ("http://localhost:8000", "localhost:8000", True),
        ("http://[::1]:8000", "[::1]:8000", True),
        ("https://friend.example", "localhost:8000", True),
        ("https://evil.example", "localhost:8000", False),
        ("http://localhost:3000", "localhost:8000", False),
        ("null", "localhost:8000", False),
        ("http://evil.example:8000", "evil.example:8000", False),  # its name leads here
        (None, "evil.example", False),
        (None, None, False),
        (None, "[", False),
    ],
)
def test_a_server_of_this_machine(origin, host, is_allowed):
    origins = Origins(Settings(local_only=True, allowed_origins=("https://friend.example",)))
    if is_allowed:
        origins.require(origin, host)
    else:
        with pytest.raises(ApiError) as refused:
            origins.require(origin, host)
        assert refused.value.status == 403


def test_a_server_with_keys_or_for_others_has_any_name():
    for settings in (Settings(local_only=True, api_keys=("k",)), Settings()):
        Origins(settings).require("https://speech.example", "speech.example")


@pytest.mark.parametrize(
    "scripted_server", [{"allowed_origins": ("https://friend.example",)}], indirect=True
)
def test_pages_over_http(scripted_server):
    url = f"{scripted_server.url}/v1/models"
    friend, evil = {"origin": "https://friend.example"}, {"origin": "https://evil.example"}
    assert httpx.get(url, headers=friend).headers["access-control-allow-origin"]
    refused = httpx.get(url, headers=evil)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
    asked = {"access-control-request-method": "POST", **friend}
    assert httpx.options(url, headers=asked).status_code == 200

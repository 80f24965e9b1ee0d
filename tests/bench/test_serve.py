"""The benchmark of the server: what clients hear of nano, over HTTP."""

import json

import pytest

from sa2jax.errors import ConfigError

pytest.importorskip("fastapi", reason="needs sa2jax[serve]")
from sa2jax.bench import serve


@pytest.mark.slow
def test_a_server_of_nano():
    told = []
    found = serve.bench_serve(
        "nano", rows=2, streams=(1, 2), repeats=1, progress=lambda *n: told.append(n)
    )
    rows = {row.name: row for row in found.rows}
    assert told == [(n, 4) for n in range(1, 5)]
    for count in ("1 client", "2 clients"):
        assert 0 < rows[f"{count}: first sound, median"].ours < 60_000
        assert (
            rows[f"{count}: first sound, 95 %"].ours >= rows[f"{count}: first sound, median"].ours
        )
        assert rows[f"{count}: sound"].ours > 0
    assert rows["programs compiled after ready"].ours == 0


def test_the_sound_in_a_line():
    audio = {"audio": {"data": "AAAAAAAA"}}
    line = b"data: " + json.dumps({"choices": [{"delta": audio}]}).encode()
    assert serve._seconds_in(line) == pytest.approx(6 / 48_000)
    for other in (b"data: [DONE]", b"", b'data: {"choices": [{"delta": {"content": "a"}}]}'):
        assert serve._seconds_in(other) == 0


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"repeats": 0}, {"streams": ()}, {"streams": (0,)}])
def test_what_cannot_be_timed(wrong):
    with pytest.raises(ConfigError, match="expected repeats >= 1, rows >= 1"):
        serve.bench_serve(**wrong)

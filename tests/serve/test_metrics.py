"""What /metrics, /readyz and /version tell."""

import re
import time

import pytest
from helpers.scripted import HELLO

from sa2jax.inference.programs import TRACES

pytest.importorskip("fastapi", reason="needs the extra [serve]")
httpx = pytest.importorskip("httpx", reason="needs the package httpx")

from sa2jax.serve.metrics import Metrics
from sa2jax.serve.state import Readiness


def values(text: str) -> dict[str, float]:
    """Samples by name and labels, the model's left out."""
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            labels = re.sub(r'model_name="[^"]*",?', "", name).replace(",}", "}").replace("{}", "")
            found[labels] = float(value)
    return found


def get(server, path="/metrics") -> dict[str, float]:
    return values(httpx.get(f"{server.url}{path}").text)


def test_an_answer_is_counted_and_measured(scripted_server, script):
    script.will_say(HELLO, "hi")
    body = {"messages": [{"role": "user", "content": "hi"}]}
    url = f"{scripted_server.url}/v1/chat/completions"
    httpx.post(url, json=body | {"modalities": ["text", "audio"], "stream": True})
    httpx.post(url, json=body)
    httpx.post(url, json={})
    scripted_server.settle()
    found = get(scripted_server)
    assert found["sa2jax:num_requests_running"] == 0
    assert found["sa2jax:num_requests_waiting"] == 0
    assert found['sa2jax:request_success_total{finished_reason="stop"}'] == 2
    assert found["sa2jax:prompt_tokens_total"] == sum(map(len, script.prompts))
    assert found["sa2jax:generation_tokens_total"] == len(HELLO) + 2
    assert found["sa2jax:time_to_first_token_seconds_count"] == 2
    assert found["sa2jax:time_to_first_audio_seconds_count"] == 1
    assert found["sa2jax:audio_seconds_total"] == pytest.approx(20 / 25)
    assert found["sa2jax:real_time_factor_count"] == 1
    assert found["sa2jax:request_queue_time_seconds_count"] == 2
    assert found["sa2jax:compiles_after_ready_total"] == 0
    path = 'path="/v1/chat/completions"'
    assert found[f'sa2jax:http_requests_total{{{path},status="200"}}'] == 2
    assert found[f'sa2jax:http_requests_total{{{path},status="400"}}'] == 1


def test_paths_that_do_not_exist_make_no_labels(scripted_server):
    for n in range(3):
        httpx.get(f"{scripted_server.url}/nothing/{n}")
    assert get(scripted_server)['sa2jax:http_requests_total{path="other",status="404"}'] == 3


def test_gaps_in_the_sound_are_underruns(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    metrics = Metrics("m", running=lambda: 0, waiting=lambda: 0, compiles=lambda: 0)
    watch = metrics.watch(queued=0.5)
    for moment, seconds in ((0.2, 1.0), (0.9, 0.5), (1.75, 0.5), (2.6, 0.5)):
        now[0] = 100 + moment  # plays until 1.2, 1.7, 2.25, 3.1
        watch.piece(seconds=seconds)
    now[0] = 103.0
    watch.end("stop")
    found = values(metrics.text().decode())
    assert found["sa2jax:audio_underruns_total"] == 1  # one of 0.05 s is not heard
    assert found["sa2jax:audio_underrun_seconds_total"] == pytest.approx(0.35)
    assert found["sa2jax:time_to_first_audio_seconds_sum"] == pytest.approx(0.7)
    assert found["sa2jax:real_time_factor_sum"] == pytest.approx(3.0 / 2.5)


def test_programs_that_are_made_later_are_counted(scripted_server):
    before = TRACES["decode"]
    TRACES["decode"] += 2
    try:
        assert get(scripted_server)["sa2jax:compiles_after_ready_total"] == 2
    finally:
        TRACES["decode"] = before


def test_ready_only_when_it_is(scripted_server):
    def status():
        response = httpx.get(f"{scripted_server.url}/readyz")
        return response.status_code, response.json()["status"]

    state = scripted_server.state
    assert status() == (200, "ready")
    state.readiness = Readiness(doing="a spoken answer (7 of 8)")
    assert status() == (503, "warming up")
    state.readiness = Readiness(error="no memory")
    assert status() == (503, "failed")
    state.admission.close()
    assert status() == (503, "shutting down")
    assert httpx.get(f"{scripted_server.url}/health").status_code == 200


def test_version(scripted_server):
    assert set(httpx.get(f"{scripted_server.url}/version").json()) == {"version", "jax"}

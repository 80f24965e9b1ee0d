"""`sa2jax serve`: what it refuses, how it starts and how it ends."""

import os
import signal
import socket
import sys
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="needs the extra [serve]")
httpx = pytest.importorskip("httpx", reason="needs the package httpx")

from sa2jax.cli import options

ASK = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def visit(port):
    """Runs something in a thread as soon as the server answers, and then ends the server.

    One signal, and no other: it would come when nobody handles it any more.
    """
    url, failures, threads, signals = f"http://127.0.0.1:{port}", [], [], []

    def end_server(number=signal.SIGINT):
        if not signals:
            signals.append(number)
            os.kill(os.getpid(), number)

    def begin(work):
        def go():
            try:
                end = time.monotonic() + 90
                while True:
                    try:
                        httpx.get(f"{url}/health")
                        break
                    except httpx.TransportError:
                        assert time.monotonic() < end
                        time.sleep(0.02)
                work(url, end_server)
            except BaseException as error:
                failures.append(error)
            finally:
                end_server()

        threads.append(threading.Thread(target=go))
        threads[0].start()

    yield begin
    for thread in threads:
        thread.join()
    assert not failures


def test_without_its_packages_it_says_which_to_install(refused, monkeypatch):
    monkeypatch.setattr(sys.modules["sa2jax.cli.serve"], "find_spec", lambda name: None)
    assert 'pip install "sa2jax[serve]"' in refused("serve")


def test_what_is_refused_before_a_model_is_loaded(refused, monkeypatch, tmp_path, port):
    def load(self):
        raise AssertionError

    monkeypatch.setattr(options.ModelOptions, "load", load)
    empty, no_pem = tmp_path / "keys", tmp_path / "cert.pem"
    empty.write_text("# none\n\n")
    no_pem.write_text("x")
    assert "expected one a line" in refused("serve", "--api-key-file", empty)
    assert "keys cannot be read" in refused("serve", "--api-key-file", tmp_path / "nothing")
    assert "printable ASCII" in refused("serve", "--api-key", "snow\u2603")
    assert "rows=0" in refused("serve", "--rows", 0)
    assert "OTHER=VOICE" in refused("serve", "--voice-alias", "alloy")
    assert "cannot be used" in refused("serve", "--ssl-certfile", no_pem)
    assert "give both" in refused("serve", "--ssl-keyfile", no_pem)
    assert "cannot listen on" in refused("serve", "--host", "no.such.host.invalid")
    assert "cannot listen on" in refused("serve", "--port", 99_999)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert "choose another --host or --port" in refused("serve", "--port", port)


@pytest.mark.both_pairs
def test_it_serves_finishes_what_is_said_and_ends_well(run, script, visit, port, caplog, tmp_path):
    """An answer under way when the signal comes is heard to its end."""
    keys = tmp_path / "keys"
    keys.write_text("# ours\nsecret\n")
    key = {"authorization": "Bearer secret"}
    script.will_say(*["ok"] * 40)
    answers = []

    def work(url, end_server):
        end = time.monotonic() + 90
        while httpx.get(f"{url}/readyz").status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert httpx.get(f"{url}/v1/models").status_code == 401
        (model,) = httpx.get(f"{url}/v1/models", headers=key).json()["data"]
        assert model["id"] == "here"
        script.replies.clear()
        script.pace = 0.02
        script.will_say("slowly but surely " * 5)

        def ask():
            answers.append(httpx.post(f"{url}/v1/chat/completions", json=ASK, headers=key))

        thread = threading.Thread(target=ask)
        before = len(script.prompts)
        thread.start()
        while len(script.prompts) == before:
            time.sleep(0.01)
        end_server(signal.SIGTERM)
        thread.join()

    visit(work)
    caplog.set_level("INFO")
    code, _, err = run(
        *("serve", "--port", port, "--name", "here", "--api-key-file", keys, "--grace", 5),
        *("--voices", tmp_path / "voices", "--no-access-log", "--rows", 2, "--max-len", 256),
    )
    assert (code, err) == (0, "ended\n")
    assert answers[0].json()["choices"][0]["message"]["content"] == "slowly but surely " * 5
    assert f"here at http://127.0.0.1:{port} (this machine only)" in caplog.text
    assert "a written answer" in caplog.text  # warming up is told
    assert "shutting down: 1 answers under way" in caplog.text


def test_whoever_can_be_reached_from_elsewhere_is_told(run, script, visit, port, caplog):
    script.will_say(*["ok"] * 20)
    visit(lambda url, end_server: None)
    assert run("serve", "--host", "0.0.0.0", "--port", port, "--no-warm-up")[0] == 0
    assert "whoever reaches this server may use it" in caplog.text

"""Clients that go away, or read slowly, in every phase: slots come back, others notice nothing."""

import json
import socket
import time

import pytest

pytest.importorskip("fastapi", reason="needs the extra [serve]")
httpx = pytest.importorskip("httpx", reason="needs the package httpx")


LONG = "x" * 400
SPOKEN = {"modalities": ["text", "audio"], "stream": True}


def body_of(**options) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "hi"}], **options}).encode()


def send(server, body: bytes, *, length: int | None = None, path="/v1/chat/completions"):
    """A connection on which a request was sent, by hand."""
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.settimeout(10)
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body) if length is None else length}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


def until(ready, seconds: float = 5.0):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.005)


def is_well(server, script):
    """It has given back what it held, and answers."""
    server.settle()
    script.replies.clear()
    script.will_say("fine")
    url = f"{server.url}/v1/chat/completions"
    answer = httpx.post(url, content=body_of(), headers={"content-type": "application/json"})
    return answer.json()["choices"][0]["message"]["content"] == "fine"


@pytest.mark.parametrize("phase", ["head", "body"])
def test_while_the_request_is_sent(scripted_server, script, phase):
    if phase == "head":
        connection = socket.create_connection(("127.0.0.1", scripted_server.port))
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-le")
    else:
        connection = send(scripted_server, body_of()[:20], length=1000)
    connection.close()
    assert is_well(scripted_server, script)


@pytest.mark.parametrize("options", [{}, {"stream": True}, SPOKEN, {"n": 2}, {"n": 2, **SPOKEN}])
def test_while_the_answer_is_made(scripted_server, script, options):
    """The answer ends within a block of ids, whether or not anything was sent yet."""
    script.pace = 0.02
    script.will_say(LONG, LONG)
    connection = send(scripted_server, body_of(**options))
    until(lambda: len(script.prompts) == options.get("n", 1))
    if options.get("stream"):
        assert connection.recv(100)
    started = time.monotonic()
    connection.close()
    scripted_server.settle()
    assert time.monotonic() - started < 0.5  # of 1.6 s that it would have taken
    assert script.left == options.get("n", 1)  # none came to its end
    assert is_well(scripted_server, script)


@pytest.mark.parametrize("scripted_server", [{"rows": 1}], indirect=True)
def test_while_it_waits_for_its_turn(scripted_server, script):
    script.pace = 0.02
    script.will_say(LONG)
    admission = scripted_server.state.admission
    first = send(scripted_server, body_of())
    until(lambda: admission.running)
    second = send(scripted_server, body_of())
    until(lambda: admission.waiting)
    second.close()
    until(lambda: not admission.waiting)
    assert admission.running == 1
    assert len(script.prompts) == 1
    first.close()
    assert is_well(scripted_server, script)


def test_while_a_text_is_read_aloud(scripted_server, script):
    script.pace = 0.02
    script.will_say(list(range(304, 504)) * 3)
    body = json.dumps({"input": "hi", "response_format": "pcm"}).encode()
    connection = send(scripted_server, body, path="/v1/audio/speech")
    assert connection.recv(100)
    connection.close()
    assert is_well(scripted_server, script)


def unread(server, script):
    """A connection that takes nothing of a long spoken answer, which has paused."""
    script.will_say(list(range(304, 504)) * 400)  # 53 minutes of speech
    body = body_of(**SPOKEN, max_completion_tokens=2000)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: "
    kind = "\r\ncontent-type: application/json\r\n\r\n"
    connection.sendall(f"{head}{len(body)}{kind}".encode() + body)
    until(lambda: script.prompts)
    spoken, before = server.state.model.speech.token2wav.spoken, -1
    while before != len(spoken):
        before = len(spoken)
        time.sleep(0.3)
    return connection


@pytest.mark.parametrize("scripted_server", [{"queued_pieces": 4}], indirect=True)
def test_a_slow_reader_pauses_its_answer_and_no_other(scripted_server, script):
    """Pieces are made as they are taken: neither memory nor the device is spent ahead."""
    connection = unread(scripted_server, script)
    assert scripted_server.state.admission.running == 1
    script.will_say("fine")
    answer = httpx.post(
        f"{scripted_server.url}/v1/chat/completions",
        content=body_of(),
        headers={"content-type": "application/json"},
    )
    assert answer.json()["choices"][0]["message"]["content"] == "fine"
    connection.close()
    assert is_well(scripted_server, script)


@pytest.mark.parametrize(
    "scripted_server", [{"queued_pieces": 4, "reader_timeout": 0.2}], indirect=True
)
def test_who_reads_nothing_is_given_up(scripted_server, script):
    connection = unread(scripted_server, script)
    assert is_well(scripted_server, script)
    connection.close()


def test_an_answer_that_fails_on_the_way(scripted_server, script, monkeypatch):
    """An error after the first piece is an event of the stream; others go on."""
    speech = scripted_server.state.model.speech.token2wav
    step, left = speech.step, [3]

    def failing(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("the device is gone")
        return step(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(speech, "step", failing)
        script.pace = 0.01
        script.will_say(list(range(304, 504)) * 3)
        text = httpx.post(
            f"{scripted_server.url}/v1/chat/completions",
            content=body_of(**SPOKEN),
            headers={"content-type": "application/json"},
        ).text
    events = [line.removeprefix("data: ") for line in text.split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    error = json.loads(events[-3])["error"]
    assert error["type"] == "server_error"
    assert "device" not in error["message"]  # what is inside is for the log
    script.pace = 0.0
    assert is_well(scripted_server, script)

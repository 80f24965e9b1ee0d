"""Sessions over real sockets: slow and dying clients, malformed events, the pace of sound."""

import threading
import time
from socket import SHUT_RDWR

import pytest
from helpers.malformed_events import MALFORMED
from helpers.realtime import LOUD, SILENT, Reply, base64_of, types
from helpers.realtime_servers import Client
from websockets.exceptions import ConnectionClosed

from sa2jax.errors import PromptError

ITEM = {
    "type": "message",
    "role": "user",
    "content": [{"type": "input_text", "text": "Hi"}],
}


def ask(client: Client) -> None:
    client.send("conversation.item.create", item=ITEM)
    client.send("response.create")


@pytest.mark.both_pairs
def test_a_whole_turn(client, server):
    server.script.replies.append(Reply(["one", "two"]))
    ask(client)
    events = client.until("response.done")
    assert types(events)[:3] == [
        "conversation.item.added",
        "conversation.item.done",
        "response.created",
    ]
    done = events[-1]["response"]
    assert done["output"][0]["content"][0]["transcript"] == "one two"


def test_sixty_malformed_events_and_the_session_lives(client):
    for text, code, _ in MALFORMED:
        client.socket.send(text)
        assert client.next()["error"]["code"] == code, text[:100]
    client.socket.send(b"\xff\xfe")
    assert client.next()["error"]["code"] == "invalid_json"
    client.socket.send(b'{"type": "response.create"}')
    assert client.until("response.done")[-1]["response"]["status"] == "completed"


def test_a_message_that_the_web_server_does_not_take(server):
    with server.connect() as socket:
        socket.recv()

        def send() -> None:
            socket.send("x" * (25 << 20))
            socket.recv(10)

        with pytest.raises(ConnectionClosed):
            send()
    server.settle()


def test_the_largest_message_is_taken(client):
    client.send("input_audio_buffer.append", audio="A" * (15 << 20))
    client.send("input_audio_buffer.append", audio="A" * ((15 << 20) + 4))
    assert client.next()["error"]["code"] == "string_above_max_length"
    client.send("input_audio_buffer.commit")
    assert client.until("conversation.item.done")


def test_an_answer_that_fails(client, server):
    server.script.replies += [
        Reply(["one"], error=PromptError("the conversation does not fit")),
        Reply([], error=RuntimeError("a secret of the server")),
    ]
    ask(client)
    done = client.until("response.done")[-1]["response"]
    assert done["status"] == "failed"
    assert done["status_details"]["error"]["message"] == "the conversation does not fit"
    client.send("response.create")
    done = client.until("response.done")[-1]["response"]
    assert "secret" not in done["status_details"]["error"]["message"]
    assert done["status_details"]["error"]["type"] == "server_error"
    client.send("response.create")
    assert client.until("response.done")[-1]["response"]["status"] == "completed"


def test_a_conversation_that_is_full(client, server):
    """Its answers fail, and end."""
    (session,) = server.realtime.sessions
    session.conversation._max_items = 1
    server.script.replies.append(Reply(["one"], holds=True))
    ask(client)
    done = client.until("response.done")[-1]["response"]
    assert done["status_details"]["error"]["code"] == "conversation_full"
    assert done["output"] == []
    assert server.script.cancelled == [0.0]


def test_transcripts_come_and_fail(client, server):
    wanted = {"audio": {"input": {"transcription": {"model": "any"}}}}
    client.send("session.update", session=wanted)
    client.until("session.updated")
    server.script.heard += ["good morning", PromptError("no")]
    kind = "conversation.item.input_audio_transcription"
    for end in ("completed", "failed"):
        client.send("input_audio_buffer.append", audio=base64_of(LOUD))
        client.send("input_audio_buffer.commit")
        event = client.until(f"{kind}.{end}")[-1]
        assert event.get("transcript") == ("good morning" if end == "completed" else None)


def test_interrupted_by_speech(server):
    server.script.replies.append(Reply(["one", "two", "three"], holds=True))
    with server.connect() as socket:
        client = Client(socket)
        client.until("session.created")
        ask(client)
        for _ in range(3):
            client.until("response.output_audio.delta")
        started = time.monotonic()
        client.send("input_audio_buffer.append", audio=base64_of(LOUD))
        events = client.until("response.done")
        assert time.monotonic() - started < 1
        assert types(events).index("input_audio_buffer.speech_started") < 6
        assert events[-1]["response"]["status_details"]["reason"] == "turn_detected"
        after = types(events)[types(events).index("input_audio_buffer.speech_started") :]
        assert "response.output_audio.delta" not in after
        client.send("input_audio_buffer.append", audio=base64_of(SILENT))
        assert client.until("response.done")[-1]["response"]["status"] == "completed"
    (sent,) = server.script.cancelled
    assert 1 <= sent <= 3


def test_cancelled_and_asked_anew(client, server):
    server.script.replies.append(Reply(["one"], holds=True))
    ask(client)
    client.until("response.output_audio.delta")
    client.send("response.cancel")
    client.send("response.create")
    first, second = (client.until("response.done")[-1]["response"] for _ in range(2))
    assert (first["status"], second["status"]) == ("cancelled", "completed")


def test_sound_is_sent_no_faster_than_it_can_be_held(client, server):
    """The server lets 3 s be ahead: of 5 s the last come when some have been heard."""
    server.script.replies.append(Reply(["one", "two", "three", "four", "five"]))
    started = time.monotonic()
    ask(client)
    client.until("response.done")
    assert 0.9 < time.monotonic() - started < 4


def test_a_client_that_reads_nothing_pauses_its_answer(server):
    words = ["word"] * 400
    server.script.replies.append(Reply(words))
    bounds = server.realtime.settings
    with server.connect(max_queue=1) as socket:
        client = Client(socket)
        client.until("session.created")
        text = {"output_modalities": ["text"]}
        client.send("conversation.item.create", item=ITEM | {"content": [long_text()]})
        for _ in range(30):  # events of 100 kB that wait for it
            client.send("conversation.item.retrieve", item_id=ITEM_ID)
        client.send("response.create", response=text)
        time.sleep(0.3)
        queued = [len(session.outbox) for session in server.realtime.sessions]
        assert max(queued) <= bounds.queued_events + 60
        events = client.until("response.done")
        assert sum("output_text.delta" in kind for kind in types(events)) == len(words)


ITEM_ID = "item_long"


def long_text() -> dict:
    return {"type": "input_text", "text": "long " * 20_000}


PHASES = ["session.created", "response.created", "response.output_audio.delta", "response.done"]


@pytest.mark.parametrize("phase", PHASES)
def test_a_client_that_dies(server, phase):
    if phase != "session.created":
        server.script.replies.append(Reply(["one", "two"], holds=phase != "response.done"))
    socket = server.connect()
    client = Client(socket)
    client.until("session.created")
    if phase != "session.created":
        ask(client)
        client.until(phase)
    socket.socket.shutdown(SHUT_RDWR)  # no goodbye
    server.settle()
    with server.connect() as other:
        client = Client(other)
        ask(client)
        assert client.until("response.done")[-1]["response"]["status"] == "completed"


def test_sessions_do_not_hear_each_other(server):
    def talk(number: int) -> None:
        with server.connect() as socket:
            client = Client(socket)
            for turn in range(3):
                text = f"{number} {turn}"
                item = ITEM | {"content": [{"type": "input_text", "text": text}]}
                client.send("conversation.item.create", item=item)
                client.send("response.create")
                client.until("response.done")

    threads = [threading.Thread(target=talk, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for request in server.script.requests:
        asked = [turn.parts[0] for turn in request.turns if hasattr(turn, "parts")]
        assert len({text.split()[0] for text in asked}) == 1
        assert [text.split()[1] for text in asked] == [str(n) for n in range(len(asked))]


def test_the_server_shuts_down_in_time():
    from helpers.realtime_servers import serve_script

    with serve_script({}, {}) as served:
        served.script.replies.append(Reply(["one"], holds=True))
        socket = served.connect()
        client = Client(socket)
        ask(client)
        client.until("response.output_audio.delta")
        started = time.monotonic()
    assert time.monotonic() - started < 6
    with pytest.raises(ConnectionClosed):
        client.until("session.closed")

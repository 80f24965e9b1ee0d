"""What a client may send, and what is refused."""

import pytest
from helpers.malformed_events import MALFORMED
from helpers.realtime import MIB, Talk, only, types

from sa2jax.serve.realtime import client_events as client
from sa2jax.serve.realtime.checks import EventError
from sa2jax.serve.realtime.client_events import parse_event


def refused(talk: Talk, text: str) -> dict:
    try:
        talk.session.receive(parse_event(text, max_bytes=24 * MIB))
    except EventError as error:
        talk.session.refuse(error)
    return only(talk.events(), "error")["error"]


def test_each_of_them_is_refused_and_nothing_has_changed():
    talk = Talk()
    before = talk.session.config
    for text, code, param in MALFORMED:
        error = refused(talk, text)
        assert error["code"] == code, (text[:100], error)
        assert param is None or error["param"] == param, (text[:100], error)
        assert error["type"] == "invalid_request_error"
        assert len(error["message"]) < 500
    assert talk.session.config is before
    assert len(talk.session.conversation) == 0
    assert types(talk.send("response.create")) == ["response.created"]


def test_an_error_names_the_clients_event():
    talk = Talk()
    text = '{"type": "session.update", "session": 7, "event_id": "mine"}'
    assert refused(talk, text)["event_id"] == "mine"
    text = '{"type": "unheard of", "event_id": "mine"}'
    assert refused(talk, text)["event_id"] == "mine"


def test_a_message_that_is_too_large():
    with pytest.raises(EventError, match="at most 10 bytes, got 11") as refusal:
        parse_event(" " * 11, max_bytes=10)
    assert refusal.value.code == "message_too_large"


def test_what_is_read():
    def read(text: str) -> client.ClientEvent:
        return parse_event(text, max_bytes=MIB)

    assert read('{"type": "input_audio_buffer.append", "audio": "AAA="}') == client.AppendAudio(
        audio=b"\0\0"
    )
    assert read('{"type": "response.cancel", "event_id": "e"}') == client.CancelResponse(
        event_id="e", response_id=None
    )
    assert read('{"type": "response.create", "response": null}') == client.CreateResponse(
        response={}
    )
    assert read(
        '{"type": "conversation.item.truncate", "item_id": "a", "content_index": 0,'
        ' "audio_end_ms": 7}'
    ) == client.TruncateItem(item_id="a", content_index=0, audio_end_ms=7)
    assert read('{"type": "output_audio_buffer.clear"}') == client.ClearOutput()

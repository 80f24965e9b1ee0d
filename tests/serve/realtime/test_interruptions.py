"""Answers that are cancelled, interrupted and cut: what the history keeps of them."""

import base64

import pytest
from helpers.realtime import (
    CLOSED,
    SILENT,
    USER_ITEM,
    Talk,
    Words,
    only,
    said_by,
    tone,
    types,
)

from sa2jax.pipeline.reply import ReplyPiece
from sa2jax.serve.realtime.responder import UserTurn
from sa2jax.serve.realtime.session_config import SessionConfig, TurnDetection


def test_cancelled_by_the_client(talk):
    talk.ask()
    talk.send("response.create")
    talk.give(ReplyPiece(text="one two three"), ReplyPiece(audio=tone(2.0)))
    talk.post("response.cancel")
    assert talk.events() == []
    assert talk.cancelled[-1].sent == pytest.approx(2)
    assert talk.give(ReplyPiece(text=" four"), ReplyPiece(audio=tone(1.0))) == []
    events = talk.end_cancelled(["one", "two"])
    assert types(events) == CLOSED
    done = only(events, "response.done")["response"]
    assert done["status_details"] == {"type": "cancelled", "reason": "client_cancelled"}
    assert done["output"][0]["status"] == "incomplete"
    # What was not heard is not said either.
    assert only(events, "response.output_audio_transcript.done")["transcript"] == "one two"


def test_what_waits_is_taken_back(talk):
    talk.ask()
    talk.send("response.create")
    talk.give(ReplyPiece(text="one"), ReplyPiece(audio=tone(1.0)))
    for piece in (ReplyPiece(text=" two"), ReplyPiece(audio=tone(3.0))):
        talk.session.piece(talk.requests[-1].id, piece)  # the client reads slowly
    talk.post("response.cancel")
    assert talk.events() == []
    assert talk.cancelled[-1].sent == pytest.approx(1)


def test_interrupted_by_speech(listening):
    listening.send("response.create")
    listening.give(ReplyPiece(text="one two three"), ReplyPiece(audio=tone(3.0)))
    listening.now += 1.5
    events = listening.speak()
    assert types(events) == ["input_audio_buffer.speech_started", "conversation.item.truncated"]
    assert events[1]["audio_end_ms"] == 1500
    assert listening.cancelled[-1].sent == pytest.approx(3)
    # The turn is over before the answer is: it is answered afterwards.
    assert types(listening.speak(SILENT)) == [
        "input_audio_buffer.speech_stopped",
        "input_audio_buffer.committed",
        *USER_ITEM,
    ]
    events = listening.end_cancelled(["one", "two", "three"])
    assert types(events) == [*CLOSED, "response.created"]
    done = only(events, "response.done")["response"]
    assert done["status_details"] == {"type": "cancelled", "reason": "turn_detected"}
    assert done["output"][0]["content"][0]["transcript"] == "one"
    said, asked = listening.requests[-1].turns
    assert said.utterance == Words(("one",), 0, 1.5)
    assert isinstance(asked, UserTurn)


def test_the_client_knows_better_what_was_heard(listening):
    listening.send("response.create")
    item = only(
        listening.give(ReplyPiece(text="one two three"), ReplyPiece(audio=tone(3.0))),
        "conversation.item.added",
    )["item"]["id"]
    listening.now += 1.5
    listening.speak()

    def truncate(ms: int) -> int:
        events = listening.send(
            "conversation.item.truncate", item_id=item, content_index=0, audio_end_ms=ms
        )
        return only(events, "conversation.item.truncated")["audio_end_ms"]

    assert truncate(2200) == 2200  # before the answer has ended
    events = listening.end_cancelled(["one", "two", "three"])
    assert only(events, "response.done")["response"]["output"][0]["content"] == [
        {"type": "output_audio", "transcript": "one two"}
    ]
    assert truncate(1100) == 1100
    assert truncate(99_999) == 3000  # beyond its end
    listening.send("response.create")
    assert listening.requests[-1].turns[0].utterance.seconds == 3.0


def test_interrupted_while_the_rest_is_played(listening):
    said_by(listening)
    listening.now += 0.5
    events = listening.speak()
    assert types(events) == ["input_audio_buffer.speech_started", "conversation.item.truncated"]
    assert events[1]["audio_end_ms"] == 500
    assert not listening.cancelled


def test_speech_after_an_answer_interrupts_nothing(listening):
    said_by(listening)
    listening.now += 3
    assert types(listening.speak()) == ["input_audio_buffer.speech_started"]


def test_an_answer_that_is_not_to_be_interrupted():
    talk = Talk(SessionConfig(turn_detection=TurnDetection(interrupt_response=False)))
    talk.send("response.create")
    talk.give(ReplyPiece(audio=tone(1.0)))
    events = [*talk.speak(), *talk.speak(SILENT)]
    assert not talk.cancelled
    assert events[-1]["error"]["code"] == "conversation_already_has_active_response"


def test_interrupted_before_anything_was_said(listening):
    listening.send("response.create")
    assert types(listening.speak()) == ["input_audio_buffer.speech_started"]
    (done,) = listening.end_cancelled()
    assert done["response"]["output"] == []
    assert done["response"]["status"] == "cancelled"


def test_cancel_and_ask_anew_at_once(talk):
    talk.ask()
    talk.send("response.create")
    talk.give(ReplyPiece(text="one"), ReplyPiece(audio=tone(1.0)))
    assert talk.send("response.cancel") == []
    assert talk.send("response.create") == []
    assert types(talk.end_cancelled(["one"])) == [*CLOSED, "response.created"]
    assert len(talk.requests) == 2


def test_nothing_to_cancel(talk):
    for fields in ({}, {"response_id": "resp_none"}):
        error = only(talk.send("response.cancel", **fields), "error")["error"]
        assert error["code"] == "response_cancel_not_active"
    assert types(talk.ask()) == USER_ITEM


def test_cut_after_the_end(talk):
    said_by(talk)
    item = talk.session.conversation.last_id
    talk.send("conversation.item.truncate", item_id=item, content_index=0, audio_end_ms=1200)
    shown = only(
        talk.send("conversation.item.retrieve", item_id=item), "conversation.item.retrieved"
    )
    (part,) = shown["item"]["content"]
    assert part["transcript"] == "one"
    assert len(base64.b64decode(part["audio"])) == 2 * 28_800

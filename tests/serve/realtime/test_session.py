"""The session as a state machine: events in, events out."""

import base64

import numpy as np
import pytest
from helpers.realtime import (
    CLOSED,
    LOUD,
    SILENT,
    USER_ITEM,
    Reply,
    Talk,
    base64_of,
    only,
    outcome_of,
    pcm,
    said_by,
    tone,
    types,
)

from sa2jax.chat.tools import ToolCall
from sa2jax.pipeline.reply import ReplyPiece
from sa2jax.serve.realtime.checks import EventError
from sa2jax.serve.realtime.responder import CallOutputTurn, SaidTurn, UserTurn
from sa2jax.serve.realtime.session_config import SessionConfig, TurnDetection

OPENED = [
    "response.created",
    "response.output_item.added",
    "conversation.item.added",
    "response.content_part.added",
]
SPOKEN = ["response.output_audio_transcript.delta", *["response.output_audio.delta"] * 2]
CALLED = [
    "response.output_item.added",
    "conversation.item.added",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
    "conversation.item.done",
]
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}}


def test_the_first_event_shows_the_session(talk):
    (created,) = talk.first
    assert created["type"] == "session.created"
    assert created["session"]["instructions"] == "Be brief."
    assert created["session"]["id"] == talk.session.id


def test_a_written_question_and_a_spoken_answer(talk):
    assert types(talk.ask()) == USER_ITEM
    created = talk.send("response.create")
    assert types(created) == ["response.created"]
    events = [*created, *talk.answer(Reply(["one", "two"]))]
    assert types(events) == [*OPENED, *SPOKEN, *SPOKEN, *CLOSED]
    done = only(events, "response.done")["response"]
    assert (done["status"], done["status_details"]["type"]) == ("completed", "completed")
    (item,) = done["output"]
    assert item["content"] == [{"type": "output_audio", "transcript": "one two"}]
    assert item["status"] == "completed"
    assert done["usage"]["input_token_details"]["cached_tokens"] == 2
    assert done["usage"]["total_tokens"] == 40
    heard = [base64.b64decode(e["delta"]) for e in events if e["type"].endswith("audio.delta")]
    np.testing.assert_allclose(
        np.frombuffer(b"".join(heard), "<i2"), np.frombuffer(LOUD * 2, "<i2"), atol=1
    )
    assert len({event["event_id"] for event in events}) == len(events)
    assert {e["response_id"] for e in events if "response_id" in e} == {done["id"]}


def test_items_name_the_one_before(talk):
    first = only(talk.ask(), "conversation.item.added")["item"]["id"]
    talk.send("response.create")
    added = only(talk.answer(Reply(["one"])), "conversation.item.added")
    assert added["previous_item_id"] == first


def test_a_written_answer():
    talk = Talk(SessionConfig(modality="text", turn_detection=None))
    talk.ask()
    talk.send("response.create")
    answer = [ReplyPiece(text="yes"), ReplyPiece(text=" so")]
    events = [*talk.give(*answer), *talk.answer(Reply())]
    assert [e["delta"] for e in events if e["type"] == "response.output_text.delta"] == [
        "yes",
        " so",
    ]
    assert only(events, "response.output_text.done")["text"] == "yes so"
    assert not any("audio" in kind for kind in types(events))


# --- the user's sound ----------------------------------------------------------------------------


def test_a_turn_that_the_client_commits(talk):
    assert talk.speak() == []
    events = talk.send("input_audio_buffer.commit")
    assert types(events) == ["input_audio_buffer.committed", *USER_ITEM]
    item = only(events, "conversation.item.done")["item"]
    assert item["content"] == [{"type": "input_audio", "transcript": None}]
    talk.send("response.create")
    (turn,) = talk.requests[-1].turns
    assert isinstance(turn, UserTurn)
    assert turn.parts[0].seconds == pytest.approx(1)


def test_nothing_to_commit(talk):
    assert only(talk.send("input_audio_buffer.commit", event_id="mine"), "error")["error"] == {
        "type": "invalid_request_error",
        "code": "input_audio_buffer_commit_empty",
        "message": "the input audio buffer is too short to commit: expected at least 100 ms of "
        "audio, it has 0.00 ms",
        "param": None,
        "event_id": "mine",
    }
    talk.speak()
    assert types(talk.send("input_audio_buffer.clear")) == ["input_audio_buffer.cleared"]
    assert types(talk.send("input_audio_buffer.commit")) == ["error"]


def test_a_turn_that_the_server_finds(listening):
    events = [*listening.speak(SILENT), *listening.speak(), *listening.speak(SILENT)]
    assert types(events) == [
        "input_audio_buffer.speech_started",
        "input_audio_buffer.speech_stopped",
        "input_audio_buffer.committed",
        *USER_ITEM,
        "response.created",
    ]
    started, stopped = events[0], events[1]
    assert started["audio_start_ms"] == pytest.approx(700, abs=33)
    assert stopped["audio_end_ms"] == pytest.approx(2500, abs=65)
    assert {e["item_id"] for e in events[:3]} == {events[3]["item"]["id"]}
    (turn,) = listening.requests[-1].turns
    expected = (stopped["audio_end_ms"] - started["audio_start_ms"]) / 1000
    assert turn.parts[0].seconds == pytest.approx(expected, abs=0.001)


def test_a_second_turn_has_its_own_sound(listening):
    for _ in range(2):
        events = [*listening.speak(), *listening.speak(SILENT)]
        if listening.requests[1:]:
            break
        listening.answer(Reply(["one"]))
        listening.now += 60
    assert only(events, "input_audio_buffer.speech_started")["audio_start_ms"] == pytest.approx(
        1700, abs=33
    )
    _, said, second = listening.requests[-1].turns
    assert isinstance(said, SaidTurn)
    assert second.parts[0].seconds == pytest.approx(1.8, abs=0.1)


def test_turns_may_be_found_and_not_answered():
    talk = Talk(SessionConfig(turn_detection=TurnDetection(create_response=False)))
    events = [*talk.speak(), *talk.speak(SILENT)]
    assert types(events)[-1] == "conversation.item.done"
    assert not talk.requests


def test_a_turn_of_the_longest_length_ends():
    talk = Talk(SessionConfig(turn_detection=TurnDetection()), max_seconds=3)
    events = [event for _ in range(4) for event in talk.speak()]
    assert types(events)[:3] == [
        "input_audio_buffer.speech_started",
        "input_audio_buffer.speech_stopped",
        "input_audio_buffer.committed",
    ]
    without = Talk(max_seconds=2)
    found = [types(without.speak()) for _ in range(4)]
    assert found == [[], [], [], ["error"]]
    assert only(without.speak(), "error")["error"]["code"] == "input_audio_buffer_full"
    assert types(without.send("input_audio_buffer.commit"))[0] == "input_audio_buffer.committed"


def test_silence_after_an_answer():
    detection = TurnDetection(idle_timeout_ms=2000)
    talk = Talk(SessionConfig(turn_detection=detection))
    talk.send("response.create")
    talk.answer(Reply(["one"]))
    talk.now += 60
    talk.send("response.create")
    talk.answer(Reply(["two", "three"]))  # two seconds that are still to be played
    quiet = [types(talk.speak(SILENT)) for _ in range(5)]
    assert quiet[:4] == [[]] * 4
    assert quiet[4] == [
        "input_audio_buffer.timeout_triggered",
        "input_audio_buffer.committed",
        *USER_ITEM,
        "response.created",
    ]


def test_transcripts_of_turns(talk):
    talk.send("session.update", session={"audio": {"input": {"transcription": {"model": "any"}}}})
    talk.speak()
    talk.send("input_audio_buffer.commit")
    (wanted,) = talk.transcribe
    talk.session.transcribed(wanted.item_id, "hello", 1.0)
    events = talk.events()
    kind = "conversation.item.input_audio_transcription"
    assert types(events) == [f"{kind}.delta", f"{kind}.completed"]
    assert events[1]["transcript"] == "hello"
    talk.session.transcription_failed(wanted.item_id, EventError("no", "busy"))
    assert types(talk.events()) == [f"{kind}.failed"]
    item = only(
        talk.send("conversation.item.retrieve", item_id=wanted.item_id),
        "conversation.item.retrieved",
    )["item"]
    assert item["content"][0]["transcript"] == "hello"
    assert len(base64.b64decode(item["content"][0]["audio"])) == pytest.approx(48_000, abs=60)


@pytest.mark.parametrize("name", ["audio/pcmu", "audio/pcma"])
def test_telephone_sound_in_and_out(talk, name):
    form = {"format": {"type": name}}
    talk.send("session.update", session={"audio": {"input": form, "output": form}})
    talk.speak(bytes(8000))
    talk.send("input_audio_buffer.commit")
    talk.send("response.create")
    assert talk.requests[-1].turns[0].parts[0].seconds == pytest.approx(1, abs=0.01)
    events = talk.answer(Reply(["one"]))
    deltas = [base64.b64decode(e["delta"]) for e in events if e["type"].endswith("audio.delta")]
    assert len(b"".join(deltas)) == 8000


# --- responses -----------------------------------------------------------------------------------


def test_one_response_at_a_time(talk):
    talk.send("response.create")
    error = only(talk.send("response.create"), "error")["error"]
    assert error["code"] == "conversation_already_has_active_response"
    assert types(talk.answer(Reply(["one"])))[-1] == "response.done"
    assert types(talk.send("response.create")) == ["response.created"]


def test_outside_the_conversation(talk):
    talk.ask("first")
    talk.send("response.create")
    asked = {
        "conversation": "none",
        "output_modalities": ["text"],
        "instructions": "Classify.",
        "metadata": {"topic": "mine"},
        "input": [
            {"type": "item_reference", "id": talk.session.conversation.last_id},
            {
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": "second"}],
            },
        ],
    }
    created = only(talk.send("response.create", response=asked), "response.created")["response"]
    assert created["metadata"] == {"topic": "mine"}
    assert created["conversation_id"] is None
    request = talk.requests[-1]
    assert [turn.parts for turn in request.turns] == [("first",), ("second",)]
    assert request.config.instructions == "Classify."
    assert not request.in_conversation
    talk.session.piece(request.id, ReplyPiece(text="yes"))
    events = talk.answer(Reply())
    assert "conversation.item.added" not in types(events)
    assert only(events, "response.done")["response"]["output"][0]["content"][0]["text"] == "yes"
    assert len(talk.session.conversation) == 1
    for _ in range(4):
        assert types(talk.send("response.create", response=asked)) == ["response.created"]
    assert types(talk.send("response.create", response=asked)) == ["error"]


def test_a_limit_and_a_failure(talk):
    talk.send("response.create", response={"max_output_tokens": 5})
    assert talk.requests[-1].config.max_output_tokens == 5
    assert talk.session.config.max_output_tokens is None
    done = talk.answer(Reply(["one"], finish_reason="length"))[-1]["response"]
    assert done["status"] == "incomplete"
    assert done["status_details"]["reason"] == "max_output_tokens"
    talk.send("response.create")
    talk.give(ReplyPiece(text="one"))
    talk.session.failed(
        talk.requests[-1].id, EventError("too busy", "server_overloaded", type="server_error")
    )
    events = talk.events()
    assert types(events) == CLOSED
    done = events[-1]["response"]
    assert done["status"] == "failed"
    assert done["status_details"]["error"]["message"] == "too busy"
    assert done["usage"]["total_tokens"] == 0
    talk.send("response.create")
    assert len(talk.requests[-1].turns) == 1  # what failed was not said


def test_tools(talk):
    talk.send("session.update", session={"tools": [WEATHER]})
    talk.ask()
    talk.send("response.create")
    call = ToolCall("weather", {"city": "Köln"})
    events = talk.answer(Reply(["wait"], [call], "tool_calls"))
    assert types(events)[-len(CALLED) - 1 :] == [*CALLED, "response.done"]
    made = only(events, "response.function_call_arguments.done")
    assert made["arguments"] == '{"city": "Köln"}'
    assert made["name"] == "weather"
    message, item = events[-1]["response"]["output"]
    assert (item["type"], item["call_id"]) == ("function_call", made["call_id"])
    assert message["status"] == item["status"] == "completed"
    output = {"type": "function_call_output", "call_id": made["call_id"], "output": "rain"}
    assert types(talk.send("conversation.item.create", item=output)) == USER_ITEM
    talk.send("response.create")
    _, said, answered = talk.requests[-1].turns
    assert said.utterance.calls == 1
    assert answered == CallOutputTurn("weather", "rain")


def test_an_answer_to_no_call(talk):
    output = {"type": "function_call_output", "call_id": "call_none", "output": "rain"}
    error = only(talk.send("conversation.item.create", item=output), "error")["error"]
    assert error["code"] == "invalid_call_id"


def test_items_that_go(talk):
    said_by(talk)
    ids = [item.id for item in talk.session.conversation]
    for item_id in ids:
        assert types(talk.send("conversation.item.delete", item_id=item_id)) == [
            "conversation.item.deleted"
        ]
    assert types(talk.send("conversation.item.delete", item_id=ids[0])) == ["error"]
    talk.send("response.create")
    assert talk.requests[-1].turns == []


def test_an_item_that_is_not_there(talk):
    error = only(
        talk.send("conversation.item.retrieve", item_id="none", event_id="rci_none"), "error"
    )["error"]
    assert error["code"] == "item_retrieve_invalid_item_id"
    assert error["event_id"] == "rci_none"


def test_items_in_between(talk):
    talk.ask("second", previous_item_id="root")
    second = talk.session.conversation.last_id
    talk.ask("first", previous_item_id="root")
    talk.ask("third", previous_item_id=second)
    assert types(talk.ask("lost", previous_item_id="none")) == ["error"]
    talk.send("response.create")
    assert [t.parts[0] for t in talk.requests[-1].turns] == ["first", "second", "third"]


def test_close_ends_what_is_under_way(talk):
    talk.send("response.create")
    talk.session.close()
    assert len(talk.session.take_actions()) == 1
    talk.session.ended(talk.requests[-1].id, outcome_of(Reply(["one"])))
    assert len(talk.session.outbox) == 0


def test_sound_in_an_item(talk):
    item = {
        "type": "message",
        "role": "user",
        "content": [
            {"type": "input_audio", "audio": base64_of(pcm(tone(0.5)))},
            {"type": "input_text", "text": "What is that?"},
        ],
    }
    talk.send("conversation.item.create", item=item)
    talk.send("response.create")
    sound, text = talk.requests[-1].turns[0].parts
    assert sound.seconds == pytest.approx(0.5)
    assert text == "What is that?"

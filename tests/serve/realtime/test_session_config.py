"""The settings of a session: what an update changes, and what is shown."""

import pytest
from helpers.realtime import Talk, check_voice, only

from sa2jax.serve.realtime.session_config import SessionConfig, TurnDetection

SERVER_VAD = TurnDetection().json


def changed(inner: dict, config: SessionConfig | None = None) -> dict:
    config = config or SessionConfig(instructions="Be brief.")
    return config.updated({"type": "realtime", **inner}, check_voice).json("sess_1", "small")


def test_an_update_keeps_what_it_does_not_name():
    before = SessionConfig(instructions="Be brief.").json("sess_1", "small")
    after = changed({"audio": {"input": {"turn_detection": {"silence_duration_ms": 700}}}})
    assert after["audio"]["input"].pop("turn_detection") == SERVER_VAD | {
        "silence_duration_ms": 700
    }
    before["audio"]["input"].pop("turn_detection")
    assert after == before


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"type": "server_vad", "idle_timeout_ms": 5000}, SERVER_VAD | {"idle_timeout_ms": 5000}),
        (
            {"type": "semantic_vad", "eagerness": "high", "create_response": False},
            {
                "type": "semantic_vad",
                "eagerness": "high",
                "method": "adaptive_silence",
                "create_response": False,
                "interrupt_response": True,
            },
        ),
        (None, None),
    ],
)
def test_turn_detection(given, shown):
    after = changed({"audio": {"input": {"turn_detection": given}}})
    assert after["audio"]["input"]["turn_detection"] == shown


def test_a_voice_is_a_name_or_an_object():
    for voice in ("anna", {"id": "anna"}):
        assert (
            changed({"audio": {"output": {"voice": voice}}})["audio"]["output"]["voice"] == "anna"
        )


def test_what_is_shown_can_be_sent_back():
    config = SessionConfig(tools=({"type": "function", "name": "f"},), max_output_tokens=7)
    shown = config.json("sess_1", "small")
    assert config.updated(shown, check_voice).json("sess_1", "small") == shown
    semantic = SessionConfig(turn_detection=TurnDetection(type="semantic_vad"))
    assert semantic.updated(semantic.json("s", "m"), check_voice) == semantic


def test_what_is_not_served_is_shown_so():
    wanted = {
        "tracing": "auto",
        "include": ["item.input_audio_transcription.logprobs"],
        "reasoning": {"effort": "low"},
        "truncation": {"type": "retention_ratio", "retention_ratio": 0.8},
        "audio": {
            "input": {
                "noise_reduction": {"type": "near_field"},
                "transcription": {"model": "whisper-1", "language": "de", "prompt": "a"},
            }
        },
    }
    after = changed(wanted)
    assert after["tracing"] is after["include"] is after["reasoning"] is None
    assert after["truncation"] == "auto"
    heard = after["audio"]["input"]
    assert heard["noise_reduction"] is None
    assert heard["transcription"] == {"model": "small", "language": "de", "prompt": None}


def test_nulls_are_as_if_not_sent():
    nulls = {
        "instructions": None,
        "output_modalities": None,
        "tools": None,
        "tool_choice": None,
        "max_output_tokens": None,
        "audio": {"output": None, "input": {"format": None}},
        "prompt": None,
    }
    assert changed(nulls) == changed({})


def test_the_session_tells_of_its_update():
    talk = Talk()
    events = talk.send("session.update", session={"instructions": "Sing."})
    session = only(events, "session.updated")["session"]
    assert session["instructions"] == "Sing."
    assert session["id"] == talk.session.id
    assert set(session) == set(talk.first[0]["session"])


def test_the_detector_gets_the_settings():
    detection = TurnDetection(silence_duration_ms=700, threshold=0.4, prefix_padding_ms=100)
    settings = detection.settings
    assert settings.silence_duration_ms == 700
    assert (settings.threshold, settings.prefix_padding_ms) == (0.4, 100)
    assert TurnDetection(type="semantic_vad", eagerness="low").settings.adaptive is not None


def test_no_other_format_while_somebody_speaks():
    talk = Talk()
    talk.speak()
    form = {"audio": {"input": {"format": {"type": "audio/pcmu"}}}}
    assert only(talk.send("session.update", session=form), "error")
    talk.send("input_audio_buffer.clear")
    assert only(talk.send("session.update", session=form), "session.updated")

"""Messages that no session can use."""

ITEM = '"type": "conversation.item.create", "item": '
MESSAGE = '"type": "message", "role": "user", "content": '


def session(inner: str) -> str:
    return f'{{"type": "session.update", "session": {{"type": "realtime", {inner}}}}}'


def response(inner: str) -> str:
    return f'{{"type": "response.create", "response": {{{inner}}}}}'


# Messages, the code of their error, and the field that it names.
MALFORMED = [
    ("", "invalid_json", None),
    ("{", "invalid_json", None),
    ("null", "invalid_type", None),
    ("[]", "invalid_type", None),
    ('"session.update"', "invalid_type", None),
    ("NaN", "invalid_json", None),
    ('{"type": 1e999}', "invalid_json", None),
    ("[" * 100_000, "invalid_json", None),
    ('{"a":' * 200 + "1" + "}" * 200, "invalid_json", None),
    ('{"type": "\\ud800"}', "invalid_json", None),
    ("{}", "missing_required_parameter", "type"),
    ('{"type": null}', "invalid_type", "type"),
    ('{"type": 7}', "invalid_type", "type"),
    ('{"type": "session.destroy"}', "unknown_event", "type"),
    ('{"type": "response.cancel", "event_id": 7}', "invalid_type", "event_id"),
    (f'{{"type": "response.cancel", "event_id": "{"x" * 600}"}}', "string_above_max_length", None),
    ('{"type": "response.cancel", "extra": 1}', "unknown_parameter", "extra"),
    ('{"type": "input_audio_buffer.append"}', "missing_required_parameter", "audio"),
    ('{"type": "input_audio_buffer.append", "audio": 7}', "invalid_type", "audio"),
    ('{"type": "input_audio_buffer.append", "audio": "!!!"}', "invalid_value", "audio"),
    ('{"type": "input_audio_buffer.append", "audio": "ä"}', "invalid_value", "audio"),
    ('{"type": "input_audio_buffer.append", "audio": "AAAA"}', "invalid_value", "audio"),
    ('{"type": "session.update"}', "missing_required_parameter", "session"),
    ('{"type": "session.update", "session": []}', "invalid_type", "session"),
    (session('"voice": "anna"'), "unknown_parameter", "session.voice"),
    (session('"audio": 7'), "invalid_type", "session.audio"),
    (session('"audio": {"output": {"voice": "nobody"}}'), "invalid_voice", None),
    (session('"audio": {"output": {"voice": "../../etc/passwd"}}'), "invalid_voice", None),
    (session('"audio": {"output": {"speed": 2}}'), "invalid_value", "session.audio.output.speed"),
    (session('"audio": {"output": {"speed": 1.25}}'), "unsupported_value", None),
    (session('"audio": {"input": {"format": {"type": "audio/ogg"}}}'), "invalid_value", None),
    (
        session('"audio": {"input": {"format": {"type": "audio/pcm", "rate": 8000}}}'),
        "invalid_value",
        "session.audio.input.format.rate",
    ),
    (session('"audio": {"input": {"turn_detection": {"type": "magic"}}}'), "invalid_value", None),
    (
        session('"audio": {"input": {"turn_detection": {"type": "server_vad", "threshold": 5}}}'),
        "invalid_value",
        "session.audio.input.turn_detection.threshold",
    ),
    (session('"output_modalities": ["audio", "text"]'), "invalid_value", None),
    (session('"max_output_tokens": -1'), "invalid_value", "session.max_output_tokens"),
    (session('"max_output_tokens": true'), "invalid_value", "session.max_output_tokens"),
    (session('"tools": {}'), "invalid_type", "session.tools"),
    (session('"tools": [7]'), "invalid_type", "session.tools[0]"),
    (session('"tools": [{"type": "mcp"}]'), "unsupported_value", "session.tools[0].type"),
    (session('"tools": [{"type": "function"}]'), "missing_required_parameter", None),
    (session('"tools": [{"name": "two words"}]'), "invalid_value", "session.tools[0]"),
    (session('"tools": [{"name": "a"}, {"name": "a"}]'), "invalid_value", "session.tools[1].name"),
    (session('"tool_choice": "required"'), "unsupported_value", "session.tool_choice"),
    (session('"prompt": {"id": "p"}'), "unsupported_value", "session.prompt"),
    (session('"model": "gpt-4"'), "model_not_found", "session.model"),
    (f'{{{ITEM}{{"type": "poem"}}}}', "invalid_value", "item.type"),
    (f"{{{ITEM}{{{MESSAGE}[]}}}}", "invalid_value", "item.content"),
    (f'{{{ITEM}{{{MESSAGE}[{{"type": "input_image"}}]}}}}', "invalid_value", None),
    (f'{{{ITEM}{{{MESSAGE}[{{"type": "output_text", "text": "a"}}]}}}}', "invalid_value", None),
    (f'{{{ITEM}{{{MESSAGE}[{{"type": "input_audio", "audio": ""}}]}}}}', "invalid_value", None),
    (f'{{{ITEM}{{"type": "function_call"}}}}', "missing_required_parameter", "item.name"),
    ('{"type": "conversation.item.delete"}', "missing_required_parameter", "item_id"),
    ('{"type": "conversation.item.truncate", "item_id": "a"}', "missing_required_parameter", None),
    (
        '{"type": "conversation.item.truncate", "item_id": "a", "audio_end_ms": 1}',
        "item_truncate_invalid_item_id",
        "item_id",
    ),
    (response('"conversation": "conv_1"'), "invalid_value", "response.conversation"),
    (response('"input": 7'), "invalid_type", "response.input"),
    (response('"input": [{"type": "item_reference", "id": "a"}]'), "item_not_found", None),
    (response('"metadata": {"a": 7}'), "invalid_value", "response.metadata"),
    ('{"type": "response.create", "response": 7}', "invalid_type", "response"),
]

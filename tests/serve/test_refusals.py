"""Requests that are wrong: a status and an error in OpenAI's form, and the server goes on."""

import base64
import json

import pytest

pytest.importorskip("fastapi", reason="needs the extra [serve]")
httpx = pytest.importorskip("httpx", reason="needs the package httpx")


CHAT, SPEECH = "/v1/chat/completions", "/v1/audio/speech"
USER = {"role": "user", "content": "hi"}
NOISE = base64.b64encode(bytes(range(256)) * 40).decode()


def sound(**audio):
    return [{"role": "user", "content": [{"type": "input_audio", "input_audio": audio}]}]


def said(message):
    return {"messages": [message]}


def after(message):
    return {"messages": [USER, message, USER]}


def tool(**call):
    return after({"role": "assistant", "tool_calls": [call]})


RAW = [  # bodies that are no JSON object
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"1",
    b"\xff\xfe",
    b'{"a": NaN}',
    b'{"a": 1e999}',
    b'{"a": ' + b"9" * 40 + b"}",
    b'{"a": "\\ud800"}',
    b"[" * 100_000,
    b'{"a":' * 500 + b"1" + b"}" * 500,
    b'{"messages": [' + b"[" * 80 + b"]" * 80 + b"]}",
    b'{"a": [' + b"0," * 1_100_000 + b"0]}",
    b"\x00" * 100,
    b"messages=hi",
    b'{"messages": [{"role": "user", "content": "hi"}],}',
]
CHATS = [
    {},
    {"messages": None},
    {"messages": []},
    {"messages": "hi"},
    {"messages": {"role": "user"}},
    {"messages": ["hi"]},
    {"messages": [[USER]]},
    {"messages": [None]},
    said({}),
    said({"role": "user"}),
    said({"role": None, "content": "hi"}),
    said({"role": 3, "content": "hi"}),
    said({"role": ["user"], "content": "hi"}),
    said({"role": "wizard", "content": "hi"}),
    said({"role": "user", "content": ""}),
    said({"role": "user", "content": "  "}),
    said({"role": "user", "content": []}),
    said({"role": "user", "content": 5}),
    said({"role": "user", "content": {"type": "text", "text": "hi"}}),
    said({"role": "user", "content": ["hi"]}),
    said({"role": "user", "content": [{"type": "text"}]}),
    said({"role": "user", "content": [{"type": "text", "text": 5}]}),
    said({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}),
    said({"role": "user", "content": [{"type": "audio", "audio": "/etc/passwd"}]}),
    said({"role": "user", "content": [{"type": "input_audio"}]}),
    said({"role": "user", "content": [{"type": "input_audio", "input_audio": "x"}]}),
    said({"role": "system", "content": "only"}),
    said({"role": "system", "content": None}),
    said({"role": "assistant", "content": "only"}),
    said({"role": "assistant", "content": None}),
    said({"role": "tool", "tool_call_id": "1", "content": "x"}),
    {"messages": [USER, {"role": "tool", "tool_call_id": "1", "content": "x"}]},
    {"messages": [USER, {"role": "assistant", "content": "begun"}]},
    {"messages": [USER, {"role": "assistant", "content": "<tts_start>"}]},
    after({"role": "assistant"}),
    after({"role": "assistant", "content": [{"type": "text"}]}),
    after({"role": "assistant", "audio": {"id": "audio_unknown"}}),
    after({"role": "assistant", "audio": "audio_1"}),
    after({"role": "assistant", "audio": {"id": {}}}),
    after({"role": "assistant", "tts_content": "x"}),
    after({"role": "assistant", "tts_content": {"tts_text": 1}}),
    after({"role": "assistant", "tts_content": {}}),
    tool(),
    tool(function="f"),
    tool(function={"name": 5}),
    tool(function={"name": "f", "arguments": "{"}),
    tool(function={"name": "f", "arguments": "[]"}),
    tool(function={"name": "f", "arguments": {"a": 1}}),
    after({"role": "assistant", "tool_calls": "x"}),
    {"messages": sound()},
    {"messages": sound(data=None, format="wav")},
    {"messages": sound(data="", format="wav")},
    {"messages": sound(data="???", format="wav")},
    {"messages": sound(data=NOISE, format="wav")},
    {"messages": sound(data=NOISE, format="midi")},
    {"messages": sound(data=NOISE, format=["wav"])},
    {"messages": sound(data="AA==", format="pcm16")},
    {"messages": sound(data="https://example.com/a.wav", format="wav")},
    {"messages": sound(data=base64.b64encode(b"RIFF\xff\xff\xff\xffWAVE").decode(), format="wav")},
    {"messages": [USER], "temperature": "hot"},
    {"messages": [USER], "temperature": -1},
    {"messages": [USER], "top_p": 0},
    {"messages": [USER], "n": 0},
    {"messages": [USER], "n": 1000},
    {"messages": [USER], "max_tokens": 0},
    {"messages": [USER], "seed": "x"},
    {"messages": [USER], "seed": 1.5},
    {"messages": [USER], "stop": [""]},
    {"messages": [USER], "stop": [1]},
    {"messages": [USER], "stop": ["x"] * 50},
    {"messages": [USER], "stream": "maybe"},
    {"messages": [USER], "stream_options": 3},
    {"messages": [USER], "modalities": ["smell"]},
    {"messages": [USER], "modalities": "audio"},
    {"messages": [USER], "modalities": ["audio"], "audio": {"voice": "nobody"}},
    {"messages": [USER], "modalities": ["audio"], "audio": {"voice": "../../etc/passwd"}},
    {"messages": [USER], "modalities": ["audio"], "audio": {"voice": {"id": "/etc/passwd"}}},
    {"messages": [USER], "modalities": ["audio"], "audio": {"voice": {"name": "x"}}},
    {"messages": [USER], "modalities": ["audio"], "audio": {"voice": ""}},
    {"messages": [USER], "modalities": ["audio"], "audio": {"voice": "a\u0000b"}},
    {"messages": [USER], "audio": {"format": "midi"}},
    {"messages": [USER], "audio": "wav"},
    {"messages": [USER], "tools": "x"},
    {"messages": [USER], "tools": [1]},
    {"messages": [USER], "tools": [{}]},
    {"messages": [USER], "tools": [{"type": "function", "function": {"name": "a b"}}]},
    {"messages": [USER], "tools": [{"type": "function", "function": {"name": "f"}}] * 2},
    {"messages": [USER], "tool_choice": "required"},
    {"messages": [USER], "tool_choice": {"type": "function", "function": {"name": "f"}}},
    {"messages": [USER], "response_format": {"type": "json_object"}},
    {"messages": [USER], "logprobs": True},
    {"messages": [USER], "frequency_penalty": 0.5},
    {"messages": [USER], "logit_bias": {"1": 5}},
    {"messages": [USER], "use_beam_search": True},
]
SPEECHES = [
    {},
    {"input": ""},
    {"input": 5},
    {"input": "x" * 5000},
    {"input": "x", "voice": "nobody"},
    {"input": "x", "voice": "../voices/anna"},
    {"input": "x", "voice": ["anna"]},
    {"input": "x", "response_format": "midi"},
    {"input": "x", "speed": 2},
    {"input": "x", "stream_format": "websocket"},
]


def check(response: httpx.Response) -> dict:
    """An error in OpenAI's form."""
    assert 400 <= response.status_code < 500, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert len(error["message"]) < 500
    assert "\n" not in error["message"].strip()
    return error


def test_malformed_bodies(scripted_server, script):
    """More than a hundred of them, by one client; then the server answers as before."""
    assert len(RAW) + len(CHATS) + len(SPEECHES) > 100
    with httpx.Client(base_url=scripted_server.url, timeout=30) as client:
        headers = {"content-type": "application/json"}
        for raw in RAW:
            for path in (CHAT, SPEECH):
                check(client.post(path, content=raw, headers=headers))
        for path, bodies in ((CHAT, CHATS), (SPEECH, SPEECHES)):
            for body in bodies:
                check(client.post(path, json=body))
        script.will_say("fine")
        answer = client.post(CHAT, json={"messages": [USER]}).json()
    assert answer["choices"][0]["message"]["content"] == "fine"
    scripted_server.settle()
    assert len(script.prompts) == 1  # nothing wrong came as far as the model


def test_what_is_wrong_is_named(scripted_server):
    with httpx.Client(base_url=scripted_server.url) as client:

        def param(body):
            return check(client.post(CHAT, json=body))["param"]

        assert param({"messages": [USER], "top_p": 3}) == "top_p"
        assert param({"messages": [USER], "audio": {"voice": 3}}) == "audio.voice"
        assert param(said({"role": "wizard"})) == "messages[0].role"
        assert param({"messages": sound(data="???", format="wav")}).endswith("input_audio.data")
        assert param(after({"role": "assistant", "audio": {"id": "x"}})) == "messages[1].audio.id"


def test_errors_of_streams_are_errors_until_the_first_piece(scripted_server):
    body = {"messages": [{"role": "user", "content": "x" * 3000}], "stream": True}
    response = httpx.post(f"{scripted_server.url}{CHAT}", json=body)
    assert check(response)["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", CHAT, 405),
        ("PUT", "/v1/models", 405),
        ("DELETE", "/v1/audio/voices/anna", 400),
        ("GET", "/v1/audio/voices/..%2F..%2Fetc%2Fpasswd", 404),
    ],
)
def test_other_paths_and_methods(scripted_server, method, path, status):
    response = httpx.request(method, f"{scripted_server.url}{path}")
    check(response)
    assert response.status_code == status


def test_a_model_that_is_not_here(scripted_server):
    response = httpx.post(f"{scripted_server.url}{CHAT}", json={"messages": [USER], "model": "x"})
    assert response.status_code == 404
    assert check(response)["code"] == "model_not_found"


def test_another_type_of_body(scripted_server):
    response = httpx.post(
        f"{scripted_server.url}{CHAT}", content=b"x", headers={"content-type": "text/plain"}
    )
    assert response.status_code == 415
    check(response)


@pytest.mark.parametrize("scripted_server", [{"max_json_bytes": 10_000}], indirect=True)
@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large(scripted_server, declared):
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 20_000}]}).encode()

    def parts():
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    response = httpx.post(
        f"{scripted_server.url}{CHAT}",
        content=body if declared else parts(),
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 413
    check(response)


FORMS = [
    ({}, {}),
    ({"file": "text"}, {}),
    ({"response_format": "docx"}, {"file": b"x"}),
    ({"response_format": "diarized_json"}, {"file": b"x"}),
    ({"timestamp_granularities[]": "word"}, {"file": b"x"}),
    ({"include[]": "logprobs"}, {"file": b"x"}),
    ({"temperature": "hot"}, {"file": b"x"}),
    ({"stream": "perhaps"}, {"file": b"x"}),
    ({"model": "other"}, {"file": b"x"}),
    ({"known_speaker_names[]": "Anna"}, {"file": b"x"}),
    ({}, {"file": b""}),
    ({}, {"file": b"not audio at all"}),
    ({}, {"file": b"RIFF0000WAVE"}),
    ({}, {"file": b"\x1a\x45\xdf\xa3" + b"0" * 100}),
    ({}, {"file": b"0000ftypM4A " + b"0" * 100}),
]


@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/v1/audio/translations"])
def test_forms_that_are_wrong(scripted_server, path):
    with httpx.Client(base_url=scripted_server.url) as client:
        for fields, files in FORMS:
            named = {name: ("a.wav", data) for name, data in files.items()} or None
            check(client.post(path, data=fields, files=named))
        check(client.post(path, json={"file": "x"}))
        for kind in ("multipart/form-data", "multipart/form-data; boundary=x"):
            check(client.post(path, content=b"--y\r\nx", headers={"content-type": kind}))
    scripted_server.settle()

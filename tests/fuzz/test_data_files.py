"""Data of users as strangers might make it: each is read, or refused in one short line."""

import hashlib
import io
import json
import random

import numpy as np
import pytest
import soundfile
from helpers.fuzzing import attempt, cases, damage_bytes, damage_json, damage_value, put
from hypothesis import example, given
from hypothesis import strategies as st

from sa2jax import audio
from sa2jax.audio.recording import Recording
from sa2jax.chat.history import load_conversation, save_conversation
from sa2jax.chat.template import Audio, Message
from sa2jax.chat.toolbox import Toolbox
from sa2jax.chat.tools import parse_tool_calls, remove_tool_calls
from sa2jax.evaluate.heldout import read_samples
from sa2jax.files.json_files import parse_json
from sa2jax.speech.voices import Voice, describe
from sa2jax.train.data.recordings import list_recordings, read_samples_info
from sa2jax.train.data.records import Record, Turn
from sa2jax.train.data.samples import (
    JsonlSource,
    Reject,
    Sample,
    decode_sample,
    encode_sample,
    open_source,
    read_dataset_info,
)
from sa2jax.train.log import read_metrics
from sa2jax.train.recipe import read_recipe_values

seeds = st.integers(0, 2**32 - 1)
TALK = {
    "messages": [
        {"role": "system", "content": "Help."},
        {"role": "user", "content": "What time is it?"},
        {"role": "tool_call", "content": '{"name": "clock", "arguments": {"zone": "x"}}'},
        {"role": "assistant", "content": "Noon.", "speech": [3, 5, 7], "loss": True},
    ],
    "tools": [{"type": "function", "function": {"name": "clock"}}],
    "solution": {"x": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def damage_lines(rng: random.Random, *rows: object) -> bytes:
    """jsonl, one line of which is damaged, or where two meet; or one array of them."""
    if rng.random() < 0.25:
        text = json.dumps(list(rows), indent=rng.choice((None, 1))).encode()
        return damage_bytes(text, rng) if rng.random() < 0.5 else damage_json(list(rows), rng)
    lines = [json.dumps(row).encode() for row in rows]
    at = rng.randrange(len(rows))
    lines[at] = damage_json(rows[at], rng)
    data = rng.choice((b"\n", b"\n", b"\r\n", b"\n\n")).join(lines)
    return data if rng.random() < 0.8 else damage_bytes(data, rng)


@cases(150)
@given(seed=seeds)
def test_jsonl_of_talks(folder, seed):
    data = damage_lines(random.Random(seed), TALK, TALK)
    path = put(folder / "talks.jsonl", data)
    source = attempt(lambda: JsonlSource([path]))
    found = attempt(lambda: [source[i] for i in range(len(source))]) if source else []
    for item in found or ():
        if isinstance(item, Reject):
            assert len(item.reason) < 500, item
        else:
            assert attempt(lambda item=item: decode_sample(encode_sample(item))) is not None
    attempt(lambda: read_samples(path))


@cases(100)
@given(seed=seeds)
def test_jsonl_of_recordings(folder, seed):
    rng, row = random.Random(seed), {"audio": "a.wav", "text": "hello", "speaker": "anna"}
    path = put(folder / "speech.jsonl", damage_lines(rng, row, row))
    found = attempt(lambda: list_recordings([path]))
    assert all(len(item.problem or "") < 500 for item in found or ())
    attempt(lambda: read_samples(path))
    attempt(lambda: read_metrics(path))


@cases(60)
@given(seed=seeds)
@example(seed=1834871)  # a shard whose file is a number
@example(seed=12454)  # or has a name that is too long
def test_prepared_folders(folder, seed):
    rng = random.Random(seed)
    shards = [{"file": "a.array_record", "samples": 2, "bytes": 3}]
    about = {"format": 1, "shards": shards, "samples": 2, "n_mels": 128, "seconds": 1.0}
    put(folder / "a.array_record", b"abc")
    put(folder / "dataset.json", damage_json({**about, "fingerprint": "x"}, rng))
    attempt(lambda: read_dataset_info(folder))
    attempt(lambda: open_source(folder))
    file = io.BytesIO()
    np.save(file, np.array([3, 4], np.int32))
    put(folder / "lengths.npy", damage_bytes(file.getvalue(), rng))
    attempt(lambda: read_samples_info(folder, "x", ["keys"], "recordings", "prepare"))


SAMPLE = encode_sample(
    Sample(
        Record((Turn("user", "<audio>"), Turn("assistant", "hi", speech=(3, 5))), ("a.wav",)),
        ((np.ones((128, 3), np.float32),),),
        {1: np.array([3, 5], np.int32)},
    )
)


@cases(100)
@given(seed=seeds)
def test_packed_samples(seed):
    rng = random.Random(seed)
    length = int.from_bytes(SAMPLE[:8], "little")
    if rng.random() < 0.6:
        head = json.loads(SAMPLE[8 : 8 + length])
        if rng.random() < 0.6:
            record = damage_value(json.loads(head["__metadata__"]["record"]), rng)
            head["__metadata__"]["record"] = json.dumps(record)
            text = json.dumps(head).encode()
        else:
            text = damage_json(head, rng)
        data = len(text).to_bytes(8, "little") + text + SAMPLE[8 + length :]
    else:
        data = damage_bytes(SAMPLE, rng)
    attempt(lambda: decode_sample(data))


@cases(100)
@given(seed=seeds)
def test_histories(folder, seed):
    rng, path = random.Random(seed), folder / "talk.json"
    clip = Recording.from_source((np.ones(160, np.float32) * 0.1, 16000))
    turns = [Message("human", (Audio(clip),)), Message("assistant", "hello")]
    save_conversation(path, turns, model="m", facts={"voice": "anna"})
    document = json.loads(path.read_text("utf-8"))
    if rng.random() < 0.6:
        put(path, damage_json(document, rng))
    else:
        arrays = folder / document["arrays"]
        data = damage_bytes(arrays.read_bytes(), rng)
        put(arrays, data)
        document["sha256"] = hashlib.sha256(data).hexdigest()
        put(path, json.dumps(document).encode())
    try:
        attempt(lambda: load_conversation(path, model="m"))
    finally:
        for file in folder.glob("talk.*"):
            file.unlink()


@cases(100)
@given(seed=seeds)
def test_voices(folder, seed):
    rng, path = random.Random(seed), folder / "anna.safetensors"
    codes, mel = np.arange(30, dtype=np.int32), np.zeros((60, 80), np.float32)
    Voice("anna", codes, np.ones(192, np.float32), mel, "a" * 64, "b" * 64).save(path)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    if rng.random() < 0.6:
        text = damage_json(json.loads(whole[8 : 8 + length]), rng)
        put(path, len(text).to_bytes(8, "little") + text + whole[8 + length :])
    else:
        put(path, damage_bytes(whole, rng))
    attempt(lambda: describe(Voice.load(path)))


CALL = '<tool_call>function\nclock\n{"at": {"a": "</tool_call>"}}</tool_call>'


@cases(150)
@given(seed=seeds)
def test_tool_calls(seed):
    rng = random.Random(seed)
    start = CALL.index("{")
    arguments = damage_json({"zone": ["x", 1.5, None], "at": {"a": 1}}, rng).decode(
        "utf-8", "replace"
    )
    text = CALL[:start] + arguments + "</tool_call> and then " + CALL
    if rng.random() < 0.5:
        text = damage_bytes(text.encode(), rng).decode("utf-8", "replace")
    for call in attempt(lambda: parse_tool_calls(text)):
        json.dumps(getattr(call, "arguments", "")).encode()
    attempt(lambda: remove_tool_calls(text))


@cases(50)
@given(seed=seeds)
def test_schemas_of_tools(seed):
    schema = {"type": "function", "function": {"name": "a", "parameters": {"type": "object"}}}
    text = damage_json([schema, schema], random.Random(seed)).decode("utf-8", "replace")
    attempt(lambda: Toolbox(text))


@cases(60)
@given(seed=seeds)
def test_recipes(folder, seed):
    """They are trusted, but read like everything else."""
    rng = random.Random(seed)
    values = json.loads(json.dumps(read_recipe_values("smoke"), default=str))
    path = put(folder / "a.yaml", damage_json(values, rng))
    attempt(lambda: read_recipe_values(path))


def sound(kind: str, subtype: str | None) -> bytes:
    file, samples = io.BytesIO(), np.sin(np.arange(2400) / 20).reshape(-1, 1)
    channels = 1 if subtype == "GSM610" else 2
    soundfile.write(file, samples.repeat(channels, 1), 16000, format=kind, subtype=subtype)
    return file.getvalue()


KINDS = {"WAV": ("PCM_16", "FLOAT", "GSM610", "MS_ADPCM"), "RF64": ("PCM_24",), "AIFF": ("PCM_16",)}
KINDS |= {"CAF": ("ALAC_16", "FLOAT"), "AU": ("ULAW",), "W64": ("DOUBLE",), "FLAC": ("PCM_16",)}
KINDS |= {"OGG": ("VORBIS", "OPUS"), "MP3": (None,), "NIST": ("PCM_16",), "VOC": ("PCM_16",)}
SOUNDS = [sound(kind, subtype) for kind, subtypes in KINDS.items() for subtype in subtypes]


@cases(100)
@given(seed=seeds)
def test_sound(folder, seed):
    rng = random.Random(seed)
    path = put(folder / "a.wav", damage_bytes(rng.choice(SOUNDS), rng))
    found = attempt(lambda: audio.load_audio(path))
    assert found is None or np.isfinite(found).all()


@cases(120)
@given(seed=seeds)
def test_json_that_is_taken_is_plain(seed):
    """What comes out can be printed, encoded and counted with."""
    data = damage_json(TALK, random.Random(seed))

    def read():
        return json.dumps(parse_json(data), allow_nan=False, ensure_ascii=False).encode()

    attempt(read)
    attempt(lambda: parse_json(data.decode("utf-8", "surrogateescape")))


def test_the_watch_sees_what_it_should(tmp_path):
    with pytest.raises(AssertionError, match="writes"):
        attempt(lambda: put(tmp_path / "a", b""))
    attempt(lambda: put(tmp_path / "a", b""), out=tmp_path)
    with pytest.raises(AssertionError, match="remove"):
        attempt((tmp_path / "a").unlink)

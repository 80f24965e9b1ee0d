"""Conversations of strangers: recordings are looked at, though their hash fits."""

import hashlib
import io
import json

import numpy as np
import pytest

from sa2jax.audio.recording import Recording
from sa2jax.chat.history import LOUDEST, load_conversation, save_conversation
from sa2jax.chat.template import Audio, Message
from sa2jax.errors import PromptError

GOOD = np.full(1600, 0.1, np.float32)


@pytest.fixture
def load(tmp_path):
    """Loads a conversation whose one recording is made of these samples."""
    path = tmp_path / "talk.json"
    turns = [Message("human", [Audio(Recording(GOOD))])]
    save_conversation(path, turns, model="m", facts={})

    def load(samples):
        document, file = json.loads(path.read_text()), io.BytesIO()
        np.savez_compressed(file, clip0=samples)
        (tmp_path / document["arrays"]).write_bytes(file.getvalue())
        document["sha256"] = hashlib.sha256(file.getvalue()).hexdigest()
        path.write_text(json.dumps(document))
        return load_conversation(path, model="m")

    return load


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (GOOD * np.nan, "expected finite samples, got NaN or Inf"),
        (GOOD * np.inf, "expected finite samples, got NaN or Inf"),
        (GOOD * 1e30, "expected samples within"),
        (-GOOD * 11 * LOUDEST, "expected samples within"),
        (GOOD[:0], "expected float32 samples"),
        (GOOD.reshape(2, 800), "expected float32 samples"),
        (GOOD.astype(np.float64), "expected float32 samples"),
        (np.zeros(9, np.int16), "expected float32 samples"),
        (np.array("text"), "cannot be read"),
        (np.array({"a": 1}), "cannot be read"),
    ],
)
def test_what_is_no_recording(load, samples, reason):
    with pytest.raises(PromptError, match=f"is damaged .*{reason}") as caught:
        load(samples)
    assert len(str(caught.value)) < 500
    loud = load(GOOD * LOUDEST)  # a float file of 16-bit numbers is what it is
    assert loud.turns[0].content[0].source.seconds == 0.1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", "9" * 5000),
        ("model", "f" * 5000),
        ("arrays", "a" * 5000),
        ("turns", [{"role": "r" * 5000, "content": "", "eot": True}]),
        (
            "turns",
            [{"role": "human", "content": [{"type": "audio", "array": "a" * 5000}], "eot": True}],
        ),
        ("turns", [{"k" * 5000: 1}]),
        ("extra" * 1000, 1),
    ],
)
def test_long_names_make_short_errors(tmp_path, key, value):
    path = tmp_path / "talk.json"
    save_conversation(path, [Message("human", "hi")], model="m", facts={})
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(PromptError) as caught:
        load_conversation(path, model="m")
    assert len(str(caught.value)) < 500

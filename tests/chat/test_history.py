import hashlib
import io
import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from sa2jax import audio
from sa2jax.audio.recording import Recording
from sa2jax.chat.history import load_conversation, save_conversation
from sa2jax.chat.template import Audio, Ids, Message, Text, render
from sa2jax.errors import AudioError, CheckpointError, PromptError

MODEL = "3f0c"
FACTS = {"voice": "小跃", "sampling": {"temperature": 0.7, "seed": None}}


def heard(rng, samples=1600):
    return Recording(rng.uniform(-1, 1, samples).astype(np.float32))


@pytest.fixture
def turns(rng):
    clip = heard(rng)
    return [
        Message("system", "你好\n“引号” \\ \u2028 😀"),
        Message("human", [Text("听："), Audio(clip), Audio(heard(rng, 400)), Audio(clip)]),
        Message("assistant", [Text("<tts_start>"), Ids((0, 7, 2**31 - 1)), Ids(())]),
        Message("input", []),
        Message("assistant", None),
        Message("assistant", "<tts_start>", eot=False),
    ]


@pytest.fixture
def path(tmp_path, turns) -> Path:
    """A conversation that was saved."""
    path = tmp_path / "talk.json"
    save_conversation(path, turns, model=MODEL, facts=FACTS)
    return path


def files(path):
    return sorted(entry.name for entry in path.parent.iterdir())


def recordings(path) -> Path:
    return path.with_name(json.loads(path.read_text("utf-8"))["arrays"])


def same(one, other):
    """Whether turns are equal, recordings by their samples."""

    def plain(turn):
        content = turn.content
        if isinstance(content, tuple):
            content = [p.source.samples.tolist() if isinstance(p, Audio) else p for p in content]
        return turn.role, content, turn.eot

    return [plain(turn) for turn in one] == [plain(turn) for turn in other]


# --- recordings --------------------------------------------------------------------------------


def test_heard_is_16_khz_mono_and_read_only(rng, tmp_path):
    stereo = rng.uniform(-1, 1, (2, 4800)).astype(np.float32)
    clip = Recording.from_source((stereo, 48_000))
    np.testing.assert_array_equal(clip.samples, audio.load_audio((stereo, 48_000)))
    assert clip.samples.dtype == np.float32
    assert clip.seconds == 0.1
    with pytest.raises(ValueError, match="read-only"):
        clip.samples[0] = 1
    audio.write_wav(tmp_path / "a.wav", clip.samples, 16_000)
    assert Recording.from_source(tmp_path / "a.wav").seconds == 0.1


def test_heard_does_not_change_with_its_source():
    source = np.ones(400, np.float32)
    clip = Recording(source)
    source[:] = 0
    assert clip.samples.min() == 1


@pytest.mark.parametrize(
    "samples",
    [
        np.zeros(8),
        np.zeros(8, np.int16),
        np.zeros((2, 8), np.float32),
        np.zeros(0, np.float32),
        np.array([0, np.nan], np.float32),
    ],
)
def test_what_is_no_recording(samples):
    with pytest.raises(AudioError, match="expected"):
        Recording(samples)


def test_mels_are_computed_once_for_each_number_of_bands(rng, monkeypatch):
    clip = heard(rng, audio.CHUNK_SAMPLES + 1600)
    want = [audio.log_mel(chunk, n_mels=80) for chunk in audio.split_chunks(clip.samples)]
    spy = Mock(wraps=audio.log_mel)
    monkeypatch.setattr("sa2jax.audio.recording.log_mel", spy)
    first, second = clip.mels(80), clip.mels(80)
    assert len(first) == len(want) == 2
    assert all(a is b for a, b in zip(first, second, strict=True))
    for got, expected in zip(first, want, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert spy.call_count == 2
    assert clip.mels(128)[0].shape[0] == 128
    assert spy.call_count == 4
    with pytest.raises(ValueError, match="read-only"):
        first[0][0, 0] = 1
    first.clear()
    assert len(clip.mels(80)) == 2


# --- round trip --------------------------------------------------------------------------------


def test_everything_comes_back(path, turns):
    saved = load_conversation(path, model=MODEL)
    assert saved.facts == FACTS
    assert same(saved.turns, turns)
    assert isinstance(saved.turns[1].content[1].source, Recording)
    assert len(render(saved.turns)) == len(render(turns))


def test_a_recording_said_twice_is_stored_once(path):
    pieces = load_conversation(path, model=MODEL).turns[1].content
    assert pieces[1].source is pieces[3].source
    assert pieces[1].source is not pieces[2].source
    with np.load(recordings(path)) as arrays:
        assert arrays.files == ["clip0", "clip1"]
        assert arrays["clip0"].dtype == np.float32


def test_the_file_is_for_people_too(path):
    text = path.read_text("utf-8")
    assert "你好" in text
    assert '{"type": "ids", "ids": [0, 7, 2147483647]}' in text
    assert max(map(len, text.splitlines())) < 300
    document = json.loads(text)
    assert [*document] == ["format", "version", "model", "arrays", "sha256", "facts", "turns"]
    assert (document["format"], document["version"]) == ("sa2jax-chat", 1)
    assert document["turns"][4] == {"role": "assistant", "content": None, "eot": True}
    assert document["turns"][1]["content"][1] == {"type": "audio", "array": "clip0"}


def test_without_recordings_there_is_one_file(tmp_path):
    path = tmp_path / "new" / "talk.json"
    save_conversation(path, [Message("user", "hi")], model=MODEL, facts={})
    assert files(path) == ["talk.json"]
    assert json.loads(path.read_text())["arrays"] is None
    assert same(load_conversation(path, model=MODEL).turns, [Message("human", "hi")])


def test_no_turns(tmp_path):
    save_conversation(tmp_path / "a.json", [], model=MODEL, facts={})
    assert load_conversation(tmp_path / "a.json", model=MODEL).turns == ()


def test_a_conversation_goes_on(path, turns, rng):
    """Saved again with more: one pair of files remains; saved without recordings: one file."""
    old = recordings(path).name
    saved = load_conversation(path, model=MODEL)
    more = [*saved.turns, Message("human", [Audio(heard(rng))])]
    save_conversation(path, more, model=MODEL, facts={})
    assert files(path) == sorted(["talk.json", recordings(path).name])
    assert recordings(path).name != old
    assert same(load_conversation(path, model=MODEL).turns, more)
    save_conversation(path, turns[:1], model=MODEL, facts={})
    assert files(path) == ["talk.json"]


def test_saving_the_same_again_keeps_its_recordings(path, turns):
    before = files(path)
    save_conversation(path, load_conversation(path, model=MODEL).turns, model=MODEL, facts={"n": 2})
    assert files(path) == before
    assert same(load_conversation(path, model=MODEL).turns, turns)


def test_a_renamed_or_copied_conversation(path, turns):
    """It is still read, and saving the copy leaves the other's recordings alone."""
    copy = path.with_name("copy.json")
    copy.write_bytes(path.read_bytes())
    assert same(load_conversation(copy, model=MODEL).turns, turns)
    save_conversation(copy, turns[:1], model=MODEL, facts={})
    assert same(load_conversation(path, model=MODEL).turns, turns)


# --- writing -----------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("error", [Killed(), OSError("no more")])
@pytest.mark.parametrize("at", [1, 2])
def test_an_end_in_the_midst_keeps_the_old_pair(path, turns, rng, monkeypatch, at, error):
    before, count, replace = files(path), [], Path.replace

    def fail(self, target):
        count.append(target)
        if len(count) == at:
            raise error
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(Killed if isinstance(error, Killed) else CheckpointError):
        save_conversation(path, [Message("human", [Audio(heard(rng))])], model=MODEL, facts={})
    assert len(count) == at
    assert [target.suffix for target in count] == [".npz", ".json"][:at]
    assert files(path) == before
    assert same(load_conversation(path, model=MODEL).turns, turns)


def test_a_kill_that_runs_no_clean_up_keeps_the_old_pair(path, turns, rng, monkeypatch):
    replace = Path.replace

    def fail(self, target):
        if target.suffix == ".json":
            raise Killed
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        patch.setattr(Path, "unlink", lambda *a, **k: None)
        with pytest.raises(Killed):
            save_conversation(path, [Message("human", [Audio(heard(rng))])], model=MODEL, facts={})
    assert len(files(path)) == 4  # the new recordings and a temporary JSON were left behind
    assert same(load_conversation(path, model=MODEL).turns, turns)
    save_conversation(path, turns, model=MODEL, facts={})
    assert same(load_conversation(path, model=MODEL).turns, turns)
    left = [name for name in files(path) if name.endswith(".partial")]
    assert [name[:11] for name in left] == [".talk.json."]  # hidden, and in nobody's way


@pytest.mark.parametrize(
    "content",
    ['{"a": 1}', "[]", "not json", '{"format": "other"}', "", b"\xff\xfe\xfa", "[" * 9999],
)
def test_a_foreign_file_is_left_alone(tmp_path, turns, content):
    path = tmp_path / "talk.json"
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(data)
    with pytest.raises(PromptError, match="expected a saved conversation"):
        save_conversation(path, turns, model=MODEL, facts={})
    assert path.read_bytes() == data
    assert files(path) == ["talk.json"]


def test_a_folder_is_left_alone(tmp_path, turns):
    (tmp_path / "talk.json").mkdir()
    with pytest.raises(PromptError, match="expected a saved conversation"):
        save_conversation(tmp_path / "talk.json", turns, model=MODEL, facts={})


def test_a_file_that_the_old_json_names_falsely_is_not_removed(path, turns):
    document = json.loads(path.read_text("utf-8"))
    (path.parent / "precious.npz").touch()
    path.write_text(json.dumps(document | {"arrays": "precious.npz"}))
    save_conversation(path, turns[:1], model=MODEL, facts={})
    assert "precious.npz" in files(path)


@pytest.mark.parametrize("name", ["talk", "talk.npz", "talk.json.gz", ".json"])
def test_a_name_that_is_none(tmp_path, name):
    with pytest.raises(PromptError, match=r"end in \.json"):
        save_conversation(tmp_path / name, [], model=MODEL, facts={})


@pytest.mark.parametrize(
    ("turn", "facts", "why"),
    [
        (Message("human", [Audio("a.wav")]), {}, "given as str"),
        (Message("human", [Audio((np.zeros(8, np.float32), 16_000))]), {}, "given as tuple"),
        (Message("assistant", [Ids((3, -1))]), {}, "ids from 0 on, got -1"),
        (Message("human", "\ud800"), {}, "Unicode"),
        (Message("human", "hi"), {"x": float("nan")}, "plain JSON"),
        (Message("human", "hi"), {"x": object()}, "plain JSON"),
    ],
)
def test_what_no_file_can_hold(tmp_path, turn, facts, why):
    with pytest.raises(PromptError, match=why):
        save_conversation(tmp_path / "talk.json", [turn], model=MODEL, facts=facts)
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write"):
        save_conversation(tmp_path / "file" / "talk.json", [], model=MODEL, facts={})


# --- damage ------------------------------------------------------------------------------------


def refused(path, why):
    with pytest.raises(PromptError, match=why) as caught:
        load_conversation(path, model=MODEL)
    assert len(str(caught.value).splitlines()) == 1
    assert path.name in str(caught.value)


def test_a_missing_file(tmp_path):
    refused(tmp_path / "talk.json", "there is no conversation")


def test_another_checkpoint(path):
    with pytest.raises(PromptError, match="another checkpoint: expected 77, got 3f0c"):
        load_conversation(path, model="77")


@pytest.mark.parametrize("size", [0, 1, 100, -3])
def test_a_file_cut_short(path, size):
    path.write_bytes(path.read_bytes()[:size])
    refused(path, "cannot be read as JSON")


def change(at, value):
    """A document with one entry set, or taken away."""

    def edit(document):
        *way, last = at
        for key in way:
            document = document[key]
        if value is change:
            del document[last]
        else:
            document[last] = value

    return edit


TURN, ITEM = ("turns", 2), ("turns", 2, "content", 1)


@pytest.mark.parametrize(
    ("at", "value", "why"),
    [
        (["format"], "chat", "something else"),
        (["format"], change, "something else"),
        (["version"], 2, "version 2, expected 1"),
        (["version"], change, "version None"),
        (["model"], None, "another checkpoint"),
        (["facts"], change, "expected the file to have"),
        (["more"], 1, "expected the file to have"),
        (["facts"], [], "facts as an object"),
        (["facts"], {"x": float("nan")}, "not JSON compliant|JSON"),
        (["facts"], {"x": "\ud800"}, "surrogates"),
        (["turns"], {}, "turns as a list"),
        (["turns"], None, "turns as a list"),
        (TURN, "hi", "expected a turn to have content, eot, role, got str"),
        ([*TURN, "role"], "user", "unknown role 'user'"),
        ([*TURN, "role"], ["system"], "unknown role"),
        ([*TURN, "role"], change, "expected a turn to have"),
        ([*TURN, "name"], "x", "expected a turn to have"),
        ([*TURN, "eot"], 1, "eot as true or false"),
        ([*TURN, "content"], 3, "content as text"),
        ([*TURN, "content"], {"type": "text", "text": ""}, "content as text"),
        (ITEM, "text", "expected an item of type"),
        (ITEM, None, "expected an item of type"),
        (ITEM, {"type": "token", "token": [1]}, "expected an item of type"),
        (ITEM, {"type": ["text"], "text": ""}, "expected an item of type"),
        (ITEM, {"type": "text"}, "expected an item to have text, type"),
        (ITEM, {"type": "text", "text": "", "x": 1}, "expected an item to have text, type"),
        (ITEM, {"type": "text", "text": 3}, "expected text to be text"),
        (ITEM, {"type": "ids", "ids": [1, -1]}, "whole numbers"),
        (ITEM, {"type": "ids", "ids": [1.0]}, "whole numbers"),
        (ITEM, {"type": "ids", "ids": [True]}, "whole numbers"),
        (ITEM, {"type": "ids", "ids": "12"}, "whole numbers"),
        (ITEM, {"type": "audio", "array": 0}, "expected array to be text"),
        (ITEM, {"type": "audio", "array": "clip2"}, "no recording 'clip2'"),
        (["arrays"], None, "an .npz file beside it, got None"),
        (["arrays"], "../talk.npz", "an .npz file beside it"),
        (["arrays"], "/etc/talk.npz", "an .npz file beside it"),
        (["arrays"], "talk.json", "an .npz file beside it"),
        (["arrays"], 3, "an .npz file beside it"),
        (["arrays"], "other.npz", "other.npz cannot be read: No such file"),
        (["sha256"], "0" * 64, "have changed"),
        (["sha256"], None, "have changed"),
    ],
)
def test_damaged_json(path, at, value, why):
    document = json.loads(path.read_text("utf-8"))
    change(at, value)(document)
    path.write_text(json.dumps(document))
    refused(path, why)


def test_json_that_never_ends(path):
    nested = "[" * 100_000 + "]" * 100_000
    path.write_text(path.read_text("utf-8").replace('"facts": {', f'"facts": {{"x": {nested}, '))
    refused(path, "cannot be read as JSON")


def test_missing_recordings(path):
    recordings(path).unlink()
    refused(path, "cannot be read: No such file")


def test_changed_recordings(path):
    file = recordings(path)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    refused(path, "have changed")


def packed(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


GOOD = np.zeros(8, np.float32)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "cannot be read"),
        (b"PK\x03\x04 nothing", "cannot be read"),
        (npy(GOOD), "cannot be read"),
        (packed(clip0=GOOD), "no recording 'clip1'"),
        (packed(clip0=GOOD, clip1=np.zeros(8)), "float64"),
        (packed(clip0=GOOD, clip1=np.zeros((2, 8), np.float32)), "expected float32 samples"),
        (packed(clip0=GOOD, clip1=np.zeros(0, np.float32)), "expected float32 samples"),
        (packed(clip0=GOOD, clip1=np.array([np.inf], np.float32)), "finite"),
        (packed(clip0=GOOD, clip1=np.array([{}], object)), "expected numbers, got object"),
    ],
)
def test_recordings_that_are_none(path, data, why):
    """Even with the right hash."""
    recordings(path).write_bytes(data)
    document = json.loads(path.read_text("utf-8"))
    document["sha256"] = hashlib.sha256(data).hexdigest()
    path.write_text(json.dumps(document))
    refused(path, why)

"""Voices that clients add: names stay in their folder, and come back after a restart."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from helpers.scripted import voice_called

from sa2jax.errors import AudioError, CheckpointError, VoiceError
from sa2jax.speech.voices import Voice

pytest.importorskip("fastapi", reason="needs the extra [serve]")
httpx = pytest.importorskip("httpx", reason="needs the package httpx")

from sa2jax.serve import voices as registry
from sa2jax.serve.errors import ApiError
from sa2jax.serve.voices import VoiceRegistry, speech_of

HOSTILE = [
    "../evil",
    "..",
    ".",
    "",
    "a/b",
    "/etc/passwd",
    "a\\..\\b",
    "a\0b",
    ".hidden",
    "-x",
    "a" * 65,
    "a b",
    "anna\n",
    "%2e%2e",
    "~root",
    "..\u2215evil",
]


class Speech:
    """A detokenizer with the voice anna, whose analysis is quick."""

    def __init__(self, analysis_hash: str = "h1"):
        flow = SimpleNamespace(codes=10, speaker=2, mels=3)
        self.folder = SimpleNamespace(
            voices={"anna": None},
            analysis_hash=analysis_hash,
            analyzer=SimpleNamespace(analysis_hash=analysis_hash),
            cfg=SimpleNamespace(flow=flow),
        )

    def voice(self, wanted):
        return voice_called("anna" if wanted == "default" else wanted)


def analysed(source, analyzer, name):
    """Stands in for the networks: a second of a voice."""
    if source == b"silence":
        raise AudioError("nothing can be heard")
    codes = np.arange(25, dtype=np.int32) % 10
    speaker, mel = np.ones(2, np.float32), np.zeros((50, 3), np.float32)
    return Voice(name, codes, speaker, mel, "audio", analyzer.analysis_hash)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(registry.Voice, "from_wav", staticmethod(analysed))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "voices"


@pytest.fixture
def voices(folder):
    return VoiceRegistry(Speech(), folder, aliases={"alloy": "anna"}, most=3)


def test_a_voice_is_there_again_after_a_restart(voices, folder):
    added = voices.add("me", b"recording")
    assert (added.name, added.id) == ("me", "voice_me")
    again = VoiceRegistry(Speech(), folder)
    assert again.names == ["anna", "me"]
    for wanted in ("me", "voice_me"):
        found = again.find(wanted)
        assert (found.name, found.hash) == ("me", voices.find("me").hash)
    assert again.added == [added]


def test_a_voice_of_another_server_on_the_same_folder_is_found(voices, folder):
    other = VoiceRegistry(Speech(), folder)
    voices.add("me", b"recording")
    assert other.find("me").name == "me"
    other.remove("me")
    with pytest.raises(VoiceError, match="no voice 'me'"):
        voices.find("me")


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_leaves_the_folder(voices, folder, tmp_path, name):
    (tmp_path / "evil.safetensors").write_bytes(b"outside")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(VoiceError):
        voices.add(name, b"recording")
    with pytest.raises(VoiceError):
        voices.find(name)
    with pytest.raises(ApiError):
        voices.remove(name)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_in_the_folder_leads_nowhere_else(voices, folder, tmp_path):
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(b"keep me")
    (folder / "me.safetensors").symlink_to(outside)
    with pytest.raises(VoiceError):
        voices.find("me")
    voices.remove("me")
    assert outside.read_bytes() == b"keep me"


def test_names_that_are_taken_or_have_a_meaning(voices):
    voices.add("me", b"recording")
    for name in ("me", "anna", "default", "alloy", "voice_x"):
        with pytest.raises(VoiceError):
            voices.add(name, b"recording")
    assert voices.find("alloy").name == "anna"
    with pytest.raises(VoiceError, match="alias"):
        VoiceRegistry(Speech(), aliases={"alloy": "nobody"})


def test_no_more_than_allowed_and_none_half_written(voices, folder):
    for name in "abc":
        voices.add(name, b"recording")
    with pytest.raises(ApiError, match="at most 3"):
        voices.add("d", b"recording")
    voices.remove("a")
    with pytest.raises(AudioError):
        voices.add("d", b"silence")
    assert [path.name for path in sorted(folder.iterdir())] == ["b.safetensors", "c.safetensors"]


def test_the_models_own_voices_stay(voices):
    with pytest.raises(ApiError, match="own"):
        voices.remove("anna")
    with pytest.raises(ApiError) as missing:
        voices.remove("nobody")
    assert missing.value.status == 404


def test_files_of_others_and_voices_of_other_models(voices, folder):
    (folder / "broken.safetensors").write_bytes(b"x")
    (folder / "notes.txt").write_text("x")
    assert voices.names == ["anna", "broken"]
    with pytest.raises(VoiceError, match="cannot be read"):
        voices.find("broken")
    voices.add("me", b"recording")
    with pytest.raises(VoiceError, match="another model"):
        VoiceRegistry(Speech("h2"), folder).find("me")


def test_a_server_without_a_folder_or_without_a_voice(folder, tmp_path):
    with pytest.raises(ApiError, match="--voices"):
        VoiceRegistry(Speech()).add("me", b"recording")

    class Mute:
        @property
        def speech(self):
            raise CheckpointError("it cannot speak")

    mute = VoiceRegistry(speech_of(Mute()), folder)
    assert mute.names == []
    with pytest.raises(ApiError, match="cannot speak"):
        mute.find()
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file"):
        VoiceRegistry(Speech(), tmp_path / "file" / "voices")


@pytest.mark.parametrize("scripted_server", [{"max_voice_bytes": 10}], indirect=True)
def test_recordings_that_are_too_large(scripted_server):
    file = io.BytesIO()
    soundfile.write(file, np.zeros(2000, np.float32), 16_000, format="WAV")
    response = httpx.post(
        f"{scripted_server.url}/v1/audio/voices",
        data={"name": "me"},
        files={"audio_sample": ("me.wav", file.getvalue())},
    )
    assert response.status_code == 413

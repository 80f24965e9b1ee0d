import shutil

import numpy as np
import pytest
import soundfile

from sa2jax import testing
from sa2jax.convert.hf import convert
from sa2jax.errors import CheckpointError, VoiceError
from sa2jax.speech.layout import ANALYSIS, SYNTHESIS
from sa2jax.speech.store import SpeechFolder
from sa2jax.speech.voices import Voice


@pytest.fixture
def home(converted_detokenizer, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(converted_detokenizer, tmp_path / "home")


@pytest.fixture
def model(converted_detokenizer, tmp_path):
    """A model folder with the detokenizer in it."""
    folder = testing.save_tiny_checkpoint(tmp_path / "model")
    shutil.copytree(converted_detokenizer, folder / "token2wav")
    return folder


@pytest.fixture
def recording(golden):
    return golden / "t2w_golden" / "prompt.wav"


def test_released_and_converted_are_the_same(golden, converted_detokenizer):
    released, ours = SpeechFolder(golden / "token2wav"), SpeechFolder(converted_detokenizer)
    assert (released.official, ours.official) == (True, False)
    assert released.cfg == ours.cfg
    assert released.analysis_hash == ours.analysis_hash
    for name in (*SYNTHESIS, *ANALYSIS):
        one, other = released.params([name]), ours.params([name])
        leaf = {"flow": "table", "vocoder": "pre", "speech_tokenizer": "conv1"}.get(name, "tdnn")
        first, second = one[name][leaf], other[name][leaf]
        if isinstance(first, dict):
            first, second = first["kernel"], second["kernel"]
        np.testing.assert_array_equal(first, second)


def test_voice_kept_under_a_name(home, recording):
    folder = SpeechFolder(home)
    assert folder.voices == {}
    made = folder.add("anna", recording)
    again = SpeechFolder(home)
    assert list(again.voices) == ["anna"]
    for wanted in ("anna", home / "voices" / "anna.safetensors", "default"):
        assert again.voice(wanted).hash == made.hash
    # A recording is analysed on the spot.
    assert again.voice(recording).hash == made.hash
    with pytest.raises(VoiceError, match="there is a voice anna already"):
        again.add("anna", recording)
    again.add("anna", recording, overwrite=True)


def test_voices_are_beside_the_detokenizer(model, recording):
    SpeechFolder(model).add("anna", recording)
    assert (model / "voices" / "anna.safetensors").is_file()
    assert SpeechFolder(model).voice("anna").name == "anna"


def test_default_voice(home, recording):
    folder = SpeechFolder(home)
    voice = folder.add("zoe", recording)
    assert folder.voice().name == "zoe"  # the only one
    voice.save(home / "voices" / "anna.safetensors")
    with pytest.raises(VoiceError, match=r"no voice 'default': .*\(anna, zoe\)"):
        folder.voice()
    for name in ("default_male", "default_female", "default"):
        Voice.from_wav(recording, folder.analyzer, name).save(
            home / "voices" / f"{name}.safetensors"
        )
        assert folder.voice().name == name


def test_recordings_of_a_release_are_voices(golden, tmp_path, recording):
    home = tmp_path / "released"
    shutil.copytree(golden / "token2wav", home / "token2wav")
    (home / "assets").mkdir()
    shutil.copy(recording, home / "assets" / "default_male.wav")
    folder = SpeechFolder(home)
    assert list(folder.voices) == ["default_male"]
    assert folder.voice().name == "default_male"


def test_voice_of_other_weights(home, recording):
    folder = SpeechFolder(home)
    made = Voice.from_wav(recording, folder.analyzer, "anna")
    strange = Voice("anna", made.codes, made.speaker, made.mel, made.audio_hash, "f" * 64)
    strange.save(home / "voices" / "anna.safetensors")
    with pytest.raises(VoiceError, match=r"another checkpoint's weights.* add it again"):
        folder.voice("anna")


def test_a_voice_of_other_sizes_is_refused(home, recording):
    folder = SpeechFolder(home)
    made = Voice.from_wav(recording, folder.analyzer, "anna")
    codes = np.full_like(made.codes, folder.cfg.flow.codes)
    hashes = made.audio_hash, made.analysis_hash
    Voice("anna", codes, made.speaker, made.mel, *hashes).save(home / "voices" / "anna.safetensors")
    with pytest.raises(VoiceError, match=r"voice anna does not fit this model: code"):
        folder.voice("anna")


@pytest.mark.parametrize("wanted", ["nobody", "nobody.wav", "../home", ""])
def test_no_such_voice(home, wanted):
    with pytest.raises(VoiceError, match=r"no voice .*\(none yet\)"):
        SpeechFolder(home).voice(wanted)


def test_nothing_is_left_of_a_voice_that_failed(home, tmp_path):
    path = tmp_path / "short.wav"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 3200), 16_000)
    with pytest.raises(VoiceError, match=r"0\.20 s"):
        SpeechFolder(home).add("short", path)
    assert not (home / "voices").exists()


def test_no_detokenizer(tmp_path):
    with pytest.raises(CheckpointError, match="no folder"):
        SpeechFolder(tmp_path / "nowhere")
    folder = testing.save_tiny_checkpoint(tmp_path / "mute")
    with pytest.raises(CheckpointError, match="has no detokenizer, it cannot speak"):
        SpeechFolder(folder)


def test_voices_of_a_conversion(golden, tmp_path, recording):
    """Recordings become voices; those made before stay when a model is converted anew."""
    released, ours = tmp_path / "released", tmp_path / "ours"
    shutil.copytree(golden / "token2wav", released)
    (released / "assets").mkdir()
    shutil.copy(recording, released / "assets" / "default_male.wav")
    soundfile.write(released / "assets" / "silent.wav", np.zeros(48_000), 24_000)
    report = convert(released, ours)
    (note,) = report.notes
    assert note.startswith("assets/silent.wav did not become a voice: ")
    folder = SpeechFolder(ours)
    assert folder.voice().name == "default_male"
    made = folder.add("anna", recording)
    foreign = Voice("bert", made.codes, made.speaker, made.mel, made.audio_hash, "f" * 64)
    foreign.save(ours / "voices" / "bert.safetensors")
    report = convert(released, ours, overwrite=True)
    assert "voice bert was analysed by other weights: not kept" in report.notes
    again = SpeechFolder(ours)
    assert again.voice("anna").hash == made.hash
    assert {p.stem for p in (ours / "voices").iterdir()} == {"anna", "default_male"}

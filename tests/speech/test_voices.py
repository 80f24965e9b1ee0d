import dataclasses
import logging

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import soundfile
from helpers.small_speech import SMALL, small_networks

from sa2jax.errors import AudioError, CheckpointError, VoiceError
from sa2jax.speech.voices import Voice, VoiceAnalyzer, check_name, describe

RATE = 16_000


class Ear(VoiceAnalyzer):
    """Hears a code every 40 ms without any network."""

    def __init__(self, analysis_hash="weights"):
        self.analysis_hash, self.parity = analysis_hash, False
        self.heard = []

    def codes_of(self, clips):
        self.heard += clips
        return [np.arange(-(-len(clip) // 640), dtype=np.int32) % 6561 for clip in clips]

    def speaker_of(self, samples):
        return np.full(192, samples.std(), np.float32)


def noise(seconds: float, level: float = 0.1) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (level * rng.standard_normal(round(seconds * RATE))).astype(np.float32)


@pytest.fixture
def voice() -> Voice:
    return Voice.from_wav((noise(2.01), RATE), Ear(), "anna")


def test_parts_fit(voice):
    assert len(voice.codes) == 51  # a part of a code counts
    assert voice.mel.shape == (102, 80)
    # 100.5 mel frames were there: the last one is repeated.
    np.testing.assert_array_equal(voice.mel[100], voice.mel[99])
    assert voice.seconds == 51 / 25


def test_saved_and_loaded(voice, tmp_path):
    path = tmp_path / "new" / "anna.safetensors"
    voice.save(path)
    again = Voice.load(path)
    for field in dataclasses.fields(Voice):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(voice, field.name))
    assert again.hash == voice.hash
    assert [p.name for p in path.parent.iterdir()] == ["anna.safetensors"]


def test_keyed_by_what_was_heard(voice, tmp_path):
    """The file's name says nothing, its samples do."""
    other = Voice.from_wav((noise(2.01, 0.11), RATE), Ear(), "anna")
    renamed = Voice.from_wav((noise(2.01), RATE), Ear(), "bert")
    elsewhere = Voice.from_wav((noise(2.01), RATE), Ear("other weights"), "anna")
    assert renamed.hash == voice.hash
    assert renamed.audio_hash == voice.audio_hash
    assert len({voice.hash, other.hash, elsewhere.hash}) == 3


def test_long_recording_is_cut_with_a_warning(caplog):
    ear = Ear()
    with caplog.at_level(logging.WARNING):
        voice = Voice.from_wav((noise(31), RATE), ear, "anna")
    assert "only the first 30 s of 31.0 s" in caplog.text
    assert len(ear.heard[0]) == 30 * RATE
    assert (len(voice.codes), len(voice.mel)) == (750, 1500)


def test_exactly_thirty_seconds_are_not_cut(caplog):
    assert Voice.from_wav((noise(30), RATE), Ear()).seconds == 30
    assert not caplog.text


def test_channels():
    """Codes hear the first channel, the mel all of them."""
    ear = Ear()
    both = Voice.from_wav((np.stack([noise(2), np.zeros(2 * RATE, np.float32)]), RATE), ear)
    alone = Voice.from_wav((noise(2), RATE), ear)
    np.testing.assert_array_equal(*ear.heard)
    np.testing.assert_allclose(both.mel, alone.mel - np.log(2), atol=1e-3)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (noise(0.2), "expected 1 to 30 s of speech, got 0.20 s"),
        (np.zeros(2 * RATE, np.float32), "channel 0 stays below -60 dB"),
        (noise(2, 1e-5), "channel 0 stays below -60 dB"),
        (np.stack([np.zeros(2 * RATE, np.float32), noise(2)]), "channel 0 stays"),
        (np.stack([noise(2), -noise(2)]), "the mean of the channels stays"),
    ],
)
def test_no_voice_to_hear(samples, message):
    with pytest.raises(VoiceError, match=message):
        Voice.from_wav((samples, RATE), Ear())


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".hidden", "a b", "x" * 65, "-o"])
def test_bad_names(name):
    with pytest.raises(VoiceError, match="voice name"):
        check_name(name)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("my voice (1).wav", "my-voice-1"),
        ("日本語 файл 'q\".wav", "日本語-файл-q"),
        ("...wav", "voice"),
        (f"{'a' * 90}.wav", "a" * 64),
        (".hidden one.flac", "hidden-one"),
    ],
)
def test_a_recording_of_any_name_is_a_voice(tmp_path, file, name):
    soundfile.write(tmp_path / file, noise(1.2), RATE, format="WAV")
    assert Voice.from_wav(tmp_path / file, Ear()).name == name


def test_good_names():
    for name in ("anna", "default_male", "小明", "a.b-c", "7"):
        check_name(name)


def test_damaged_files(voice, tmp_path):
    path = tmp_path / "anna.safetensors"
    voice.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VoiceError, match="cannot be read"):
        Voice.load(path)
    path.write_bytes(whole[:-4] + b"oops")
    with pytest.raises(VoiceError, match="is damaged"):
        Voice.load(path)
    path.write_bytes(safetensors.numpy.save({"x": np.zeros(2)}))
    with pytest.raises(VoiceError, match="is no voice"):
        Voice.load(path)
    path.unlink()
    with pytest.raises(VoiceError, match="cannot be read"):
        Voice.load(path)


def changed(voice: Voice, part: str, index: int, value: float) -> dict:
    array = getattr(voice, part).copy()
    array.reshape(-1)[index] = value
    return {part: array}


HOSTILE = {
    "nan speaker": (
        lambda v: changed(v, "speaker", 3, np.nan),
        r"speaker: expected numbers within",
    ),
    "inf speaker": (
        lambda v: changed(v, "speaker", 0, np.inf),
        r"speaker: expected numbers within",
    ),
    "large speaker": (
        lambda v: changed(v, "speaker", 0, 1e30),
        r"speaker: expected numbers within",
    ),
    "no speaker": (lambda v: {"speaker": np.zeros_like(v.speaker)}, "a vector that is not 0"),
    "nan mel": (lambda v: changed(v, "mel", -1, np.nan), r"mel: expected numbers within ±50"),
    "large mel": (lambda v: changed(v, "mel", 7, -1e6), r"mel: expected numbers within ±50"),
    "negative code": (lambda v: changed(v, "codes", 1, -1), "code -1, expected 0 or more"),
    "no codes": (
        lambda v: {"codes": v.codes[:0], "mel": v.mel[:0]},
        "codes: expected int32 with 1",
    ),
    "short": (lambda v: {"codes": v.codes[:24], "mel": v.mel[:48]}, "expected 25 to 750 codes"),
    "long": (
        lambda v: {"codes": np.zeros(751, np.int32), "mel": np.zeros((1502, 80), np.float32)},
        "expected 25 to 750 codes and two mel frames for each, got 751 and 1502",
    ),
    "odd mel": (lambda v: {"mel": v.mel[:-1]}, "two mel frames for each, got 51 and 101"),
    "flat mel": (lambda v: {"mel": v.mel.reshape(-1)}, "mel: expected float32 with 2 axes"),
    "wide codes": (lambda v: {"codes": v.codes.astype(np.int64)}, "codes: expected int32"),
    "half mel": (lambda v: {"mel": v.mel.astype(np.float16)}, "mel: expected float32"),
    "path as name": (lambda v: {"name": "../../etc/passwd"}, "voice name"),
    "long name": (lambda v: {"name": "x" * 5000}, "voice name"),
    "line as hash": (lambda v: {"audio_hash": "a\nb"}, "expected a hash under 'audio'"),
    "long hash": (lambda v: {"analysis_hash": "f" * 5000}, "expected a hash under 'analysis'"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hash_that_fits_makes_no_voice(voice, tmp_path, kind):
    """Whoever writes a file can write its hash."""
    change, reason = HOSTILE[kind]
    path = tmp_path / "anna.safetensors"
    dataclasses.replace(voice, **change(voice)).save(path)
    with pytest.raises(VoiceError, match=f"holds no voice .*{reason}") as caught:
        Voice.load(path)
    assert len(str(caught.value)) < 400


def test_more_than_a_voice_is_none(voice, tmp_path):
    path = tmp_path / "anna.safetensors"
    voice.save(path)
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
    arrays = {"codes": voice.codes, "speaker": voice.speaker, "mel": voice.mel}
    for parts, got in (
        (arrays | {"more": np.zeros(1)}, "got codes, mel, more, speaker"),
        ({"codes": voice.codes}, "got codes"),
    ):
        safetensors.numpy.save_file(parts, path, metadata)
        with pytest.raises(VoiceError, match=f"expected codes, speaker, mel, {got}"):
            Voice.load(path)


def test_a_voice_fits_its_model(voice):
    cfg = SMALL.flow
    fits = dataclasses.replace(
        voice,
        codes=voice.codes % cfg.codes,
        speaker=np.ones(cfg.speaker, np.float32),
        mel=np.zeros((102, cfg.mels), np.float32),
    )
    fits.require_fit(cfg)
    for change, reason in (
        ({"codes": np.full(51, cfg.codes, np.int32)}, f"code {cfg.codes}, expected 0 to"),
        ({"speaker": np.ones(cfg.speaker + 1, np.float32)}, "numbers of a speaker, expected"),
        ({"mel": np.zeros((102, cfg.mels + 1), np.float32)}, "mel bands, expected"),
    ):
        with pytest.raises(VoiceError, match=f"voice anna does not fit this model: .*{reason}"):
            dataclasses.replace(fits, **change).require_fit(cfg)


def test_save_into_a_file_is_refused(voice, tmp_path):
    (tmp_path / "voices").write_text("not a folder")
    with pytest.raises(CheckpointError, match="cannot write"):
        voice.save(tmp_path / "voices" / "anna.safetensors")


def test_description(voice):
    facts = describe(voice)
    assert facts["name"] == "anna"
    assert facts["codes"] == 51
    assert facts["hash"] == voice.hash


def test_too_short_for_codes():
    analyzer = VoiceAnalyzer(SMALL, small_networks(SMALL), "")
    with pytest.raises(AudioError, match=r"at least 320 samples at 16 kHz .*, got 100"):
        analyzer.codes([(np.ones(100, np.float32), RATE)])

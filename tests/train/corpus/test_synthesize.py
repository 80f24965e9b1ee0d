"""Synthetic recordings: the same each time, resumed, and what their levels and noises should be."""

import hashlib
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sa2jax.errors import ConfigError, DataError
from sa2jax.train.corpus import acoustics, tts_engines
from sa2jax.train.corpus.acoustics import AcousticAugmentation
from sa2jax.train.corpus.plan import CorpusConfig, CorpusPlan, read_corpus
from sa2jax.train.corpus.synthesize import synthesize
from sa2jax.train.corpus.tts_engines import Synthesizer, VoiceSpec, VoiceStyle
from sa2jax.train.data.records import parse_record

pytest.importorskip("soxr", reason="needs the extra sa2jax[synthesis]")
COUNTS = {"asr": 4, "tts": 2, "repeat": 2, "sums": 2, "chat": 3, "tools": 4, "voices": 4, "text": 6}
SMALL = {"dialogues.counts": COUNTS, "dialogues.held_out.counts": {"asr_seen": 2, "asr_unseen": 2}}


def small(**others) -> CorpusConfig:
    """The recipe, with tones for voices."""
    recipe = read_corpus("nano/corpus", SMALL | others)
    voices = {
        name: replace(spec, engine="tones", voice=name, pitch_range_hz=None)
        for name, spec in recipe.voices.items()
    }
    return replace(recipe, voices=voices)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "out"
    return folder, synthesize(folder, small())


LISTS = ("speech.jsonl", "heard.jsonl")  # of recordings, not of conversations

# --- the corpus ---------------------------------------------------------------------------------


def test_all_records_can_be_read(made):
    folder, about = made
    counted = {}
    for file in sorted(folder.glob("*/*.jsonl")):
        rows = file.read_text(encoding="utf-8").splitlines()
        counted[str(file.relative_to(folder))] = len(rows)
        if file.name in LISTS:
            continue
        for number, row in enumerate(rows, 1):
            record = parse_record(row, f"{file.name}:{number}", file.parent)
            assert all(Path(path).is_file() for path in record.audios)
            said = [turn.speech for turn in record.turns if turn.speech]
            assert all(Path(str(path)).is_file() for path in said)
            assert len(json.loads(row)["speakers"]) == len(record.audios)
    for name in LISTS:
        rows = (folder / name).read_text().splitlines()
        counted[name] = len(rows)
        assert all((folder / json.loads(row)["audio"]).is_file() for row in rows)
    assert counted == {name: file["records"] for name, file in about["files"].items()}


def test_about(made):
    folder, about = made
    assert json.loads((folder / "corpus.json").read_text()) == about
    assert about["recordings"] == len([*folder.rglob("*.flac"), *folder.rglob("*.wav")]) - 1
    assert about["hours"] > 0
    assert about["engines"] == {"tones": "1"}
    assert {"one", "plus"} & {*about["vocabulary"]}
    assert all(word.isalpha() for word in about["vocabulary"])


def test_recordings(made):
    folder, _ = made
    for path in folder.rglob("*.flac"):
        info = soundfile.info(path)
        heard = path.parts[-2] == "noise" or "heard" in path.parts
        assert (info.samplerate, info.channels) == (16_000 if heard else 24_000, 1)
        assert info.subtype == "PCM_16"
        if not heard:
            assert info.frames % 960 == 0  # whole codes
    assert {path.name for path in (folder / "voices").iterdir()} == {
        "anna.wav",
        "sue.wav",
        "rob.wav",
    }


def test_clean_speech(made):
    folder, _ = made
    rows = [json.loads(line) for line in (folder / "speech.jsonl").open()]
    assert all((folder / row["audio"]).is_file() for row in rows)
    said = [row for row in rows if "/said/" in row["audio"]]
    short = {row["text"] for row in said if len(row["text"].split()) <= 3}
    for name in ("sue", "rob"):
        assert {row["text"] for row in said if row["speaker"] == name} == short
        assert all(f"/said/{name}/" in row["audio"] for row in said if row["speaker"] == name)
    assert {row["speaker"] for row in said} == {"anna", "sue", "rob"}

    def seconds(name):
        return soundfile.info(folder / name).duration

    for row in rows:
        assert not ("voice" in row and seconds(row["audio"]) >= 1)
        assert "voice" not in row or seconds(row["voice"]) >= 1
    assert any("voice" in row for row in said)
    held = [json.loads(line) for line in (folder / "heldout/speech.jsonl").open()]
    assert all((folder / "heldout" / row["audio"]).is_file() for row in held)
    assert not {row["text"] for row in rows} & {row["text"] for row in held}
    wave, _ = soundfile.read(folder / rows[0]["audio"])
    loud = 20 * np.log10(np.sqrt(np.mean(wave[wave != 0] ** 2)))
    assert abs(loud + 21) < 1


def test_loud_and_soft(made):
    folder, _ = made
    peaks: dict[str, list[float]] = {}
    for line in (folder / "talks/voices.jsonl").open():
        row = json.loads(line)
        wave, _ = soundfile.read(folder / "talks" / row["audios"][0])
        word = row["messages"][-1]["content"].split()[-1]
        peaks.setdefault(word, []).append(20 * np.log10(np.abs(wave).max()))
    assert min(peaks.get("loud", [0])) > -5
    assert max(peaks.get("soft", [-30])) < -27


def test_same_bytes_with_processes(made, tmp_path):
    synthesize(tmp_path / "again", small(), workers=2)
    assert contents(tmp_path / "again") == contents(made[0])


def test_going_on(made, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(made[0], out)
    for name in ("corpus.json", "talks/asr.jsonl", "speech.jsonl"):
        (out / name).unlink()
    missing = [*sorted((out / "talks/heard").rglob("*.flac"))[:3], out / "talks/said/seven.flac"]
    for path in missing:
        path.unlink(missing_ok=True)
    spoken = []
    say = Synthesizer.say
    monkeypatch.setattr(
        Synthesizer, "say", lambda self, *how: spoken.append(how) or say(self, *how)
    )
    steps = []
    synthesize(out, small(), progress=lambda done, total: steps.append((done, total)))
    assert 3 <= len(spoken) <= 4
    assert steps[-1][0] == steps[-1][1] == len(steps)
    assert contents(out) == contents(made[0])


def test_another_recipe_or_folder(made, tmp_path):
    with pytest.raises(DataError, match="another recipe, seed or scale"):
        synthesize(made[0], small(seed=1))
    (tmp_path / "mine.txt").write_text("?")
    with pytest.raises(DataError, match="already holds something else"):
        synthesize(tmp_path, small())
    with pytest.raises(DataError, match="scale above 0"):
        synthesize(tmp_path / "x", small(), scale=0)
    assert not (tmp_path / "x").exists()


def test_a_voice_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(tts_engines, "_tones", None)
    monkeypatch.setitem(
        tts_engines._MAKERS, "tones", lambda: lambda *how: (np.zeros(100, np.float32), 16_000)
    )
    with pytest.raises(DataError, match="said nothing"):
        synthesize(tmp_path / "out", small())
    assert not (tmp_path / "out/corpus.json").exists()


def test_missing_engine(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DataError, match="flite needs flite: apt-get install flite"):
        Synthesizer({"a": VoiceSpec(engine="flite")})
    monkeypatch.setattr(tts_engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r'hibari needs hibari: pip install "sa2jax\[synthesis\]"'):
        synthesize(tmp_path / "out", read_corpus("nano/corpus"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "flow"}, "expected one of kind corpus"),
        ({"voices.anna.colour": 1}, r"voices.anna: there is no colour"),
        ({"voices.anna.engine": "siri"}, "no engine 'siri'"),
        (
            {"voices.anna.speed_range": [2, 1]},
            r"expected speed_range and pitch_range_hz as \[low, high\]",
        ),
        ({"voices.anna.pitch_range_hz": [80, 90]}, "pitch_range_hz is for flite only"),
        ({"voices.sue": None}, "there is no voice 'sue'"),
        ({"voices.ben.weight": 1}, "an unseen one of weight 0"),
        ({"augmentation.noise_probability": 2}, "noise_probability: expected 0 to 1"),
        ({"augmentation.snr_db": [9, 2]}, r"snr_db: expected \[low, high\]"),
        ({"augmentation.peak_db": [-3, 3]}, "expected peak_db <= 0"),
        ({"augmentations": {}}, "there is no augmentations"),
    ],
)
def test_wrong_recipes(change, message):
    with pytest.raises(ConfigError, match=message):
        read_corpus("nano/corpus", change)


def test_leaving_a_voice_out():
    assert "joe" not in read_corpus("nano/corpus", {"voices.joe": None}).voices


def test_plan_bends_voices_for_training_only():
    plan = CorpusPlan.of(
        small(**{"dialogues.counts.asr": 60, "dialogues.held_out.counts.asr_seen": 20}), 1
    )
    learnt = {j.style.speaker for p, j in plan.jobs.items() if p.startswith("talks/heard/asr")}
    tested = {j.style.speaker for p, j in plan.jobs.items() if p.startswith("heldout/heard/asr")}
    assert len(learnt) > 12
    assert any("@" in name for name in learnt)
    assert not any("@" in name for name in tested)
    assert "ben" in tested
    assert "ben" not in {name.split("@")[0] for name in learnt}


# --- effects ------------------------------------------------------------------------------------

SILENT = np.zeros(0)


@pytest.fixture
def tone():
    return np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)


def test_no_effects_keep_the_wave(tone):
    still = AcousticAugmentation(peak_db=(-6, -6), silence_seconds=(0.1, 0.1))
    heard = still.apply(tone, np.random.default_rng(0), SILENT)
    assert len(heard) == 16_000 + 3200
    np.testing.assert_allclose(heard[1600:-1600], tone * 10 ** (-6 / 20), atol=1e-3)
    assert not heard[:1600].any()


@pytest.mark.parametrize("snr", [5, 30])
def test_noise_has_its_level(tone, snr):
    noisy = AcousticAugmentation(noise_probability=1, snr_db=(snr, snr), silence_seconds=(0.5, 0.5))
    for seed in range(6):
        babble = np.random.default_rng(9).standard_normal(16_000)
        heard = noisy.apply(tone, np.random.default_rng(seed), babble).astype(float)
        noise = np.concatenate([heard[:8000], heard[-8000:]])
        both = np.mean(heard[8000:-8000] ** 2)
        found = 10 * np.log10(both / np.mean(noise**2) - 1)
        assert abs(found - snr) < 2.5


def test_level_that_is_asked_for(tone):
    heard = AcousticAugmentation().apply(tone, np.random.default_rng(0), SILENT, peak=(-30, -30))
    assert abs(20 * np.log10(np.abs(heard).max()) + 30) < 0.1


def test_rooms_ring(tone):
    room = AcousticAugmentation(
        reverb_probability=1,
        rt60_seconds=(0.4, 0.4),
        reverb_db=(-3, -3),
        silence_seconds=(0.3, 0.3),
    )
    heard = room.apply(tone, np.random.default_rng(0), SILENT)
    assert not heard[: round(0.29 * 16_000)].any() or np.abs(heard[:4000]).max() < 1e-3
    assert np.abs(heard[-4600:-3600]).max() > 0.01


def test_narrow_lines():
    white = np.random.default_rng(0).standard_normal(16_000)
    line = AcousticAugmentation(
        bandpass_probability=1,
        bandpass_low_hz=(300, 300),
        bandpass_high_hz=(3400, 3400),
        silence_seconds=(0, 0),
    )
    power = np.abs(np.fft.rfft(line.apply(white, np.random.default_rng(0), SILENT))) ** 2
    assert power[:100].mean() < 0.01 * power[500:3000].mean()
    assert power[6000:].mean() < 0.05 * power[500:3000].mean()


def test_tilt():
    white = np.random.default_rng(0).standard_normal(16_000)
    steep = AcousticAugmentation(
        tilt_probability=1, tilt_db_per_octave=(-6, -6), silence_seconds=(0, 0)
    )
    power = np.abs(np.fft.rfft(steep.apply(white, np.random.default_rng(0), SILENT))) ** 2
    fall = 10 * np.log10(power[3600:4400].mean() / power[450:550].mean())
    assert abs(fall + 18) < 2  # three octaves


def test_effects_are_of_the_generator(tone):
    every = AcousticAugmentation(
        noise_probability=1, reverb_probability=1, tilt_probability=1, bandpass_probability=1
    )
    first, again, other = (every.apply(tone, np.random.default_rng(s), SILENT) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert len(first) != len(other)
    assert first.dtype == np.float32
    assert acoustics.NOISES == ("white", "pink", "babble")


# --- voices -------------------------------------------------------------------------------------


def test_warp_moves_pitch_not_pace():
    synthesizer = Synthesizer({"a": VoiceSpec(engine="tones", voice="a")})

    def pitch(wave):
        return np.abs(np.fft.rfft(wave)).argmax() * 24_000 / len(wave)

    plain = synthesizer.say("mmmm", VoiceStyle(voice="a"))
    bent = synthesizer.say("mmmm", VoiceStyle(voice="a", warp=1.2))
    assert abs(len(bent) / len(plain) - 1) < 0.05
    assert abs(pitch(bent) / pitch(plain) - 1.2) < 0.05
    assert len(synthesizer.say("mmmm", VoiceStyle(voice="a", speed=2))) < 0.55 * len(plain)


def test_speakers():
    assert VoiceStyle(voice="kal").speaker == "kal"
    assert VoiceStyle(voice="kal", warp=0.9).speaker == "kal@0.90"
    spec = VoiceSpec(engine="tones", warp_factors=(0.8, 1.2), speed_range=(0.9, 1.1))
    rng = np.random.default_rng(0)
    assert VoiceStyle.draw(rng, "a", spec, warped=True).warp in spec.warp_factors
    assert VoiceStyle.draw(rng, "a", spec, warped=False).warp == 1


def test_programs_that_fail(monkeypatch):
    monkeypatch.setattr(tts_engines.shutil, "which", lambda name: name)
    synthesizer = Synthesizer({"a": VoiceSpec(engine="flite", voice="slt")})

    def missing(*command, **how):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    with pytest.raises(DataError, match="flite is not installed"):
        synthesizer.say("seven", VoiceStyle(voice="a"))

    def failing(*command, **how):
        raise subprocess.CalledProcessError(3, "flite", stderr=b"no such\nvoice")

    monkeypatch.setattr(subprocess, "run", failing)
    with pytest.raises(DataError, match=r"flite failed \(3\): no such voice"):
        synthesizer.say("seven", VoiceStyle(voice="a"))


@pytest.mark.parametrize("name", ["anna", "joe", "sue", "kal", "ben", "fay"])
def test_real_voices(name):
    """With the engine itself, where it is installed."""
    spec = read_corpus("nano/corpus").voices[name]
    try:
        synthesizer = Synthesizer({name: spec})
    except DataError as error:
        pytest.skip(str(error))
    wave = synthesizer.say("seven", VoiceStyle(voice=name))
    np.testing.assert_array_equal(wave, synthesizer.say("seven", VoiceStyle(voice=name)))
    assert 0.25 * 24_000 < len(wave) < 1.2 * 24_000
    longer = synthesizer.say(
        "seven three eight one five", VoiceStyle(voice=name, speed=0.9, warp=1.1)
    )
    assert len(longer) > 1.8 * len(wave)
    assert tts_engines.version_of(spec.engine) != "unknown"

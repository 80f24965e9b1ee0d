"""Recordings for the networks that hear and the vocoder: kept as they are, in exact order."""

import json
import sys

import numpy as np
import pytest
import soundfile
from helpers.sound import tone

from sa2jax.errors import DataError
from sa2jax.speech.layout import SYNTHESIS
from sa2jax.speech.store import SpeechFolder
from sa2jax.speech.token2wav import Token2Wav
from sa2jax.train.networks.flow_data import speaker_vector
from sa2jax.train.networks.recognition import letter_ids
from sa2jax.train.networks.speech_data import (
    ClipConfig,
    ClipData,
    CropConfig,
    CropData,
    prepare_speech,
    read_speech_info,
)

WORDS = ["one", "two three", "four", "five six seven", "eight"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Five clips of 0.4 to 0.8 s by two speakers, one that is silent, and a bad line."""
    folder = tmp_path_factory.mktemp("speech")
    rows = []
    for number, text in enumerate(WORDS):
        wave = tone(0.4 + number / 10, rate=24_000, frequency=150 + 20 * number)
        soundfile.write(folder / f"{number}.wav", wave, 24_000)
        rows.append({"audio": f"{number}.wav", "text": text, "speaker": f"s{number % 2}"})
    soundfile.write(folder / "still.wav", np.zeros(24_000), 24_000)
    rows += [{"audio": "still.wav"}, {"audio": "0.wav", "text": 3}]
    lines = "\n".join(map(json.dumps, rows))
    (folder / "speech.jsonl").write_text(lines)
    return folder / "speech.jsonl"


@pytest.fixture(scope="module")
def low(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("low") / "ready"
    return out, prepare_speech([source], out)


@pytest.fixture(scope="module")
def high(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("high") / "ready"
    prepare_speech([source], out, rate=24_000)
    return out


def test_what_is_kept(low):
    folder, about = low
    assert (about["samples"], about["rejected"], about["rate"]) == (5, 2, 16_000)
    assert about["speakers"] == ["s0", "s1"]
    _, lengths = read_speech_info(folder, 16_000)
    np.testing.assert_array_equal(lengths, [40, 50, 60, 70, 80])
    reasons = [json.loads(line)["reason"] for line in (folder / "rejects.jsonl").open()]
    assert reasons == ["silence", 'expected "text" to be text, got 3']


def test_the_channel_that_is_heard(tmp_path):
    wave = tone(0.5, rate=16_000, frequency=200)
    soundfile.write(tmp_path / "a.wav", np.stack([wave * 0, wave], axis=1), 16_000)
    with pytest.raises(DataError, match="silence"):
        prepare_speech([tmp_path / "a.wav"], tmp_path / "none", channel=0)
    prepare_speech([tmp_path / "a.wav"], tmp_path / "one", channel=1)
    data = ClipData(ClipConfig(folder=tmp_path / "one", rows=1, shuffle=False, epochs=1), seed=0)
    (batch,) = data
    np.testing.assert_allclose(batch.sound[0, :8000], wave, atol=1e-4)


def test_clips_come_padded(low):
    config = ClipConfig(folder=low[0], rows=2, buckets=(60, 80), shuffle=False, epochs=1)
    data = ClipData(config, seed=0)
    batches = list(data)
    assert [batch.sound.shape for batch in batches] == [(2, 9600), (2, 12800), (2, 9600)]
    first = batches[0]
    np.testing.assert_array_equal(first.lengths, [6400, 8000])
    assert np.abs(first.sound[0, :6400]).max() > 0.1
    assert not first.sound[0, 6400:].any()
    assert list(first.letters[1, : first.letter_counts[1]]) == letter_ids("two three")
    np.testing.assert_array_equal(first.speaker, [0, 1])
    np.testing.assert_array_equal(batches[2].lengths, [9600, 0])
    assert batches[2].speaker[1] == -1
    assert data.audio_seconds == pytest.approx(3.0)
    assert not data.empty_batch().lengths.any()


def test_speakers_of_another_folder(low):
    config = ClipConfig(folder=low[0], rows=5, buckets=(80,), shuffle=False)
    batch = next(ClipData(config, seed=0, speakers=["x", "s1"]))
    np.testing.assert_array_equal(batch.speaker, [-1, 1, -1, 1, -1])


def test_the_order_can_be_gone_back_to(low):
    config = ClipConfig(folder=low[0], rows=2, buckets=(60, 80))
    data = ClipData(config, seed=3)
    for _ in range(4):
        next(data)
    place = json.loads(json.dumps(data.state()))
    wanted = [next(data) for _ in range(5)]
    again = ClipData(config, seed=3)
    again.restore(place)
    for batch in wanted:
        np.testing.assert_array_equal(next(again).sound, batch.sound)
    with pytest.raises(DataError, match="have changed"):
        ClipData(config, seed=4).restore(place)


def test_pieces_are_parts_of_their_clips(high):
    whole = CropData(CropConfig(folder=high, rows=5, crop=40, shuffle=False, epochs=1), seed=0)
    clips = next(whole)
    np.testing.assert_array_equal(clips.frames, [20, 25, 30, 35, 40])
    assert (clips.f0 == -1).all()  # nobody has looked for it
    data = CropData(CropConfig(folder=high, rows=3, crop=15), seed=0)
    firsts = set()
    for _ in range(6):
        batch = next(data)
        for row, count in enumerate(batch.frames):
            if not count:
                continue
            piece = batch.sound[row, : 480 * count]
            found = [
                start
                for clip in clips.sound
                for start in range(0, len(clip) - len(piece) + 1, 480)
                if np.array_equal(clip[start : start + len(piece)], piece)
            ]
            assert found
            firsts.add(found[0])
    assert len(firsts) > 3  # they begin anywhere
    place = data.state()
    wanted = next(data).sound
    data.restore(place)
    np.testing.assert_array_equal(next(data).sound, wanted)


def test_pieces_in_order_cover_a_clip(high):
    config = CropConfig(folder=high, rows=2, crop=20, shuffle=False, epochs=1)
    counts = [int(batch.frames.sum()) for batch in CropData(config, seed=0)]
    assert sum(counts) == 20 * (1 + 1 + 1 + 1 + 2)


def test_pitch(source, tmp_path):
    pytest.importorskip("pyworld", reason="needs the [synthesis] extra (pyworld)")
    prepare_speech([source], tmp_path / "ready", rate=24_000, pitch=True)
    config = CropConfig(folder=tmp_path / "ready", rows=5, crop=40, shuffle=False)
    batch = next(CropData(config, seed=0))
    for row, count in enumerate(batch.frames):
        middle = batch.f0[row, 5 : count - 5]
        np.testing.assert_allclose(middle, 150 + 20 * row, rtol=0.02)


def test_mel_frames_that_a_flow_makes(source, golden, tmp_path):
    home = golden / "token2wav"
    lines = [json.loads(line) for line in source.read_text().splitlines() if line.startswith("{")]
    path = source.parent / "again.jsonl"
    soundfile.write(source.parent / "long.wav", tone(1.2, rate=24_000, frequency=200), 24_000)
    rows = [line | {"voice": "long.wav"} for line in lines[:3]] + lines[3:4]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = prepare_speech([path], tmp_path / "made", rate=24_000, model=home)
    assert about["mel"]
    assert (about["samples"], about["rejected"]) == (3, 1)
    assert '"voice" with a longer' in (tmp_path / "made" / "rejects.jsonl").read_text().replace(
        "\\", ""
    )
    config = CropConfig(folder=tmp_path / "made", rows=3, crop=60, shuffle=False)
    batch = next(CropData(config, seed=0))
    speech = SpeechFolder(home)
    speaker = speaker_vector(speech.analyzer, str(source.parent / "long.wav"))
    codes = speech.analyzer.codes([source.parent / row["audio"] for row in rows[:3]])
    talker = Token2Wav(speech.cfg, speech.params(SYNTHESIS))
    own = talker.mels(codes, [speaker] * 3, seed=1)
    for row, mel in enumerate(own):
        count = int(batch.frames[row])
        assert count in (len(mel), len(mel) - 1)
        np.testing.assert_allclose(batch.mel[row, :count], mel[:count], atol=2e-4)
        assert not batch.mel[row, count:].any()
    others = talker.mels(codes, [speaker] * 3, seed=2)
    assert max(np.abs(a - b).max() for a, b in zip(own, others, strict=True)) > 0.1
    with pytest.raises(DataError, match="kept for the vocoder"):
        prepare_speech([path], tmp_path / "low", model=home)


def test_pyworld_is_asked_for(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyworld", None)
    with pytest.raises(DataError, match=r"pip install 'sa2jax\[synthesis\]'"):
        prepare_speech([source], tmp_path / "ready", rate=24_000, pitch=True)


def test_what_cannot_be(source, low, high, tmp_path):
    mistakes = [
        ({"rate": 8000}, "rate 8000: expected 16000 or 24000 Hz"),
        ({"pitch": True}, "expected a rate of 24000 Hz"),
        ({"max_seconds": 0.1}, "none of 7 recordings can be used"),
    ]
    for options, said in mistakes:
        with pytest.raises(DataError, match=said):
            prepare_speech([source], tmp_path / "out", **options)
    with pytest.raises(DataError, match="holds sound at 24000 Hz: expected 16000"):
        ClipData(ClipConfig(folder=high), seed=0)
    with pytest.raises(DataError, match="expected a bucket that large"):
        ClipData(ClipConfig(folder=low[0], buckets=(50,)), seed=0)
    row = {"audio": str(source.parent / "0.wav"), "text": "far too many letters for so little"}
    (tmp_path / "crowded.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"34 letters in 0.4 s: expected at most 40 a second"):
        prepare_speech([tmp_path / "crowded.jsonl"], tmp_path / "out")
    with pytest.raises(DataError, match="crop 0"):
        CropConfig(folder=high, crop=0)

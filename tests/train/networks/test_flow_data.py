"""Recordings for the flow: heard as voices are, each once an epoch, in an order to go back to."""

import json
import shutil

import jax
import numpy as np
import pytest
import soundfile
from helpers.recorded_flow import RecordedFlow
from jax import jit

from sa2jax import audio
from sa2jax.errors import DataError, Sa2jaxError
from sa2jax.speech.store import SpeechFolder
from sa2jax.train.networks import flow_data
from sa2jax.train.networks.batches import FlowBatch
from sa2jax.train.networks.flow import flow_loss
from sa2jax.train.networks.flow_data import FlowData, FlowDataConfig, prepare_flow


def tone(path, seconds: float, pitch: float = 220.0):
    """A hum whose loudness goes up and down."""
    time = np.arange(int(seconds * 24000)) / 24000
    sound = np.sin(2 * np.pi * pitch * time * (1 + time / 9)) * (0.3 + 0.2 * np.sin(7 * time))
    soundfile.write(path, sound, 24000)
    return path


@pytest.fixture(scope="module")
def speech(golden):
    return golden / "token2wav"


@pytest.fixture(scope="module")
def prepared(speech, tmp_path_factory):
    """A folder of three hums, and one line of a file about one of them and another's voice."""
    root = tmp_path_factory.mktemp("flow")
    (root / "hums").mkdir()
    for number, seconds in enumerate((1.3, 2.0, 2.9)):
        tone(root / "hums" / f"{number}.wav", seconds, 150 + 60 * number)
    tone(root / "hums" / "short.wav", 0.5)
    soundfile.write(root / "hums" / "still.wav", np.zeros(48000), 24000)
    lines = [{"audio": "hums/0.wav", "voice": "hums/2.wav"}, {"text": "?"}, {"audio": "none.wav"}]
    lines.append({"audio": "hums/short.wav", "voice": "hums/2.wav"})
    path = root / "more.jsonl"
    path.write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    about = prepare_flow([root / "hums", path], root / "ready", speech)
    return root, about


def config(prepared, **options) -> FlowDataConfig:
    return FlowDataConfig(
        **{"folder": prepared[0] / "ready", "rows": 2, "buckets": (50, 75)} | options
    )


def all_of(data: FlowData) -> list[FlowBatch]:
    return list(data)


def test_recordings_are_heard_as_voices_are(prepared, speech):
    root, about = prepared
    rejects = [json.loads(line) for line in (root / "ready" / "rejects.jsonl").open()]
    assert [(r["where"], r["reason"].split(",")[0]) for r in rejects] == [
        ("short.wav", "0.50 s do not tell who speaks: expected at least 1 s"),
        ("still.wav", "expected at least 0.2 s of sound"),
        ("more.jsonl:3", 'expected {"audio": "a.wav"}'),
        ("more.jsonl:5", rejects[3]["reason"].split(",")[0]),
    ]
    assert "none.wav" in rejects[3]["reason"]
    assert (about["samples"], about["rejected"]) == (5, 4)
    heard, analyzer = SpeechFolder(speech), SpeechFolder(speech).analyzer
    assert about["speech_tokenizer"] == heard.analysis_hash
    data = FlowData(config(prepared, shuffle=False, epochs=1, rows=1), seed=0)
    first, second, third, mixed, word = all_of(data)
    for number, batch in enumerate((first, second, third)):
        path = root / "hums" / f"{number}.wav"
        length, codes = int(batch.lengths[0]), analyzer.codes([path])[0]
        assert length in (len(codes), len(codes) - 1)
        np.testing.assert_array_equal(batch.codes[0, :length], codes[:length])
        mel = audio.mel_24k(audio.load_audio(path, 24000, channel="mean")).T
        np.testing.assert_array_equal(batch.mels[0, : 2 * length], mel[: 2 * length])
        assert not batch.mels[0, 2 * length :].any()
        low = audio.load_audio(path, 16000)
        np.testing.assert_allclose(batch.speaker[0], analyzer.speaker_of(low), atol=1e-5)
    np.testing.assert_array_equal(mixed.codes, first.codes)
    np.testing.assert_array_equal(mixed.speaker, third.speaker)
    np.testing.assert_array_equal(word.speaker, third.speaker)
    count = len(analyzer.codes([root / "hums" / "short.wav"])[0])
    assert int(word.lengths[0]) in (count, count - 1)
    assert data.audio_seconds == pytest.approx(about["seconds"])


def test_an_epoch_has_every_piece_once(prepared):
    data = FlowData(config(prepared, epochs=2), seed=0)
    batches = all_of(data)
    assert {batch.codes.shape for batch in batches} == {(2, 50), (2, 75)}
    assert sum(int((batch.lengths > 0).sum()) for batch in batches) == 2 * len(data._lengths)
    lengths = sorted(int(n) for batch in batches for n in batch.lengths if n)
    assert lengths == sorted([*data._lengths, *data._lengths])
    assert not data.empty_batch().lengths.any()


def test_an_epoch_has_some_buckets_more_often(prepared):
    data = FlowData(config(prepared, buckets=(20, 50, 75), oversample=(3, 1, 2), epochs=1), seed=0)
    lengths = [int(n) for batch in all_of(data) for n in batch.lengths if n]
    times = {int(n): (3 if n <= 20 else 1 if n <= 50 else 2) for n in data._lengths}
    assert set(times.values()) == {1, 2, 3}
    assert sorted(lengths) == sorted(int(n) for n in data._lengths for _ in range(times[int(n)]))
    once = FlowData(config(prepared, buckets=(20, 50, 75), epochs=1), seed=0)
    assert once.fingerprint != data.fingerprint


def test_the_order_is_the_seeds_and_can_be_gone_back_to(prepared):
    def same(a, b):
        return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))

    one, other = (FlowData(config(prepared, rows=1), seed=seed) for seed in (0, 1))
    first = [next(one) for _ in range(12)]
    assert not all(map(same, first, (next(other) for _ in range(12))))
    again = FlowData(config(prepared, rows=1), seed=0)
    for _ in range(5):
        next(again)
    state = json.loads(json.dumps(again.state()))
    resumed = FlowData(config(prepared, rows=1), seed=0)
    resumed.restore(state)
    assert all(map(same, first[5:], (next(resumed) for _ in range(7))))
    with pytest.raises(DataError, match="have changed"):
        other.restore(state)


def test_hosts_share_each_batch(prepared):
    whole = all_of(FlowData(config(prepared, epochs=1), seed=3))
    parts = [
        all_of(FlowData(config(prepared, epochs=1), seed=3, host=host, hosts=2)) for host in (0, 1)
    ]
    for batch, *halves in zip(whole, *parts, strict=True):
        joined = jax.tree.map(lambda *rows: np.concatenate(rows), *halves)
        jax.tree.map(np.testing.assert_array_equal, joined, batch)


def test_a_long_recording_is_cut(speech, tmp_path, monkeypatch):
    monkeypatch.setattr(flow_data, "MAX_SECONDS", 2.0)
    (tmp_path / "in").mkdir()
    tone(tmp_path / "in" / "a.wav", 5.5)
    about = prepare_flow([tmp_path / "in"], tmp_path / "out", speech)
    data = FlowData(
        FlowDataConfig(folder=tmp_path / "out", rows=1, shuffle=False, epochs=1), seed=0
    )
    assert [int(batch.lengths[0]) for batch in data] == [50, 50, about["seconds"] * 25 - 100]


def damage_lengths(folder):
    np.save(folder / "lengths.npy", np.zeros(1, np.int32))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "dataset.json").unlink(),
            "no folder of rec.*prepare-flow",
        ),
        (lambda folder: (folder / "dataset.json").write_text('{"format": 1}'), "expected 'flow 1'"),
        (lambda folder: (folder / "samples.array_record").write_bytes(b"x"), "is cut off"),
        (damage_lengths, "do not add up"),
    ],
)
def test_damaged_folders(prepared, tmp_path, damage, message):
    folder = shutil.copytree(prepared[0] / "ready", tmp_path / "copy")
    damage(folder)
    with pytest.raises(DataError, match=message):
        FlowData(FlowDataConfig(folder=folder), seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows and epochs of at least 1"),
        ({"buckets": (75, 50)}, "buckets in rising order"),
        ({"buckets": (50,)}, "expected a bucket that large"),
        ({"oversample": (2,)}, "for each of the 2 buckets"),
        ({"oversample": (2, 0)}, "a number of at least 1"),
    ],
)
def test_configs_that_do_not_fit(prepared, options, message):
    with pytest.raises(DataError, match=message):
        FlowData(config(prepared, **options), seed=0)


def test_another_models_codes_are_refused(prepared):
    with pytest.raises(DataError, match="heard by another checkpoint"):
        FlowData(config(prepared), seed=0, analysis="other")
    with pytest.raises(DataError, match="host 2 of 2"):
        FlowData(config(prepared), seed=0, host=2, hosts=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "no recordings in"),
        (lambda path: path.write_text(""), "lists no recordings"),
        (lambda path: None, "or a .jsonl file"),
        (lambda path: path.write_text('{"audio": 3}'), "none of 1 recordings can be used"),
    ],
)
def test_sources_without_recordings(speech, tmp_path, make, message):
    make(tmp_path / "source")
    with pytest.raises(DataError, match=message):
        prepare_flow([tmp_path / "source"], tmp_path / "out", speech)
    assert not (tmp_path / "out").exists()


def test_only_a_prepared_folder_is_replaced(prepared, speech, tmp_path):
    hums, model = prepared[0] / "hums", tmp_path / "model"
    model.mkdir()
    (model / "sa2jax.json").write_text("{}")
    with pytest.raises(DataError, match="is no prepared folder"):
        prepare_flow([hums], model, speech, overwrite=True)
    out = shutil.copytree(prepared[0] / "ready", tmp_path / "out")
    with pytest.raises(Sa2jaxError, match="choose another folder"):
        prepare_flow([hums], out, speech)
    assert prepare_flow([hums], out, speech, overwrite=True)["samples"] == 3


def test_a_prepared_batch_can_be_learnt(prepared, golden):
    recorded = RecordedFlow(golden)
    batch = next(FlowData(config(prepared), seed=0))
    run = jit(lambda params, key: flow_loss(recorded.model, params, batch, key))
    loss, report = run(recorded.params, jax.random.key(0))
    assert np.isfinite(float(loss))
    assert float(report["frames"]) == 2 * batch.lengths.sum()

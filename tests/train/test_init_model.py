"""Models of random numbers, and models of parts: whole folders that hear, answer and speak."""

import json
import random

import jax
import numpy as np
import pytest
import soundfile
from helpers.sound import tone

from sa2jax import StepAudio2, checkpoint
from sa2jax.convert.assemble import assemble
from sa2jax.errors import CheckpointError, ConfigError, DataError, TokenizerError
from sa2jax.speech.store import SpeechFolder
from sa2jax.speech_config import Token2WavConfig
from sa2jax.train.init_model import init_model
from sa2jax.train.networks.model_io import open_audio_encoder, open_detokenizer_network

LETTERS = "abcdefghilmnoprstu"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Enough different words for the merges of nano."""
    draw = random.Random(0)
    words = ["".join(draw.choices(LETTERS, k=draw.randint(3, 7))) for _ in range(300)]
    path = tmp_path_factory.mktemp("texts") / "talks.jsonl"
    with path.open("w") as file:
        for _ in range(400):
            content = " ".join(draw.choices(words, k=6))
            file.write(json.dumps({"messages": [{"role": "user", "content": content}]}) + "\n")
    return path


@pytest.fixture(scope="module")
def begun(texts, tmp_path_factory):
    return init_model("nano", tmp_path_factory.mktemp("begun") / "model", texts=[texts])


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    path = tmp_path_factory.mktemp("recording") / "anna.wav"
    soundfile.write(path, tone(1.5, rate=24_000, frequency=180), 24_000)
    return path


@pytest.fixture(scope="module")
def joined(begun, recording, tmp_path_factory):
    out = tmp_path_factory.mktemp("joined") / "model"
    voices = {"sue": recording, "anna": recording}
    notes = assemble(begun, begun, out, dtype="bfloat16", single=True, voices=voices)
    assert notes == []
    return out


def leaves(folder):
    return {name: leaf.read().result() for name, leaf in checkpoint.open_leaves(folder).items()}


@pytest.mark.slow
def test_a_fresh_model_is_whole(begun, recording):
    model = StepAudio2.from_pretrained(begun)
    special = model.tokenizer.special
    assert special.num_codes == 243
    assert model.tokenizer.size <= model.cfg.decoder.vocab == 1024
    assert isinstance(model.caption(str(recording), max_new_tokens=4), str)
    codes = model.speech.tokenize(recording)
    assert len(codes) == 38
    assert max(codes) < 243


@pytest.mark.slow
def test_what_has_to_begin_as_nothing_does(begun):
    flow = leaves(begun / "token2wav")
    for name in ("estimator.blocks.modulation.kernel", "estimator.out.kernel"):
        assert not flow[f"flow.{name}"].any()
    table = leaves(begun)["audio_encoder.positions"]
    np.testing.assert_allclose(table[0], [0] * 72 + [1] * 72, atol=1e-6)


def test_texts_that_are_not_enough(tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "one two"}]}\n')
    with pytest.raises(TokenizerError, match="ask for less"):
        init_model("nano", tmp_path / "out", texts=[path])
    path.write_text("no json\n")
    with pytest.raises(DataError, match=r"few\.jsonl:1: expected a record with messages"):
        init_model("nano", tmp_path / "out", texts=[path])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="no model preset 'micro'"):
        init_model("micro", tmp_path / "out", texts=[path])
    with pytest.raises(ConfigError, match="no detokenizer preset 'micro': expected one of nano"):
        Token2WavConfig.preset("micro")


@pytest.mark.slow
def test_parts_in_one_file_each(begun, joined):
    assert sorted(path.name for path in joined.glob("*.safetensors")) == ["params.safetensors"]
    assert not (joined / "params").exists()
    for folder in ("", "token2wav"):
        before, after = leaves(begun / folder), leaves(joined / folder)
        assert before.keys() == after.keys()
        for name, array in before.items():
            assert after[name].dtype == "bfloat16"
            np.testing.assert_array_equal(array.astype("bfloat16"), after[name])


@pytest.mark.slow
def test_what_was_joined_speaks(joined):
    model = StepAudio2.from_pretrained(joined)
    assert list(model.speech.folder.voices) == ["anna", "sue"]
    assert model.speech.voice().name == "sue"  # the first one given
    wave = model.speech.vocode([1, 2, 3] * 9, voice="anna")
    assert wave.shape == (27 * 960,)
    assert np.isfinite(wave).all()


@pytest.mark.slow
def test_a_joined_model_is_trained_on(joined, tmp_path):
    """One network of a folder of single files, the others as they were."""
    network = open_detokenizer_network("flow", joined)
    params = jax.tree.map(lambda leaf: leaf + 1, jax.device_get(network.load_params(None)))
    assert network.save(params, tmp_path / "flow") == []
    before, after = leaves(joined / "token2wav"), leaves(tmp_path / "flow")
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("flow.") for name in moved)
    made = SpeechFolder(tmp_path / "flow")
    assert list(made.voices) == ["anna", "sue"]
    assert made.voice().name == "sue"


@pytest.mark.slow
def test_a_network_that_hears_leaves_voices_behind(joined, tmp_path):
    network = open_detokenizer_network("speech_tokenizer", joined)
    params = jax.tree.map(lambda leaf: leaf * 2, jax.device_get(network.load_params(None)))
    notes = network.save(params, tmp_path / "ears")
    for name, note in zip(("anna", "sue"), notes, strict=True):
        assert f"voice {name} was analysed by other weights" in note
    made = SpeechFolder(tmp_path / "ears")
    assert made.voices == {}
    assert made.analysis_hash != SpeechFolder(joined).analysis_hash


@pytest.mark.slow
def test_an_encoder_in_its_model(begun, tmp_path):
    encoder = open_audio_encoder(begun)
    params = jax.tree.map(lambda leaf: leaf / 2, jax.device_get(encoder.load_params(None)))
    assert encoder.save(params, tmp_path / "model") == []
    before, after = leaves(begun), leaves(tmp_path / "model")
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("audio_encoder.") for name in moved)
    assert StepAudio2.from_pretrained(tmp_path / "model").tokenizer.special.num_codes == 243


@pytest.mark.slow
def test_what_cannot_be_joined(begun, golden, tmp_path):
    mistakes = [
        (begun / "token2wav", begun, "is no model folder of this library"),
        (begun, golden / "token2wav", "is not converted: convert it first"),
        (begun, tmp_path, "has no detokenizer"),
    ]
    for model, speech, said in mistakes:
        with pytest.raises(CheckpointError, match=said):
            assemble(model, speech, tmp_path / "out")
    broken = tmp_path / "broken"
    assemble(begun, begun, broken, single=True)
    (broken / "params.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"params\.safetensors"):
        StepAudio2.from_pretrained(broken)

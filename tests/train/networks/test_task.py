"""What a flow's run leaves beside the flow: everything, from wherever it lay."""

import shutil

import jax
import numpy as np
import pytest

from sa2jax import checkpoint, testing
from sa2jax.errors import CheckpointError, TrainError
from sa2jax.speech.store import SpeechFolder
from sa2jax.speech.voices import Voice
from sa2jax.train.networks.flow import FlowRecipe
from sa2jax.train.networks.flow_data import FlowDataConfig
from sa2jax.train.networks.model_io import open_detokenizer_network
from sa2jax.train.networks.recipes import NetworkSpec
from sa2jax.train.networks.task import TRAINERS, make_network_task
from sa2jax.train.recipe import build_config


@pytest.fixture
def model(converted_detokenizer, tmp_path):
    """A model folder with a detokenizer in it, a voice, its recording, and a hidden file."""
    folder = testing.save_tiny_checkpoint(tmp_path / "model")
    shutil.copytree(converted_detokenizer, folder / "token2wav")
    (folder / "token2wav" / ".half").write_text("?")
    (folder / "assets").mkdir()
    (folder / "assets" / "anna.wav").write_bytes(b"not heard again")
    voice("anna", folder).save(folder / "voices" / "anna.safetensors")
    return folder


def voice(name, folder):
    arrays = np.zeros(25, np.int32), np.ones(192, np.float32), np.zeros((50, 80), np.float32)
    return Voice(name, *arrays, "none", SpeechFolder(folder).analysis_hash)


def halved(flow):
    return jax.tree.map(lambda leaf: leaf / 2, jax.device_get(flow.load_params(None)))


def leaves(folder):
    return checkpoint.flatten(jax.device_get(checkpoint.load_params(folder)))


def test_a_models_voices_and_recordings_come_along(model, tmp_path):
    """Voices that somebody adds to the result stay when it is made again."""
    flow, out = open_detokenizer_network("flow", model), tmp_path / "run" / "model"
    out.parent.mkdir()
    assert flow.save(halved(flow), out) == []
    made = SpeechFolder(out)
    assert set(made.voices) == {"anna"}
    assert {path.name for path in out.iterdir()} == {
        *(path.name for path in (model / "token2wav").iterdir() if path.name != ".half"),
        "assets",
        "voices",
    }
    assert made.voice("anna").hash == SpeechFolder(model).voice("anna").hash
    voice("bert", model).save(out / "voices" / "bert.safetensors")
    flow.save(halved(flow), out)
    assert set(SpeechFolder(out).voices) == {"anna", "bert"}
    old, new = leaves(model / "token2wav"), leaves(out)
    for name, leaf in old.items():
        by = 2 if name.startswith("flow.") else 1
        np.testing.assert_array_equal(leaf / by, new[name], err_msg=name)


def test_numbers_keep_their_dtype_on_disk(converted_detokenizer, tmp_path):
    folder = shutil.copytree(converted_detokenizer, tmp_path / "narrow")
    narrow = {
        name: leaf.astype(np.float16) if name.startswith("flow.") else leaf
        for name, leaf in leaves(folder).items()
    }
    checkpoint.save_params(folder / checkpoint.PARAMS, checkpoint.unflatten(narrow), overwrite=True)
    flow = open_detokenizer_network("flow", folder)
    params = flow.load_params(None)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    flow.save(params, tmp_path / "out")
    new = leaves(tmp_path / "out")
    for name, leaf in narrow.items():
        np.testing.assert_array_equal(leaf, new[name], err_msg=name)
        assert leaf.dtype == new[name].dtype


def test_a_fingerprint_is_that_of_the_numbers(converted_detokenizer, model, tmp_path):
    flow, same = (
        open_detokenizer_network("flow", folder) for folder in (converted_detokenizer, model)
    )
    assert flow.fingerprint() == same.fingerprint()
    flow.save(halved(flow), tmp_path / "other")
    assert open_detokenizer_network("flow", tmp_path / "other").fingerprint() != flow.fingerprint()
    leaf = tmp_path / "other" / "params" / "flow.table"
    next(path for path in leaf.iterdir() if path.name[0] != ".").unlink()
    with pytest.raises(CheckpointError, match="is damaged"):
        open_detokenizer_network("flow", tmp_path / "other").fingerprint()


def test_several_processes_are_refused(converted_detokenizer, tmp_path, monkeypatch):
    spec = NetworkSpec(folder=str(converted_detokenizer))
    recipe = FlowRecipe(network=spec, data=FlowDataConfig(folder="none"))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(TrainError, match="2 processes: a single network is trained by one"):
        make_network_task(recipe)


@pytest.mark.parametrize(
    ("kind", "data", "unit"),
    [
        ("flow", {"buckets": [20, 50]}, "codes"),
        ("vocoder", {"crop": 50}, "frames"),
        ("speech_tokenizer", {"buckets": [20, 50]}, "frames"),
        ("speaker_encoder", {"buckets": [20, 50]}, "frames"),
    ],
)
def test_a_trainer_knows_its_network_and_the_longest_rows(converted_detokenizer, kind, data, unit):
    trainer, folder = TRAINERS[kind], str(converted_detokenizer)
    values = {"network": {"folder": folder}, "data": {"folder": "none", **data}}
    recipe = build_config(trainer.recipe, values, "small")
    network = trainer.open(folder, "float32")
    assert (network.name, trainer.unit, trainer.longest_row(recipe)) == (kind, unit, 50)
    leaves = jax.tree.leaves(trainer.abstract_batch(network, recipe, None, 3))
    assert {leaf.shape[0] for leaf in leaves} == {3}

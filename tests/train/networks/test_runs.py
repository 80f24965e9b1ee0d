"""A run of each kind of network: what it reports, what it leaves, and how it goes on.

The flow's are in `cli/test_flow_training.py`, with data of their own.
"""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.small_speech import save_networks, save_tones
from helpers.small_training import save_model

from sa2jax import checkpoint
from sa2jax.convert import hf
from sa2jax.train.log import read_metrics
from sa2jax.train.networks.recipes import NetworkRecipe
from sa2jax.train.networks.speech_data import prepare_speech
from sa2jax.train.networks.task import TRAINERS, train_network
from sa2jax.train.recipe import build_config

ALWAYS = {"step", "loss", "grad_norm", "learning_rate"}
TIMES = {"step_seconds", "tokens_per_second", "audio_hours_per_second", "data_wait_fraction"}
SPELT = {"letters", "skipped"}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What is expected of a run.

    Attributes:
        part: the network's name among the parameters of its folder.
        stays: what of it nothing is known about: without pyworld, the pitch.
        learning: what training reports besides `ALWAYS`.
        shown: what is measured on held-out clips.
        rate: of the recordings, in Hz.
        data: how batches are made of them.
        loss: of its loss, what is not as usual.
    """

    part: str
    stays: str = "nothing"
    learning: set[str]
    shown: set[str]
    rate: int = 16_000
    data: dict[str, Any]
    loss: dict[str, Any]


CLIPS = {"rows": 2, "buckets": [60]}
MILD = {"augmentation": {"time_masks": 0, "freq_masks": 0}}
KINDS = {
    "vocoder": Kind(
        part="vocoder.",
        stays="vocoder.f0_predictor.",
        learning={"convergence", "magnitude", "mel", "pitch", "voicing", "frames"},
        shown={"loss"},
        rate=24_000,
        data={"rows": 2, "crop": 12},
        loss={"resolutions": [[256, 64]]},
    ),
    "speech_tokenizer": Kind(
        part="speech_tokenizer.",
        learning={
            "ctc",
            "intermediate_ctc",
            "mel_error",
            "codebook_balance",
            "saturation",
            "codebook_usage",
        }
        | SPELT,
        shown={"loss", "ctc", "mel_error", "codebook_balance", "wer", "codes", "perplexity"},
        data=CLIPS,
        loss=MILD,
    ),
    "speaker_encoder": Kind(
        part="speaker_encoder.",
        learning={"rows", "accuracy", "same_speaker", "other_speaker"},
        shown={"loss", "accuracy", "same_speaker", "other_speaker"},
        data=CLIPS,
        loss=MILD | {"max_seconds": 0.3},
    ),
    "audio_encoder": Kind(
        part="audio_encoder.",
        learning=SPELT,
        shown={"loss", "wer"},
        data=CLIPS,
        loss=MILD,
    ),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("networks")


@pytest.fixture(scope="module")
def model(home) -> Path:
    """A model that hears and speaks, in the form of this library."""
    hf.convert(save_model(home / "released"), home / "model")
    save_networks(home / "model" / "token2wav")
    return home / "model"


@pytest.fixture(scope="module")
def clips(home) -> None:
    """Three clips to learn from and three to be asked about, at both rates."""
    sources = {
        "ready": save_tones(home / "clips"),
        "held": save_tones(home / "others", ("bab", "ca", "acb")),
    }
    for name, source in sources.items():
        for rate in (16_000, 24_000):
            prepare_speech([source], home / f"{name}{rate}", rate=rate)


def recipe(kind: str, home: Path, model: Path) -> NetworkRecipe:
    expected = KINDS[kind]
    values = {
        "network": {"folder": str(model)},
        "data": {"folder": str(home / f"ready{expected.rate}"), **expected.data},
        "loss": expected.loss,
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0, "steps": 2, "weight_decay": 0.0},
        "evaluate": {"folder": str(home / f"held{expected.rate}"), "batches": 2},
        "intervals": {"log_every": 1},
    }
    return build_config(TRAINERS[kind].recipe, values, "small")


def leaves(params) -> dict[str, np.ndarray]:
    return checkpoint.flatten(jax.device_get(params))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_a_run(kind, home, model, clips):
    expected, trainer, plan = KINDS[kind], TRAINERS[kind], recipe(kind, home, model)

    # --- what it reports
    whole = train_network(plan, home / kind, quiet=True)
    lines = read_metrics(home / kind / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 2]
    for line in lines[:2]:
        assert line.keys() - TIMES == ALWAYS | expected.learning
    assert lines[2].keys() == {"step", *(f"evaluate/{name}" for name in expected.shown)}
    assert np.isfinite([value for line in lines for value in line.values()]).all()
    found = {name: lines[2][f"evaluate/{name}"] for name in expected.shown}
    if kind == "speech_tokenizer":  # of 96 frames of 10 ms
        assert 1 <= found["perplexity"] <= found["codes"] <= 24

    # --- what it leaves
    source, made = trainer.open(str(model), "float32"), whole.results["model"]
    old, new = (leaves(checkpoint.load_params(folder)) for folder in (source.folder, made))
    assert old.keys() == new.keys()
    for name, leaf in old.items():
        assert (leaf.shape, leaf.dtype) == (new[name].shape, new[name].dtype)
        learnt = name.startswith(expected.part) and not name.startswith(expected.stays)
        assert np.array_equal(leaf, new[name]) != learnt, name
    again = leaves(trainer.open(str(made), "float32").load_params(None))
    for name, leaf in again.items():
        np.testing.assert_array_equal(leaf, new[expected.part + name], err_msg=name)

    # --- how it goes on
    out = home / f"{kind}-interrupted"

    def interrupt(step):
        return os.kill(os.getpid(), signal.SIGINT)

    first = train_network(plan, out, quiet=True, on_step=interrupt)
    assert (first.step, first.finished, first.results) == (1, False, {})
    second = train_network(plan, out, quiet=True)
    assert (second.step, second.finished) == (2, True)
    other = leaves(checkpoint.load_params(second.results["model"]))
    for name, leaf in new.items():
        np.testing.assert_array_equal(leaf, other[name], err_msg=name)

    def timeless(line):
        return {name: line[name] for name in line.keys() - TIMES}

    both = (read_metrics(home / name / "metrics.jsonl") for name in (kind, out.name))
    one, two = ([timeless(line) for line in lines] for lines in both)
    assert one == two

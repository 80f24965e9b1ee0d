"""The first recipe: it learns the shipped exchanges by heart, and its model answers them."""

from pathlib import Path

import pytest

from sa2jax import StepAudio2
from sa2jax.inference.requests import GenerationConfig
from sa2jax.train.language.recipe import read_language_recipe
from sa2jax.train.language.task import train_language_model
from sa2jax.train.log import read_metrics

HOME = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.optimized
def test_smoke(tmp_path, monkeypatch):
    monkeypatch.chdir(HOME)
    outcome = train_language_model(read_language_recipe("smoke"), tmp_path / "smoke", quiet=True)
    assert outcome.metrics["loss"] < 0.05
    lines = read_metrics(tmp_path / "smoke" / "metrics.jsonl")
    waits = [line["data_wait_fraction"] for line in lines if "data_wait_fraction" in line]
    assert sum(waits) / len(waits) < 0.05
    assert not (tmp_path / "smoke" / "rejects.jsonl").exists()
    model = StepAudio2.from_pretrained(outcome.results["model"])
    heard = ["examples/audio/01_harbour.flac", "examples/audio/02_bread.flac"]
    assert model.transcribe_batch(heard) == [
        "The boats come back at noon.",
        "She baked two loaves of bread.",
    ]
    chat = model.chat(options=GenerationConfig(max_new_tokens=64))
    assert chat.say("Name a fruit.").text == "An apple."
    chat = model.chat(options=GenerationConfig(max_new_tokens=64))
    assert chat.say(Path("examples/audio/06_capital.flac")).text == "Paris."

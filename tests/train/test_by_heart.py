"""Twelve spoken pairs learnt by heart: whole, by low rank, and by low rank beside int8 matrices."""

import json
import time

import pytest
from helpers.small_training import save_pairs

from sa2jax import StepAudio2
from sa2jax.audio.recording import Recording
from sa2jax.chat.interleave import deinterleave
from sa2jax.chat.template import Audio, human_turn, render, reply_turn
from sa2jax.inference.requests import GenerationConfig
from sa2jax.train.language.recipe import LanguageRecipe
from sa2jax.train.language.task import train_language_model
from sa2jax.train.recipe import build_config

pytestmark = [pytest.mark.slow, pytest.mark.optimized]
LIMIT = 150  # seconds of processor time for all three


def plan(model, pairs, steps, **more):
    values = {
        "model": model,
        "data": {
            "sources": {str(pairs): 1},
            "length": 512,
            "rows": 1,
            "mel_frames": 800,
            "clips": 10,
        },
        "optimizer": {
            "learning_rate": 3e-3,
            "final_fraction": 0.1,
            "warmup_steps": 10,
            "steps": steps,
            "weight_decay": 0,
        },
        "remat": None,
        "intervals": {"log_every": 10, "save_every": 1000},
    }
    return build_config(LanguageRecipe, values | more, "by heart")


def test_by_heart(tmp_path):
    started = time.process_time()
    first, second = save_pairs(tmp_path / "a"), save_pairs(tmp_path / "b", seed=1)
    preset = {"preset": "smoke", "tokenizer": "bytes"}
    whole = train_language_model(plan(preset, first, 60), tmp_path / "whole", quiet=True)
    assert whole.metrics["loss"] < 0.05
    assert whole.metrics["audio/loss"] < 0.05

    # Other pairs, by low rank, on what has learnt the first ones.
    folder = {"folder": str(whole.results["model"])}
    lora = {"rank": 16, "alpha": 32, "learning_rate": 3e-3}
    adapted = train_language_model(
        plan(folder, second, 65, lora=lora), tmp_path / "lora", quiet=True
    )
    assert adapted.metrics["loss"] < 0.05
    int8 = folder | {"dtype": "int8", "compute_dtype": "float32"}
    beside = train_language_model(plan(int8, second, 65, lora=lora), tmp_path / "qlora", quiet=True)
    assert beside.metrics["loss"] < 0.05
    assert set(beside.results) == {"adapter", "curves"}
    assert time.process_time() - started < LIMIT

    # A recording of the second set is answered in speech as it was taught, by who was taught it.
    record = json.loads(second.read_text().splitlines()[7])
    said = record["messages"][1]
    for outcome, right in ((adapted, True), (whole, False)):
        model = StepAudio2.from_pretrained(outcome.results["model"])
        heard = Recording.from_source(second.parent / record["audios"][0])
        turns = [human_turn([Audio(heard)]), reply_turn(spoken=True)]
        request = model.request(render(turns))
        ((found,),) = model.generate([request], GenerationConfig(max_new_tokens=160))
        reply = deinterleave(found.ids, model.tokenizer.special)
        assert (reply.codes == said["speech"]) is right
        assert (model.tokenizer.decode(reply.text_ids) == said["content"]) is right

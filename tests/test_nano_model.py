"""The model that comes with the library: what it hears and says has a meaning.

A few held-out recordings of its corpus (tests/golden/nano) are asked; `sa2jax eval nano` asks all.
"""

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from sa2jax import StepAudio2
from sa2jax.assets import model_folder
from sa2jax.evaluate.base import EvalOptions
from sa2jax.evaluate.heldout import HeldOut
from sa2jax.evaluate.runner import run_suite
from sa2jax.evaluate.suites import find_suite
from sa2jax.inference.requests import GenerationConfig
from sa2jax.inference.sampling import SamplingParams

MOST_BYTES = 16_000_000
GREEDY = GenerationConfig(sampling=SamplingParams(temperature=0), max_new_tokens=256)
# The floors of the table; where a judge hears 19 replies, one reply less than were right when the
# model was shipped (94 and 84): on another CPU a sound may be rounded to another word. Streams then
# lost one reply of 19, and may lose no more.
BOUNDS = {
    "seen": 8,
    "unseen": 25,
    "sums": 89,
    "sums_open": 78,
    "tool_asked": 95,
    "tool_unasked": 95,
    "streamed": -6,
}


@pytest.fixture(scope="module")
def held_out(golden) -> HeldOut:
    return HeldOut.find(golden / "nano")


@pytest.fixture(scope="module")
def nano() -> StepAudio2:
    return StepAudio2.from_pretrained("nano")


@pytest.fixture(scope="module")
def scores(nano, held_out) -> dict:
    options = EvalOptions(metrics=tuple(BOUNDS), greedy=True)
    table = run_suite(find_suite("nano"), nano, held_out.folder, options)
    return {metric.key: metric for metric in table.metrics}


def test_it_is_small_and_complete():
    folder = model_folder("nano")
    assert folder == Path(str(files("sa2jax.assets"))) / "nano"
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    assert 8_000_000 < sum(sizes) <= MOST_BYTES
    assert (folder / "README.md").is_file()


def test_a_folder_of_its_name_is_never_passed_over(run, refused, held_out, tmp_path, monkeypatch):
    (sample, *_) = held_out.samples("asr_seen")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano" / "model").mkdir(parents=True)
    said = refused("asr", sample.audio, "--model", "nano")
    assert f"{tmp_path / 'nano'} holds no checkpoint, and comes before" in said
    assert run("asr", sample.audio)[0] == 0  # none was named: it is the one that comes along
    (tmp_path / "nano" / "sa2jax.json").write_text("{}")
    assert model_folder("nano") == Path("nano")


@pytest.mark.parametrize("key", BOUNDS)
@pytest.mark.slow
def test_rows_of_the_table(scores, key):
    metric, bound = scores[key], BOUNDS[key]
    assert metric.value <= bound if metric.lower_is_better else metric.value >= bound


@pytest.mark.slow
def test_int8_matrices_hear_as_well(nano, held_out):
    """Of thirty recordings, not more than one is written down in other words than by floats."""
    paths = [str(sample.audio) for sample in held_out.samples("asr_seen")]
    small = StepAudio2.from_pretrained("nano", dtype="int8")
    texts, others = nano.transcribe_batch(paths), small.transcribe_batch(paths)
    assert sum(a != b for a, b in zip(texts, others, strict=True)) <= 1


@pytest.mark.slow
def test_the_clock_is_asked_and_read(nano, held_out):
    """What is said aloud at half past three on a Monday."""
    said = []
    for sample in [sample for sample in held_out.samples("tools") if sample.tool][:6]:
        chat = nano.chat(
            tools=["get_date_time"],
            options=GREEDY,
            functions={"get_date_time": lambda: "2024-05-06 15:30:00 Monday UTC+00:00"},
        )
        reply = chat.say(sample.audio, speak=True)
        assert len(reply.audio) > 0
        said.append(reply.text)
    right = ["three thirty" in text or "monday" in text for text in said]
    assert sum(right) >= 5
    assert any("three thirty" in text for text in said)


@pytest.mark.slow
def test_voices_differ_and_words_do_not(nano):
    assert list(nano.speech.folder.voices) == ["anna", "rob", "sue"]
    assert nano.speech.voice().name == "anna"
    anna, rob = (nano.tts("seven", voice=name, seed=0) for name in ("anna", "rob"))
    assert anna.codes == rob.codes
    assert not np.allclose(anna.audio, rob.audio, atol=0.01)
    assert 0.3 < len(anna.audio) / 24_000 < 3


def test_a_command_that_names_no_model(run, held_out):
    (sample, *_) = held_out.samples("asr_seen")
    code, out, err = run("asr", sample.audio)
    assert code == 0
    assert len(out.split()) >= 2
    assert "this is nano, a demonstration model" in err

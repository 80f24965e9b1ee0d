"""`sa2jax eval nano` as a user runs it."""

import json
import sys

import pytest
from helpers.scripted import Script, Speech, groups

from sa2jax import testing
from sa2jax.chat import tokenizer_files
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.cli.evaluate import evaluate
from sa2jax.evaluate import nano
from sa2jax.pipeline import StepAudio2


@pytest.fixture(autouse=True)
def judges(monkeypatch):
    """Its judges hear nothing."""
    silent = nano.Judges(grammar=lambda w, r: "", open=lambda w, r: "")
    monkeypatch.setattr(nano.Judges, "load", lambda metrics: silent)


@pytest.fixture
def loads(monkeypatch):
    """What was loaded; the models themselves are scripted."""
    asked = []

    class Always(Script):
        def submit(self, *args, **more):
            self.will_say(groups("five", [1, 2, 3]))
            return super().submit(*args, **more)

    Always().stand_in(monkeypatch)

    def load(folder, *, dtype, batch_size, parity, progress):
        asked.append((str(folder), dtype))
        cfg = testing.tiny_config(max_positions=2048)
        tokenizer = Tokenizer(tokenizer_files.byte_tokenizer(testing.AUDIO_START, 512))
        return StepAudio2(cfg, testing.tiny_params(cfg), tokenizer, speech=lambda: Speech())

    monkeypatch.setattr(StepAudio2, "from_pretrained", load)
    module = sys.modules[evaluate.__module__]
    monkeypatch.setattr(module, "_has_int8", lambda model: asked[-1][1] == "int8")
    return asked


QUICK = ("--limit", 1, "--metric", "tool_unasked", "--metric", "sums")


@pytest.mark.both_pairs
def test_a_table_and_its_answers(run, loads, corpus, tmp_path):
    command = ("eval", "nano", "--data", corpus, "--model", tmp_path, *QUICK)
    code, out, err = run(*command, "--predictions", tmp_path / "predictions.jsonl")
    assert (code, err) == (0, "")
    assert "no tool called when not asked" in out
    assert "below" in out
    assert loads == [(str(tmp_path), None)]
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["metric"] for line in lines] == ["sums", "tool_unasked"]
    code, out, err = run(*command, "--metric", "int8", "--json", "--strict")
    assert code == 1
    assert err == "below the threshold: sums\n"
    metrics = {metric["key"]: metric for metric in json.loads(out)["metrics"]}
    assert metrics["sums"]["verdict"] == "below"
    assert metrics["int8"]["value"] == 0
    assert loads[1:] == [(str(tmp_path), None), (str(tmp_path), "int8")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--metric", "nothing"), "there is no metric 'nothing'"),
        (("--data", "/nowhere"), "has no held-out set"),
        ((), "has no folder heldout/"),
    ],
)
def test_mistakes_are_one_line(run, loads, tmp_path, arguments, message):
    code, out, err = run("eval", "nano", "--model", tmp_path, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert loads == []

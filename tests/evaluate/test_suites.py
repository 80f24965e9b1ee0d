"""The table of suites, and a guest's: text in, text out, exact match."""

import json
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from sa2jax.errors import DataError
from sa2jax.evaluate import suites
from sa2jax.evaluate.base import EvalOptions, Suite, SuiteRun
from sa2jax.evaluate.heldout import evenly_spaced, read_samples
from sa2jax.evaluate.normalizer import normalized
from sa2jax.evaluate.runner import run_suite
from sa2jax.evaluate.scores import Metric, Prediction
from sa2jax.pipeline import StepAudio2

QUESTIONS = {"two and two": "four", "one and two": "three", "one and one": "two", "ten": "ten"}


@dataclass(frozen=True, kw_only=True)
class ToyOptions:
    prefix: str = ""
    """Text before each question."""


class ToyRun(SuiteRun):
    def __init__(self, context):
        super().__init__(context)
        self.samples = evenly_spaced(read_samples(context.data / "toy.jsonl"), self.options.limit)

    @property
    def total(self):
        return len(self.samples)

    def run(self):
        rights = []
        for number, sample in enumerate(self.samples):
            chat = self.model.chat(sample.system, options=self.generation_config())
            question = self.context.suite_options.prefix + sample.content
            text = chat.say(question, seed=self.options.seed + number).text
            rights.append(normalized(text) == normalized(sample.expected))
            self.record(Prediction("exact", sample.name, sample.expected, text, rights[-1]))
            self.counter.add()
        return {"exact": self.metrics["exact"].accuracy(rights)}


def toy(**more) -> Suite:
    exact = Metric(key="exact", title="exact match", unit="%", threshold=50, target=80)
    fields = {"metrics": (exact,), "find_data": lambda model, data: data or model} | more
    return Suite(
        name="toy", description="sums as text.", start=ToyRun, options=ToyOptions, **fields
    )


class Model:
    """Answers every question it knows, in capitals."""

    def __init__(self, log=None):
        self.log = [] if log is None else log

    def chat(self, system, *, options):
        def say(content, *, seed):
            self.log.append((content, options.sampling.temperature, seed))
            return SimpleNamespace(text=QUESTIONS.get(content, "?").upper() + ".")

        return SimpleNamespace(say=say)


@pytest.fixture
def table(monkeypatch):
    """A table that forgets what the test registers."""
    monkeypatch.setattr(suites, "SUITES", dict(suites.SUITES))


@pytest.fixture
def data(tmp_path):
    """Four questions with their answers; the third answer is not what the model says."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": "five" if n == 2 else answer},
            ]
        }
        for n, (question, answer) in enumerate(QUESTIONS.items())
    ]
    (tmp_path / "toy.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path


@pytest.fixture
def log(table, monkeypatch):
    """What the model is asked by the command."""
    asked = []
    suites.register_suite(toy())
    monkeypatch.setattr(StepAudio2, "from_pretrained", lambda *args, **more: Model(log=asked))
    module = sys.modules["sa2jax.cli.evaluate"]  # beside which is the function of that name
    monkeypatch.setattr(module, "_has_int8", lambda model: False)
    return asked


def test_a_suite_of_a_guest_is_run_by_the_command(run, log, data):
    code, out, err = run(
        "eval",
        "toy",
        "--data",
        data,
        "--model",
        data,
        "--greedy",
        "--json",
        "--predictions",
        data / "predictions.jsonl",
    )
    assert (code, err) == (0, "")
    report = json.loads(out)
    (metric,) = report["metrics"]
    assert (metric["key"], metric["value"], metric["n"]) == ("exact", 75, 4)
    assert metric["verdict"] == "threshold"
    assert metric["interval"][0] < 75 < metric["interval"][1]
    assert report["title"] == "toy"
    assert report["metadata"] == {"data": str(data), "sampling": "greedy", "seed": 0}
    assert log == [(question, 0, n) for n, question in enumerate(QUESTIONS)]
    lines = map(json.loads, (data / "predictions.jsonl").read_text().splitlines())
    wrong = [(line["sample"], line["predicted"]) for line in lines if not line["correct"]]
    assert wrong == [("toy:3", "TWO.")]


def test_its_own_options_are_flags(run, log, data):
    code, out, _ = run("eval", "toy", "--model", data, "--prefix", "what is ", "--limit", 1)
    assert code == 0
    assert "exact match" in out
    assert "below" in out
    assert [question for question, *_ in log] == ["what is two and two"]
    code, out, _ = run("eval", "toy", "--help")
    assert code == 0
    assert "--prefix" in out
    assert "--real-recordings" not in out
    assert "sums as text" in out
    # Before the name of a suite, options are those of every suite.
    assert run("eval", "--limit", 1, "--model", data, "toy")[0] == 0
    assert log[-1][0] == "two and two"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tow",), "there is no suite 'tow': expected one of nano, toy"),
        (("toy", "--metric", "wer"), "there is no metric 'wer': expected some of exact"),
        (("toy", "--limit", 0), "expected at least 1"),
        (("toy", "--compare-with", "x"), "the suite toy compares no models"),
        (("toy", "--data", "/nowhere"), "toy.jsonl cannot be read"),
    ],
)
def test_mistakes_are_one_line(refused, log, arguments, message):
    assert message in refused("eval", *arguments)
    assert not log


def test_a_name_is_given_once(table):
    suites.register_suite(toy())
    with pytest.raises(DataError, match="a suite 'toy' already"):
        suites.register_suite(toy())


def test_a_suite_with_a_metric_int8_is_run_by_two_models(data):
    int8 = Metric(key="int8", title="int8 against float weights", unit="points", threshold=-2)
    suite = toy(metrics=(*toy().metrics, int8))
    ticks = []
    scores = run_suite(suite, Model(), data, other=Model(), progress=lambda *at: ticks.append(at))
    assert [(metric.key, metric.value) for metric in scores.metrics] == [("exact", 75), ("int8", 0)]
    assert [prediction.model for prediction in scores.predictions] == [""] * 4 + ["other"] * 4
    assert ticks == [(n, 8) for n in range(1, 9)]
    alone = run_suite(suite, Model(), data, EvalOptions(metrics=("int8",)))
    assert [metric.verdict for metric in alone.metrics] == ["not measured"]


def test_judges_are_loaded_for_the_metrics_that_are_measured(data):
    loaded = []
    suite = toy(load_judges=lambda keys: loaded.append(tuple(keys)))
    run_suite(suite, Model(), data)
    assert loaded == [("exact",)]

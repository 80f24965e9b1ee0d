"""Every reader of jsonl takes byte order marks and the line ends that only Unicode knows."""

import shutil
from pathlib import Path

import pytest

from sa2jax.evaluate.heldout import read_samples
from sa2jax.train import init_model
from sa2jax.train.data.recordings import list_recordings
from sa2jax.train.data.samples import JsonlSource
from sa2jax.train.log import read_metrics

HERE = Path(__file__).parent
SPOKEN = "one\u2028two \u0085 three "


@pytest.fixture
def folder(tmp_path):
    for path in HERE.glob("*.jsonl"):
        shutil.copy(path, tmp_path)
    (tmp_path / "a.wav").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(("name", "text"), [("speech_bom", "hello"), ("speech_ls", SPOKEN)])
def test_recordings(folder, name, text):
    path = folder / f"{name}.jsonl"
    found = list_recordings([path])
    assert [item.problem for item in found] == ["", ""]
    assert [item.values["text"] for item in found] == [text, "bye"]
    assert [sample.expected for sample in read_samples(path)] == [text, "bye"]
    assert [row["text"] for row in read_metrics(path)] == [text, "bye"]


def test_talks(folder):
    path = folder / "talk_bom.jsonl"
    assert [sample.expected for sample in read_samples(path)] == ["hello", "bye"]
    assert len(list(init_model._texts([path]))) == 4
    first = JsonlSource([path])[0]
    assert "a.wav" in first.reason  # the line was read: only its recording is empty


def test_metrics_of_a_run_that_diverged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]

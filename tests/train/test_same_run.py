"""Whose checkpoints a run may go on from: contents and weights count, not where they lie."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers.small_training import recipe, save_model, save_pairs

from sa2jax.errors import TrainError
from sa2jax.train import loop
from sa2jax.train.data import samples
from sa2jax.train.data.samples import JsonlSource
from sa2jax.train.language.task import make_language_task


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A run with a checkpoint, and what it learns from."""
    home = tmp_path_factory.mktemp("runs")
    save_model(home / "model")
    save_pairs(home / "pairs")
    claim(home / "run", home / "model", home / "pairs" / "pairs.jsonl")
    (home / "run" / loop.CHECKPOINTS / "2").mkdir(parents=True)
    return home


def claim(out: Path, model: Path, data: Path, **changes) -> None:
    """What a run does first."""
    task = make_language_task(recipe(model, data, **changes), out)
    with ExitStack() as held:
        loop._claim_run_folder(out, task.metadata, False, held)


def test_copies_links_and_other_spellings_are_the_same(home, tmp_path, monkeypatch):
    shutil.copytree(home, tmp_path / "moved")
    (tmp_path / "link").symlink_to(tmp_path / "moved" / "model")
    monkeypatch.chdir(tmp_path)
    claim(Path("moved/run"), Path("link"), Path("moved/../moved/pairs/pairs.jsonl"))
    claim(Path("moved/run"), home / "model", Path("moved/pairs"))


def test_a_voice_that_was_added_to_the_model_changes_nothing(home, tmp_path):
    shutil.copytree(home, tmp_path / "moved")
    voices = tmp_path / "moved" / "model" / "voices"
    voices.mkdir()
    shutil.copy(tmp_path / "moved" / "model" / "model.safetensors", voices / "anna.safetensors")
    claim(tmp_path / "moved" / "run", voices.parent, home / "pairs" / "pairs.jsonl")


def test_what_differs_is_named_with_its_place(home, tmp_path):
    pairs = home / "pairs" / "pairs.jsonl"
    more = save_pairs(tmp_path / "pairs", 13)
    with pytest.raises(TrainError, match=r"contents of the data .*\(data.sources: .* → .*\)"):
        claim(home / "run", home / "model", more)
    with pytest.raises(TrainError, match=r"the weights in data.sources: \[1.*\] → \[2.0\]"):
        claim(home / "run", home / "model", pairs, data__sources={str(pairs): 2.0})
    other = tmp_path / "model"
    shutil.copytree(home / "model", other)
    path = other / "model.safetensors"
    numbers = bytearray(path.read_bytes())
    numbers[-1] ^= 1  # of the last tensor; the header is as it was
    path.write_bytes(numbers)
    with pytest.raises(TrainError, match=r"the model that .* \(model.folder: .* → .*\)") as caught:
        claim(home / "run", other, pairs)
    assert "the data" not in str(caught.value)
    with pytest.raises(TrainError, match=r"optimizer.steps: 6 → 7\. Choose"):
        claim(home / "run", home / "model", pairs, optimizer__steps=7)


def test_recordings_are_told_by_what_is_in_them(home, tmp_path):
    """Another recording under the same name; the lines that name it are the same."""
    shutil.copytree(home, tmp_path / "moved")
    run, pairs = tmp_path / "moved" / "run", tmp_path / "moved" / "pairs"
    sound = bytearray((pairs / "3.wav").read_bytes())
    sound[len(sound) // 2] ^= 1
    (pairs / "3.wav").write_bytes(sound)
    with pytest.raises(TrainError, match="differs in: the recordings that the data names") as error:
        claim(run, home / "model", pairs)
    assert "contents" not in str(error.value)
    (pairs / "3.wav").unlink()
    with pytest.raises(TrainError, match="the recordings that the data names"):
        claim(run, home / "model", pairs)
    said = json.loads((run / loop.RUN).read_text())
    del said["recordings"]  # as a run of before
    (run / loop.RUN).write_text(json.dumps(said))
    claim(run, home / "model", pairs)


def test_many_recordings_are_looked_at_here_and_there(home, monkeypatch):
    source, asked = JsonlSource([home / "pairs" / "pairs.jsonl"]), []
    monkeypatch.setattr(samples, "recording_identity", lambda path: asked.append(path) or b"x")
    monkeypatch.setattr(samples, "_PROBED_ROWS", 5)
    source.recordings_fingerprint()
    assert [Path(path).name for path in asked] == ["0.wav", "2.wav", "4.wav", "7.wav", "9.wav"]

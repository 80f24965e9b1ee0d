"""The folder of a run: one run at a time, removed under it, on a full disk; nothing is lost."""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from helpers.toy_kind import train_toy

from sa2jax.errors import CheckpointError, TrainError
from sa2jax.locks import LOCK, exclusive
from sa2jax.train.log import TrainingLog, read_metrics
from sa2jax.train.stages import StagesRecipe, run_stages


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Six updates that nothing disturbed."""
    out = tmp_path_factory.mktemp("toy") / "whole"
    train_toy(out)
    return json.loads((out / "toy.json").read_text())


def test_two_trainings_with_one_folder(tmp_path, whole):
    out, said = tmp_path / "run", []

    def on_step(step):
        if step == 3:
            before = {p: p.read_bytes() for p in out.rglob("*.json*")}
            for fresh in (False, True):
                with pytest.raises(CheckpointError, match=r"another run is writing .*run: wait"):
                    train_toy(out, fresh=fresh)
                said.append(fresh)
            assert {p: p.read_bytes() for p in out.rglob("*.json*")} == before

    train_toy(out, on_step=on_step)
    assert said == [False, True]
    assert json.loads((out / "toy.json").read_text()) == whole
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_fresh_run_follows_no_link(tmp_path):
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "treasure").write_text("precious")
    out.mkdir()
    (out / "run.json").write_text("{}")
    (out / "checkpoints").symlink_to(elsewhere)
    with pytest.raises(TrainError, match="checkpoints is a link, --fresh does not follow it"):
        train_toy(out, fresh=True)
    assert (elsewhere / "treasure").exists()


def test_two_lists_of_stages_with_one_folder(tmp_path):
    (tmp_path / "run").mkdir()
    plan = StagesRecipe(stages={"one": "data show nothing"})
    with (
        exclusive(tmp_path / "run" / LOCK, tmp_path / "run"),
        pytest.raises(CheckpointError, match="another run is writing"),
    ):
        run_stages(plan, tmp_path / "run")


@pytest.mark.parametrize("moved", [False, True])
def test_a_folder_that_is_removed_while_it_is_written(tmp_path, capfd, moved):
    out = tmp_path / "run"

    def on_step(step):
        if step == 5:
            out.rename(tmp_path / "moved")
            if not moved:
                shutil.rmtree(tmp_path / "moved", ignore_errors=True)

    with pytest.raises(CheckpointError, match=r"was removed while|cannot write") as caught:
        train_toy(out, steps=9, on_step=on_step)
    assert len(str(caught.value)) < 500
    assert capfd.readouterr().err == ""
    if moved:  # it can be gone on with
        again = tmp_path / "moved"
        assert [line["step"] for line in read_metrics(again / "metrics.jsonl")] == [1, 2, 3, 4, 5]
        assert train_toy(again, steps=9).finished


FULL = """
    import resource, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from helpers.toy_kind import train_toy
    from sa2jax.cli import common
    from sa2jax.errors import Sa2jaxError

    def on_step(step):
        if step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))

    try:
        train_toy(Path(sys.argv[1]), 12, log_every=100, on_step=on_step)
    except Sa2jaxError as error:
        common.log_error(error)
        sys.exit(2)
"""


def test_a_disk_that_takes_no_more(tmp_path):
    """What Orbax and its threads cannot write is one line, and the run goes on once they can."""
    out, tests = tmp_path / "run", Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL), out, tests],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert (run.returncode, run.stdout) == (2, ""), run.stderr
    assert run.stderr.startswith("error: cannot write "), run.stderr
    assert run.stderr.count("\n") == 1, run.stderr
    assert len(run.stderr) < 500
    assert train_toy(out, 12).finished


def test_metrics_on_a_full_disk(tmp_path):
    log = TrainingLog(tmp_path, steps=3, quiet=True)
    log.write_metrics(1, {"loss": 1.0})
    log._file.close()
    with Path("/dev/full").open("w") as full:
        log._file = full
        with pytest.raises(CheckpointError, match=r"disk is full: cannot write .*metrics"), log:
            log.write_metrics(2, {"loss": 1.0})
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_a_full_disk_keeps_what_the_run_wrote_down(tmp_path, monkeypatch):
    """`run.json` and the metrics are written anew when a run goes on: never cut first."""
    out = tmp_path / "run"
    train_toy(out, 2)
    before = {p.name: p.read_text() for p in out.glob("*.json*")}

    def full(self, *words, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(CheckpointError, match="the disk is full"):
            train_toy(out, 2)
    assert {p.name: p.read_text() for p in out.glob("*.json*")} == before
    assert train_toy(out, 2).finished


# --- what the run is made from --------------------------------------------------------------------


def test_a_run_replaces_no_folder_that_it_reads(tmp_path, monkeypatch):
    source = tmp_path / "run" / "model"
    source.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for out in (tmp_path / "run", "run", source, source / "new"):
        with pytest.raises(CheckpointError, match="which it would be made from"):
            train_toy(Path(out), sources=[source])
    assert list(tmp_path.rglob("*")) == [tmp_path / "run", source]

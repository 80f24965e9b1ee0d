"""One writer at a time: with locks of the system, without them, and without fcntl at all."""

import errno
import fcntl
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sa2jax.atomic_io import new_folder
from sa2jax.errors import CheckpointError

LACKING = [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL]


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refuse(*numbers: int):
    def flock(file, operation):
        raise OSError(numbers[0], os.strerror(numbers[0]))

    return flock


def test_two_runs_do_not_write_into_each_other(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        with (
            pytest.raises(CheckpointError, match=r"another run is writing .*out: wait for it"),
            new_folder(tmp_path / "out"),
        ):
            raise AssertionError("it was let in")
        assert entries(folder) == ["a"]
        with new_folder(tmp_path / "other"):
            pass
    assert entries(tmp_path) == ["other", "out"]


@pytest.mark.parametrize("number", LACKING)
def test_a_file_system_without_flock(tmp_path, monkeypatch, caplog, number):
    monkeypatch.setattr(fcntl, "flock", refuse(number))
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        assert "no file locks" in caplog.text
        assert entries(tmp_path) == [".out.sa2jax-lock-soft", ".out.sa2jax-partial"]
        with (
            pytest.raises(CheckpointError, match=r"if there is none, remove .*sa2jax-lock-soft"),
            new_folder(tmp_path / "out"),
        ):
            raise AssertionError("it was let in")
        assert entries(folder) == ["a"]
    assert entries(tmp_path) == ["out"]


def test_without_flock_a_killed_run_is_in_nobodys_way(tmp_path, monkeypatch):
    lock = tmp_path / ".out.sa2jax-lock-soft"
    code = """import os, sys, filelock
lock = filelock.SoftFileLock(sys.argv[1])
lock.acquire()
os._exit(9)"""
    assert subprocess.run([sys.executable, "-c", code, lock], timeout=60).returncode == 9
    assert lock.exists()
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOSYS))
    with new_folder(tmp_path / "out"):
        pass
    assert entries(tmp_path) == ["out"]


def test_another_error_of_the_lock_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refuse(errno.EIO))
    with (
        pytest.raises(CheckpointError, match=r"cannot write .*Input/output"),
        new_folder(tmp_path / "out"),
    ):
        raise AssertionError("it was let in")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.sa2jax-partial").exists()


AS_ON_WINDOWS = """
    import importlib, importlib.abc, pkgutil, sys, warnings
    from pathlib import Path

    GONE = {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog"}

    class Blocked(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name in GONE:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in GONE:
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, Blocked())
    warnings.simplefilter("ignore")
    import sa2jax

    done = 0
    for found in pkgutil.walk_packages(sa2jax.__path__, "sa2jax."):
        if not found.name.endswith(("__main__", "_reference")):  # an entry, and torch's oracles
            importlib.import_module(found.name)
            done += 1
    assert done > 150, done
    assert not GONE & sys.modules.keys(), GONE & sys.modules.keys()

    from sa2jax.atomic_io import new_folder
    from sa2jax.errors import CheckpointError

    out = Path(sys.argv[1])
    with new_folder(out) as folder:
        (folder / "a").write_text("a")
        try:
            with new_folder(out):
                raise AssertionError("it was let in")
        except CheckpointError as error:
            assert "another run is writing" in str(error)
    assert (out / "a").read_text() == "a"
"""


def test_without_the_modules_that_windows_lacks(tmp_path):
    """All of the library imports, and a lock holds."""
    code = textwrap.dedent(AS_ON_WINDOWS)
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    assert entries(tmp_path) == ["out"]

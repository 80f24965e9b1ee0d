"""How tests compile, see tests/helpers/compiling.py."""

import os
import time

import jax
import pytest
from helpers import compiling


def test_most_tests_are_compiled_quickly():
    assert jax.config.read(compiling.QUICK.lower())
    assert os.environ[compiling.QUICK] == "1"


@pytest.mark.optimized
def test_marked_ones_are_compiled_as_for_users():
    """On the newer versions; on the lower bound nothing is."""
    assert jax.config.read(compiling.QUICK.lower()) is compiling.OLD
    assert os.environ[compiling.QUICK] == str(int(compiling.OLD))


def test_memory_comes_in_large_pages():
    assert "glibc.malloc.hugetlb=1" in os.environ["GLIBC_TUNABLES"]


def test_what_was_compiled_the_other_way_is_forgotten():
    traces = []

    @jax.jit
    def double(x):
        traces.append(x)
        return 2 * x

    for quickly in (True, False, False, True):
        compiling.compile_quickly(quickly)
        double(1.0)
    assert len(traces) == 3


def test_old_programs_are_deleted(tmp_path):
    new, old = tmp_path / "new-cache", tmp_path / "old-cache"
    for path in (new, old):
        path.write_bytes(b"program")
    before = time.time() - (compiling.KEEP_DAYS + 1) * 24 * 3600
    os.utime(old, (before, before))
    compiling.forget_old_programs(tmp_path)
    assert list(tmp_path.iterdir()) == [new]
    compiling.forget_old_programs(tmp_path / "nowhere")


def test_a_cache_folder_is_of_one_version_and_processor(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = compiling.cache_folder()
    assert folder.parent == tmp_path / "sa2jax" / "tests"
    assert jax.lib.__version__ in folder.name
    monkeypatch.setattr(compiling, "processor", lambda: "other")
    assert compiling.cache_folder() != folder

"""Pytest plugin: a test marked `alone` has the machine for itself.

What it measures in wall time would else depend on what the other workers of the run happen to do.
All other tests share a lock, and such a test holds it alone; while it waits for that, no other
begins. Where there is no `fcntl`, or one worker only, nothing is locked.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

try:
    import fcntl
except ImportError:
    fcntl = None


def lock_file(name: str) -> Path:
    """Of the workers of one run."""
    run = os.environ["PYTEST_XDIST_TESTRUNUID"]
    return Path(tempfile.gettempdir(), f"sa2jax-tests-{run}-{name}.lock")


@contextmanager
def held(name: str, *, shared: bool) -> Iterator[None]:
    """Hold one of the run's locks."""
    with lock_file(name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Take the machine, or a share of it, for all of a test."""
    if fcntl is None or "PYTEST_XDIST_TESTRUNUID" not in os.environ:
        return (yield)
    alone = item.get_closest_marker("alone") is not None
    # Whoever waits holds the entrance, so that no stream of other tests keeps it out.
    entrance = held("entrance", shared=False)
    machine = held("machine", shared=not alone)
    with entrance:
        machine.__enter__()
    try:
        return (yield)
    finally:
        machine.__exit__(None, None, None)


def pytest_sessionfinish():
    """Leave no files; a worker that is not done makes them anew."""
    if "PYTEST_XDIST_TESTRUNUID" in os.environ:
        for name in ("entrance", "machine"):
            lock_file(name).unlink(missing_ok=True)

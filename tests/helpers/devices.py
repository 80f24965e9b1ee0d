"""Run a program on fake devices, in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parents[1]  # what is imported as `helpers` lies there

needs_libtpu = pytest.mark.skipif(
    find_spec("libtpu") is None, reason="needs libtpu: pip install 'sa2jax[plan]'"
)


def environment(count: int, home: Path, *flags: str) -> dict[str, str]:
    """Variables of a process with so many devices and a compilation cache in `home`."""
    devices = f"--xla_force_host_platform_device_count={count}"
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), devices, *flags]),
        "XDG_CACHE_HOME": str(home),
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
        "TF_CPP_MIN_LOG_LEVEL": "1",  # XLA's warnings are shown
    }


def run_on_devices(
    count: int, command: Sequence[Any], home: Path, *flags: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments; it must end well."""
    run = subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment(count, home, *flags),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr
    return run

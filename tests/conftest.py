import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest_plugins = ["helpers.alone", "helpers.compiling", "helpers.processor_time", "pytester"]

# A shell starts background jobs with interrupts ignored, and all their children with them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

HERE = Path(__file__).parent
SMALL_GOLDEN = HERE / "golden"
# Not in the repository; used when there and minutes may pass: it shows what the small one shows.
LARGE_GOLDEN = HERE.parent.parent / "shared" / "golden"


# Whole folders that both version pairs run, see CONTRIBUTING.md, and that compile as users do.
BOTH_PAIRS = ("parity",)
OPTIMIZED = ("plan",)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        topic = item.path.relative_to(HERE).parts[0]
        if topic in BOTH_PAIRS:
            item.add_marker("both_pairs")
        if topic in OPTIMIZED:
            item.add_marker("optimized")


def golden_folder() -> Path:
    """Folder of reference data; `SA2JAX_GOLDEN` points the same tests at another one."""
    folder = Path(os.environ.get("SA2JAX_GOLDEN", SMALL_GOLDEN))
    assert folder.is_dir(), f"SA2JAX_GOLDEN={folder} is not a folder"
    return folder


def golden_checkpoints() -> list[Path]:
    """Every folder with a checkpoint (`llm/`) and its recorded outputs (`golden/`)."""
    roots = [golden_folder()]
    large = "SA2JAX_LONG" in os.environ and "SA2JAX_GOLDEN" not in os.environ
    if large and LARGE_GOLDEN.is_dir():
        roots.append(LARGE_GOLDEN)
    found = {
        folder.name: folder
        for root in reversed(roots)
        for folder in sorted(root.iterdir())
        if (folder / "llm" / "config.json").is_file() and (folder / "golden").is_dir()
    }
    assert found, f"no checkpoint with recorded outputs under {roots[0]}"
    return list(found.values())


@pytest.fixture(scope="session")
def golden() -> Path:
    return golden_folder()


@pytest.fixture(scope="session")
def converted_detokenizer(golden, tmp_path_factory) -> Path:
    """The recorded detokenizer, converted; not to be changed."""
    from sa2jax.convert.hf import convert  # not before a test sets how many devices there are

    out = tmp_path_factory.mktemp("speech") / "ours"
    convert(golden / "token2wav", out)
    return out


def marked(folder: Path):
    """What a larger recording repeats of a small one is slow."""
    slow = folder.parent == LARGE_GOLDEN
    return pytest.param(folder, id=folder.name, marks=[pytest.mark.slow] if slow else [])


@pytest.fixture(scope="session", params=map(marked, golden_checkpoints()))
def recorded_checkpoint(request) -> Path:
    """A folder with `llm/`, a checkpoint, and `golden/`, what the official code made of it."""
    return request.param


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def run(capsys):
    """Runs a command; gives its exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = 0
        try:
            from sa2jax import cli

            cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def run_json(run):
    """Runs a command that must end well, with `--json`; gives what it prints."""

    def call(*arguments: object) -> Any:
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return call


@pytest.fixture
def refused(run):
    """Runs a command that must end with one line and exit code 2; gives the line."""

    def call(*arguments: object) -> str:
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    return call


@pytest.fixture
def loop():
    """A device loop; its thread ends with the test."""
    from sa2jax.device_loop import DeviceLoop

    loop = DeviceLoop()
    yield loop
    loop.close()
    loop.join()

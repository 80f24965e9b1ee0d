import shutil
from pathlib import Path

import pytest


@pytest.fixture
def source(golden) -> Path:
    return golden / "micro" / "llm"


@pytest.fixture
def broken(source, tmp_path) -> Path:
    """A copy of the source that a test may damage."""
    return Path(shutil.copytree(source, tmp_path / "broken"))

"""Models that come with the library, by name: `nano`, a small one for demonstrations and tests."""

from importlib.resources import files
from pathlib import Path

NANO = "nano"


def model_folder(name: str | Path) -> Path:
    """A folder as it is, or that of a model that comes with the library.

    A folder of that name in the working directory comes first.

    Args:
        name: a path, or `nano`.
    """
    path = Path(name)
    if path.exists() or str(name) != NANO:
        return path
    return Path(str(files(__name__) / NANO))

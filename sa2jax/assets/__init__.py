"""Models that come with the library, by name: `nano`, a small one for demonstrations and tests."""

from importlib.resources import files
from pathlib import Path

NANO = "nano"


def model_folder(name: str | Path) -> Path:
    """A folder as it is, or that of a model that comes with the library.

    A folder of that name in the working directory comes first; a name without a model stays what
    it is, and whoever opens it says that there is none.

    Args:
        name: a path, or `nano`.
    """
    path, shipped = Path(name), Path(str(files(__name__) / NANO))
    return shipped if str(name) == NANO and not path.exists() and shipped.is_dir() else path

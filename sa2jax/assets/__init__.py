"""Models that come with the library, by name: `nano`, a small one for demonstrations and tests."""

from importlib.resources import files
from pathlib import Path

from sa2jax.folders import holds_checkpoint

NANO = "nano"


def model_folder(name: str | Path) -> Path:
    """A folder as it is, or that of a model that comes with the library.

    A checkpoint of that name in the working directory comes first, not any folder; a name without
    a model stays what it is, and whoever opens it says that there is none.

    Args:
        name: a path, or `nano`.
    """
    path, shipped = Path(name), Path(str(files(__name__) / NANO))
    if str(name) != NANO or holds_checkpoint(path) or not shipped.is_dir():
        return path
    return shipped

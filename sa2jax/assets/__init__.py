"""Models that come with the library: `nano`, for demonstrations and tests, and Silero VAD."""

from importlib.resources import files
from pathlib import Path

from sa2jax.atomic_io import holds_checkpoint
from sa2jax.errors import CheckpointError

NANO = "nano"
SHIPPED = Path(str(files(__name__) / NANO))  # where it is, if it came along
SILERO_VAD = Path(str(files(__name__) / "silero_vad" / "model.safetensors"))


def model_folder(name: str | Path) -> Path:
    """A folder as it is, or that of a model that comes with the library.

    A checkpoint of that name in the working directory comes first; a name without a model stays
    what it is, and whoever opens it says that there is none.

    Args:
        name: a path, or `nano`.

    Raises:
        CheckpointError: if something of that name in the working directory is no checkpoint:
            which of the two is meant cannot be told.
    """
    path = Path(name)
    if str(name) != NANO or not SHIPPED.is_dir():
        return path
    if not path.exists():
        return SHIPPED
    if not holds_checkpoint(path):
        raise CheckpointError(
            f"{path.resolve()} holds no checkpoint, and comes before the demonstration model of "
            "that name: work in another folder, rename it, or name the checkpoint inside it"
        )
    return path

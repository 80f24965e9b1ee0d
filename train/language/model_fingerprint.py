"""Whether two model folders hold the same numbers, told from a fraction of them.

Neither where a folder lies counts, nor how its tensors are spread over files, nor what else is in
it, such as voices: a run goes on with a copy of the model that it began with.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sa2jax import checkpoint
from sa2jax.convert.weights import SafetensorsFolder
from sa2jax.errors import CheckpointError

WHOLE_BYTES = 1 << 20  # what is not larger is read whole
PIECES, PIECE_BYTES = 8, 4096  # of what is, so many pieces at even distances, its ends included


def weights_fingerprint(folder: str | Path) -> str:
    """SHA-256, in hex, of all tensors' names, shapes, dtypes and of numbers all over them.

    Args:
        folder: a model folder of this library, or a Hugging Face one.

    Raises:
        CheckpointError: if it is damaged or incomplete.
    """
    folder, digest = Path(folder), hashlib.sha256()
    try:
        if not checkpoint.is_checkpoint(folder):
            _add_safetensors(digest.update, folder)
        else:
            _add_leaves(digest.update, folder)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{folder} cannot be read ({reason})") from None
    return digest.hexdigest()


def _add_safetensors(add: Callable[[bytes], None], folder: Path) -> None:
    with SafetensorsFolder(folder) as weights:
        for name, info in sorted(weights.tensors.items()):
            add(f"{name} {list(info.shape)} {info.dtype.name}\n".encode())
            numbers = np.ascontiguousarray(weights.get(name)).reshape(-1).view(np.uint8)
            for start, stop in _pieces(len(numbers)):
                add(numbers[start:stop].tobytes())
            weights.drop(name)


def _add_leaves(add: Callable[[bytes], None], folder: Path) -> None:
    for name, leaf in sorted(checkpoint.open_leaves(folder).items()):
        add(f"{name} {list(leaf.shape)} {leaf.dtype.numpy_dtype.name}\n".encode())
        home = folder / checkpoint.PARAMS / name
        if not home.is_dir():  # a file of its own, or all leaves in one database
            add(checkpoint.content_hash({name: leaf}).encode())
            continue
        for path in sorted(home.rglob("[!.]*")):  # the chunks of the array
            if not path.is_file():
                continue
            size = path.stat().st_size
            add(f"{path.relative_to(home).as_posix()} {size}\n".encode())
            with path.open("rb") as file:
                for start, stop in _pieces(size):
                    file.seek(start)
                    add(file.read(stop - start))


def _pieces(size: int) -> list[tuple[int, int]]:
    """Ranges of bytes that stand for so many."""
    if size <= WHOLE_BYTES:
        return [(0, size)]
    last = size - PIECE_BYTES
    starts = [n * last // (PIECES - 1) for n in range(PIECES)]
    return [(start, start + PIECE_BYTES) for start in starts]

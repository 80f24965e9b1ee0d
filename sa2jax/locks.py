"""One writer at a time, over all processes: a lock file that the library filelock holds.

A lock of the system ends with its process, however that ends. Where a file system has none, such
as Lustre mounted without flock and some NFS, a file that exists is the lock: a killed process
leaves it behind, and the next one on the same host removes it.
"""

import errno
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sa2jax.errors import CheckpointError

if TYPE_CHECKING:
    from filelock import BaseFileLock

LOCK = ".sa2jax-lock"  # of a folder that several commands write into, one after the other
log = logging.getLogger(__name__)

# What file systems without locks answer.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
SOFT_SECONDS = 1.0  # to find that the owner of a lock file is dead


@contextmanager
def exclusive(path: Path, target: Path) -> Iterator[None]:
    """Hold a lock file for as long as the block runs; it is removed at the end.

    Args:
        path: the lock file, in a folder that exists.
        target: what is written, for messages.

    Raises:
        CheckpointError: if another run holds it, or a link is in its place.
        OSError: if it cannot be made.
    """
    if path.is_symlink():
        raise CheckpointError(f"{path} is a link, expected a lock file: remove it")
    lock = _acquire(path, target)
    try:
        yield
    finally:
        with suppress(OSError):
            # While it is held, as others would be holding it then; soft ones do so themselves.
            if lock.lock_file == str(path) and sys.platform != "win32":
                path.unlink(missing_ok=True)
            lock.release()


def _acquire(path: Path, target: Path) -> "BaseFileLock":
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # our note says it
        from filelock import SoftFileLock, Timeout, UnixFileLock, WindowsFileLock, has_fcntl

    busy = f"another run is writing {target}: wait for it, or stop it"
    kind = UnixFileLock if has_fcntl else WindowsFileLock
    native = kind(path, thread_local=False, fallback_to_soft=False)
    try:
        native.acquire(timeout=0)
        return native
    except Timeout:
        raise CheckpointError(busy) from None
    except NotImplementedError:
        reason = "this system has none"
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        path.unlink(missing_ok=True)
        reason = str(error.strerror)
    soft = path.with_name(f"{path.name}-soft")
    lock = SoftFileLock(soft, thread_local=False)
    try:
        lock.acquire(timeout=SOFT_SECONDS)
    except Timeout:
        raise CheckpointError(f"{busy}; if there is none, remove {soft}") from None
    log.warning("note: no file locks in %s (%s): %s is one", path.parent, reason, soft.name)
    return lock

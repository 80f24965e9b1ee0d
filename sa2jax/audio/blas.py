"""Matrix products of NumPy that round the same way in every process."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock

from threadpoolctl import ThreadpoolController

_ALONE = Lock()  # the number of threads is one for the whole process


@contextmanager
def one_thread() -> Iterator[None]:
    """Products in here take one thread: on some machines more of them add up in another order."""
    with _ALONE, _controller().limit(limits=1, user_api="blas"):
        yield


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()

"""Device loop: the one thread that runs a model's programs.

Workers have something to do from time to time (the scheduler of replies, the synthesis of speech);
the loop lets them do a turn each, the most urgent first. Programs of a device run in the order in
which they are dispatched, so this order is what decides who waits for whom.
"""

import atexit
import threading
import weakref
from typing import Protocol


class Worker(Protocol):
    """Something that has work for the devices."""

    def urgency(self) -> float:
        """How soon its next turn is due: the lowest number goes first."""
        ...

    def turn(self) -> bool:
        """Do a little.

        Returns:
            Whether there is more to do, as far as it knows.
        """
        ...

    def has_work(self) -> bool:
        """Whether there is something to do."""
        ...

    def fail(self, error: BaseException) -> None:
        """A turn has raised this: tell whoever waits, and begin anew."""
        ...


class DeviceLoop:
    """Runs workers in a thread of its own; the thread begins with the first of them."""

    def __init__(self):
        self._changed = threading.Condition()
        self._busy: list[Worker] = []
        self._closed = False
        self._thread: threading.Thread | None = None
        _LOOPS.add(self)

    def wake(self, worker: Worker) -> None:
        """A worker has something to do; from any thread."""
        with self._changed:
            if worker not in self._busy:
                self._busy.append(worker)
            if self._thread is None or not self._thread.is_alive():  # as after a fork
                self._thread = threading.Thread(target=self._run, name="sa2jax-device", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """End the thread after the turn in flight, which is not waited for."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def join(self) -> None:
        """Wait for the end of the thread."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._busy or self._closed)
                if self._closed:
                    return
                worker = min(self._busy, key=lambda worker: worker.urgency())
                self._busy.remove(worker)  # behind those that are as urgent
                self._busy.append(worker)
            try:
                more = worker.turn()
            except BaseException as error:
                worker.fail(error)
                more = False
            if not more:
                with self._changed:
                    if not worker.has_work():
                        self._busy.remove(worker)
            del worker  # nothing is kept alive by a thread that waits


_LOOPS: "weakref.WeakSet[DeviceLoop]" = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """Join all threads before the interpreter shuts down."""
    loops = [*_LOOPS]
    for loop in loops:
        loop.close()
    for loop in loops:
        loop.join()

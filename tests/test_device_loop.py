"""The device loop: one thread, the most urgent worker first, and nothing lost when one fails."""

import gc
import threading
import weakref

from sa2jax.device_loop import DeviceLoop


class Worker:
    """Has so many turns to do."""

    def __init__(self, name: str, urgency: float, turns: int, done: list):
        self.name, self.level, self.left, self.done = name, urgency, turns, done
        self.errors: list[BaseException] = []
        self.ended = threading.Event()

    def urgency(self) -> float:
        return self.level

    def has_work(self) -> bool:
        return self.left > 0

    def turn(self) -> bool:
        self.left -= 1
        self.done.append((self.name, threading.current_thread().name))
        if self.left < 0:
            raise ValueError(self.name)
        if not self.left:
            self.ended.set()
        return self.has_work()

    def fail(self, error: BaseException) -> None:
        self.errors.append(error)
        self.left = 0
        self.ended.set()


class Gate(Worker):
    """Holds the loop up until all others are there."""

    def __init__(self, done: list):
        super().__init__("gate", -1, 1, done)
        self.open = threading.Event()

    def turn(self) -> bool:
        self.open.wait(10)
        return super().turn()


def run(loop: DeviceLoop, *workers: Worker) -> None:
    gate = Gate([])
    loop.wake(gate)
    for worker in workers:
        loop.wake(worker)
    gate.open.set()
    for worker in workers:
        assert worker.ended.wait(10)


def test_the_most_urgent_goes_first_and_equals_take_turns(loop):
    done: list = []
    run(
        loop,
        Worker("later", 2, 2, done),
        Worker("a", 1, 2, done),
        Worker("b", 1, 2, done),
    )
    assert [name for name, _ in done] == ["a", "b", "a", "b", "later", "later"]
    assert {thread for _, thread in done} == {"sa2jax-device"}


def test_a_worker_that_fails_is_told_and_others_go_on(loop):
    done: list = []
    bad, good = Worker("bad", 1, 0, done), Worker("good", 2, 3, done)
    run(loop, bad, good)
    assert [str(error) for error in bad.errors] == ["bad"]
    assert [name for name, _ in done] == ["bad", "good", "good", "good"]
    again = Worker("again", 0, 1, done)
    run(loop, again)
    assert done[-1][0] == "again"


def test_nothing_is_kept_alive_by_a_loop_that_waits(loop):
    worker = Worker("w", 0, 1, [])
    run(loop, worker)
    seen = weakref.ref(worker)
    del worker
    for _ in range(100):
        gc.collect()
        if seen() is None:
            break
        threading.Event().wait(0.01)
    assert seen() is None


def test_a_closed_loop_ends_its_thread():
    loop, done = DeviceLoop(), []
    run(loop, Worker("w", 0, 1, done))
    thread = next(t for t in threading.enumerate() if t is loop._thread)
    loop.close()
    loop.join()
    assert not thread.is_alive()

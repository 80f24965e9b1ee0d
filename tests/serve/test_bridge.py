"""The bridge between a stream in a worker thread and the event loop."""

import asyncio
import threading
import time

import numpy as np
import pytest

from sa2jax.errors import PromptError
from sa2jax.pipeline.reply import Reply, ReplyPiece
from sa2jax.serve.bridge import Bridge


class Counting:
    """A stream of numbers that remembers what became of it."""

    def __init__(self, pieces: int, pace: float = 0.0, fails: bool = False):
        self.made, self.pieces, self.pace, self.fails = 0, pieces, pace, fails
        self.cancelled: list[float | None] = []
        self.threads: set[str] = set()

    def __next__(self) -> ReplyPiece:
        self.threads.add(threading.current_thread().name)
        if self.made == self.pieces:
            if self.fails:
                raise PromptError("the context is full")
            raise StopIteration
        time.sleep(self.pace)
        self.made += 1
        return ReplyPiece(text=str(self.made), audio=np.zeros(2400, np.float32))

    def cancel(self, played: float | None = None) -> Reply:
        self.cancelled.append(played)
        return Reply(text="cut", ids=(), finish_reason="cancelled")

    @property
    def reply(self) -> Reply:
        return Reply(text="whole", ids=(), finish_reason="stop")


@pytest.fixture
def bridge():
    made = Bridge(2, size=4)
    yield made
    made.close()


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 10))


def test_pieces_come_in_order_and_from_another_thread(bridge):
    stream = Counting(50)

    async def take():
        answer = bridge.open(lambda: stream)
        texts = [piece.text async for piece in answer]
        return texts, await answer.reply()

    texts, reply = run(take())
    assert texts == [str(n) for n in range(1, 51)]
    assert reply.text == "whole"
    assert stream.cancelled == []
    assert threading.current_thread().name not in stream.threads


def test_a_slow_reader_pauses_the_stream(bridge):
    stream = Counting(1000)

    async def take():
        answer = bridge.open(lambda: stream)
        await anext(answer)
        await asyncio.sleep(0.1)
        held = stream.made
        await answer.cancel()
        return held

    assert run(take()) <= 1 + 4
    assert stream.cancelled == [None]


def test_a_cancel_drops_what_was_not_taken_and_says_what_was_heard(bridge):
    stream = Counting(1000, pace=0.001)

    async def take():
        answer = bridge.open(lambda: stream)
        await anext(answer)
        reply = await answer.cancel(played=0.05)
        return reply, [piece async for piece in answer]

    reply, rest = run(take())
    assert reply.finish_reason == "cancelled"
    assert rest == []
    assert set(stream.cancelled) == {0.05}


def test_an_answer_that_has_ended_can_be_cut(bridge):
    stream = Counting(2)

    async def take():
        answer = bridge.open(lambda: stream)
        async for _ in answer:
            pass
        return await answer.cancel(played=0.1)

    assert run(take()).text == "cut"
    assert stream.cancelled == [0.1]


@pytest.mark.parametrize("when", ["start", "later"])
def test_errors_reach_who_iterates(bridge, when):
    async def take():
        def start():
            if when == "start":
                raise PromptError("nothing was said")
            return Counting(2, fails=True)

        texts = []
        try:
            async for piece in bridge.open(start):
                texts.append(piece.text)
        except PromptError:
            return texts

    assert run(take()) == ([] if when == "start" else ["1", "2"])


def test_a_cancel_wakes_who_waits_in_another_task(bridge):
    stream = Counting(1000, pace=0.05)

    async def take():
        answer = bridge.open(lambda: stream)

        async def count():
            return len([piece async for piece in answer])

        counting = asyncio.create_task(count())
        await asyncio.sleep(0.12)
        await answer.cancel()
        return await counting

    assert run(take()) < 10
    assert stream.made < 10


def test_what_has_not_begun_when_the_server_closes_ends(bridge):
    async def take():
        blocked = [bridge.open(lambda: Counting(10, pace=0.05)) for _ in range(4)]
        bridge.close()
        with pytest.raises(asyncio.CancelledError):
            await anext(blocked[3])
        for answer in blocked[:2]:
            answer.cancel_soon()

    run(take())

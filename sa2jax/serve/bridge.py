"""The bridge between threads and the event loop: a stream iterated here, its pieces taken there.

    answer = bridge.open(lambda: chat.stream("Hello", speak=True))
    async for piece in answer: ...
    await answer.cancel(played=1.3)

A worker thread starts and iterates the stream, so the event loop never waits for the device. A
client who reads slowly pauses the thread, and with it the answer: at most `size` pieces are held.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, TypeVar

from sa2jax.pipeline.reply import Reply, ReplyPiece

T = TypeVar("T")


class PieceStream(Protocol):
    """What the bridge needs of a stream; `sa2jax.pipeline.stream.Stream` is one."""

    def __next__(self) -> ReplyPiece:
        """The next piece; StopIteration when the answer is over."""
        ...

    def cancel(self, played: float | None = None) -> Reply:
        """Interrupt the answer, of which so many seconds were heard."""
        ...

    @property
    def reply(self) -> Reply:
        """The whole answer, or what there was of it."""
        ...


class Answer(AsyncIterator[ReplyPiece]):
    """An answer under way in a worker thread; made by `Bridge.open`.

    To be used in the event loop it was made in. It ends by itself, or by one of the cancels; one of
    them has to be called if not all pieces are taken.
    """

    def __init__(
        self,
        start: Callable[[], PieceStream],
        size: int,
        submit: Callable[..., Future[Reply]],
    ):
        self._start, self._submit = start, submit
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[ReplyPiece | None] = asyncio.Queue()  # None: the end
        self._room = threading.Semaphore(size)
        self._stop = threading.Event()
        self._played: float | None = None
        self._stream: PieceStream | None = None
        self._ended = False
        self._work = submit(self._run)
        self.finished: asyncio.Future[Reply] = asyncio.wrap_future(self._work)
        self.finished.add_done_callback(self._finish)

    async def __anext__(self) -> ReplyPiece:
        """The next piece.

        Raises:
            Sa2jaxError: what the stream raises.
        """
        if self._ended:
            raise StopAsyncIteration
        piece = await self._pieces.get()
        if self._ended:  # cancelled by another task
            raise StopAsyncIteration
        if piece is None:
            self._ended = True
            await asyncio.shield(self.finished)
            raise StopAsyncIteration
        self._room.release()
        return piece

    @property
    def stream(self) -> PieceStream | None:
        """The stream, once it has begun; to be used after the answer has ended."""
        return self._stream

    async def reply(self) -> Reply:
        """The whole answer, or what there was of it when it was cancelled; waits for its end."""
        return await asyncio.shield(self.finished)

    def cancel_soon(self, played: float | None = None) -> None:
        """Have the answer end after the block that is under way; returns at once.

        Pieces that were made and not taken are dropped.

        Args:
            played: seconds of its sound that were really heard, see `Stream.cancel`.
        """
        if not self._stop.is_set():
            self._played = played
            self._stop.set()
        self._ended = True
        self._room.release()  # the thread may wait for room

    async def cancel(self, played: float | None = None) -> Reply:
        """End the answer and wait until it has ended; also cuts one that has ended by itself.

        Args:
            played: seconds of its sound that were really heard, see `Stream.cancel`.

        Raises:
            PromptError: if the conversation has gone on.
        """
        self.cancel_soon(played)
        reply = await asyncio.shield(self.finished)
        stream = self._stream
        if played is None or stream is None:
            return reply
        # It may have ended before it saw the cancel; to cut it there twice is to cut it once.
        return await asyncio.wrap_future(self._submit(partial(stream.cancel, played)))

    def _run(self) -> Reply:
        """In the worker thread: start the stream, hand out its pieces, and sum it up."""
        stream = self._stream = self._start()
        while True:
            self._room.acquire()
            if self._stop.is_set():
                return stream.cancel(self._played)
            try:
                piece = next(stream)
            except StopIteration:
                return stream.reply
            try:
                self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
            except RuntimeError:  # the loop has closed: nobody waits
                return stream.cancel()

    def _finish(self, done: asyncio.Future[Reply]) -> None:
        """Tell who waits for pieces that there are no more; nobody has to ask for the outcome."""
        if not done.cancelled():
            done.exception()
        self._pieces.put_nowait(None)


class Bridge:
    """Worker threads of a server.

    Args:
        workers: how many; each answer under way takes one.
        size: pieces of an answer that are held for a slow reader.
    """

    def __init__(self, workers: int, size: int = 32):
        self._size = size
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="serve")

    def open(self, start: Callable[[], PieceStream]) -> Answer:
        """Start a stream in a worker thread.

        Args:
            start: makes the stream; called in that thread, since it may read recordings.
        """
        return Answer(start, self._size, self._pool.submit)

    async def call(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Call something that takes long in a worker thread."""
        work = partial(function, *arguments, **options)
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        """Let the threads end; what has not begun never will."""
        self._pool.shutdown(wait=False, cancel_futures=True)

"""What all requests of a server share."""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request, WebSocket

from sa2jax.audio.rates import SPEECH_SAMPLE_RATE
from sa2jax.inference.programs import TRACES as LANGUAGE_TRACES
from sa2jax.pipeline import StepAudio2
from sa2jax.serve.admission import Admission, Slot
from sa2jax.serve.auth import Keys
from sa2jax.serve.bridge import Answer, Bridge, PieceStream
from sa2jax.serve.errors import ApiError
from sa2jax.serve.metrics import Metrics
from sa2jax.serve.origins import Origins
from sa2jax.serve.replies import ReplyStore
from sa2jax.serve.settings import Settings
from sa2jax.serve.voices import VoiceRegistry, speech_of
from sa2jax.speech.programs import TRACES as SPEECH_TRACES

T = TypeVar("T")

SPARE_THREADS = 4  # for what needs no row: voices, counting, reading files


class Abandoned(Exception):
    """Nobody waits for this any more."""


@dataclass
class Readiness:
    """Whether the server is ready, and what it waits for.

    Attributes:
        ready: whether all programs were made.
        doing: what is being done.
        error: why it never will be ready, if so.
    """

    ready: bool = False
    doing: str = "starting"
    error: str | None = None


class ServerState:
    """The model, and the bounds within which requests use it.

    Args:
        model: the model.
        settings: bounds and defaults.

    Raises:
        CheckpointError: if the folder of voices cannot be made.
        VoiceError: for an alias of no voice.
    """

    def __init__(self, model: StepAudio2, settings: Settings):
        self.model, self.settings = model, settings
        self.keys = Keys(settings.api_keys, public_operations=settings.public_operations)
        self.origins = Origins(settings)
        self.admission = Admission(settings.rows, settings.queue, settings.queue_timeout)
        self.bridge = Bridge(settings.rows + SPARE_THREADS, settings.queued_pieces)
        self.voices = VoiceRegistry(
            speech_of(model),
            settings.voices,
            aliases=settings.voice_aliases,
            most=settings.max_voices,
        )
        self.replies = ReplyStore(settings.reply_seconds, settings.max_replies)
        self.readiness = Readiness()
        self._traces_when_ready: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.metrics = Metrics(
            settings.model_id,
            running=lambda: self.admission.running,
            waiting=lambda: self.admission.waiting,
            compiles=lambda: self.compiles_after_ready,
        )

    @property
    def compiles_after_ready(self) -> int:
        """Programs that were traced since the server was ready; 0 if all was made before."""
        if not self.readiness.ready:
            return 0
        return _traces().total() - self._traces_when_ready.total()

    @property
    def max_len(self) -> int:
        """Positions of a conversation, prompt and answer together."""
        own = self.model.cfg.decoder.max_positions
        return min(own, self.settings.max_len or own)

    @property
    def sample_rate(self) -> int:
        """Of what is spoken, in Hz."""
        return self.model.sample_rate if self.voices.can_speak else SPEECH_SAMPLE_RATE

    def set_ready(self) -> None:
        """All programs are made: let requests be sent here."""
        with self._lock:
            self._traces_when_ready = _traces()
            self.readiness = Readiness(ready=True, doing="ready")

    def open(self, start: Callable[[], PieceStream], slot: Slot) -> Answer:
        """Start a stream in a worker thread; its slot is free again when it has really ended.

        Args:
            start: makes the stream, in that thread.
            slot: from `admission.acquire`.
        """
        answer = self.bridge.open(start)
        answer.finished.add_done_callback(lambda done: slot.release())
        return answer

    async def work(self, function: Callable[[Callable[[], None]], T]) -> tuple[T, float]:
        """Run something in a worker thread, with a slot until it has really ended.

        Args:
            function: given a `check` to call now and then, which ends it once nobody waits.

        Returns:
            What it returns, and the seconds that the slot was waited for.

        Raises:
            ApiError: 503 if there is no slot.
        """
        slot = await self.admission.acquire()
        gone = threading.Event()

        def check() -> None:
            if gone.is_set():
                raise Abandoned

        def end(done: asyncio.Future[T]) -> None:
            slot.release()
            if not done.cancelled():
                done.exception()  # if nobody waits, nobody asks for it

        work = asyncio.ensure_future(self.bridge.call(function, check))
        work.add_done_callback(end)
        try:
            return await asyncio.shield(work), slot.waited
        except asyncio.CancelledError:
            gone.set()
            raise

    def require_model(self, name: object) -> None:
        """Refuse a model that is not here.

        Raises:
            ApiError: 404.
        """
        if name is not None and name != self.settings.model_id:
            raise ApiError(
                f"no model {name!r:.80}: expected {self.settings.model_id}",
                404,
                param="model",
                code="model_not_found",
            )


def state_of(connection: Request | WebSocket) -> ServerState:
    """What a request shares with all others."""
    return connection.app.state.server


def _traces() -> Counter[str]:
    """How often each program was traced in this process."""
    return LANGUAGE_TRACES + Counter({f"speech {k}": n for k, n in SPEECH_TRACES.items()})

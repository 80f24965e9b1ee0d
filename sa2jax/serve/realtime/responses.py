"""The responses of a session: one at a time in the conversation, a few outside of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sa2jax.pipeline.reply import ReplyPiece
from sa2jax.serve.realtime.actions import Action, CancelResponse, StartResponse
from sa2jax.serve.realtime.checks import EventError
from sa2jax.serve.realtime.items import Conversation, Item
from sa2jax.serve.realtime.outbox import Outbox
from sa2jax.serve.realtime.responder import CancelReason, Outcome, ResponseRequest
from sa2jax.serve.realtime.response import Response
from sa2jax.serve.realtime.session_config import SessionConfig

MAX_OUTSIDE = 4  # responses outside the conversation at the same time


@dataclass(frozen=True, eq=False)
class Wish:
    """A response that is asked for.

    Attributes:
        config: its settings.
        input: what it is to see instead of the conversation, None for that.
        metadata: of the client.
        outside: whether it is no part of the conversation.
    """

    config: SessionConfig
    input: Conversation | None = None
    metadata: Mapping[str, str] | None = None
    outside: bool = False


class Responses:
    """The responses of a session.

    Args:
        conversation: the session's.
        outbox: where their events go.
        act: takes what is to be done.
        clock: the time, in seconds.
    """

    def __init__(
        self,
        conversation: Conversation,
        outbox: Outbox,
        act: Callable[[Action], None],
        clock: Callable[[], float],
    ):
        self._conversation, self._outbox = conversation, outbox
        self._act, self._clock = act, clock
        self._running: dict[str, Response] = {}
        self._active: Response | None = None  # that of the conversation
        self._last: Response | None = None  # the conversation's newest that has ended
        self._waiting: Wish | None = None  # begins when the one that is cancelled has ended

    @property
    def is_speaking(self) -> bool:
        """Whether the client hears an answer, as far as is known: speech would interrupt it."""
        active = self._active is not None and not self._active.cancelled
        return active or self._is_playing

    @property
    def lead(self) -> float:
        """Seconds of the conversation's newest answer that cannot have been played yet."""
        return 0.0 if self._last is None else max(self._last.lead, 0.0)

    @property
    def _is_playing(self) -> bool:
        return self._active is None and self.lead > 0

    def create(self, wish: Wish) -> None:
        """Answer: at once, or after the response that is being cancelled.

        Raises:
            EventError: if the conversation has a response under way, or there are too many.
        """
        if wish.outside:
            if sum(r.conversation is None for r in self._running.values()) >= MAX_OUTSIDE:
                raise EventError(
                    f"{MAX_OUTSIDE} responses outside the conversation are under way: wait for one",
                    "too_many_responses",
                )
            self._start(wish)
            return
        active = self._active
        if active is not None and not active.cancelled:
            raise EventError(
                f"the conversation already has an active response, {active.id}: wait for its "
                "response.done, or cancel it",
                "conversation_already_has_active_response",
            )
        if active is None:
            self._start(wish)
        else:
            self._waiting = wish

    def _start(self, wish: Wish) -> None:
        home = None if wish.outside else self._conversation
        response = Response(wish.config, home, self._outbox, self._clock, wish.metadata)
        if home is not None:
            self._active = response
        self._running[response.id] = response
        response.begin()
        seen = self._conversation if wish.input is None else wish.input
        request = ResponseRequest(
            id=response.id,
            turns=seen.turns(),
            config=wish.config,
            in_conversation=home is not None and wish.input is None,
        )
        self._act(StartResponse(request))

    def cancel(self, response_id: str | None) -> None:
        """End a response at the client's wish, by default that of the conversation.

        Raises:
            EventError: if there is none to end; nothing has changed then.
        """
        if response_id is None and self._waiting is not None:
            self._waiting = None  # nobody was told of it yet
            return
        response = self._active if response_id is None else self._running.get(response_id)
        if response is None or response.cancelled:
            raise EventError(
                # Clients know this beginning, and take it for no error.
                "Cancellation failed: there is no response to cancel"
                if response_id is None
                else f"Cancellation failed: no response {response_id!r:.100} is under way",
                "response_cancel_not_active",
                param=None if response_id is None else "response_id",
            )
        self._cancel(response, "client_cancelled")

    def interrupt(self) -> tuple[Item, float] | None:
        """Somebody begins to speak: end the conversation's answer before anything else.

        Returns:
            The spoken answer that was interrupted, and the most that can have been heard of it, in
            seconds; None if there is none, or all of it can have been heard.
        """
        response = self._active
        if response is not None and not response.cancelled:
            self._cancel(response, "turn_detected")
        elif self._is_playing:
            response = self._last
        else:
            return None
        if response is None or response.message is None or response.config.modality == "text":
            return None
        if response.message.heard is not None or response.played >= response.sent:
            return None
        return response.message, response.played

    def _cancel(self, response: Response, reason: CancelReason) -> None:
        response.cancel(reason)
        self._act(CancelResponse(response.id, response.sent))

    def piece(self, response_id: str, piece: ReplyPiece) -> None:
        """A response has a next piece."""
        if (response := self._running.get(response_id)) is not None:
            response.piece(piece)

    def lead_of(self, response_id: str) -> float:
        """Seconds by which the sound of a response under way is ahead of the time."""
        response = self._running.get(response_id)
        return 0.0 if response is None else response.lead

    def ended(self, response_id: str, outcome: Outcome) -> None:
        """A response has ended, by itself or because it was cancelled."""
        if (response := self._running.pop(response_id, None)) is not None:
            try:
                response.finish(outcome)
            except EventError as error:  # the conversation has no room for its items
                response.fail(error)
            self._next(response)

    def failed(self, response_id: str, error: EventError) -> None:
        """A response has failed."""
        if (response := self._running.pop(response_id, None)) is not None:
            response.fail(error)
            self._next(response)

    def _next(self, response: Response) -> None:
        if response is self._active:
            self._active, self._last = None, response
            waiting, self._waiting = self._waiting, None
            if waiting is not None:
                self._start(waiting)

    @property
    def is_idle(self) -> bool:
        """Whether the conversation has no response under way."""
        return self._active is None

    def close(self) -> None:
        """End all of them."""
        self._waiting = None
        for response in self._running.values():
            if not response.cancelled:
                self._cancel(response, "client_cancelled")

"""One of the `n` answers to a request, while it is made."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import numpy as np

from sa2jax.chat.tools import MalformedToolCall
from sa2jax.pipeline.reply import Reply, ReplyPiece
from sa2jax.serve.admission import Slot
from sa2jax.serve.conversation import Conversation, TokenCounts, calls_of
from sa2jax.serve.state import ServerState

_FINISH = {
    "stop": "stop",
    "string": "stop",
    "length": "length",
    "repetition": "length",
    "cancelled": "length",
    "tool_calls": "tool_calls",
    "tool_limit": "tool_calls",
}


class Choice:
    """An answer, from its slot to its end.

    Args:
        state: of the server.
        conversation: what is answered.
        index: which of the answers it is.

    Attributes:
        reply: the whole answer, once it has ended.
        text: its text, up to a stop string.
        waited: seconds that it waited for its slot.
    """

    def __init__(self, state: ServerState, conversation: Conversation, index: int = 0):
        self._state, self._conversation, self.index = state, conversation, index
        self._stops = StopFilter(conversation.options.stop_strings)
        self.reply: Reply | None = None
        self.text, self.waited = "", 0.0

    async def pieces(self) -> AsyncGenerator[ReplyPiece]:
        """Its pieces, as soon as it has a slot.

        Raises:
            ApiError: if there is no slot, or the conversation does not fit.
            Sa2jaxError: if the request cannot be answered.
        """
        slot: Slot = await self._state.admission.acquire()
        self.waited = slot.waited
        watch = self._state.metrics.watch(slot.waited)
        answer = self._state.open(self._conversation.start, slot)
        reason = "abort"
        try:
            async for piece in answer:
                text = self._stops.push(piece.text)
                seconds = len(piece.audio) / self._state.sample_rate if len(piece.audio) else 0.0
                watch.piece(text or piece.thinking, seconds)
                self.text += text
                if text or len(piece.audio) or piece.thinking:
                    yield ReplyPiece(text=text, audio=piece.audio, thinking=piece.thinking)
            self.reply = await answer.reply()
            if rest := self._stops.flush() + self._unread_calls:
                self.text += rest
                yield ReplyPiece(text=rest)
            reason = self.finish_reason
        except Exception:
            reason = "error"
            raise
        finally:
            answer.cancel_soon()
            counts = TokenCounts() if self.reply is None else self.counts
            watch.end(
                reason,
                prompt_tokens=counts.prompt,
                cached_tokens=counts.cached,
                generated_tokens=counts.generated,
            )

    async def whole(self) -> np.ndarray:
        """Take all pieces; the sound of the answer, 24 kHz."""
        sound = [np.zeros(0, np.float32)]
        async with aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                sound.append(piece.audio)
        return np.concatenate(sound)

    @property
    def ended(self) -> Reply:
        """The whole answer."""
        assert self.reply is not None
        return self.reply

    @property
    def finish_reason(self) -> str:
        """Why it ended, in OpenAI's words."""
        reason = _FINISH[self.ended.finish_reason]
        return "stop" if reason == "tool_calls" and not calls_of(self.ended) else reason

    @property
    def _unread_calls(self) -> str:
        """Calls that nobody can read, as the text that they are, if there are no others."""
        calls = [] if calls_of(self.ended) else self.ended.tool_calls
        return "".join(call.text for call in calls if isinstance(call, MalformedToolCall))

    @property
    def counts(self) -> TokenCounts:
        """Its tokens."""
        return self._conversation.counts(self.ended)

    def keep(self, key: str) -> int:
        """Keep it as an answer that the client can refer to.

        Args:
            key: its id.

        Returns:
            When it expires, in seconds of Unix time.
        """
        return self._state.replies.keep(key, self._conversation.answer_turn).expires_at


class StopFilter:
    """Text before the first of some stop strings; what may begin one is held back.

    Args:
        stops: the strings, none of them empty.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held, self._found = tuple(stops), "", False

    def push(self, text: str) -> str:
        """The text that is certain to come before all of them."""
        if self._found:
            return ""
        held = self._held + text
        places = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        self._found = bool(places)
        end = min(places) if places else len(held) - self._begun(held)
        self._held = held[end:]
        return held[:end]

    def flush(self) -> str:
        """The text is over: what was held back and begins none."""
        return "" if self._found else self._held

    def _begun(self, text: str) -> int:
        """Characters at the end that may begin a stop string."""
        sizes = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(sizes, default=0)

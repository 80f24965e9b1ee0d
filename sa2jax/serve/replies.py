"""Spoken answers that clients refer to by `assistant.audio.id`, kept as the ids they are."""

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass

from sa2jax.chat.template import Message


@dataclass(frozen=True)
class KeptReply:
    """A spoken answer.

    Attributes:
        turn: the answer as the history has it: its own ids.
        expires_at: when it is forgotten, in seconds of Unix time.
    """

    turn: Message
    expires_at: int


class ReplyStore:
    """Answers by id, the newest ones; a few kB each.

    Args:
        seconds: how long each is kept.
        most: how many are kept.
    """

    def __init__(self, seconds: float, most: int):
        self._seconds, self._most = seconds, most
        self._kept: OrderedDict[str, KeptReply] = OrderedDict()

    def new_id(self) -> str:
        """The id of an answer that is about to be made."""
        return f"audio_{secrets.token_hex(12)}"

    def keep(self, key: str, turn: Message) -> KeptReply:
        """Keep an answer; the oldest ones go.

        Args:
            key: from `new_id`.
            turn: the answer as the history has it.
        """
        kept = self._kept[key] = KeptReply(turn, int(time.time() + self._seconds))
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return kept

    def find(self, key: str) -> KeptReply | None:
        """The answer of an id, None if there is none or it has expired."""
        kept = self._kept.get(key)
        if kept is not None and kept.expires_at < time.time():
            del self._kept[key]
            return None
        return kept

"""Incremental parser of a reply: text to show, codes to speak, tool calls.

    parser = ReplyParser(tokenizer)
    for ids in ...:
        text, codes = parser.push(ids)
    text = parser.end()
    parser.calls

Ids are told apart by their kind, as in `interleave.deinterleave`; nothing a model writes is
an error. A call of a tool is never shown: text is held back from `<tool_call>` on until the end.
"""

from collections.abc import Iterable
from typing import NamedTuple

from sa2jax.chat.interleave import GROUP
from sa2jax.chat.tokenizer import SpecialTokens, Tokenizer
from sa2jax.chat.tools import (
    CALL_START,
    MalformedToolCall,
    ToolCall,
    parse_tool_calls,
    remove_tool_calls,
)
from sa2jax.chat.utf8_stream import Utf8Stream


class Part(NamedTuple):
    """Increment of a reply.

    Attributes:
        text: characters to show.
        codes: speech codes to speak; an audio pad is the number after the last code.
    """

    text: str
    codes: list[int]


class ReplyParser:
    """Parses one reply while it is generated.

    Args:
        tokenizer: the checkpoint's tokenizer.

    Attributes:
        ids: all ids so far.
        codes: speech codes so far, pads left out.
        shown: how many ids come before the first one whose text is held back.
        text: all text so far, calls of tools included.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.ids: list[int] = []
        self.codes: list[int] = []
        self.shown = 0
        self._special = tokenizer.special
        self._utf8, self._visible = Utf8Stream(tokenizer), MarkerFilter(CALL_START)
        self.text = ""  # with calls
        self._ended = False

    def push(self, ids: Iterable[int]) -> Part:
        """Read the next ids."""
        special, text, codes = self._special, "", []
        for i in ids:
            self.ids.append(i)
            self._ended |= i in (special.eot, special.end_of_text)
            if self._ended:
                continue
            if special.is_text(i):
                fresh = self._utf8.push(i)
                self.text += fresh
                text += self._visible.push(fresh)
                if not (self._visible.held or self._utf8.waiting):
                    self.shown = len(self.ids)
            elif is_code(i, special):
                codes.append(i - special.audio_code_0)
        self.codes += (c for c in codes if c < special.num_codes)
        return Part(text, codes)

    def end(self) -> str:
        """The reply is over: what of its text was held back and is no call."""
        rest = self._utf8.flush()
        self.text += rest
        shown = self._visible.push(rest)
        return shown + remove_tool_calls(self._visible.flush())

    @property
    def calls(self) -> list[ToolCall | MalformedToolCall]:
        """Calls of tools in the reply so far."""
        return parse_tool_calls(self.text)

    def closed(self) -> tuple[int, ...]:
        """The ids of a spoken reply, speech ended if a limit cut it: a whole group and its end."""
        special = self._special
        if special.tts_end in self.ids:
            return tuple(self.ids)
        slots = next(
            (n for n, i in enumerate(reversed(self.ids)) if not is_code(i, special)), len(self.ids)
        )
        pads = [special.code_pad] * (GROUP - slots if 0 <= slots < GROUP and self.ids else 0)
        return (*self.ids, *pads, special.tts_end)

    def until(self, codes: int) -> tuple[int, ...]:
        """The ids of a spoken reply of which only the first codes were heard.

        A last group that is cut is filled with pads and speech is closed, as in training. What
        follows speech counts as far as it was shown, once all of it was heard.
        """
        special = self._special
        if codes >= len(self.codes) and special.tts_end in self.ids:
            return tuple(self.ids[: max(self.ids.index(special.tts_end) + 1, self.shown)])
        kept: list[int] = []
        end = slots = 0
        for i in self.ids:
            if not codes:
                break
            kept.append(i)
            if special.is_text(i) or i == special.tts_pad:
                slots = 0
            elif is_code(i, special):
                slots += 1
                if i - special.audio_code_0 < special.num_codes:
                    codes, end = codes - 1, len(kept)
        kept = kept[:end]
        pads = [special.code_pad] * (-slots % GROUP if kept else 0)
        return (*kept, *pads, special.tts_end)


def is_code(token: int, special: SpecialTokens) -> bool:
    """Whether an id fills an audio slot: a speech code or an audio pad."""
    return special.audio_code_0 <= token < special.audio_code_0 + special.num_codes or (
        token == special.audio_pad
    )


class MarkerFilter:
    """Text before a marker, as it comes; a tail that may begin the marker is held back.

    Args:
        marker: the text that ends what is let through.

    Attributes:
        held: what is held back: once the marker was found, it and all that follows.
        found: whether it was.
    """

    def __init__(self, marker: str):
        self.held, self.found = "", False
        self._marker = marker

    def push(self, text: str) -> str:
        """The part of the text so far that is certain to stand before the marker."""
        self.held += text
        if self.found:
            return ""
        end = self.held.find(self._marker)
        self.found = end >= 0
        if not self.found:
            begun = (n for n in range(len(self._marker), 0, -1))
            end = len(self.held) - next(
                (n for n in begun if self.held.endswith(self._marker[:n])), 0
            )
        free, self.held = self.held[:end], self.held[end:]
        return free

    def flush(self) -> str:
        """The text is over: what was held back."""
        rest, self.held = self.held, ""
        return rest

"""TA4 interleaving of text tokens and audio codes in one sequence.

Speech runs at 25 codes per second. One text slot is followed by four audio slots (160 ms), text
first; the shorter side is padded:

    words w0 w1, codes c0 … c9:
    <tts_start> w0 c0 c1 c2 c3 w1 c4 c5 c6 c7 <tts_pad> c8 c9 <audio_6561> <audio_6561> <tts_end>

Source: technical report section 3, and the released models' own output.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from sa2jax.chat.tokenizer import SpecialTokens
from sa2jax.errors import PromptError

GROUP = 4  # audio slots per text slot


class Reply(NamedTuple):
    """A generated reply, taken apart.

    Attributes:
        text_ids: the words that are spoken.
        codes: the speech codes, 25 per second, pads removed.
        trailing_text_ids: what follows `<tts_end>` unspoken: plain text or a tool call.
    """

    text_ids: list[int]
    codes: list[int]
    trailing_text_ids: list[int]


def interleave(
    text_ids: Sequence[int] | Int[np.ndarray, " T"],
    codes: Sequence[int] | Int[np.ndarray, " A"],
    special: SpecialTokens,
    *,
    group: int = GROUP,
) -> list[int]:
    """Interleave text tokens and audio codes: `<tts_start>` groups `<tts_end>`.

    There are max(ceil(codes / group), words) groups of 1 + group ids, so neither side is cut. A
    vocabulary without `<audio_6561>` (test models) fills empty audio slots with `<tts_pad>`.

    Args:
        text_ids: ids of the spoken text, see `SpecialTokens.is_text`.
        codes: speech codes from 0 to num_codes - 1, without pads.
        special: ids of the tokenizer.
        group: audio slots per text slot.

    Raises:
        PromptError: for an id that is no text or a code that does not exist.
    """
    if group < 1:
        raise PromptError(f"expected a group of at least one audio slot, got {group}")
    for i in text_ids:
        if not special.is_text(i):
            raise PromptError(f"text id {i} is no text: expected 0 to {special.audio_start - 1}")
    for c in codes:
        if not 0 <= c < special.num_codes:
            raise PromptError(f"no speech code {c}: expected 0 to {special.num_codes - 1}, no pads")
    groups = max(-(-len(codes) // group), len(text_ids))
    text = [int(i) for i in text_ids] + [special.tts_pad] * (groups - len(text_ids))
    audio = [special.audio_code_0 + int(c) for c in codes]
    audio += [special.code_pad] * (groups * group - len(codes))
    ids = [special.tts_start]
    for n, word in enumerate(text):
        ids += [word, *audio[n * group : (n + 1) * group]]
    return [*ids, special.tts_end]


def deinterleave(ids: Iterable[int], special: SpecialTokens) -> Reply:
    """Split a reply into text tokens and audio codes; the inverse of `interleave`.

    Made for what a model really writes, it never raises: ids are told apart by what they are, not
    by where they stand, so a cut last group, missing or doubled `<tts_start>` and `<tts_end>`,
    and groups of another size are all read. Precisely:

    * reading starts inside speech (the prompt ends with `<tts_start>`) and ends before the first
      `<|EOT|>` or `<|endoftext|>`;
    * text is spoken until `<tts_end>`, trailing after it, and spoken again after `<tts_start>`;
    * speech codes count wherever they stand;
    * pads, stray markers and ids without a meaning are dropped.
    """
    reply = Reply([], [], [])
    words = reply.text_ids
    for i in ids:
        i = int(i)
        if i in (special.eot, special.end_of_text):
            break
        if i == special.tts_end:
            words = reply.trailing_text_ids
        elif i == special.tts_start:
            words = reply.text_ids
        elif special.is_text(i):
            words.append(i)
        elif 0 <= i - special.audio_code_0 < special.num_codes:
            reply.codes.append(i - special.audio_code_0)
    return reply

"""Text of a reply as it comes, token by token."""

import codecs

from sa2jax.chat.tokenizer import Tokenizer


class Utf8Stream:
    """Text of a reply as it comes, one id at a time, never half a character.

    A character may span several text tokens with audio tokens between them: bytes are held back
    until they form valid UTF-8. Ids that are no text (`SpecialTokens.is_text`) give "". Everything
    pushed and flushed, joined, equals `decode` of the text ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this id completes, often none."""
        if not self._tokenizer.special.is_text(token_id):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    @property
    def waiting(self) -> bool:
        """Whether the beginning of a character is held back."""
        return bool(self._decoder.getstate()[0])

    def flush(self) -> str:
        """End the text: what is left of a broken character, as U+FFFD. Ready for a new text."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest

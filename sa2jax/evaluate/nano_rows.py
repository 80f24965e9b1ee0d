"""The rows of the nano table with their floors and aims, and how they are measured."""

from dataclasses import dataclass
from pathlib import Path

from sa2jax.errors import DataError
from sa2jax.evaluate.scores import Row

ROWS = (
    Row(key="seen", figure="transcription WER, held-out sentences of training voices",
        unit="%", floor=8, aim=3, lower=True),
    Row(key="unseen", figure="transcription WER, a voice never trained on",
        unit="%", floor=25, aim=12, lower=True),
    Row(key="digits", figure="isolated digits of real recordings, right",
        unit="%", floor=55, aim=85),
    Row(key="sums", figure="spoken answers to spoken sums, judged by pocketsphinx",
        unit="%", floor=85, aim=97),
    Row(key="sums_open", figure="the same, judged by Whisper tiny.en",
        unit="%", floor=70, aim=90),
    Row(key="tool_asked", figure="tool called when asked", unit="%", floor=95, aim=99),
    Row(key="tool_unasked", figure="no tool called when not asked", unit="%", floor=95, aim=99),
    Row(key="voice", figure="reply voice closer to the asked voice than to any other",
        unit="%", floor=80, aim=95),
    Row(key="streamed", figure="streamed replies against offline ones",
        unit="points", floor=-2, aim=0),
    Row(key="int8", figure="int8 against float weights, the worst row",
        unit="points", floor=-2, aim=0),
    Row(key="first_sound", figure="time to the first sound of a streamed reply, median",
        unit="s", floor=2, lower=True),
    Row(key="real_time", figure="real-time factor of replies, median",
        unit="", floor=1, lower=True),
)  # fmt: skip
KEYS = tuple(row.key for row in ROWS)
HEARD = ("seen", "unseen", "digits")
SPOKEN = ("sums", "sums_open", "streamed", "first_sound", "real_time")
TOOLS = ("tool_asked", "tool_unasked")
NOT_COMPARED = ("int8", "first_sound", "real_time", "streamed")


@dataclass(frozen=True, kw_only=True)
class NanoOptions:
    """What to measure, and how.

    Attributes:
        rows: keys of the rows, all by default.
        quick: items of each row at most.
        real: folder of real recordings with digits.jsonl, made by examples/fetch_real.sh; by
            default digits.jsonl of the held-out set.
        first: codes (25 Hz) of the first chunk of streamed replies.
        chunk: codes of their other chunks.
        max_new_tokens: limit of a reply; a second of speech takes 31.
        greedy: take the most likely token, instead of drawing as conversations do by default.
        seed: of what is drawn; reply n has seed + n.
    """

    rows: tuple[str, ...] = ()
    quick: int | None = None
    real: Path | None = None
    first: int = 5
    chunk: int = 10
    max_new_tokens: int = 256
    greedy: bool = False
    seed: int = 0

    def __post_init__(self):
        if strange := [key for key in self.rows if key not in KEYS]:
            raise DataError(f"there is no row {strange[0]!r}: expected some of {', '.join(KEYS)}")
        if self.quick is not None and self.quick < 1:
            raise DataError(f"quick={self.quick}: expected at least 1 item")

    @property
    def measured(self) -> tuple[str, ...]:
        """Rows to measure of one model; int8 alone needs all that can be compared."""
        rows = tuple(key for key in KEYS if key in (self.rows or KEYS) and key != "int8")
        return rows or tuple(key for key in KEYS if key not in NOT_COMPARED)

    @property
    def compares(self) -> bool:
        """Whether two models are to be compared."""
        return not self.rows or "int8" in self.rows

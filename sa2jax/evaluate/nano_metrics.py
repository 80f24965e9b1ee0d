"""The metrics of the nano table with their thresholds and targets, and how they are measured."""

from dataclasses import dataclass
from pathlib import Path

from sa2jax.errors import DataError
from sa2jax.evaluate.scores import Metric

METRICS = (
    Metric(key="seen", title="transcription WER, held-out sentences of training voices",
        unit="%", threshold=8, target=3, lower_is_better=True),
    Metric(key="unseen", title="transcription WER, a voice never trained on",
        unit="%", threshold=25, target=12, lower_is_better=True),
    Metric(key="digits", title="isolated digits of real recordings, right",
        unit="%", threshold=55, target=85),
    Metric(key="sums", title="spoken answers to spoken sums, judged by pocketsphinx",
        unit="%", threshold=85, target=97),
    Metric(key="sums_open", title="the same, judged by Whisper tiny.en",
        unit="%", threshold=70, target=90),
    Metric(key="tool_asked", title="tool called when asked", unit="%", threshold=95, target=99),
    Metric(key="tool_unasked", title="no tool called when not asked",
        unit="%", threshold=95, target=99),
    Metric(key="voice", title="reply voice closer to the asked voice than to any other",
        unit="%", threshold=80, target=95),
    Metric(key="streamed", title="streamed replies against offline ones",
        unit="points", threshold=-2, target=0),
    Metric(key="int8", title="int8 against float weights, the worst metric",
        unit="points", threshold=-2, target=0),
    Metric(key="first_sound", title="time to the first sound of a streamed reply, median",
        unit="s", threshold=2, lower_is_better=True),
    Metric(key="real_time", title="real-time factor of replies, median",
        unit="", threshold=1, lower_is_better=True),
)  # fmt: skip
KEYS = tuple(metric.key for metric in METRICS)
HEARD = ("seen", "unseen", "digits")
SPOKEN = ("sums", "sums_open", "streamed", "first_sound", "real_time")
TOOLS = ("tool_asked", "tool_unasked")
NOT_COMPARED = ("int8", "first_sound", "real_time", "streamed")


@dataclass(frozen=True, kw_only=True)
class NanoOptions:
    """What to measure, and how.

    Attributes:
        metrics: keys of the metrics, all by default.
        limit: items of each metric at most.
        real_recordings: folder of real recordings with digits.jsonl, of examples/fetch_real.sh;
            by default digits.jsonl of the held-out set.
        first: codes (25 Hz) of the first chunk of streamed replies.
        chunk: codes of their other chunks.
        max_new_tokens: limit of a reply; a second of speech takes 31.
        greedy: take the most likely token, instead of drawing as conversations do by default.
        seed: of what is drawn; reply n has seed + n.
    """

    metrics: tuple[str, ...] = ()
    limit: int | None = None
    real_recordings: Path | None = None
    first: int = 5
    chunk: int = 10
    max_new_tokens: int = 256
    greedy: bool = False
    seed: int = 0

    def __post_init__(self):
        if strange := [key for key in self.metrics if key not in KEYS]:
            raise DataError(
                f"there is no metric {strange[0]!r}: expected some of {', '.join(KEYS)}"
            )
        if self.limit is not None and self.limit < 1:
            raise DataError(f"limit={self.limit}: expected at least 1 item")

    @property
    def measured(self) -> tuple[str, ...]:
        """Metrics to measure of one model; int8 alone needs all that can be compared."""
        metrics = tuple(key for key in KEYS if key in (self.metrics or KEYS) and key != "int8")
        return metrics or tuple(key for key in KEYS if key not in NOT_COMPARED)

    @property
    def compares(self) -> bool:
        """Whether two models are to be compared."""
        return not self.metrics or "int8" in self.metrics

"""The metrics of the suite `nano` with their thresholds and targets, and the suite's options."""

from dataclasses import dataclass, replace
from pathlib import Path

from sa2jax.evaluate.scores import Metric


def _wer(key: str, of: str, threshold: float, target: float) -> Metric:
    title = f"transcription WER, {of}"
    metric = Metric(key=key, title=title, unit="%", threshold=threshold, target=target)
    return replace(metric, lower_is_better=True)


METRICS = (
    _wer("seen", "held-out sentences of training voices", threshold=8, target=3),
    _wer("unseen", "a voice never trained on", threshold=25, target=12),
    Metric(
        key="digits",
        title="isolated digits of real recordings, right",
        unit="%",
        threshold=55,
        target=85,
    ),
    Metric(
        key="sums",
        title="spoken answers to spoken sums, judged by pocketsphinx",
        unit="%",
        threshold=85,
        target=97,
    ),
    Metric(
        key="sums_open",
        title="the same, judged by Whisper tiny.en",
        unit="%",
        threshold=70,
        target=90,
    ),
    Metric(key="tool_asked", title="tool called when asked", unit="%", threshold=95, target=99),
    Metric(
        key="tool_unasked", title="no tool called when not asked", unit="%", threshold=95, target=99
    ),
    Metric(
        key="voice",
        title="reply voice closer to the asked voice than to any other",
        unit="%",
        threshold=80,
        target=95,
    ),
    Metric(
        key="streamed",
        title="streamed replies against offline ones",
        unit="points",
        threshold=-2,
        target=0,
    ),
    Metric(
        key="int8",
        title="int8 against float weights, the worst metric",
        unit="points",
        threshold=-2,
        target=0,
    ),
    Metric(
        key="first_sound",
        title="time to the first sound of a streamed reply, median",
        unit="s",
        threshold=2,
        lower_is_better=True,
    ),
    Metric(
        key="real_time",
        title="real-time factor of replies, median",
        unit="",
        threshold=1,
        lower_is_better=True,
    ),
)
TRANSCRIBED = ("seen", "unseen", "digits")
SPOKEN = ("sums", "sums_open", "streamed", "first_sound", "real_time")
TOOLS = ("tool_asked", "tool_unasked")


@dataclass(frozen=True, kw_only=True)
class NanoOptions:
    """Options of the suite `nano` alone."""

    real_recordings: Path | None = None
    """Folder of real recordings with digits.jsonl, made by examples/fetch_real.sh; by default
    digits.jsonl of the held-out set."""
    first: int = 5
    """Codes of the first chunk of streamed replies (25 are a second)."""
    chunk: int = 10
    """Codes of their other chunks."""

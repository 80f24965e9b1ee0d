"""Segments of a recording as subtitles: SubRip and WebVTT."""

from collections.abc import Sequence

from sa2jax.pipeline.reply import Segment


def srt(segments: Sequence[Segment]) -> str:
    """SubRip; segments without text are left out."""
    cues = [
        f"{number}\n{_time(s.start, ',')} --> {_time(s.end, ',')}\n{_line(s.text)}\n"
        for number, s in enumerate(_spoken(segments), 1)
    ]
    return "\n".join(cues)


def vtt(segments: Sequence[Segment]) -> str:
    """WebVTT; segments without text are left out."""
    cues = [
        f"\n{_time(s.start, '.')} --> {_time(s.end, '.')}\n{_escaped(_line(s.text))}\n"
        for s in _spoken(segments)
    ]
    return "WEBVTT\n" + "".join(cues)


def _spoken(segments: Sequence[Segment]) -> list[Segment]:
    return [segment for segment in segments if segment.text]


def _line(text: str) -> str:
    """An empty line would end the cue, an arrow begin another."""
    return " ".join(text.split()).replace("-->", "->")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _time(seconds: float, point: str) -> str:
    whole = round(1000 * max(seconds, 0))
    hours, rest = divmod(whole, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02}{point}{rest % 1000:03}"

"""A source of a task as parts that the model answers one by one, read as they are needed."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from sa2jax import audio
from sa2jax.audio import levels, pauses
from sa2jax.audio.rates import SAMPLE_RATE
from sa2jax.audio.reader import AudioSource, Blocks, source_name
from sa2jax.audio.recording import Recording
from sa2jax.chat.template import Audio, Piece, Text
from sa2jax.errors import AudioError
from sa2jax.pipeline.base import as_recording

MAX_STREAM_SECONDS = 86_400.0  # of a recording of which no more than 25 s are held
Source = audio.Audio | AudioSource | Recording | Text


@dataclass(frozen=True)
class Part:
    """A part of a source.

    Attributes:
        piece: what the model is given.
        start: its first moment in the recording, in seconds; 0 for a text.
        end: its last.
    """

    piece: Piece
    start: float = 0.0
    end: float = 0.0

    @property
    def chunks(self) -> int:
        """The clips of at most 25 s that the model hears of it."""
        samples = round((self.end - self.start) * SAMPLE_RATE)
        return max(1, -(-samples // audio.CHUNK_SAMPLES))


@dataclass(eq=False)
class Listener:
    """Reads a source once, in parts.

    Args:
        source: a recording or a text.
        longest: samples of a part at most; None for clips of at most 25 s, cut at pauses and
            without what is no speech.

    Attributes:
        notes: what the user should know; complete when all parts were read.
        error: why it could not be read, if so.
        made: how many parts there were so far.
    """

    source: Source
    longest: int | None
    notes: list[str] = field(default_factory=list, init=False)
    error: AudioError | None = field(default=None, init=False)
    made: int = field(default=0, init=False)
    _seconds: float | None = field(default=None, init=False)  # of it, None if nobody knows
    _read: float = field(default=0.0, init=False)  # s that were read
    _ended: bool = field(default=False, init=False)

    @property
    def name(self) -> str:
        """What messages call the source."""
        return source_name(self.source)

    @property
    def expected(self) -> int:
        """How many parts there are in all, as far as one can tell."""
        left = 0.0 if self._seconds is None else max(self._seconds - self._read, 0.0)
        chunks = -int(-left * SAMPLE_RATE // (self.longest or audio.CHUNK_SAMPLES))
        return self.made if self._ended or self.error else max(self.made + chunks, 1)

    def check(self) -> None:
        """Open and close it: what cannot be read is noticed before anything is computed.

        Raises:
            AudioError: if it cannot be opened.
        """
        if isinstance(self.source, Text | Recording) or hasattr(_inner(self.source), "read"):
            return  # a pipe can be read once
        with audio.open_mono(self.source, max_seconds=MAX_STREAM_SECONDS) as (reader, _):
            self._seconds = reader.seconds

    def parts(self) -> Iterator[Part]:
        """Its parts, in order; none if it is read by clips and nobody speaks.

        Raises:
            AudioError: if it cannot be read, also further on.
        """
        for part in self._parts():
            self.made += 1
            yield part
        self._ended = True

    def _parts(self) -> Iterator[Part]:
        source = self.source
        if isinstance(source, Text):
            yield Part(source)
        elif self.longest is not None:
            recording = as_recording(source)
            self.notes += recording.notes
            self._seconds = recording.seconds
            for part in recording.split(self.longest):
                start, self._read = self._read, self._read + part.seconds
                yield Part(Audio(part), start, self._read)
        elif isinstance(source, Recording):
            self._seconds = source.seconds
            self.notes += source.notes
            yield from self._segments(iter([source.samples[None]]))
        else:
            with audio.open_mono(source, max_seconds=MAX_STREAM_SECONDS) as (reader, blocks):
                self._seconds = reader.seconds
                yield from self._segments(blocks)
                self.notes[:0] = reader.notes
            if not self._read:
                raise AudioError(
                    f"expected audio, but {reader.name} holds no samples; record it again"
                )

    def _segments(self, blocks: Blocks) -> Iterator[Part]:
        sound = 0.0  # s, until it is enough to tell silence from what is no speech

        def rows() -> Iterator:
            nonlocal sound
            for block in blocks:
                self._read += block.shape[1] / SAMPLE_RATE
                if sound < levels.MIN_SOUND:
                    sound += levels.sound_seconds(block[0])
                yield block[0]

        for clip in pauses.split_at_pauses(rows()):
            start = clip.start / SAMPLE_RATE
            part = Recording.part(clip.samples)
            yield Part(Audio(part), start, start + part.seconds)
        note = pauses.no_speech_note(self._read, sound >= levels.MIN_SOUND)
        if not self.made and note not in self.notes:
            self.notes.append(note)


def _inner(source: Source) -> object:
    return source.source if isinstance(source, AudioSource) else source

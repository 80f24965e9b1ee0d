"""A recording written down segment by segment, as a stream."""

from collections.abc import Generator

from sa2jax.audio import AudioSource
from sa2jax.chat.template import PromptTask
from sa2jax.pipeline import StepAudio2
from sa2jax.pipeline.listening import Listener
from sa2jax.pipeline.reply import (
    Reply,
    ReplyPiece,
    Segment,
    finish_reason_of,
    segment_notes,
)
from sa2jax.pipeline.stream import Stream
from sa2jax.pipeline.task_runner import task_options


class SegmentStream:
    """The text of a recording as it is heard, with what `TaskRunner.run` would answer at the end.

    Args:
        model: the model.
        source: the recording, of any length.
        task: a written task that is answered by segments.
    """

    def __init__(self, model: StepAudio2, source: AudioSource, task: PromptTask):
        self._model, self._task = model, task
        self._listener = Listener(source, None)
        self._options = task_options(task)
        self._current: Stream | None = None
        self._segments: list[Segment] = []
        self._ids: list[int] = []
        self._cancelled = False
        self._pieces = self._run()

    def __next__(self) -> ReplyPiece:
        """The next words.

        Raises:
            AudioError: if the recording cannot be read, also further on.
        """
        return next(self._pieces)

    def cancel(self, played: float | None = None) -> Reply:
        """Leave it."""
        self._cancelled = True
        if self._current is not None:
            self._current.close()
        self._pieces.close()
        return self.reply

    @property
    def reply(self) -> Reply:
        """What was written down so far."""
        notes = segment_notes(self._segments, self._options.max_new_tokens)
        return Reply(
            text=" ".join(segment.text for segment in self._segments if segment.text),
            ids=tuple(self._ids),
            finish_reason="cancelled" if self._cancelled else finish_reason_of(self._segments),
            segments=tuple(self._segments),
            notes=(*self._listener.notes, *notes),
        )

    def _run(self) -> Generator[ReplyPiece]:
        written = False
        for part in self._listener.parts():
            chat = self._model.chat(self._task.system, options=self._options)
            stream = self._current = chat.stream([part.piece], speak=False)
            text, held = "", " " * written
            for piece in stream:
                fresh = piece.text if text else piece.text.lstrip()
                text += fresh
                held += fresh
                if shown := held.rstrip():
                    # Space at the end of what is known may be that of the segment.
                    written, held = True, held[len(shown) :]
                    yield ReplyPiece(text=shown)
            reply = stream.reply
            self._ids += reply.ids
            self._segments.append(
                Segment(
                    start=part.start,
                    end=part.end,
                    text=text.strip(),
                    finish_reason=reply.finish_reason,
                )
            )

"""Run a prompt task over recordings and texts: prompts, batches, long recordings, speech.

    model.run("caption", ["a.wav", "b.wav"])  # any task of `chat.template.TASKS`, by name

A recording is read once, a piece at a time; a long one is answered in parts, see `listening`.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from sa2jax import audio
from sa2jax.audio.pauses import no_speech_note
from sa2jax.audio.recording import Recording
from sa2jax.chat.content import Content, as_pieces
from sa2jax.chat.reply_parser import ReplyParser
from sa2jax.chat.template import SPEECH_START, TASKS, Audio, Piece, PromptTask, Text
from sa2jax.errors import AudioError, PromptError
from sa2jax.inference.requests import Completion, GenerationConfig, Request
from sa2jax.pipeline.base import PipelineBase, Progress, opened, recording_notes
from sa2jax.pipeline.listening import Listener, Part, Source
from sa2jax.pipeline.reply import (
    NO_SOUND,
    Reply,
    Segment,
    Timings,
    finish_note,
    finish_reason_of,
    segment_notes,
)
from sa2jax.speech.api import AnyVoice

_BATCHES = 4  # of which the prompts are held at once: like lengths are answered together


class TaskRunner(PipelineBase):
    """Runs prompt tasks and raw prompts."""

    def run(
        self,
        task: str | PromptTask,
        sources: Sequence[Source],
        *,
        question: str = "",
        voice: AnyVoice = "default",
        max_new_tokens: int | None = None,
        seed: int = 0,
        skip_unreadable: bool = False,
        progress: Progress | None = None,
    ) -> list[Reply]:
        """Run a task over recordings or texts, in batches.

        Args:
            task: a name in `chat.template.TASKS`, or a task of one's own.
            sources: a list of recordings (path, bytes, file, `(array, rate)`, or an `AudioSource`
                that names a channel or a limit) and texts (`Text("…")`). Recordings of a written
                task may have any length: they are answered in parts that fit in the model's
                context; for transcripts and translations in segments of at most 25 s that end in
                pauses, without what is no speech. Those of a spoken task have to fit with their
                answer.
            question: text that follows each source.
            voice: who speaks, in a spoken task.
            max_new_tokens: limit of each reply; by default the task's, in a written task for each
                25 s of a recording. A second of speech takes 31.
            seed: same seed, same replies, where the task samples.
            skip_unreadable: answer the others if a recording cannot be read; its reply has the
                `finish_reason` "error", and says why in its notes.
            progress: called with (prompts done, prompts in all, as far as one can tell).

        Returns:
            A `Reply` for each source. One in which nobody speaks has an empty text where the task
            puts speech into words, and notes that say why.

        Raises:
            PromptError: for an unknown task, or if `sources` is no list.
            AudioError: if a recording cannot be read.
            VoiceError: if there is no such voice.
            CheckpointError: if the model has no detokenizer and the task is spoken.
        """
        task = find_task(task)
        if not isinstance(sources, list):
            raise PromptError(f"expected a list of recordings or texts, got {sources!r:.80}")
        extra = [Text(question)] if question else []
        if task.spoken:
            return self._spoken(
                task, sources, extra, voice, max_new_tokens, seed, skip_unreadable, progress
            )
        return self._written(task, sources, extra, max_new_tokens, seed, skip_unreadable, progress)

    def complete(
        self,
        content: Content,
        *,
        speak: bool = False,
        voice: AnyVoice = "default",
        options: GenerationConfig | None = None,
    ) -> Reply:
        """Continue a raw prompt, which is how a base model is used.

        Args:
            content: text and recordings in order, as for `Chat.stream`; nothing is added but
                `<tts_start>`, if the answer is to be speech. What was spoken earlier is
                `chat.template.SPEECH_START` and its ids: special tokens in a text are text.
            speak: whether it is.
            voice: who speaks.
            options: sampling and limits, by default those of the Base examples (0.7, 2048 tokens).
        """
        pieces = opened(as_pieces(content))
        if not pieces:
            raise PromptError("an empty prompt: expected text, a recording, or both")
        options = task_options(TASKS["tts"]) if options is None else options
        request = self.request([*pieces, *([SPEECH_START] if speak else [])])
        (reply,) = self._replies([request], options, voice if speak else None)
        return replace(reply, notes=(*recording_notes(pieces), *reply.notes))

    # --- parts ----------------------------------------------------------------------------

    def _task_request(self, task: PromptTask, pieces: Sequence[Piece]) -> Request:
        """The prompt of a task in the model's prompt style."""
        if self.prompt_style == "base":
            return self.request(task.base_pieces(*pieces))
        return self.request(self.family.chat_template(task.messages(*pieces)))

    def _needs_speech(self, task: PromptTask) -> bool:
        """Whether silence has no answer, and long recordings one a segment: not in parity."""
        return task.needs_speech and not self.parity

    def _spoken(
        self,
        task: PromptTask,
        sources: Sequence[Source],
        extra: Sequence[Text],
        voice: AnyVoice,
        max_new_tokens: int | None,
        seed: int,
        skip_unreadable: bool,
        progress: Progress | None,
    ) -> list[Reply]:
        """Run a task with spoken answers."""
        if not sources:
            return []
        chosen = self.speech.voice(voice)  # before anything is computed
        replies: dict[int, Reply] = {}
        requests: dict[int, Request] = {}
        notes: dict[int, list[str]] = {}
        for n, source in enumerate(sources):
            try:
                pieces = opened([_as_piece(source)])
            except AudioError as error:
                if not skip_unreadable:
                    raise
                replies[n] = _unreadable(error)
                continue
            notes[n] = recording_notes(pieces)
            heard = [piece.source for piece in pieces if isinstance(piece, Audio)]
            if self._needs_speech(task) and (why := _no_speech(heard)):
                notes[n] += [note for note in why if note not in notes[n]]
                replies[n] = Reply(text="", ids=(), finish_reason="stop", notes=tuple(notes[n]))
                continue
            requests[n] = self._task_request(task, [*pieces, *extra])
        limit = task.max_new_tokens if max_new_tokens is None else max_new_tokens
        options = replace(task_options(task), max_new_tokens=limit, seed=seed)
        made = self._replies(list(requests.values()), options, chosen, progress)
        for n, reply in zip(requests, made, strict=True):
            replies[n] = replace(reply, notes=(*notes[n], *reply.notes))
        return [replies[n] for n in range(len(sources))]

    def _replies(
        self,
        requests: Sequence[Request],
        options: GenerationConfig,
        voice: AnyVoice | None,
        progress: Progress | None = None,
    ) -> list[Reply]:
        """Answer single prompts in batches, and speak the answers if there is a voice."""
        started = time.perf_counter()
        chosen = None if voice is None else self.speech.voice(voice)
        made = self.generate(requests, options, progress=progress)
        readers = [ReplyParser(self.tokenizer) for _ in made]
        parts = [r.push(reply.ids) for r, (reply,) in zip(readers, made, strict=True)]
        waves = [NO_SOUND] * len(made)
        if chosen is not None:
            waves = self.speech.speak([part.codes for part in parts], chosen, seed=options.seed)
        rate = self.speech.sample_rate if chosen is not None else Reply.sample_rate
        total = time.perf_counter() - started
        replies = []
        for request, reader, part, (reply,), wave in zip(
            requests, readers, parts, made, waves, strict=True
        ):
            timings = Timings(
                first_text=None,
                first_audio=None,
                total=total,
                speech=len(wave) / rate,
                prompt_tokens=len(request.ids),
                generated_tokens=len(reply.ids),
            )
            note = finish_note(reply.finish_reason, options.max_new_tokens)
            replies.append(
                Reply(
                    text=part.text + reader.end(),
                    ids=reply.ids,
                    finish_reason=reply.finish_reason,
                    audio=wave,
                    sample_rate=rate,
                    codes=tuple(reader.codes),
                    voice=None if chosen is None else chosen.name,
                    tool_calls=tuple(reader.calls),
                    notes=() if note is None else (note,),
                    timings=timings,
                )
            )
        return replies

    def _written(
        self,
        task: PromptTask,
        sources: Sequence[Source],
        extra: Sequence[Text],
        max_new_tokens: int | None,
        seed: int,
        skip_unreadable: bool,
        progress: Progress | None,
    ) -> list[Reply]:
        """Run a task with written answers; long recordings in parts, a few at a time."""
        started = time.perf_counter()
        longest = None
        if any(not isinstance(source, Text) for source in sources):
            fits = self._chunks_that_fit(task, extra)
            longest = None if self._needs_speech(task) else fits * audio.CHUNK_SAMPLES
        listeners = [Listener(source, longest) for source in sources]
        for listener in listeners:
            try:
                listener.check()
            except AudioError as error:
                if not skip_unreadable:
                    raise
                listener.error = error
        limit = task.max_new_tokens if max_new_tokens is None else max_new_tokens
        answers: list[list[_Answer]] = [[] for _ in sources]
        parts = _parts_of(listeners, skip_unreadable)
        done = 0
        while batch := list(islice(parts, _BATCHES * self.batch_size)):
            # A limit of its own: the answer does not depend on what else is in the list.
            requests = [
                replace(
                    self._task_request(task, [part.piece, *extra]),
                    max_new_tokens=limit * (part.chunks if max_new_tokens is None else 1),
                )
                for _, part in batch
            ]
            most = max(request.max_new_tokens or 0 for request in requests)
            options = replace(task_options(task), max_new_tokens=most, seed=seed)

            def report(count: int, _: int, before: int = done) -> None:
                if progress is not None:
                    progress(before + count, sum(listener.expected for listener in listeners))

            completions = self.generate(requests, options, first_index=done, progress=report)
            for (index, part), request, (completion,) in zip(
                batch, requests, completions, strict=True
            ):
                answers[index].append(self._answer(part, request, completion))
            done += len(batch)
        total = time.perf_counter() - started
        return [
            _written_reply(listener, own, limit, total)
            for listener, own in zip(listeners, answers, strict=True)
        ]

    def _answer(self, part: Part, request: Request, completion: Completion) -> "_Answer":
        text = self.text_of(completion.ids).strip()
        segment = Segment(
            start=part.start, end=part.end, text=text, finish_reason=completion.finish_reason
        )
        return _Answer(segment, completion.ids, len(request.ids))

    def _chunks_that_fit(self, task: PromptTask, extra: Sequence[Text]) -> int:
        """How many clips of 25 s fit in the context with their answers.

        Raises:
            PromptError: if not even one does.
        """
        prompt = self.tokenizer.encode_pieces([task.system, *(text.text for text in extra)])
        room = self.cfg.decoder.max_positions - len(prompt) - 64  # turn marks
        per_chunk = audio.num_tokens(audio.num_frames(audio.CHUNK_SAMPLES)) + 2
        fits = room // (per_chunk + task.max_new_tokens)
        if fits < 1:
            raise PromptError(
                f"the model's context of {self.cfg.decoder.max_positions} tokens is too short for "
                f"25 s of audio ({per_chunk} tokens) and an answer of {task.max_new_tokens}"
            )
        return fits


@dataclass(frozen=True)
class _Answer:
    """What the model answered to a part."""

    segment: Segment
    ids: tuple[int, ...]
    prompt_tokens: int


def _parts_of(listeners: Sequence[Listener], skip_unreadable: bool) -> Iterator[tuple[int, Part]]:
    """The parts of all sources, each with the number of its source."""
    for index, listener in enumerate(listeners):
        if listener.error is not None:
            continue
        try:
            for part in listener.parts():
                yield index, part
        except AudioError as error:
            if not skip_unreadable:
                raise
            listener.error = error


def _written_reply(
    listener: Listener, answers: Sequence[_Answer], limit: int, total: float
) -> Reply:
    """The answers to the parts of a source as one."""
    if listener.error is not None:
        return _unreadable(listener.error)
    segments = [answer.segment for answer in answers]
    ids = tuple(i for answer in answers for i in answer.ids)
    timings = Timings(
        first_text=None,
        first_audio=None,
        total=total,
        speech=0.0,
        prompt_tokens=sum(answer.prompt_tokens for answer in answers),
        generated_tokens=len(ids),
    )
    return Reply(
        text=" ".join(segment.text for segment in segments if segment.text),
        ids=ids,
        finish_reason=finish_reason_of(segments),
        segments=() if isinstance(listener.source, Text) else tuple(segments),
        notes=(*listener.notes, *segment_notes(segments, limit)),
        timings=timings,
    )


def _unreadable(error: AudioError) -> Reply:
    return Reply(text="", ids=(), finish_reason="error", notes=(str(error),))


def find_task(task: str | PromptTask) -> PromptTask:
    """A task of `chat.template.TASKS` by its name; another as it is.

    Raises:
        PromptError: for an unknown name.
    """
    if isinstance(task, PromptTask):
        return task
    if task not in TASKS:
        raise PromptError(f"there is no task {task!r}: expected one of {', '.join(TASKS)}")
    return TASKS[task]


def task_options(task: PromptTask) -> GenerationConfig:
    """Sampling and limits of a task, as the official examples have them.

    A loop that fills half of the limit ends the answer, and earlier if that is long.
    """
    most = task.max_new_tokens
    repeat = min(GenerationConfig.max_repeat, most // 2)
    return GenerationConfig(sampling=task.sampling, max_new_tokens=most, max_repeat=repeat)


def _no_speech(recordings: Sequence[Recording]) -> list[str]:
    """Why recordings hold no speech, for each that does not."""
    return [
        no_speech_note(recording.seconds, recording.has_sound)
        for recording in recordings
        if not recording.has_speech
    ]


def _as_piece(source: Source) -> Piece:
    return source if isinstance(source, Text) else Audio(source)

"""Run a prompt task over recordings and texts: prompts, batches, long recordings, speech.

    model.run("caption", ["a.wav", "b.wav"])  # any task of `chat.template.TASKS`, by name

A recording is opened and checked once; one that is too long for the context is answered in parts.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from sa2jax import audio
from sa2jax.audio.recording import Recording
from sa2jax.chat.content import Content, as_pieces
from sa2jax.chat.reply_parser import ReplyParser
from sa2jax.chat.template import TASKS, Audio, Piece, PromptTask, Text
from sa2jax.errors import PromptError
from sa2jax.inference.requests import GenerationConfig, Request
from sa2jax.pipeline.base import PipelineBase, Progress, as_recording
from sa2jax.pipeline.reply import NO_SOUND, Reply, Timings
from sa2jax.speech.api import AnyVoice


class TaskRunner(PipelineBase):
    """Runs prompt tasks and raw prompts."""

    def run(
        self,
        task: str | PromptTask,
        sources: Sequence[audio.Audio | Text],
        *,
        question: str = "",
        voice: AnyVoice = "default",
        max_new_tokens: int | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> list[Reply]:
        """Run a task over recordings or texts, in batches.

        Args:
            task: a name in `chat.template.TASKS`, or a task of one's own.
            sources: a list of recordings (path, bytes, file or `(array, rate)`) and texts
                (`Text("…")`). Recordings of a written task may have any length: what does not fit
                in the model's context is answered in parts. Those of a spoken task have to fit
                with their answer.
            question: text that follows each source.
            voice: who speaks, in a spoken task.
            max_new_tokens: limit of each reply; by default the task's, in a written task for each
                25 s of a recording. A second of speech takes 31.
            seed: same seed, same replies, where the task samples.
            progress: called with (prompts done, prompts in all).

        Returns:
            A `Reply` for each source.

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
            return self._spoken(task, sources, extra, voice, max_new_tokens, seed, progress)
        return self._written(task, sources, extra, max_new_tokens, seed, progress)

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
                `<tts_start>`, if the answer is to be speech.
            speak: whether it is.
            voice: who speaks.
            options: sampling and limits, by default those of the Base examples (0.7, 2048 tokens).
        """
        pieces = [*as_pieces(content), *([Text("<tts_start>")] if speak else [])]
        if not as_pieces(content):
            raise PromptError("an empty prompt: expected text, a recording, or both")
        options = task_options(TASKS["tts"]) if options is None else options
        return self._replies([self.request(pieces)], options, voice if speak else None)[0]

    # --- parts ----------------------------------------------------------------------------

    def _task_request(self, task: PromptTask, pieces: Sequence[Piece]) -> Request:
        """The prompt of a task in the model's prompt style."""
        if self.prompt_style == "base":
            return self.request(task.base_pieces(*pieces))
        return self.request(self.family.chat_template(task.messages(*pieces)))

    def _spoken(
        self,
        task: PromptTask,
        sources: Sequence[audio.Audio | Text],
        extra: Sequence[Text],
        voice: AnyVoice,
        max_new_tokens: int | None,
        seed: int,
        progress: Progress | None,
    ) -> list[Reply]:
        """Run a task with spoken answers."""
        if not sources:
            return []
        chosen = self.speech.voice(voice)  # before anything is computed
        requests = [self._task_request(task, [_as_piece(source), *extra]) for source in sources]
        limit = task.max_new_tokens if max_new_tokens is None else max_new_tokens
        options = replace(task_options(task), max_new_tokens=limit, seed=seed)
        return self._replies(requests, options, chosen, progress)

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
                    timings=timings,
                )
            )
        return replies

    def _written(
        self,
        task: PromptTask,
        sources: Sequence[audio.Audio | Text],
        extra: Sequence[Text],
        max_new_tokens: int | None,
        seed: int,
        progress: Progress | None,
    ) -> list[Reply]:
        """Run a task with written answers; long recordings in parts."""
        started = time.perf_counter()
        requests: list[Request] = []
        owners: list[int] = []
        for index, source in enumerate(sources):
            for part in self._parts(source, task, extra):
                # A limit of its own: the answer does not depend on what else is in the list.
                limit = max_new_tokens
                if limit is None:
                    samples = 0 if isinstance(part, Text) else len(part.samples)
                    limit = task.max_new_tokens * max(1, -(-samples // audio.CHUNK_SAMPLES))
                request = self._task_request(task, [_as_piece(part), *extra])
                requests.append(replace(request, max_new_tokens=limit))
                owners.append(index)
        if not requests:
            return []
        longest = max(request.max_new_tokens or 0 for request in requests)
        options = replace(task_options(task), max_new_tokens=longest, seed=seed)
        completions = self.generate(requests, options, progress=progress)
        total = time.perf_counter() - started
        replies = []
        for index in range(len(sources)):
            own = [n for n, owner in enumerate(owners) if owner == index]
            parts = [completions[n][0] for n in own]
            texts = [self.text_of(part.ids).strip() for part in parts]
            ids = tuple(i for part in parts for i in part.ids)
            timings = Timings(
                first_text=None,
                first_audio=None,
                total=total,
                speech=0.0,
                prompt_tokens=sum(len(requests[n].ids) for n in own),
                generated_tokens=len(ids),
            )
            replies.append(
                Reply(
                    text=" ".join(text for text in texts if text),
                    ids=ids,
                    finish_reason=parts[-1].finish_reason,
                    timings=timings,
                )
            )
        return replies

    def _parts(
        self, source: audio.Audio | Text, task: PromptTask, extra: Sequence[Text]
    ) -> Sequence[Recording | Text]:
        """A source in parts that fit in the context with room for their answers.

        A recording is opened and checked here, once; its parts are views of it.
        """
        if isinstance(source, Text):
            return [source]
        recording = as_recording(source)
        prompt = self.tokenizer.encode_pieces([task.system, *(text.text for text in extra)])
        room = self.cfg.decoder.max_positions - len(prompt) - 64  # turn marks
        per_chunk = audio.num_tokens(audio.num_frames(audio.CHUNK_SAMPLES)) + 2
        fits = room // (per_chunk + task.max_new_tokens)
        if fits < 1:
            raise PromptError(
                f"the model's context of {self.cfg.decoder.max_positions} tokens is too short for "
                f"25 s of audio ({per_chunk} tokens) and an answer of {task.max_new_tokens}"
            )
        return recording.split(fits * audio.CHUNK_SAMPLES)


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
    """Sampling and limits of a task, as the official examples have them."""
    return GenerationConfig(sampling=task.sampling, max_new_tokens=task.max_new_tokens)


def _as_piece(source: audio.Audio | Recording | Text) -> Piece:
    return source if isinstance(source, Text) else Audio(source)

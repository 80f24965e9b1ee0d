"""What a model is asked to do in one go: write down, translate, describe, answer, read aloud.

The prompts are those of `chat.template.TASKS`. Recordings and texts come alone or in lists, which
are answered in batches.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

from sa2jax import audio
from sa2jax.chat import template
from sa2jax.chat.content import Content, as_pieces
from sa2jax.chat.reply_parser import ReplyParser
from sa2jax.chat.template import TASKS, Audio, Piece, PromptTask
from sa2jax.checkpoint import Progress
from sa2jax.errors import PromptError
from sa2jax.inference.requests import GenerationConfig, Request
from sa2jax.pipeline.base import Base
from sa2jax.pipeline.reply import NO_SOUND, Reply, Timings
from sa2jax.speech.api import AnyVoice


class Tasks(Base):
    """The tasks of `StepAudio2`, in terms of prompts and what continues them."""

    # --- tasks -----------------------------------------------------------------------------

    @overload
    def transcribe(
        self, sources: list, *, max_new_tokens: int | None = None, progress: Progress | None = None
    ) -> list[str]: ...
    @overload
    def transcribe(
        self,
        sources: audio.Audio,
        *,
        max_new_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> str: ...
    def transcribe(self, sources, *, max_new_tokens=None, progress=None):
        """Write down what is said.

        Recordings of any length: what does not fit in the model's context is transcribed in parts.

        Args:
            sources: a recording (path, bytes, file or `(array, rate)`), or a list of them, which
                are answered in batches.
            max_new_tokens: limit of the text per recording part; by default 256 for each 25 s.
            progress: told about recordings (or parts of long ones) done and how many in all.

        Returns:
            The text, or a list of texts.

        Raises:
            AudioError: if a recording cannot be read.
        """
        return self._over_audio(TASKS["asr"], sources, (), max_new_tokens, progress)

    @overload
    def translate(
        self,
        sources: list,
        *,
        to: str = "zh",
        speech: Literal[False] = False,
        voice: AnyVoice = "default",
        max_new_tokens: int | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> list[str]: ...
    @overload
    def translate(
        self,
        sources: audio.Audio,
        *,
        to: str = "zh",
        speech: Literal[False] = False,
        voice: AnyVoice = "default",
        max_new_tokens: int | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> str: ...
    @overload
    def translate(
        self,
        sources: list,
        *,
        to: str = "zh",
        speech: Literal[True],
        voice: AnyVoice = "default",
        max_new_tokens: int | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> list[Reply]: ...
    @overload
    def translate(
        self,
        sources: audio.Audio | template.Text,
        *,
        to: str = "zh",
        speech: Literal[True],
        voice: AnyVoice = "default",
        max_new_tokens: int | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Reply: ...
    def translate(
        self, sources, *, to="zh", speech=False, voice="default", max_new_tokens=None, seed=0,
        progress=None,
    ):  # fmt: skip
        """Write down, or say, in another language what is said.

        Args:
            sources: as for `transcribe`; to be spoken, a recording or text (`Text("…")`) has to
                fit in the context with its translation.
            to: `zh` or `en`.
            speech: say it.
            voice: who says it.
            max_new_tokens: as for `transcribe`; of speech, a second takes 31.
            seed: same seed, same translation.
            progress: as for `transcribe`.

        Returns:
            The text, or a `Reply` if it is spoken; a list of them for a list.

        Raises:
            AudioError: if a recording cannot be read.
            PromptError: for another language, or text that is not to be spoken.
            VoiceError: if there is no such voice.
            CheckpointError: if the model has no detokenizer and is to speak.
        """
        if f"s2tt_{to}" not in TASKS:
            raise PromptError(f"cannot translate to {to!r}: expected zh or en")
        many = isinstance(sources, list)
        asked = sources if many else [sources]
        if not speech:
            if any(isinstance(source, template.Text) for source in asked):
                raise PromptError("text is translated into speech only: expected speech=True")
            task = TASKS[f"s2tt_{to}"]
            return self._over_audio(task, sources, (), max_new_tokens, progress, seed)
        replies: list[Reply | None] = [None] * len(asked)
        for kind in ("s2st", "t2st"):
            chosen = [
                n for n, s in enumerate(asked) if isinstance(s, template.Text) == (kind == "t2st")
            ]
            items = [asked[n] for n in chosen]
            contents = [[s if isinstance(s, template.Text) else Audio(s)] for s in items]
            made = self._spoken(
                TASKS[f"{kind}_{to}"], contents, voice, max_new_tokens, seed, progress
            )
            for n, reply in zip(chosen, made, strict=True):
                replies[n] = reply
        return replies if many else replies[0]

    @overload
    def caption(
        self,
        sources: list,
        *,
        max_new_tokens: int = 256,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> list[str]: ...
    @overload
    def caption(
        self,
        sources: audio.Audio,
        *,
        max_new_tokens: int = 256,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> str: ...
    def caption(self, sources, *, max_new_tokens=256, seed=0, progress=None):
        """Describe what happens in a recording; arguments as for `translate`."""
        return self._over_audio(TASKS["caption"], sources, (), max_new_tokens, progress, seed)

    def ask(
        self,
        source: audio.Audio,
        question: str,
        choices: Sequence[str] = (),
        *,
        max_new_tokens: int = 256,
    ) -> str:
        """Answer a question about a recording.

        Args:
            source: the recording.
            question: what to ask.
            choices: possible answers; the model is then asked to pick one, as in MMAU.
            max_new_tokens: limit of the answer.
        """
        text = template.choice_question(question, choices) if choices else question
        return self._over_audio(TASKS["mmau"], source, (text,), max_new_tokens, None)

    @overload
    def tts(
        self,
        text: list[str],
        voice: AnyVoice = "default",
        *,
        max_new_tokens: int | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> list[Reply]: ...
    @overload
    def tts(
        self,
        text: str,
        voice: AnyVoice = "default",
        *,
        max_new_tokens: int | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Reply: ...
    def tts(self, text, voice="default", *, max_new_tokens=None, seed=0, progress=None):
        """Read text aloud.

        Args:
            text: a text, or a list of texts, which are spoken in batches.
            voice: name of a voice, a voice file, a recording of it, or a `Voice`.
            max_new_tokens: limit of each reply; a second of speech takes 31.
            seed: same seed, same reading.
            progress: told about texts done and how many in all.

        Returns:
            A `Reply`, or a list of them.

        Raises:
            PromptError: for an empty text.
            VoiceError: if there is no such voice.
            CheckpointError: if the model has no detokenizer.
        """
        texts = text if isinstance(text, list) else [text]
        if not all(isinstance(t, str) and t.strip() for t in texts):
            raise PromptError("nothing to read: expected text, or a list of texts")
        asked = [[template.Text(t)] for t in texts]
        replies = self._spoken(TASKS["tts"], asked, voice, max_new_tokens, seed, progress)
        return replies if isinstance(text, list) else replies[0]

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
        pieces = [*as_pieces(content), *([template.Text("<tts_start>")] if speak else [])]
        if not as_pieces(content):
            raise PromptError("an empty prompt: expected text, a recording, or both")
        options = options_of(TASKS["tts"]) if options is None else options
        return self._replies([self.request(pieces)], options, voice if speak else None)[0]

    # --- parts ----------------------------------------------------------------------------

    def _spoken(
        self,
        task: PromptTask,
        contents: Sequence[Sequence[Piece]],
        voice: AnyVoice,
        max_new_tokens: int | None,
        seed: int,
        progress: Progress | None,
    ) -> list[Reply]:
        """Run a task with a spoken answer."""
        if not contents:
            return []
        chosen = self.speech.voice(voice)  # before anything is computed
        requests = [
            self.request(
                task.base_pieces(*pieces) if self.prompt_style == "base"
                else template.render(task.messages(*pieces))
            )
            for pieces in contents
        ]  # fmt: skip
        limit = task.max_new_tokens if max_new_tokens is None else max_new_tokens
        options = replace(options_of(task), max_new_tokens=limit, seed=seed)
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
        return [
            Reply(
                text=part.text + reader.end(),
                ids=reply.ids,
                finish=reply.finish_reason,
                audio=wave,
                sample_rate=rate,
                codes=tuple(reader.codes),
                voice=None if chosen is None else chosen.name,
                tool_calls=tuple(reader.calls),
                timings=Timings(
                    first_text=None, first_audio=None, total=total, speech=len(wave) / rate,
                    read=len(request.ids), made=len(reply.ids),
                ),
            )
            for request, reader, part, (reply,), wave in zip(
                requests, readers, parts, made, waves, strict=True
            )
        ]  # fmt: skip

    def _over_audio(
        self,
        task: PromptTask,
        sources: Any,
        extra: tuple[str, ...],
        max_new_tokens: int | None,
        progress: Progress | None,
        seed: int = 0,
    ) -> Any:
        """Run a task with a text answer over one recording or many."""
        many = isinstance(sources, list)
        requests: list[Request] = []
        owners: list[int] = []
        for index, source in enumerate(sources if many else [sources]):
            for part in self._parts(source, task, extra):
                chunks = -(-len(part[0]) // audio.CHUNK_SAMPLES)
                pieces = (Audio(part), *map(template.Text, extra))
                if self.prompt_style == "base":
                    request = self.request(task.base_pieces(*pieces))
                else:
                    request = self.request(template.render(task.messages(*pieces)))
                # A limit of its own: the answer does not depend on what else is in the list.
                limit = task.max_new_tokens * chunks if max_new_tokens is None else max_new_tokens
                requests.append(replace(request, max_new_tokens=limit))
                owners.append(index)
        if not requests:
            return []
        longest = max(request.max_new_tokens or 0 for request in requests)
        options = replace(options_of(task), max_new_tokens=longest, seed=seed)
        replies = self.generate(requests, options, progress=progress)
        texts: list[list[str]] = [[] for _ in (sources if many else [sources])]
        for owner, (reply,) in zip(owners, replies, strict=True):
            texts[owner].append(self.text_of(reply.ids).strip())
        joined = [" ".join(part for part in parts if part) for parts in texts]
        return joined if many else joined[0]

    def _parts(self, source: Any, task: PromptTask, extra: tuple[str, ...]) -> Iterator[tuple]:
        """Cut a recording so that each part fits in the context with room for its answer."""
        samples = audio.load_audio(source)
        words = self.tokenizer.encode_pieces([task.system, *extra])
        room = self.cfg.decoder.max_positions - len(words) - 64  # turn marks
        per_chunk = audio.num_tokens(audio.num_frames(audio.CHUNK_SAMPLES)) + 2
        fits = room // (per_chunk + task.max_new_tokens)
        if fits < 1:
            raise PromptError(
                f"the model's context of {self.cfg.decoder.max_positions} tokens is too short for "
                f"25 s of audio ({per_chunk} tokens) and an answer of {task.max_new_tokens}"
            )
        for part in audio.split_chunks(samples, fits * audio.CHUNK_SAMPLES):
            yield part, audio.SAMPLE_RATE


def options_of(task: PromptTask) -> GenerationConfig:
    """How the official examples sample a task."""
    return GenerationConfig(sampling=task.sampling, max_new_tokens=task.max_new_tokens)

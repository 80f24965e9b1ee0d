"""Prompt tasks by name: transcribe, translate, caption, answer a question, read aloud.

A method for one recording or text returns one result, its twin that ends in `_batch` takes a list
and returns a list. `task_runner.TaskRunner.run` runs them, and any other task.
"""

from collections.abc import Sequence

from sa2jax.audio.io import log_notes
from sa2jax.audio.reader import source_name
from sa2jax.chat import template
from sa2jax.chat.template import TASKS, Text
from sa2jax.errors import PromptError
from sa2jax.pipeline.base import Progress
from sa2jax.pipeline.listening import Source
from sa2jax.pipeline.reply import Reply
from sa2jax.pipeline.task_runner import TaskRunner
from sa2jax.speech.api import AnyVoice


class Tasks(TaskRunner):
    """The published tasks of `StepAudio2`."""

    def transcribe(self, source: Source, *, max_new_tokens: int | None = None) -> str:
        """Transcribe a recording of any length: speech to text.

        Args:
            source: a recording: path, bytes, file or `(array, rate)`, or an `AudioSource`, which
                also names a channel.
            max_new_tokens: limit of the text for each segment of at most 25 s; by default 256.

        Returns:
            The text, empty if nothing can be heard. What `run("asr", [source])` has in its notes
            and segments is logged as a warning.

        Raises:
            AudioError: if the recording cannot be read.
        """
        return self.transcribe_batch([source], max_new_tokens=max_new_tokens)[0]

    def transcribe_batch(
        self,
        sources: Sequence[Source],
        *,
        max_new_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> list[str]:
        """Transcribe a list of recordings; see `transcribe`, and `run` for `progress`."""
        return _texts(
            sources, self.run("asr", sources, max_new_tokens=max_new_tokens, progress=progress)
        )

    def translate(
        self,
        source: Source,
        *,
        to: str = "zh",
        max_new_tokens: int | None = None,
        seed: int = 0,
    ) -> str:
        """Translate a recording of any length into text: speech-to-text translation.

        Args:
            source: as for `transcribe`.
            to: target language, `zh` or `en`.
            max_new_tokens: as for `transcribe`.
            seed: same seed, same translation.

        Raises:
            AudioError: if the recording cannot be read.
            PromptError: for another language, or for text.
        """
        return self.translate_batch([source], to=to, max_new_tokens=max_new_tokens, seed=seed)[0]

    def translate_batch(
        self,
        sources: Sequence[Source],
        *,
        to: str = "zh",
        max_new_tokens: int | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> list[str]:
        """Translate a list of recordings into text; see `translate`."""
        task = _translation("s2tt", to)
        if any(isinstance(source, Text) for source in sources):
            raise PromptError("text is translated into speech only: use `translate_speech`")
        return _texts(
            sources,
            self.run(task, sources, max_new_tokens=max_new_tokens, seed=seed, progress=progress),
        )

    def translate_speech(
        self,
        source: Source,
        *,
        to: str = "zh",
        voice: AnyVoice = "default",
        max_new_tokens: int | None = None,
        seed: int = 0,
    ) -> Reply:
        """Translate a recording or text into speech.

        Args:
            source: a recording, or text as `Text("…")`; it has to fit in the context with its
                translation.
            to: target language, `zh` or `en`.
            voice: name of a voice, a voice file, a recording of it, or a `Voice`.
            max_new_tokens: limit of the reply; a second of speech takes 31.
            seed: same seed, same translation.

        Raises:
            AudioError: if the recording cannot be read.
            PromptError: for another language.
            VoiceError: if there is no such voice.
            CheckpointError: if the model has no detokenizer.
        """
        return self.translate_speech_batch(
            [source], to=to, voice=voice, max_new_tokens=max_new_tokens, seed=seed
        )[0]

    def translate_speech_batch(
        self,
        sources: Sequence[Source],
        *,
        to: str = "zh",
        voice: AnyVoice = "default",
        max_new_tokens: int | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> list[Reply]:
        """Translate a list of recordings and texts into speech; see `translate_speech`."""
        of_speech, of_text = _translation("s2st", to), _translation("t2st", to)
        places = {
            of_speech: [n for n, source in enumerate(sources) if not isinstance(source, Text)],
            of_text: [n for n, source in enumerate(sources) if isinstance(source, Text)],
        }
        replies: dict[int, Reply] = {}
        for task, chosen in places.items():
            found = self.run(
                task,
                [sources[n] for n in chosen],
                voice=voice,
                max_new_tokens=max_new_tokens,
                seed=seed,
                progress=progress,
            )
            replies |= zip(chosen, found, strict=True)
        return [replies[n] for n in range(len(sources))]

    def caption(self, source: Source, *, max_new_tokens: int = 256, seed: int = 0) -> str:
        """Describe what happens in a recording; arguments as for `translate`."""
        return self.caption_batch([source], max_new_tokens=max_new_tokens, seed=seed)[0]

    def caption_batch(
        self,
        sources: Sequence[Source],
        *,
        max_new_tokens: int = 256,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> list[str]:
        """Describe what happens in each of a list of recordings; see `caption`."""
        return _texts(
            sources,
            self.run(
                "caption", sources, max_new_tokens=max_new_tokens, seed=seed, progress=progress
            ),
        )

    def ask(
        self,
        source: Source,
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
        replies = self.run("mmau", [source], question=text, max_new_tokens=max_new_tokens)
        return _texts([source], replies)[0]

    def tts(
        self,
        text: str,
        voice: AnyVoice = "default",
        *,
        max_new_tokens: int | None = None,
        seed: int = 0,
    ) -> Reply:
        """Read a text aloud: text to speech.

        Args:
            text: the text.
            voice: name of a voice, a voice file, a recording of it, or a `Voice`.
            max_new_tokens: limit of the reply; a second of speech takes 31.
            seed: same seed, same reading.

        Raises:
            PromptError: for an empty text.
            VoiceError: if there is no such voice.
            CheckpointError: if the model has no detokenizer.
        """
        return self.tts_batch([text], voice, max_new_tokens=max_new_tokens, seed=seed)[0]

    def tts_batch(
        self,
        texts: Sequence[str],
        voice: AnyVoice = "default",
        *,
        max_new_tokens: int | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> list[Reply]:
        """Read a list of texts aloud; see `tts`."""
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise PromptError("nothing to read: expected text")
        return self.run(
            "tts",
            [Text(text) for text in texts],
            voice=voice,
            max_new_tokens=max_new_tokens,
            seed=seed,
            progress=progress,
        )


def _translation(kind: str, to: str) -> str:
    """Name of a translation task."""
    if (name := f"{kind}_{to}") not in TASKS:
        raise PromptError(f"cannot translate to {to!r}: expected zh or en")
    return name


def _texts(sources: Sequence[Source], replies: Sequence[Reply]) -> list[str]:
    """The texts alone; what else there is to know goes to the log."""
    for source, reply in zip(sources, replies, strict=True):
        log_notes(source_name(source), reply.notes)
    return [reply.text for reply in replies]

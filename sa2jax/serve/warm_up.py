"""Making all programs before the first request, by requests of our own."""

import logging
import time
from collections.abc import Callable, Iterator

import numpy as np

from sa2jax.audio.rates import SAMPLE_RATE
from sa2jax.chat.content import Content
from sa2jax.chat.template import TASKS
from sa2jax.pipeline import StepAudio2
from sa2jax.pipeline.task_runner import task_options
from sa2jax.serve.state import Readiness, ServerState
from sa2jax.speech.voices import Voice

log = logging.getLogger(__name__)


def warm_up(state: ServerState, log_step: Callable[[str], None] = log.info) -> None:
    """Answer what clients will ask, so that their requests compile nothing; in a worker thread.

    Args:
        state: of the server; its readiness says what is being done.
        log_step: called with each step's name and time.
    """
    steps = list(_steps(state))
    for number, (name, step) in enumerate(steps, 1):
        if state.admission.closed:  # shutting down
            return
        state.readiness = Readiness(doing=f"{name} ({number} of {len(steps)})")
        started = time.perf_counter()
        step()
        log_step(f"{name}: {time.perf_counter() - started:.1f} s ({number} of {len(steps)})")


def _steps(state: ServerState) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and work of each step."""
    model = state.model
    yield "programs of the language model", lambda: _language(state)
    yield "a written answer", lambda: _answer(state, _noise(1.0), None)
    yield "a transcript", lambda: model.run("asr", [_noise(2.0)], max_new_tokens=8)
    if state.voices.own:
        voice = state.voices.find()
        yield "a spoken answer", lambda: _answer(state, "Hello", voice)
        yield "speech", lambda: _speech(state, voice)
        yield "reading aloud", lambda: _read(model, voice)


def _language(state: ServerState) -> None:
    """All that so many rows of such a length can need; nothing grows afterwards."""
    for engine in state.model.replicas:
        engine.reserve(state.settings.rows, state.max_len)
        engine.warm_up()


def _answer(state: ServerState, content: Content, voice: Voice | None) -> None:
    chat = state.model.chat(state.settings.default_system)
    for _ in chat.stream(
        content,
        speak=voice is not None,
        voice=voice,
        first=state.settings.first_codes,
        chunk=state.settings.chunk_codes,
    ):
        pass


def _speech(state: ServerState, voice: Voice) -> None:
    """Chunks of all sizes, for all numbers of answers that are spoken together."""
    settings = state.settings
    chunk = max(settings.first_codes, settings.chunk_codes)
    for replica in range(len(state.model.replicas)):
        state.model.token2wav(replica).warm_up(voice, streams=settings.rows, chunk=chunk)


def _read(model: StepAudio2, voice: Voice) -> None:
    chat = model.chat(TASKS["tts"].system, options=task_options(TASKS["tts"]))
    for _ in chat.stream("seven", speak=True, voice=voice):
        pass


def _noise(seconds: float) -> tuple[np.ndarray, int]:
    """A recording in which something can be heard."""
    samples = np.random.default_rng(0).standard_normal(round(seconds * SAMPLE_RATE))
    return samples.astype(np.float32) / 10, SAMPLE_RATE

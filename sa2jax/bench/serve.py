"""Benchmark of the server: spoken answers to several clients at once, over HTTP on this machine.

Clients and server share a process and its processors, so the figures hold the clients' work, too.
"""

import base64
import http.client
import json
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import uvicorn

from sa2jax.audio.rates import SPEECH_SAMPLE_RATE
from sa2jax.bench.common import Bench, Row, machine
from sa2jax.errors import ConfigError
from sa2jax.files.json_files import parse_json
from sa2jax.pipeline import StepAudio2
from sa2jax.serve.app import create_app
from sa2jax.serve.metrics import LATE
from sa2jax.serve.settings import Settings
from sa2jax.serve.state import ServerState

QUESTIONS = (
    "what is three plus four",
    "what is nine minus two",
    "what is six plus two",
    "what is eight minus five",
)
MODEL_ID = "bench"
WAIT = 600.0  # seconds until the server has to be ready
BYTES_PER_SECOND = 2 * SPEECH_SAMPLE_RATE


@dataclass(frozen=True)
class Heard:
    """What a client heard of an answer.

    Attributes:
        first: seconds until the first sound.
        total: until the end.
        spoken: seconds of sound.
        underruns: gaps above 0.1 s of a player that began at once.
    """

    first: float
    total: float
    spoken: float
    underruns: int


def bench_serve(
    model: str = "nano",
    *,
    rows: int = 8,
    streams: Sequence[int] = (1, 2, 4, 8),
    repeats: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> Bench:
    """Time a server of a model that has a voice.

    Args:
        model: a model's folder or name.
        rows: answers that the server makes at a time.
        streams: numbers of clients that ask at the same time.
        repeats: answers that each of them hears.
        progress: called with (rounds done, rounds in all).

    Raises:
        ConfigError: for numbers that cannot be timed, or a server that does not get ready.
        CheckpointError: if the model cannot be loaded, or cannot speak.
    """
    if repeats < 1 or rows < 1 or not streams or min(streams) < 1:
        raise ConfigError("expected repeats >= 1, rows >= 1, streams of at least 1")
    loaded = StepAudio2.from_pretrained(model, batch_size=rows)
    settings = Settings(model_id=MODEL_ID, rows=rows, queue=max(streams), first_codes=5)
    found: list[Row] = []
    rounds, done = len(streams) + 2, 0

    def told() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, rounds)

    with running_server(loaded, settings) as (port, state):
        found += _overhead(loaded, port, settings, max(repeats, 5))
        told()
        for count in streams:
            found += _at_once(port, count, repeats)
            told()
        found.append(
            Row("programs compiled after ready", "", state.compiles_after_ready, note="to be 0")
        )
        told()
    return Bench(machine(("fastapi", "uvicorn")), f"{model}, {rows} rows", tuple(found))


@contextmanager
def running_server(model: StepAudio2, settings: Settings) -> Iterator[tuple[int, ServerState]]:
    """A server on a free port of this machine, in a thread; ready."""
    app = create_app(model, settings)
    state: ServerState = app.state.server
    with socket.create_server(("127.0.0.1", 0)) as bound:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        try:
            deadline = time.monotonic() + WAIT
            while not state.readiness.ready:
                if state.readiness.error or time.monotonic() > deadline or not thread.is_alive():
                    raise ConfigError(
                        f"the server did not get ready: {state.readiness.error or 'too late'}"
                    )
                time.sleep(0.05)
            yield bound.getsockname()[1], state
        finally:
            server.should_exit = True
            thread.join()


def ask(port: int, question: str) -> Heard:
    """Ask for a spoken answer and hear it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)
    body = {
        "model": MODEL_ID,
        "modalities": ["text", "audio"],
        "audio": {"voice": "default", "format": "pcm16"},
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "seed": 0,
    }
    headers = {"content-type": "application/json"}
    started = time.perf_counter()
    first, spoken, plays_until, underruns = 0.0, 0.0, 0.0, 0
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise ConfigError(f"the server answered {response.status}: {response.read(300)!r}")
        for line in response:
            seconds = _seconds_in(line)
            if not seconds:
                continue
            now = time.perf_counter() - started
            if not spoken:
                first = plays_until = now
            underruns += now - plays_until > LATE
            plays_until = max(plays_until, now) + seconds
            spoken += seconds
    finally:
        connection.close()
    return Heard(first, time.perf_counter() - started, spoken, underruns)


def _seconds_in(line: bytes) -> float:
    """Seconds of sound in a line of a stream of events."""
    if not line.startswith(b"data: {"):
        return 0.0
    for choice in parse_json(line[6:]).get("choices", ()):
        if data := (choice["delta"].get("audio") or {}).get("data"):
            return len(base64.b64decode(data)) / BYTES_PER_SECOND
    return 0.0


def _at_once(port: int, count: int, repeats: int) -> list[Row]:
    """So many clients, each with one question after the other."""

    def client(number: int) -> list[Heard]:
        return [ask(port, QUESTIONS[(number + n) % len(QUESTIONS)]) for n in range(repeats)]

    started = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        heard = [one for answers in pool.map(client, range(count)) for one in answers]
    took = time.perf_counter() - started
    firsts = [1000 * one.first for one in heard]
    name = f"{count} client{'s' * (count > 1)}: "
    late = sum(one.underruns > 0 for one in heard)
    gaps = f"{late} of {len(heard)} answers with a gap above {LATE:g} s"
    return [
        Row(name + "first sound, median", "ms", statistics.median(firsts), note="less is better"),
        Row(name + "first sound, 95 %", "ms", float(np.percentile(firsts, 95))),
        Row(name + "sound", "s/s", sum(one.spoken for one in heard) / took, note=gaps),
    ]


def _overhead(model: StepAudio2, port: int, settings: Settings, repeats: int) -> list[Row]:
    """The first sound over HTTP and by the library, in turn."""
    served, direct = [], []
    for n in range(repeats):
        question = QUESTIONS[n % len(QUESTIONS)]
        served.append(1000 * ask(port, question).first)
        direct.append(1000 * _first_sound(model, settings, question))
    difference = statistics.median(served) - statistics.median(direct)
    note = f"median of {repeats} over HTTP less {repeats} by the library, in turn"
    return [Row("server's part of the first sound", "ms", difference, note=note)]


def _first_sound(model: StepAudio2, settings: Settings, question: str) -> float:
    chat: Any = model.chat(settings.default_system)
    started = time.perf_counter()
    stream = chat.stream(
        question,
        speak=True,
        voice="default",
        first=settings.first_codes,
        chunk=settings.chunk_codes,
    )
    for piece in stream:
        if len(piece.audio):
            break
    first = time.perf_counter() - started
    for _ in stream:
        pass
    return first

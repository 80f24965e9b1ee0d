"""Benchmark of the speech side: voice analysis, flow and vocoder, offline and streaming.

Figures are seconds of computing, or seconds of computing per second of sound (the real-time
factor); less is better. The reference is the official PyTorch code, where it is installed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sa2jax import audio
from sa2jax.audio.rates import CODE_RATE
from sa2jax.bench.common import (
    OURS,
    REFERENCE,
    Bench,
    Row,
    SpeechWork,
    Times,
    machine,
    row,
    stream_parts,
    take_turns,
)
from sa2jax.errors import ConfigError
from sa2jax.models.flow import VoicePrompt, flow_model
from sa2jax.models.speaker_encoder import speaker_encoder
from sa2jax.models.speech_tokenizer import speech_tokenizer
from sa2jax.models.vocoder import vocoder
from sa2jax.nn import Params
from sa2jax.runtime import enable_compilation_cache
from sa2jax.sharding import make_mesh
from sa2jax.speech.token2wav import StreamState, Token2Wav
from sa2jax.speech.voices import Voice, VoiceAnalyzer
from sa2jax.speech_config import Token2WavConfig

SECONDS, FACTOR = "s, less is better", "s/s, less is better"
WHOLE = ("tokenizer", "speaker", "flow", "vocoder")  # the parts of `reconstruct`
OFFICIAL = ("torch", "step-audio2", "s3tokenizer")


def bench_speech(
    *,
    seconds: float = 12.0,
    streams: Sequence[int] = (1, 8),
    chunk: int = 25,
    prompt_seconds: float = 3.0,
    repeats: int = 3,
    dtype: str = "float32",
    mesh: str | None = None,
    reference: bool = True,
    progress: Callable[[int, int], None] | None = None,
    cfg: Token2WavConfig | None = None,
) -> Bench:
    """Time the released sizes, or others.

    Args:
        seconds: length of the recording that is analysed and spoken again in its own voice.
        streams: numbers of streams that advance in one call; none leaves streaming out.
        chunk: codes (25 Hz) of a stream's chunk.
        prompt_seconds: length of the voice that streams speak with.
        repeats: rounds.
        dtype: of the flow's weights and computation; the other networks are float32.
        mesh: devices to deal streams out to, such as `data=4`.
        reference: time the official code as well, if it is installed.
        progress: called with (rounds done, rounds in all).
        cfg: sizes, by default the released ones.

    Raises:
        ConfigError: for lengths or numbers that cannot be timed.
    """
    lengths = 1 <= seconds <= 30 and 1 <= prompt_seconds <= 30
    if repeats < 1 or chunk < 1 or min(streams, default=1) < 1 or not lengths:
        raise ConfigError(
            "expected repeats, chunk and streams >= 1, seconds and prompt_seconds in 1..30"
        )
    enable_compilation_cache()
    cfg = Token2WavConfig.released() if cfg is None else cfg
    codes, prompt = round(seconds * CODE_RATE), round(prompt_seconds * CODE_RATE)
    work = SpeechWork(cfg=cfg, codes=codes, prompt=prompt, chunk=chunk)
    ours = Ours(work, dtype, None if mesh is None else make_mesh(mesh))
    sides = {OURS: ours.whole_parts() | stream_parts(ours, streams)}
    theirs = _reference(work) if reference else None
    if theirs is not None:
        sides[REFERENCE] = theirs.whole_parts() | stream_parts(theirs, streams)
    times = take_turns(sides, repeats, progress)
    rows = whole_rows(times, seconds) + (stream_rows(times, streams, chunk) if streams else [])
    return Bench(machine(OFFICIAL if theirs is not None else ()), "token2wav", tuple(rows))


class Ours:
    """This library with random weights.

    Args:
        work: sizes and lengths.
        dtype: of the flow.
        mesh: devices to deal streams out to.
    """

    def __init__(self, work: SpeechWork, dtype: str, mesh: Mesh | None = None):
        cfg, codes = work.cfg, work.codes
        params = {
            "flow": random_params(flow_model(cfg.flow).abstract),
            "vocoder": random_params(vocoder(cfg.vocoder).abstract),
            "speech_tokenizer": random_params(speech_tokenizer(cfg.speech_tokenizer).abstract),
            "speaker_encoder": random_params(speaker_encoder(cfg.speaker_encoder).abstract),
        }
        self.speak = Token2Wav(cfg, params, dtype=dtype, mesh=mesh)
        self.analyzer = VoiceAnalyzer(cfg, params, analysis_hash="")
        self.rng, self.cfg, self.chunk, self.seed = np.random.default_rng(0), cfg, work.chunk, 0
        self.clip = self._normal(codes * audio.SAMPLE_RATE // CODE_RATE) / 10
        self.codes = self._codes(codes)
        self.voice, self.prompt = self._voice(codes), self._voice(work.prompt)
        flow, vocode = self.speak.flow, self.speak.vocoder
        self._mel = jax.jit(lambda params, prompt, codes: flow.bind(params)(prompt, codes))
        self._wave = jax.jit(lambda params, mel: vocode.bind(params)(mel)[0])
        self.mel: Any = None
        self.fresh: StreamState | None = None
        self.running: dict[int, StreamState] = {}

    def whole_parts(self) -> dict[str, Callable[[], Any]]:
        """What is timed of a whole recording, in this order; for streams see `stream_parts`."""
        return {
            "tokenizer": lambda: self.analyzer.codes_of([self.clip]),
            "speaker": lambda: self.analyzer.speaker_of(self.clip),
            "flow": self.flow,
            "vocoder": self.vocoder,
        }

    def flow(self) -> None:
        """The reply's mel frames."""
        voice = (self.voice.codes, self.voice.mel, self.voice.speaker)
        prompt = VoicePrompt(*(x[None] for x in voice))
        mel = self._mel(self.speak.params["flow"], prompt, self.codes[None])
        self.mel = jax.block_until_ready(mel)

    def vocoder(self) -> None:
        """The reply's sound."""
        jax.block_until_ready(self._wave(self.speak.params["vocoder"], self.mel))

    def start(self) -> None:
        """A stream with a voice that no stream has had."""
        self.seed += 1
        self.fresh = jax.block_until_ready(self.speak.start([self.prompt], seed=self.seed))

    def first(self) -> None:
        """That stream's first chunk."""
        assert self.fresh is not None
        self.speak.step(self.fresh, [self._codes(self.chunk + self.lookahead)])

    def step(self, streams: int) -> None:
        """One more chunk of each of some streams."""
        if streams not in self.running:  # before the first round that counts
            state = self.speak.start([self.prompt] * streams)
            fill = [self._codes(self.chunk + self.lookahead)] * streams
            self.running[streams], _ = self.speak.step(state, fill)
        chunks = [self._codes(self.chunk)] * streams
        state, _ = self.speak.step(self.running[streams], chunks)
        self.running[streams] = jax.block_until_ready(state)

    @property
    def lookahead(self) -> int:
        """Codes that a stream hears before it speaks."""
        return self.cfg.flow.encoder.lookahead

    def _voice(self, codes: int) -> Voice:
        cfg = self.cfg.flow
        mel = self._normal(cfg.encoder.upsample * codes, cfg.mels)
        speaker = self._normal(cfg.speaker)
        return Voice("bench", self._codes(codes), speaker, mel, audio_hash="", analysis_hash="")

    def _codes(self, count: int) -> np.ndarray:
        return self.rng.integers(0, self.cfg.flow.codes, count).astype(np.int32)

    def _normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape, np.float32)


def random_params(abstract: Params, seed: int = 0) -> Params:
    """Small random matrices, and vectors of ones, as norms and variances need them."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: (
            jnp.ones(x.shape, x.dtype)
            if x.ndim < 2
            else jnp.asarray(rng.standard_normal(x.shape, np.float32) / 50)
        ),
        abstract,
    )


def whole_rows(times: Times, seconds: float) -> list[Row]:
    """Rows of one recording, spoken again in its own voice."""

    def factor(t):
        return t / seconds

    clip = f"one recording of {seconds:g} s"
    notes = {
        "tokenizer": ("speech tokenizer", f"{clip}: log-mel and codes"),
        "speaker": ("speaker encoder", f"{clip}: filterbank and vector"),
        "flow": ("flow", f"{seconds:g} s with a voice of {seconds:g} s"),
        "vocoder": ("vocoder", f"{seconds:g} s"),
    }
    rows = [row(name, FACTOR, part, times, factor, note) for part, (name, note) in notes.items()]
    sums: Times = {}
    for side in {side for side, _ in times}:
        parts = [times[side, part] for part in WHOLE if (side, part) in times]
        sums[side, "whole"] = [sum(round_) for round_ in zip(*parts, strict=True)]
    note = "their sum; the official speaker encoder, an ONNX file, is not timed"
    return [*rows, row("reconstruct", FACTOR, "whole", sums, factor, note)]


def stream_rows(times: Times, streams: Sequence[int], chunk: int) -> list[Row]:
    """Rows of streaming."""
    times = dict(times)
    for side in {side for side, _ in times}:
        pairs = zip(times[side, "start"], times[side, "first"], strict=True)
        times[side, "sound"] = [sum(pair) for pair in pairs]

    def same(t):
        return t

    rows = [
        row("start", SECONDS, "start", times, same, "what a stream's voice alone decides"),
        row("first sound", SECONDS, "sound", times, same, f"start, and {chunk} codes"),
    ]
    single = times.get((OURS, "chunk 1"))
    for n in streams:
        part, name = f"chunk {n}", "1 stream" if n == 1 else f"{n} streams"
        note = "one call"
        if n > 1 and single:
            times_one = np.median([a / b for a, b in zip(times[OURS, part], single, strict=True)])
            note += f", {times_one:.1f} times that of 1 stream"
        if n > 1 and (REFERENCE, part) in times:
            note += f"; the official code: {n} calls"
        rows.append(row(f"chunk, {name}", SECONDS, part, times, same, note))

        def factor(t, n=n):
            return t * CODE_RATE / (chunk * n)

        note = f"chunks of {chunk} codes, per second of each stream's sound"
        rows.append(row(f"stream, {name}", FACTOR, part, times, factor, note))
    return rows


def _reference(work: SpeechWork) -> Any:
    try:
        from sa2jax.bench.speech_reference import Reference
    except ImportError:
        return None
    return Reference(work)

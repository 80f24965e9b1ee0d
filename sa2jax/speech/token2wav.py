"""Codes to sound: whole replies in batches, and many streams in one batched call.

speak = Token2Wav(cfg, params)
wave = speak(codes, voice)                       # one reply, 24 kHz
waves = speak([codes, codes], [voice, voice])    # a batch: any lengths, any voices

state = speak.start([voice, voice])              # two streams
state, pieces = speak.step(state, [codes, codes])
state, pieces = speak.step(state, [codes, []], last=[True, False])

A stream's state is an immutable pytree, used up by the step it is given to. Steps may be of any
length. The last three codes given are spoken with the next ones, whose beginning they need to hear.

Source: the official `Token2wav`. How streaming differs from it by default, and how far the result
is from a whole reply either way, is in docs/performance.md; `start(parity=True)` is the official
streaming, quirks included.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, Self, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from sa2jax import sharding
from sa2jax.errors import CodeError
from sa2jax.models.flow import (
    KEEP_FRAMES,
    STEPS,
    FlowOptions,
    VoicePrompt,
    flow_model,
    unstack_flow,
)
from sa2jax.models.vocoder import Vocoder
from sa2jax.models.vocoder import vocoder as hift
from sa2jax.nn import Functional, Params, Policy
from sa2jax.runtime import uses_scan
from sa2jax.speech import programs
from sa2jax.speech.batching import CHUNK, chunk_bucket, pad_codes, pad_noise, require_finite
from sa2jax.speech.programs import Networks, row_keys
from sa2jax.speech.reply_stream import ReplyStream
from sa2jax.speech.state import StreamState, concat_streams
from sa2jax.speech.stream_steps import MAX_STREAMS, Codes, StreamSteps
from sa2jax.speech.voices import Voice
from sa2jax.speech_config import Token2WavConfig

INITIAL_CAPACITY = 512  # codes that a stream holds at first: 20 s, the prompt's included
MAX_STARTS = 4  # voices whose started streams are kept


class Token2Wav(StreamSteps):
    """Flow and vocoder, ready for use.

    Args:
        cfg: sizes.
        params: parameters under `flow` and `vocoder`, layers stacked as checkpoints have them.
        dtype: of the flow's weights and computation; the vocoder's phase needs float32.
        steps: Euler steps of the flow.
        guidance: weight of what the voice and the codes change, by default the checkpoint's.
        flow_noise: start noise of each frame [S, M], the prompt's included, for comparisons with
            other implementations; by default it is drawn from the seed.
        batch_size: replies that are made at once.
        mesh: devices to spread over. The networks are small: each device holds them, and the
            replies of a batch are dealt out. Of several hosts, each speaks on its own devices.
        vocoder: structure of the vocoder, by default the HiFT network of `cfg`.
    """

    def __init__(
        self,
        cfg: Token2WavConfig,
        params: Params,
        *,
        dtype: Any = jnp.float32,
        steps: int = STEPS,
        guidance: float | None = None,
        flow_noise: Float[np.ndarray, "S M"] | None = None,
        batch_size: int = 8,
        mesh: Mesh | None = None,
        vocoder: Functional[Vocoder] | None = None,
    ):
        self.cfg, self.batch_size, self.mesh = cfg, batch_size, mesh
        self.vocoder = hift(cfg.vocoder) if vocoder is None else vocoder
        self._sizes = self.vocoder.bind(self.vocoder.abstract).cfg
        self.sample_rate = self._sizes.sample_rate
        # A CPU is bound by arithmetic: eight streams in one call cost seven times one.
        self.max_streams = 1 if jax.default_backend() == "cpu" else MAX_STREAMS
        guidance = cfg.flow.guidance if guidance is None else guidance
        self._options = FlowOptions(guidance=guidance, noise=flow_noise, steps=steps)
        dtype = jnp.dtype(dtype)
        stacked = uses_scan(mesh)
        flow = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params["flow"])
        self.params = {
            "flow": flow if stacked else unstack_flow(flow),
            "vocoder": jax.tree.map(jnp.asarray, params["vocoder"]),
        }
        self.flow = flow_model(cfg.flow, Policy(param=dtype, compute=dtype), stacked=stacked)
        self._place_on(mesh)

    def _place_on(self, mesh: Mesh | None) -> None:
        """Move to these devices: parameters, programs, and no stream started yet."""
        self._mesh = sharding.local_mesh(mesh)
        if self._mesh is not None:
            self.params = jax.device_put(self.params, NamedSharding(self._mesh, PartitionSpec()))
        self._starts: OrderedDict[tuple, StreamState] = OrderedDict()
        encoder = self.cfg.flow.encoder
        nets = Networks(self.flow, self.vocoder, encoder.lookahead, encoder.upsample, self._mesh)

        def jit(f, **options):
            return jax.jit(partial(f, nets), **options)

        self._mel_program, self._wave_program = jit(programs.mel), jit(programs.wave)
        self._start_program = jit(programs.start)
        self._step_each_program = jit(programs.step_each, static_argnames=("max_codes",))
        self._step_program = jit(
            programs.step,
            static_argnames=("max_codes",),
            donate_argnames=("flow", "vocoder"),
        )

    def replicas(self) -> list[Self]:
        """One for each index of the mesh's data axis that this host holds; nothing is copied."""
        found = []
        for mesh in sharding.replicas(self.mesh):
            other = copy(self)
            other.mesh, other.params = mesh, sharding.replica_of(self.params, mesh)
            other._place_on(mesh)
            found.append(other)
        return found or [self]

    # --- whole replies ---------------------------------------------------------------------

    @overload
    def __call__(
        self, codes: Sequence[Codes], voice: Sequence[Voice], *, seed: int = 0
    ) -> list[Float[np.ndarray, "N"]]: ...
    @overload
    def __call__(self, codes: Codes, voice: Voice, *, seed: int = 0) -> Float[np.ndarray, "N"]: ...
    def __call__(self, codes, voice, *, seed=0, source_noise=None):
        """Speak whole replies; one does not depend on the others of its batch.

        Time and memory of the flow grow with the square of a reply's length: stream what is longer
        than a minute or two.

        Args:
            codes: codes (25 Hz) of a reply, or a list of replies. Pads are left out; a reply of
                pads alone is silence.
            voice: the voice of all, or a list with one for each reply.
            seed: another one gives another reading.
            source_noise: normal draws of the vocoder's source [B, N, H], one for each sample and
                harmonic, for comparisons; zeros follow them.

        Returns:
            Samples in [-1, 1] at 24 kHz, 960 for each code; a list if `codes` is one of replies.

        Raises:
            CodeError: for codes that no recording has, or none at all.
            VoiceError: if NaN comes out.
        """
        many = isinstance(voice, Sequence) or _is_nested(codes)
        replies = [self.validate_codes(c) for c in (codes if many else [codes])]
        voices = list(voice) if isinstance(voice, Sequence) else [voice] * len(replies)
        if len(voices) != len(replies):
            raise CodeError(f"expected one voice or {len(replies)}, got {len(voices)}")
        waves: list[np.ndarray] = [self._silence(len(c)) for c in (codes if many else [codes])]
        for rows in self._batches(replies):
            made = self._speak(
                [replies[i] for i in rows], [voices[i] for i in rows], seed, source_noise
            )
            for i, wave in zip(rows, made, strict=True):
                waves[i] = wave
        return waves if many else waves[0]

    def _speak(self, replies, voices, seed, source_noise) -> list[Float[np.ndarray, "N"]]:
        """One batch."""
        count = len(replies)
        more = 0 if self._mesh is None else -count % self._mesh.size  # each has as many rows
        if more:
            replies, voices = [*replies, *replies[:1] * more], [*voices, *voices[:1] * more]
            if source_noise is not None:
                source_noise = np.concatenate([source_noise, *[source_noise[:1]] * more])
        codes, lengths = pad_codes(replies)
        prompt, options = self._prompt(voices), replace(self._options, seed=seed)
        frames = self.cfg.flow.encoder.upsample * lengths
        with sharding.use_mesh(self._mesh):
            mel = self._mel_program(self.params["flow"], prompt, codes, lengths, options)
            noise = pad_noise(source_noise, self._sizes.samples * mel.shape[1])
            speech = np.asarray(
                self._wave_program(self.params["vocoder"], mel, frames, noise, seed)
            )
        samples = self._sizes.samples * frames
        return require_finite([row[:n] for row, n in zip(speech[:count], samples, strict=False)])

    def mels(
        self,
        codes: Sequence[Int[np.ndarray, "_"]],
        speakers: Sequence[Float[np.ndarray, "C"]],
        *,
        seed: int = 0,
    ) -> list[Float[np.ndarray, "Q M"]]:
        """The flow alone, in voices of which there is nothing but the speaker's vector.

        Args:
            codes: codes (25 Hz) of each reply, at least one.
            speakers: a vector for each.
            seed: another one gives another reading.

        Returns:
            Log-mel frames (50 Hz), two for each code.
        """
        found: list[np.ndarray] = [np.empty(0, np.float32)] * len(codes)
        for rows in self._batches(codes):
            padded, lengths = pad_codes([codes[i] for i in rows])
            prompt = self._prompt([_speaker_only(speakers[i], self.cfg.flow.mels) for i in rows])
            options = replace(self._options, seed=seed)
            mel = self._mel_program(self.params["flow"], prompt, padded, lengths, options)
            counts = self.cfg.flow.encoder.upsample * lengths
            for i, row, count in zip(rows, np.asarray(mel), counts, strict=True):
                found[i] = row[:count]
        return found

    def warm_up(self, voice: Voice, *, streams: int = 1, chunk: int = CHUNK) -> None:
        """Make the programs of streams of up to `INITIAL_CAPACITY` codes.

        Args:
            voice: one of those that will speak.
            streams: how many will speak at a time.
            chunk: codes of their chunks at most.
        """
        most = min(streams, self.max_streams)
        counts = [2**n for n in range(1, (most - 1).bit_length() + 1)]
        for size in sorted({chunk_bucket(size) for size in range(1, chunk + 1)}):
            codes = [0] * size
            self.step(self.start([voice]), [codes], last=True)
            for count in counts:
                states = [self.start([voice]) for _ in range(count)]
                self.step_each(states, [codes] * count, [True] * count)

    # --- streams ---------------------------------------------------------------------------

    def start(
        self,
        voices: Sequence[Voice],
        *,
        seed: int = 0,
        parity: bool = False,
        keep_frames: int = KEEP_FRAMES,
    ) -> StreamState:
        """Streams that have said nothing yet, one for each voice.

        What a voice alone decides is computed once and kept for the next stream.

        Args:
            voices: the voice of each stream.
            seed: another one gives another reading.
            parity: stream exactly as the official code does.
            keep_frames: mel frames of a reply that the flow looks back on, beside the prompt.
        """
        return concat_streams([self._started(voice, seed, parity, keep_frames) for voice in voices])

    def stream(
        self,
        codes: Iterable[int],
        voice: Voice,
        *,
        chunk: int = CHUNK,
        first: int | None = None,
        seed: int = 0,
        parity: bool = False,
    ) -> Iterator[Float[np.ndarray, "N"]]:
        """Speak one reply while its codes arrive.

        Args:
            codes: codes (25 Hz) as they come; pads are left out.
            voice: the voice.
            chunk: codes that are spoken at once.
            first: codes of the first chunk, by default `chunk`; fewer let the reply begin sooner.
            seed: another one gives another reading.
            parity: stream exactly as the official code does.

        Yields:
            Samples in [-1, 1] at 24 kHz; together 960 for each code.

        Raises:
            CodeError: for codes that no recording has, none at all, or an empty chunk.
        """
        reply = ReplyStream(self, voice, chunk=chunk, first=first, seed=seed, parity=parity)
        for code in codes:
            reply.add([code])
            if reply.is_ready:
                yield reply.step()
        yield reply.end()

    # --- parts -----------------------------------------------------------------------------

    def _batches(self, replies: Sequence[Int[np.ndarray, "_"]]) -> Iterator[list[int]]:
        """Places of all replies but empty ones, those of like length together."""
        order = sorted((i for i, r in enumerate(replies) if len(r)), key=lambda i: len(replies[i]))
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def _started(self, voice: Voice, seed: int, parity: bool, keep_frames: int) -> StreamState:
        """A stream of one row that has said nothing; kept, so only copies of it may be stepped."""
        key = voice.hash, seed, parity, keep_frames
        if key not in self._starts:
            options = replace(
                self._options,
                seed=seed,
                keep_frames=keep_frames,
                capacity=INITIAL_CAPACITY,
                parity=parity,
            )
            with sharding.use_mesh(self._mesh):
                flow = self._start_program(self.params["flow"], self._prompt([voice]), options)
            state = StreamState(
                flow=flow,
                vocoder=self.vocoder.bind(self.params["vocoder"]).start(1, row_keys(seed, 1)),
                pending=np.zeros((1, self.lookahead), np.int32),
                num_pending=np.zeros(1, np.int32),
                num_codes=np.array([len(voice.codes)], np.int32),
                seed=np.array([seed]),
                parity=parity,
            )
            self._starts[key] = state
            while len(self._starts) > MAX_STARTS:
                self._starts.popitem(last=False)
        self._starts.move_to_end(key)
        return self._starts[key]

    def _prompt(self, voices: Sequence[Voice]) -> VoicePrompt[np.ndarray]:
        """The voices' recordings as one batch."""
        ratio = self.cfg.flow.encoder.upsample
        codes, lengths = pad_codes([voice.codes for voice in voices])
        mel = np.zeros((len(voices), ratio * codes.shape[1], self.cfg.flow.mels), np.float32)
        for row, voice in zip(mel, voices, strict=True):
            row[: len(voice.mel)] = voice.mel
        speakers = np.stack([voice.speaker for voice in voices]).astype(np.float32)
        return VoicePrompt(codes, mel, speakers, lengths)


def _speaker_only(speaker: Float[np.ndarray, "C"], mels: int) -> Voice:
    """A voice of which there is a vector alone."""
    return Voice("", np.zeros(0, np.int32), speaker, np.zeros((0, mels), np.float32), "", "")


def _is_nested(codes: Any) -> bool:
    """Whether these are several replies."""
    return isinstance(codes, Sequence | np.ndarray) and len(codes) > 0 and np.ndim(codes[0]) > 0

"""Steps of streaming synthesis: codes to sound, for one batch of streams or for several apart."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from sa2jax import sharding
from sa2jax.audio.rates import CODE_RATE
from sa2jax.errors import CodeError
from sa2jax.models.flow import FlowOptions, batch_axes, grow_streams
from sa2jax.nn import Params
from sa2jax.speech.batching import chunk_bucket, pad_codes, pad_noise, require_finite
from sa2jax.speech.state import StreamState
from sa2jax.speech_config import Token2WavConfig

MAX_STREAMS = 32  # that are spoken in one call

Codes = Sequence[int] | Int[np.ndarray, "T"]


class StreamSteps:
    """The part of `Token2Wav` that advances streams; it sets what is declared here."""

    cfg: Token2WavConfig
    params: Params
    sample_rate: int
    max_streams: int
    _mesh: Mesh | None
    _options: FlowOptions
    _sizes: Any
    _step_program: Callable[..., Any]
    _step_each_program: Callable[..., Any]

    @property
    def lookahead(self) -> int:
        """Codes that a chunk needs to hear ahead; the last ones given wait for what follows."""
        return self.cfg.flow.encoder.lookahead

    def step(
        self,
        state: StreamState,
        codes: Sequence[Codes],
        last: bool | Sequence[bool] = False,
        *,
        source_noise: Float[np.ndarray, "B N H"] | None = None,
    ) -> tuple[StreamState, list[Float[np.ndarray, "N"]]]:
        """Speak the next codes of each stream, in one call for all.

        Args:
            state: the streams; used up.
            codes: next codes of each row, of any number; none for a row that waits.
            last: whether a row's reply ends with them: for all rows, or each.
            source_noise: see `__call__`.

        Returns:
            The next state, and the samples (24 kHz, [-1, 1]) of each row that are final now.

        Raises:
            CodeError: for codes that no recording has, or another number of rows.
            VoiceError: if NaN comes out.
        """
        rows = len(state.num_pending)
        if len(codes) != rows:
            raise CodeError(f"expected codes for {rows} streams, got {len(codes)}")
        ends = np.broadcast_to(np.asarray(last, bool), (rows,))
        lines, spoken, after = self._take(state, codes, ends)
        if not (spoken.any() or ends.any()):
            return after, [self._silence(0)] * rows
        max_codes = chunk_bucket(int(spoken.max()))
        flow = grow_streams(state.flow, int(state.num_codes.max()) + max_codes)
        inputs = self._step_inputs(lines, ends, state.seed, max_codes, source_noise)
        axes = batch_axes(flow), 0
        flow, vocoder = sharding.device_put_rows((flow, state.vocoder), self._mesh, rows, axes)
        with sharding.use_mesh(self._mesh):
            flow, voc, speech, counts = self._step_program(
                self.params, flow, vocoder, *inputs, max_codes=max_codes
            )
        pieces = [row[:n] for row, n in zip(np.asarray(speech), np.asarray(counts), strict=True)]
        return replace(after, flow=flow, vocoder=voc), require_finite(pieces)

    def step_each(
        self, states: Sequence[StreamState], codes: Sequence[Codes], last: Sequence[bool]
    ) -> tuple[list[StreamState], list[Float[np.ndarray, "N"]]]:
        """`step` of streams that are apart: those of one shape are spoken in one call.

        Args:
            states: streams of one row each; used up on a mesh alone, where each is stepped apart.
            codes: next codes of each, at least so many that something is spoken.
            last: whether a stream's reply ends with them.

        Returns:
            What `step` returns for each.

        Raises:
            CodeError: for codes that no recording has.
            VoiceError: if NaN comes out.
        """
        found: list[Any] = [None] * len(states)
        groups: dict[Any, list[int]] = {}
        taken = [
            self._take(state, [own], np.array([end]))
            for state, own, end in zip(states, codes, last, strict=True)
        ]
        sizes = [chunk_bucket(int(spoken[0])) for _, spoken, _ in taken]
        flows = [
            grow_streams(state.flow, int(state.num_codes[0]) + size)
            for state, size in zip(states, sizes, strict=True)
        ]
        for n, (state, flow, size) in enumerate(zip(states, flows, sizes, strict=True)):
            shape = flow.encoder.capacity, flow.estimator.slots, flow.keep_frames
            alone = n if self._mesh is not None else None  # its devices share rows as it is
            groups.setdefault((shape, size, state.parity, alone), []).append(n)
        for (_, size, *_), alike in groups.items():
            for first in range(0, len(alike), MAX_STREAMS):
                group = alike[first : first + MAX_STREAMS]
                if self._mesh is not None:
                    (n,) = group
                    after, (piece,) = self.step(states[n], [codes[n]], last[n])
                    found[n] = after, piece
                    continue
                rows = 1 << (len(group) - 1).bit_length()
                padded = [*group, *group[:1] * (rows - len(group))]
                inputs = self._step_inputs(
                    [line for n in padded for line in taken[n][0]],
                    np.array([last[n] for n in padded]),
                    np.concatenate([states[n].seed for n in padded]),
                    size,
                    None,
                )
                after, vocoders, speech, counts = self._step_each_program(
                    self.params,
                    tuple(replace(flows[n], modulation=()) for n in padded),
                    tuple(states[n].vocoder for n in padded),
                    flows[group[0]].modulation,
                    *inputs,
                    max_codes=size,
                )
                waves = zip(np.asarray(speech), np.asarray(counts), strict=True)
                pieces = require_finite([row[:count] for row, count in waves][: len(group)])
                for n, flow, vocoder, piece in zip(group, after, vocoders, pieces, strict=False):
                    flow = replace(flow, modulation=flows[n].modulation)
                    found[n] = replace(taken[n][2], flow=flow, vocoder=vocoder), piece
        return [state for state, _ in found], [piece for _, piece in found]

    def validate_codes(
        self, codes: Codes, *, empty: bool = False, first: int = 0
    ) -> Int[np.ndarray, "T"]:
        """Codes without pads.

        Args:
            codes: numbers below the size of the code book; that size itself is the pad.
            empty: whether there may be none.
            first: place of the first one, for errors.

        Raises:
            CodeError: for anything else.
        """
        book = self.cfg.flow.codes
        array = np.asarray(codes)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise CodeError(f"expected a list of whole numbers, got {array.dtype} {array.shape}")
        if not (array.size or empty):
            raise CodeError("no codes: expected at least one")
        wrong = (array < 0) | (array > book)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise CodeError(
                f"code {array[at]} at place {first + at}: expected 0 to {book - 1} (pads, {book}, "
                "are left out); from token ids subtract the id of <audio_0>"
            )
        return array[array < book].astype(np.int32)

    # --- parts -----------------------------------------------------------------------------

    def _take(
        self, state: StreamState, codes: Sequence[Codes], ends: Bool[np.ndarray, "B"]
    ) -> tuple[list[Int[np.ndarray, "_"]], Int[np.ndarray, "B"], StreamState]:
        """Codes that a step is given, how many of each row are spoken, and what waits after it."""
        lookahead = self.lookahead
        waiting = [row[:n] for row, n in zip(state.pending, state.num_pending, strict=True)]
        lines = [
            np.concatenate([held, self.validate_codes(row, empty=True)])
            for held, row in zip(waiting, codes, strict=True)
        ]
        present = np.array([len(line) for line in lines], np.int32)
        spoken = np.where(ends, present, np.maximum(present - lookahead, 0))
        pending = np.zeros((len(lines), lookahead), np.int32)
        for row, line, count in zip(pending, lines, spoken, strict=True):
            row[: len(line) - count] = line[count:]
        after = replace(
            state,
            pending=pending,
            num_pending=present - spoken,
            num_codes=state.num_codes + spoken,
        )
        return lines, spoken, after

    def _step_inputs(
        self, lines, ends, seed, max_codes: int, source_noise
    ) -> tuple[Any, Any, Any, FlowOptions, Any]:
        """What `programs.step` takes beside parameters and states."""
        present = np.array([len(line) for line in lines], np.int32)
        frames = self._sizes.carry + self.cfg.flow.encoder.upsample * max_codes
        noise = pad_noise(source_noise, self._sizes.samples * frames)
        codes, _ = pad_codes(lines, max_codes + self.lookahead)
        return codes, present, ends, replace(self._options, seed=seed), noise

    def _silence(self, codes: int) -> Float[np.ndarray, "N"]:
        return np.zeros(codes * self.sample_rate // CODE_RATE, np.float32)

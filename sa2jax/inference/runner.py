"""Model runner: the rows of an engine on its devices, and the compiled programs that change them.

Shapes are padded to buckets, so that prompts of any length share a handful of programs;
`programs.TRACES` counts them. One thread at a time may use a runner.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from sa2jax import sharding
from sa2jax.config import StepAudio2Config
from sa2jax.inference import programs
from sa2jax.inference.programs import MAX_STOP_IDS, Batch, DecodeState, RowSettings
from sa2jax.inference.requests import GenerationConfig, Request
from sa2jax.inference.sampling import SamplingArrays
from sa2jax.models.audio_encoder import adapter_length, encoder_length
from sa2jax.models.step_audio import StepAudio2Model
from sa2jax.nn import Functional, Params

TOKEN_BUCKETS = tuple(2**n for n in range(6, 18))  # of chunks and of slots, tokens
MEL_BUCKETS = (128, 256, 512, 1024, 1536, 2048, 2504)  # of clips, 10 ms frames
PREFILL_CHUNK = 512  # tokens that are read at once: bounds memory and the number of programs
MIN_SLOTS = 1024  # of a row: large enough that rows seldom grow
MIN_READ = 256  # slots that are looked at, at least
READ_SIZES = 5  # programs of different `read`

Clip = Float[Array, "S D"]  # embeddings of a clip, with padding


def bucket(size: int, sizes: Sequence[int]) -> int:
    """The smallest bucket that holds `size`; beyond the largest, `size` itself."""
    return next((s for s in sizes if s >= size), size)


class Chunk(NamedTuple):
    """A piece of a prompt, to be read into a row.

    Attributes:
        row: the row.
        request: the whole prompt.
        start: its first position, which is how many are in the row.
        count: positions to read.
        clips: embeddings of the clips that it touches, by their number in the prompt.
    """

    row: int
    request: Request
    start: int
    count: int
    clips: dict[int, Clip]


class Start(NamedTuple):
    """A reply whose prompt has been read.

    Attributes:
        row: the row.
        request: the prompt.
        options: how to continue it.
        limit: tokens at most.
        prompt_index: what is drawn depends on it and the next.
        sample_index: number of the reply to the prompt.
    """

    row: int
    request: Request
    options: GenerationConfig
    limit: int
    prompt_index: int
    sample_index: int


class Tokens:
    """What a program chose, still under way on the devices.

    Args:
        table: tokens of each row, how many its reply has with them, and whether it has ended.
    """

    def __init__(self, table: Int[Array, "R W"]):
        self._table = table
        table.copy_to_host_async()

    def read(self) -> tuple[Int[np.ndarray, "R S"], Int[np.ndarray, "R"], Bool[np.ndarray, "R"]]:
        """Wait for it: the tokens, padded, their numbers in all and whether rows have ended."""
        table = np.asarray(self._table)
        return table[:, :-2], table[:, -2], table[:, -1].astype(bool)


class ModelRunner:
    """Compiled programs around one model, its parameters and rows.

    Args:
        model: the model's structure.
        params: its parameters.
        cfg: its config.
        mesh: the mesh the parameters are sharded over, if any.
        parity: let the clips of a prompt feel each other's lengths as in the official code. A
            program is compiled for each length of a prompt's longest clip.

    Attributes:
        parts: parts of the data axis; each holds as many rows as the others.
        rows: rows that there are now.
        slots: of each row.
    """

    def __init__(
        self,
        model: Functional[StepAudio2Model],
        params: Params,
        cfg: StepAudio2Config,
        *,
        mesh: Mesh | None = None,
        parity: bool = False,
    ):
        self.model, self.params, self.cfg, self.mesh, self.parity = model, params, cfg, mesh, parity
        self.parts = sharding.batch_axis_size(mesh)
        self.rows = self.slots = 0
        self._state: DecodeState | None = None

        def jit(f, **options):
            return jax.jit(partial(f, model), **options)

        # With clips or without, features have one dtype and one sharding: one program for both.
        self._compute = model.bind(model.abstract).decoder.policy.compute
        self._everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        self._clip_length = adapter_length(
            encoder_length(2 * cfg.audio_encoder.max_positions), cfg.adapter
        )
        self._encode_audio = jit(programs.encode_audio, static_argnames=("official_batch", "size"))
        self._logits = jit(programs.logits)
        # Partials of their own: what one runner has traced does not hide what another needs.
        self._scatter = jax.jit(
            partial(programs.scatter_features), donate_argnums=(0,), out_shardings=self._everywhere
        )
        self._empty = jit(programs.empty_state, static_argnames=("rows", "slots"))
        self._grow = jax.jit(partial(programs.grow_state), static_argnames=("rows", "slots"))
        self._copy = jax.jit(partial(programs.copy_rows), donate_argnums=(0,))
        self._chunk = jit(
            programs.prefill_chunk, static_argnames=("read", "cache_is_empty"), donate_argnums=(1,)
        )
        self._start = jit(programs.start_rows, donate_argnums=(1,))
        self._decode = jit(programs.decode, static_argnames=("block", "read"), donate_argnums=(1,))

    # --- rows ------------------------------------------------------------------------------

    @property
    def state(self) -> DecodeState:
        """The rows, which `reserve` has made."""
        assert self._state is not None, "no rows: reserve some"
        return self._state

    def reserve(self, rows: int, slots: int) -> None:
        """See to it that there are at least so many rows and slots; what they hold stays."""
        rows = max(self.rows, -(-rows // self.parts) * self.parts)
        slots = min(bucket(slots, TOKEN_BUCKETS), self.cfg.decoder.max_positions)
        slots = max(self.slots, slots)
        if (rows, slots) == (self.rows, self.slots):
            return
        with sharding.use_mesh(self.mesh):
            if self._state is None:
                self._state = self._empty(rows=rows, slots=slots)
            else:
                self._state = self._grow(self._state, rows=rows, slots=slots)
        self.rows, self.slots = rows, slots

    def release(self) -> None:
        """Forget all rows."""
        self._state, self.rows, self.slots = None, 0, 0

    def part_of(self, row: int) -> int:
        """The part of the data axis that holds a row."""
        return row // (self.rows // self.parts)

    def copy_row(self, source: int, target: int) -> None:
        """Copy what a row holds to another of the same part."""
        rows = np.zeros((2, self.parts), np.int32)
        rows[:, self.part_of(source)] = self._within(source), self._within(target)
        with sharding.use_mesh(self.mesh):
            self._state = self._copy(self.state, self._put(rows[0]), self._put(rows[1]))

    @property
    def read_sizes(self) -> tuple[int, ...]:
        """Numbers of slots that programs look at, ascending."""
        sizes = {self.slots >> n for n in range(READ_SIZES)}
        return tuple(sorted(size for size in sizes if size == self.slots or size >= MIN_READ))

    # --- reading ---------------------------------------------------------------------------

    def encode_audio(
        self, mels: Sequence[Float[np.ndarray, "M L"]], *, longest: int | None = None
    ) -> list[Clip]:
        """Audio embeddings (12.5 Hz) of clips of any lengths, each as if alone.

        Args:
            mels: log-mel frames of each clip.
            longest: frames of the longest clip of the prompt, for `parity`: officially a clip's
                result depends on it, as all are padded to it.

        Returns:
            The embeddings of each clip with padding behind them, all of one length.
        """
        official = longest if self.parity else None
        lengths = [official or bucket(mel.shape[1], MEL_BUCKETS) for mel in mels]
        found: list[Any] = [None] * len(mels)
        for length in sorted(set(lengths)):
            alike = [n for n, own in enumerate(lengths) if own == length]
            for first in range(0, len(alike), self.parts):
                group = alike[first : first + self.parts]
                frames = np.zeros(self.parts, np.int32)
                batch = np.zeros((self.parts, self.cfg.audio_encoder.mels, length), np.float32)
                for place, n in enumerate(group):
                    frames[place] = mels[n].shape[1]
                    batch[place, :, : frames[place]] = mels[n]
                with sharding.use_mesh(self.mesh):
                    clips = self._encode_audio(
                        self.params,
                        batch,
                        frames,
                        official_batch=official is not None,
                        size=self._clip_length,
                    )  # P times [S, D]
                for n, clip in zip(group, clips, strict=False):
                    found[n] = clip
        return found

    def prefill_chunk(self, chunks: Sequence[Chunk]) -> Float[Array, "P D"]:
        """Read chunks of prompts, each in another part of the data axis.

        Returns:
            The hidden state of the last token that was read in each part.
        """
        steps = min(bucket(max(chunk.count for chunk in chunks), TOKEN_BUCKETS), self.slots)
        rows, start = np.zeros((2, self.parts), np.int32)
        read = self._read_size(max(chunk.start + chunk.count for chunk in chunks))
        for chunk in chunks:
            part = self.part_of(chunk.row)
            rows[part], start[part] = self._within(chunk.row), chunk.start
        batch = self._pad(
            {
                self.part_of(chunk.row): (chunk.request, chunk.start, chunk.count, chunk.clips)
                for chunk in chunks
            },
            self.parts,
            steps,
        )
        with sharding.use_mesh(self.mesh):
            self._state, hidden = self._chunk(
                self.params,
                self.state,
                self._put(rows),
                self._put(start),
                batch,
                read=max(read, steps),
                cache_is_empty=all(chunk.start == 0 for chunk in chunks),
            )
        return hidden

    def start_rows(self, starts: Sequence[Start], hidden: Float[Array, "P D"]) -> Tokens:
        """Choose the first tokens of replies, each in another part of the data axis.

        Args:
            starts: the replies.
            hidden: what `prefill_chunk` returned for the ends of their prompts.
        """
        rows = np.full(self.parts, self.rows, np.int32)
        lengths = np.zeros(self.parts, np.int32)
        seen = np.zeros((self.parts, self.cfg.decoder.vocab), bool)
        by_part = {self.part_of(start.row): start for start in starts}
        for part, start in by_part.items():
            rows[part], lengths[part] = start.row, len(start.request.ids)
            seen[part, start.request.ids] = True
        settings = _settings([by_part.get(part, starts[0]) for part in range(self.parts)])
        with sharding.use_mesh(self.mesh):
            self._state, table = self._start(
                self.params,
                self.state,
                *map(self._put, (rows, lengths)),
                hidden,
                self._put(seen),
                jax.tree.map(self._put, settings),
            )
        return Tokens(table)

    # --- generating ------------------------------------------------------------------------

    def decode(self, active: Iterable[int], block: int, longest: int) -> Tokens:
        """Up to `block` further tokens for each of these rows that is not done.

        Args:
            active: the rows.
            block: steps.
            longest: positions of the longest of them, these steps included.
        """
        mask = np.zeros(self.rows, bool)
        mask[list(active)] = True
        with sharding.use_mesh(self.mesh):
            self._state, table = self._decode(
                self.params,
                self.state,
                self._put(mask),
                block=block,
                read=self._read_size(longest),
            )
        return Tokens(table)

    def logits(self, request: Request) -> Float[np.ndarray, "T V"]:
        """Scores of the next token after each position of a prompt; no row is used."""
        count = len(request.ids)
        steps = min(bucket(count, TOKEN_BUCKETS), self.cfg.decoder.max_positions)
        longest = longest_clip(request)
        clips = dict(enumerate(self.encode_audio(request.mels, longest=longest)))
        batch = self._pad({0: (request, 0, count, clips)}, self.parts, steps)
        with sharding.use_mesh(self.mesh):
            scores = self._logits(self.params, batch)
        if not scores.is_fully_addressable:
            scores = multihost_utils.process_allgather(scores, tiled=True)
        return np.asarray(scores[0, :count])

    def warm_up(
        self, block: int, *, clip_frames: int = MEL_BUCKETS[-1]
    ) -> Iterator[tuple[int, int]]:
        """Run every program that the rows there are can need, once; what rows hold is lost.

        Args:
            block: steps of a block.
            clip_frames: of the longest clip that will be heard.

        Yields:
            How many were run, and how many there are.
        """
        mels = self.cfg.audio_encoder.mels
        chunks = [n for n in TOKEN_BUCKETS if n <= min(PREFILL_CHUNK, self.slots)]
        heard = [n for n in MEL_BUCKETS if n <= bucket(clip_frames, MEL_BUCKETS)]
        tasks: list[Callable[[], object]] = [
            partial(self.encode_audio, [np.zeros((mels, frames), np.float32)]) for frames in heard
        ]
        (clip,) = self.encode_audio([np.zeros((mels, heard[0]), np.float32)])
        none = np.zeros((mels, heard[0]), np.float32)
        request = Request(np.zeros(self.slots, np.int32), (none,), (0,), (1,))
        for steps in chunks:
            count = steps // 2 + 1
            for start in {0} | {size - count for size in self.read_sizes if size >= steps}:
                chunk = Chunk(0, request, start, count, {0: clip})
                tasks.append(partial(self._warm_start, chunk))
        tasks += [partial(self.decode, [0], block, size) for size in self.read_sizes]
        if self.rows > self.parts:
            tasks.append(partial(self.copy_row, 0, 1))
        for done, task in enumerate(tasks):
            yield done, len(tasks)
            task()
        jax.block_until_ready(self.state)
        yield len(tasks), len(tasks)

    def _warm_start(self, chunk: Chunk) -> None:
        options = GenerationConfig(max_new_tokens=1)
        self.start_rows([Start(0, chunk.request, options, 1, 0, 0)], self.prefill_chunk([chunk]))

    # --- parts -----------------------------------------------------------------------------

    def _within(self, row: int) -> int:
        """A row's number within its part."""
        return row % (self.rows // self.parts)

    def _read_size(self, positions: int) -> int:
        return bucket(positions, self.read_sizes)

    def _put(self, x: Any) -> Array:
        """An input on every device; of a multi-host mesh, too."""
        return jax.device_put(x, self._everywhere)

    def _pad(
        self, pieces: dict[int, tuple[Request, int, int, dict[int, Clip]]], rows: int, steps: int
    ) -> Batch:
        """Pieces of prompts as rows of a batch, with the embeddings of what is heard in them."""
        ids, index = np.zeros((rows, steps), np.int32), np.full((rows, steps), -1, np.int32)
        lengths = np.zeros(rows, np.int32)
        features = jnp.zeros(
            (rows * steps, self.cfg.decoder.embed), self._compute, device=self._everywhere
        )
        for row, (request, start, count, clips) in pieces.items():
            lengths[row] = count
            ids[row, :count] = request.ids[start : start + count]
            for n, clip in clips.items():
                places = request.starts[n] + np.arange(request.counts[n]) - start
                inside = (places >= 0) & (places < count)
                homes = np.where(inside, row * steps + places, rows * steps)
                index[row, places[inside]] = homes[inside]
                targets = np.full(clip.shape[0], rows * steps, np.int32)
                targets[: len(homes)] = homes
                features = self._scatter(features, clip, self._put(targets))
        put = self._put
        return Batch(
            ids=put(ids), lengths=put(lengths), features=features, feature_index=put(index)
        )


def longest_clip(request: Request) -> int:
    """Mel frames of the longest clip of a prompt, 0 for none."""
    return max((mel.shape[1] for mel in request.mels), default=0)


def _settings(starts: Sequence[Start]) -> RowSettings:
    """The settings of replies as arrays."""
    stop_ids = np.full((len(starts), MAX_STOP_IDS), -1, np.int32)
    for line, start in zip(stop_ids, starts, strict=True):
        line[: len(start.options.stop_ids)] = start.options.stop_ids
    return RowSettings(
        sampling=SamplingArrays.of([start.options.sampling for start in starts]),
        stop_ids=stop_ids,
        limit=np.array([start.limit for start in starts], np.int32),
        seed=np.array([start.options.seed % 2**32 for start in starts], np.uint32),
        prompt_index=np.array([start.prompt_index for start in starts], np.uint32),
        sample_index=np.array([start.sample_index for start in starts], np.uint32),
    )

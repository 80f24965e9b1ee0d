"""Benchmark of the language side: encoder, prefill and decode with random weights.

The reference is transformers on torch, where it is installed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from sa2jax import audio
from sa2jax.bench.common import (
    OURS,
    REFERENCE,
    TURN,
    Bench,
    Row,
    copy_bandwidth,
    language_parts,
    machine,
    row,
    take_turns,
)
from sa2jax.config import StepAudio2Config
from sa2jax.errors import ConfigError
from sa2jax.inference.engine import Engine
from sa2jax.inference.loading import resolve_policy
from sa2jax.inference.requests import GenerationConfig, Request
from sa2jax.inference.runner import PREFILL_CHUNK, Chunk, ModelRunner, Start
from sa2jax.models.heads import pad_heads_for_mesh
from sa2jax.models.step_audio import StepAudio2Model, step_audio2, unstack_decoder
from sa2jax.nn import Policy, init_params
from sa2jax.runtime import enable_compilation_cache, uses_scan
from sa2jax.sharding import make_mesh

NEW_TOKENS = 256  # of the reply that is timed


def bench(
    size: str,
    *,
    prompt: int = 512,
    tokens: int = 300,
    seconds: float = 25.0,
    repeats: int = 3,
    dtype: str | None = None,
    attention: str | None = None,
    mesh: str | None = None,
    reference: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Bench:
    """Time a named size.

    Args:
        size: preset from configs/models.
        prompt: tokens of the prompt that is prefilled.
        tokens: length of the reply that the official loop without a cache is charged for.
        seconds: length of the recording that is encoded, at most 25.
        repeats: rounds.
        dtype: dtype of weights and computation; by default bfloat16, float32 on a CPU. int8 is that
            of the matrices; the reference has the dtype of the computation.
        attention: what computes the decoder's attention, see `nn.Policy`.
        mesh: devices to spread over, such as `tensor=4`.
        reference: time transformers as well, if torch is installed.
        progress: called with (rounds done, rounds in all).

    Raises:
        ConfigError: for an unknown size or attention, or lengths that cannot be timed.
        ShardingError: for a mesh that does not fit the devices.
    """
    if repeats < 1 or tokens < 2 or prompt < 1 or not 0.1 <= seconds <= 25:
        raise ConfigError("expected repeats >= 1, tokens >= 2, prompt >= 1, seconds in 0.1..25")
    enable_compilation_cache()
    cfg = StepAudio2Config.preset(size)
    policy = resolve_policy(dtype, attention=attention)
    where = None if mesh is None else make_mesh(mesh)
    ours = Ours(cfg, policy, prompt, seconds, where)
    theirs = _reference(cfg, jnp.dtype(policy.compute).name, prompt, seconds) if reference else None
    steps = min(tokens, 32)
    sides = {OURS: language_parts(ours, steps)}
    if theirs is not None:
        sides[REFERENCE] = language_parts(theirs, steps)
    times = take_turns(sides, repeats, progress)
    bandwidth = copy_bandwidth()
    rows = [
        row(
            "encode",
            "x real time",
            "encode",
            times,
            lambda t: seconds / t,
            f"one clip of {seconds:g} s",
        ),
        row(
            "prefill",
            "tokens/s",
            "prefill",
            times,
            lambda t: prompt / t,
            f"one prompt of {prompt} tokens",
        ),
        row(
            "decode",
            "tokens/s",
            "decode",
            times,
            lambda t: steps / t,
            f"{steps} tokens after it, greedy",
        ),
        row(
            "next turn",
            "1/s",
            "turn",
            times,
            lambda t: 1 / t,
            f"first token of an answer to {TURN} tokens after the prompt; the reference reads all "
            "again, as the official code does",
        ),
    ]
    speed = rows[2].ours
    if theirs is not None:
        loop = tokens / theirs.loop_without_cache(tokens)
        rows.append(
            Row(
                "decode, no cache",
                "tokens/s",
                speed,
                loop,
                speed / loop,
                f"the official loop over {tokens} tokens, integrated from 5 lengths",
            )
        )
    weights = ours.decoder_bytes / 1e9
    rows += [
        Row("weights read in decode", "GB/s", weights * speed, note=f"{weights:.2f} GB per token"),
        Row("copy bandwidth", "GB/s", bandwidth, note="read and written, all threads"),
    ]
    packages = () if theirs is None else ("torch", "transformers")
    return Bench(machine(packages), size, tuple(rows))


class Ours:
    """This library with random weights."""

    def __init__(
        self,
        cfg: StepAudio2Config,
        policy: Policy,
        prompt: int,
        seconds: float,
        mesh: Mesh | None = None,
    ):
        wide = pad_heads_for_mesh(cfg, mesh)

        def make():
            return StepAudio2Model(wide, policy=policy, rngs=nnx.Rngs(0))

        places = None if mesh is None else step_audio2(wide, policy).shardings(mesh)
        params = init_params(make, places)
        stacked = uses_scan(mesh)
        decoder = params["decoder"]
        # Of the embedding table a step reads one row; everything else it reads whole.
        read = [decoder["layers"], decoder["head"]]
        self.decoder_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(read))
        params = params if stacked else unstack_decoder(params)
        model = step_audio2(wide, policy, stacked=stacked)
        self.engine = Engine(model, params, cfg, mesh=mesh)  # of a conversation
        self.runner = ModelRunner(model, params, cfg, mesh=mesh)
        rng = np.random.default_rng(0)
        self.request = Request(rng.integers(0, cfg.decoder.vocab, prompt).astype(np.int32))
        frames = int(audio.num_frames(int(seconds * audio.SAMPLE_RATE)))
        self.mel = rng.standard_normal((cfg.audio_encoder.mels, frames), np.float32)
        self._rng = rng

    def encode(self) -> None:
        """One clip through encoder and adapter."""
        jax.block_until_ready(self.runner.encode_audio([self.mel])[0])

    def prefill(self) -> None:
        """One prompt and the first token; the row it leaves is what `decode` goes on from."""
        count, request = len(self.request.ids), self.request
        self.runner.reserve(1, count + NEW_TOKENS)
        chunks = [
            Chunk(0, request, first, min(PREFILL_CHUNK, count - first), {})
            for first in range(0, count, PREFILL_CHUNK)
        ]
        hidden = [self.runner.prefill_chunk([chunk]) for chunk in chunks][-1]
        options = GenerationConfig(max_new_tokens=NEW_TOKENS)
        start = Start(0, request, options, NEW_TOKENS, prompt_index=0, sample_index=0)
        self.runner.start_rows([start], hidden).read()

    def decode(self, steps: int) -> None:
        """`steps` tokens in one compiled program."""
        self.runner.decode([0], steps, len(self.request.ids) + NEW_TOKENS).read()

    def turn(self) -> None:
        """Another question in a conversation that has read the prompt."""
        question = self._rng.integers(0, self.engine.cfg.decoder.vocab, TURN)
        ids = np.concatenate([self.request.ids, question]).astype(np.int32)
        with self.engine.submit(Request(ids), GenerationConfig(max_new_tokens=1)) as reply:
            next(reply)


def _reference(cfg: StepAudio2Config, dtype: str, prompt: int, seconds: float) -> Any:
    try:
        from sa2jax.bench.language_reference import Reference
    except ImportError:
        return None
    return Reference(cfg, dtype, prompt, seconds)

"""Compiled programs of speech: pure functions of networks, their parameters and data.

On a mesh the rows of a batch are dealt out: each device computes its own as if there were no
others, see `sharding.shard_rows`.
"""

from collections import Counter
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from sa2jax.models.flow import Flow, FlowState, batch_axes
from sa2jax.models.vocoder import Vocoder
from sa2jax.models.vocoder_stream import VocoderState, vocoder_step
from sa2jax.nn import Functional
from sa2jax.sharding import ALL, shard, shard_rows

TRACES: Counter[str] = Counter()  # how often each program has been traced, by name


@dataclass(frozen=True)
class Networks:
    """What speaks, without its numbers.

    Attributes:
        flow: codes to mel frames.
        vocoder: mel frames to sound.
        lookahead: codes that a stream's newest ones need to hear.
        upsample: mel frames of a code.
        steps: Euler steps of the flow.
        mesh: the devices.
    """

    flow: Functional[Flow]
    vocoder: Functional[Vocoder]
    lookahead: int
    upsample: int
    steps: int
    mesh: Mesh | None


def mel(
    nets: Networks, params, prompt, frames, speaker, prompts, codes, lengths, guidance, noise, seed
) -> Float[Array, "B R M"]:
    """Whole replies as mel frames; see `Flow.__call__`."""
    TRACES["mel"] += 1

    def run(params, prompt, frames, speaker, prompts, codes, lengths, guidance, noise, seed):
        return nets.flow.bind(params)(
            prompt, frames, speaker, codes, prompts, lengths, steps=nets.steps,
            guidance=guidance, noise=noise, seed=seed,
        )  # fmt: skip

    rows = shard_rows(run, nets.mesh, (ALL, 0, 0, 0, 0, 0, 0, ALL, ALL, ALL), 0)
    return rows(params, prompt, frames, speaker, prompts, codes, lengths, guidance, noise, seed)


def wave(nets: Networks, params, mel, frames, noise, seed) -> Float[Array, "B N"]:
    """Mel frames as sound, on every device, so that every host can read it."""
    TRACES["wave"] += 1

    def run(params, mel, frames, noise, seed):
        keys = row_keys(seed, len(mel))
        return nets.vocoder.bind(params)(mel, frames, noise=noise, key=keys)[0]

    rows = shard_rows(run, nets.mesh, (ALL, 0, 0, 0, ALL), 0)
    return shard(rows(params, mel, frames, noise, seed), None, None)


def start(
    nets: Networks, params, prompt, frames, speaker, prompts, guidance, noise, seed, *, keep_frames,
    capacity, parity,
) -> FlowState:  # fmt: skip
    """Streams that have said nothing; see `Flow.start`."""
    TRACES["start"] += 1

    def run(params, prompt, frames, speaker, prompts, guidance, noise, seed):
        return nets.flow.bind(params).start(
            prompt, frames, speaker, prompts, steps=nets.steps, guidance=guidance, noise=noise,
            seed=seed, keep_frames=keep_frames, capacity=capacity, parity=parity,
        )  # fmt: skip

    axes = (ALL, 0, 0, 0, 0, ALL, ALL, ALL)
    rows = shard_rows(run, nets.mesh, axes, batch_axes(keep_frames, parity))
    return rows(params, prompt, frames, speaker, prompts, guidance, noise, seed)


def step(
    nets: Networks, params, flow, vocoder, codes, lengths, last, guidance, flow_noise,
    source_noise, seed, *, max_codes, parity,
) -> tuple[FlowState, VocoderState, Float[Array, "B N"], Int[Array, "B"]]:  # fmt: skip
    """The next codes of each stream as sound; see `Flow.step` and `vocoder_step`."""
    TRACES["step"] += 1

    def run(params, flow, vocoder, codes, lengths, last, guidance, flow_noise, source_noise, seed):
        flow, mel = nets.flow.bind(params["flow"]).step(
            flow,
            codes,
            lengths,
            last,
            max_codes=max_codes,
            guidance=guidance,
            noise=flow_noise,
            seed=seed,
        )
        spoken = jnp.where(last, lengths, jnp.maximum(lengths - nets.lookahead, 0))
        net = nets.vocoder.bind(params["vocoder"])
        return flow, *vocoder_step(
            net, vocoder, mel, nets.upsample * spoken, last=last, noise=source_noise,
            equal_gain=not parity,
        )  # fmt: skip

    states = batch_axes(flow.keep_frames, parity), 0
    axes = (ALL, *states, 0, 0, 0, ALL, ALL, 0, 0)
    rows = shard_rows(run, nets.mesh, axes, (*states, 0, 0))
    flow, vocoder, speech, counts = rows(
        params, flow, vocoder, codes, lengths, last, guidance, flow_noise, source_noise, seed
    )
    return flow, vocoder, shard(speech, None, None), shard(counts, None)


def row_keys(seed: int | Array, rows: int) -> Array:
    """The same key for each row: what a reply sounds like does not depend on its neighbours."""
    return jnp.broadcast_to(jax.random.key(seed), (rows,))

"""Compiled programs of speech: pure functions of networks, their parameters and data.

On a mesh the rows of a batch are dealt out: each device computes its own as if there were no
others, see `sharding.shard_rows`.
"""

from collections import Counter
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from sa2jax.models.flow import Flow, FlowOptions, FlowState, VoicePrompt, batch_axes
from sa2jax.models.flow import concat_streams as concat_flow_streams
from sa2jax.models.flow import select_streams as select_flow_streams
from sa2jax.models.vocoder import Vocoder, VocoderState
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
        mesh: the devices.
    """

    flow: Functional[Flow]
    vocoder: Functional[Vocoder]
    lookahead: int
    upsample: int
    mesh: Mesh | None


def mel(
    nets: Networks, params, prompt: VoicePrompt, codes, lengths, options: FlowOptions
) -> Float[Array, "B R M"]:
    """Whole replies as mel frames; see `Flow.__call__`."""
    TRACES["mel"] += 1

    def run(params, *inputs):
        return nets.flow.bind(params)(*inputs)

    rows = shard_rows(run, nets.mesh, (ALL, 0, 0, 0, ALL), 0)
    return rows(params, prompt, codes, lengths, options)


def wave(nets: Networks, params, mel, frames, noise, seed) -> Float[Array, "B N"]:
    """Mel frames as sound, on every device, so that every host can read it."""
    TRACES["wave"] += 1

    def run(params, mel, frames, noise, seed):
        keys = row_keys(seed, len(mel))
        return nets.vocoder.bind(params)(mel, frames, noise=noise, key=keys)[0]

    rows = shard_rows(run, nets.mesh, (ALL, 0, 0, 0, ALL), 0)
    return shard(rows(params, mel, frames, noise, seed), None, None)


def start(nets: Networks, params, prompt: VoicePrompt, options: FlowOptions) -> FlowState:
    """Streams that have said nothing; see `Flow.start`."""
    TRACES["start"] += 1

    def run(params, prompt, options):
        return nets.flow.bind(params).start(prompt, options)

    if nets.mesh is None:
        return run(params, prompt, options)
    axes = batch_axes(jax.eval_shape(run, params, prompt, options))
    return shard_rows(run, nets.mesh, (ALL, 0, ALL), axes)(params, prompt, options)


def step(
    nets: Networks,
    params,
    flow: FlowState,
    vocoder: VocoderState,
    codes,
    lengths,
    last,
    options: FlowOptions,
    source_noise,
    *,
    max_codes: int,
) -> tuple[FlowState, VocoderState, Float[Array, "B N"], Int[Array, "B"]]:
    """The next codes of each stream as sound; see `Flow.step` and `Vocoder.step`."""
    TRACES["step"] += 1

    def run(params, flow, vocoder, codes, lengths, last, options, source_noise):
        flow, mel = nets.flow.bind(params["flow"]).step(
            flow, codes, lengths, last, max_codes=max_codes, options=options
        )
        spoken = jnp.where(last, lengths, jnp.maximum(lengths - nets.lookahead, 0))
        net, frames = nets.vocoder.bind(params["vocoder"]), nets.upsample * spoken
        equal_gain = not flow.parity
        return flow, *net.step(
            vocoder, mel, frames, last=last, noise=source_noise, equal_gain=equal_gain
        )

    states = batch_axes(flow), 0
    axes = (ALL, *states, 0, 0, 0, batch_axes(options), 0)
    rows = shard_rows(run, nets.mesh, axes, (*states, 0, 0))
    flow, vocoder, speech, counts = rows(
        params, flow, vocoder, codes, lengths, last, options, source_noise
    )
    return flow, vocoder, shard(speech, None, None), shard(counts, None)


def step_each(
    nets: Networks,
    params,
    flows: tuple[FlowState, ...],
    vocoders: tuple[VocoderState, ...],
    modulation,
    *inputs,
    max_codes: int,
) -> tuple[tuple[FlowState, ...], tuple[VocoderState, ...], Float[Array, "B N"], Int[Array, "B"]]:
    """`step` of streams that are apart, one row each, without the modulation that they share."""
    TRACES["step_each"] += 1
    flow = concat_flow_streams([replace(flow, modulation=modulation) for flow in flows])
    vocoder = jax.tree.map(lambda *rows: jnp.concatenate(rows), *vocoders)
    flow, vocoder, speech, counts = step(nets, params, flow, vocoder, *inputs, max_codes=max_codes)
    rows = range(len(flows))
    flows = tuple(replace(select_flow_streams(flow, [row]), modulation=()) for row in rows)
    vocoders = tuple(jax.tree.map(lambda x, row=row: x[row : row + 1], vocoder) for row in rows)
    return flows, vocoders, speech, counts


def row_keys(seed: int | Array, rows: int) -> Array:
    """The same key for each row: what a reply sounds like does not depend on its neighbours."""
    return jnp.broadcast_to(jax.random.key(seed), (rows,))

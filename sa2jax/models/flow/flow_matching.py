"""Speech codes and a voice to a mel spectrogram: conditional flow matching, offline or streaming.

Source: CosyVoice 2 (arXiv 2412.10117), the official `CausalMaskedDiffWithXvec`: codes → conformer →
features `mu`; a few Euler steps, with classifier-free guidance, carry noise to mel frames.

    flow = flow_model(cfg)                                    # structure, no numbers
    prompt = VoicePrompt(codes, mel, speaker)                     # a recording of each voice
    mel = flow.bind(params)(prompt, codes)                        # whole replies, batched

    state = flow.bind(params).start(prompt)                       # one state for B streams
    state, mel = flow.bind(params).step(state, codes)             # codes incl. look-ahead
    state, mel = flow.bind(params).step(state, codes, last=True)  # the rest, flushed

All of it is meant to be called under `jax.jit`. A state is an immutable pytree: nothing is shared
between streams; `concat_streams` makes one batch of several states, `select_streams` takes some
streams out of a batch.

**Static shapes.** A step compiles once per (batch, columns of `codes`, capacity of the state).
The estimator's caches have prompt + `keep_frames` slots from the first chunk on. The conformer's
cache grows without bound, as in the official code, through powers of two: `grow_streams(state,
codes)` between steps; without it the oldest codes are forgotten. Every row has its own number of
valid codes and may be the last of its reply or idle (0 codes: its state does not change). Donate
the state to a jitted step (`donate_argnums`): its caches, by far the largest part, are written in
place then.

**Two kinds of streaming**, chosen at `start` and part of the state's type:

- `parity=True` is the official one, quirks included: the attention cache keeps the newest `prompt`
  and the oldest `keep_frames` frames, and the noise of a chunk starts at the cache's length, so
  that all chunks have the same noise once the cache is full.
- the default keeps the prompt and the newest `keep_frames` frames, and each frame has the noise of
  its place in time, as in a whole reply.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sa2jax.models.flow.dit import DiT, EstimatorState
from sa2jax.models.flow.inputs import FlowOptions, VoicePrompt
from sa2jax.models.flow.state import FlowState, capacity_for
from sa2jax.models.flow.upsample_conformer import ConformerState, UpsampleConformer
from sa2jax.nn import (
    Functional,
    Linear,
    Params,
    Policy,
    length_mask,
    param,
    structure_of,
    tap,
    unstack,
)
from sa2jax.speech_config import FlowConfig


def schedule(steps: int) -> tuple[Float[np.ndarray, "E"], Float[np.ndarray, "E"]]:
    """Noise levels `1 − cos(π/2 · k/steps)` and the steps between, summed in float32.

    Returns:
        Level at the start of each Euler step, and each step's length.
    """
    line = np.linspace(0, 1, steps + 1).astype(np.float32)
    angle = line * np.float32(0.5) * np.float32(np.pi)
    # Not every float32 cosine is rounded correctly; the official one is.
    span = np.float32(1) - np.cos(angle.astype(np.float64)).astype(np.float32)
    levels, lengths = [span[0]], []
    for following in span[1:]:
        lengths.append(following - levels[-1])
        levels.append(levels[-1] + lengths[-1])
    return np.array(levels[:-1]), np.array(lengths)


def start_noise(
    first: Int[Array, "B"], frames: int, mels: int, seed: int | Int[Array, "*B"] = 0
) -> Float[Array, "B T M"]:
    """Normal noise that depends on the seed and a frame's number only, for any length.

    Args:
        first: number of each row's first frame.
        frames: how many.
        mels: values per frame.
        seed: of all rows, or of each; another one gives another reading of the same codes.
    """

    def row(seed, first):
        key = jax.random.key(seed)

        def draw(number):
            return jax.random.normal(jax.random.fold_in(key, number), (mels,))

        return jax.vmap(draw)(first + jnp.arange(frames))

    return jax.vmap(row)(jnp.broadcast_to(seed, first.shape), first)


class Flow(nnx.Module):
    """Codes and a voice to mel frames."""

    def __init__(self, cfg: FlowConfig, *, policy: Policy, rngs: nnx.Rngs, stacked: bool = True):
        self.cfg, self.policy = cfg, policy
        common = {"policy": policy, "rngs": rngs}
        self.table = param(
            rngs, (cfg.codes, cfg.encoder.inputs), ("vocab", "embed"), dtype=policy.param
        )
        self.speaker = Linear({"speaker": cfg.speaker}, {"mels": cfg.mels}, **common)
        self.encoder = UpsampleConformer(cfg.encoder, stacked=stacked, **common)
        self.to_mel = Linear({"embed": cfg.encoder.embed}, {"mels": cfg.mels}, **common)
        self.estimator = DiT(cfg.estimator, cfg.mels, stacked=stacked, **common)

    def __call__(
        self,
        prompt: VoicePrompt[Array],
        codes: Int[Array, "B T"],
        lengths: Int[Array, "B"] | None = None,
        options: FlowOptions | None = None,
        *,
        trace: dict[str, Array] | None = None,
    ) -> Float[Array, "B R M"]:
        """Mel frames of whole replies; a row's result does not depend on the others.

        Args:
            prompt: voice of each row.
            codes: codes to speak, right-padded; negative ones are read as 0.
            lengths: valid codes of each row, by default all.
            options: steps, guidance and noise; by default `FlowOptions()`.
            trace: filled with intermediate results by name, to compare implementations.

        Returns:
            Log-mel frames (50 Hz), `R = upsample · T`, zero beyond each row's own.
        """
        ratio, (batch, room) = self.cfg.encoder.upsample, codes.shape
        options = options or FlowOptions()
        prompts = _lengths_or_full(prompt.lengths, batch, prompt.codes.shape[1])
        lengths = _lengths_or_full(lengths, batch, room)
        joined = _concat_ragged(prompt.codes, codes, prompts)
        total = prompts + lengths
        encoder, estimator = self._empty_states(batch, options.steps)
        mu, _ = self._encode(joined, total, total, encoder, joined.shape[1], trace=trace)
        levels = self.estimator.timestep_modulation(schedule(options.steps)[0], trace=trace)
        frames = mu.shape[1]
        given = prompt.mel.shape[1]
        cond = jnp.pad(prompt.mel, [(0, 0), (0, frames - given), (0, 0)])
        cond = jnp.where(length_mask(ratio * prompts, frames)[..., None], cond, 0)
        x = self._start_noise(jnp.zeros(batch, jnp.int32), frames, options)
        x, _ = self._euler(
            x,
            mu,
            self._project_speaker(prompt.speaker, trace),
            cond,
            ratio * total,
            estimator,
            levels,
            guidance=options.guidance,
            record=False,
            trace=trace,
        )
        place = ratio * prompts[:, None] + jnp.arange(ratio * room)
        mel = jnp.take_along_axis(x, place[..., None], axis=1)
        return jnp.where(length_mask(ratio * lengths, ratio * room)[..., None], mel, 0)

    def start(
        self,
        prompt: VoicePrompt[Array],
        options: FlowOptions | None = None,
        *,
        ahead: Int[Array, "B A"] | None = None,
        trace: dict[str, Array] | None = None,
    ) -> FlowState:
        """Streams after the prefill of their voice prompt, before the first code of a reply.

        The state depends on the voice alone and may be kept and started from again (a copy of it,
        `jax.tree.map(jnp.copy, state)`, where steps are donated theirs).

        Args:
            prompt: voice of each row.
            options: of this stream, by default `FlowOptions()`.
            ahead: codes that follow the prompt, by default the prompt's first ones again, as the
                official code has it.
            trace: filled with intermediate results by name.
        """
        options = options or FlowOptions()
        batch, given = prompt.codes.shape
        ratio, lookahead = self.cfg.encoder.upsample, self.cfg.encoder.lookahead
        prompts = _lengths_or_full(prompt.lengths, batch, given)
        if ahead is None:
            again = jnp.arange(lookahead)[None] % jnp.maximum(prompts, 1)[:, None]
            ahead = jnp.take_along_axis(prompt.codes, again, axis=1)
        codes = _concat_ragged(prompt.codes, ahead, prompts)
        encoder, estimator = self._empty_states(batch, options.steps)
        mu, encoder = self._encode(
            codes,
            prompts + lookahead,
            prompts,
            encoder,
            given,
            capacity=max(options.capacity, capacity_for(given + 1)),
            trace=trace,
        )
        levels = self.estimator.timestep_modulation(schedule(options.steps)[0], trace=trace)
        frames, keep = ratio * prompts, options.keep_frames
        x = self._start_noise(jnp.zeros(batch, jnp.int32), mu.shape[1], options)
        voice = self._project_speaker(prompt.speaker, trace)
        _, fresh = self._euler(
            x,
            mu,
            voice,
            prompt.mel,
            frames,
            estimator,
            levels,
            guidance=options.guidance,
            record=True,
            trace=trace,
        )
        estimator = estimator.grow(ratio * given + keep).evict_and_insert(
            fresh, frames, frames, jnp.zeros_like(frames), keep_frames=keep, parity=options.parity
        )
        return FlowState(voice, frames, levels, encoder, estimator, keep, options.parity)

    def step(
        self,
        state: FlowState,
        codes: Int[Array, "B T"],
        lengths: Int[Array, "B"] | None = None,
        last: bool | Bool[Array, "B"] = False,
        *,
        max_codes: int | None = None,
        options: FlowOptions | None = None,
        trace: dict[str, Array] | None = None,
    ) -> tuple[FlowState, Float[Array, "B R M"]]:
        """Speak the next codes of each stream.

        A row that is not at its end speaks all its codes but the `lookahead` last ones, which come
        again at the front of its next chunk. A row at its end speaks all.

        Args:
            state: the streams.
            codes: next codes of each row, right-padded.
            lengths: valid codes of each row, by default all; 0 for a row that waits.
            last: whether these are a row's last codes, for all rows or each.
            max_codes: most codes that a row speaks, by default all columns of `codes`, less the
                look-ahead if `last` is False.
            options: guidance and noise; steps and caches are those that `start` was given.
            trace: filled with intermediate results by name.

        Returns:
            The next state and log-mel frames (50 Hz), `R = upsample · max_codes`, zero beyond each
            row's `upsample · spoken`.
        """
        options = options or FlowOptions()
        batch, columns = codes.shape
        ratio, lookahead = self.cfg.encoder.upsample, self.cfg.encoder.lookahead
        present = _lengths_or_full(lengths, batch, columns)
        if max_codes is None:
            max_codes = columns - lookahead if last is False else columns
        spoken = jnp.where(last, present, jnp.maximum(present - lookahead, 0))
        mu, encoder = self._encode(codes, present, spoken, state.encoder, max_codes, trace=trace)
        frames = ratio * spoken
        seen = ratio * state.encoder.length
        first = state.estimator.filled if state.parity else seen
        x = self._start_noise(first, mu.shape[1], options)
        x, fresh = self._euler(
            x,
            mu,
            state.speaker,
            jnp.zeros_like(mu),
            frames,
            state.estimator,
            state.modulation,
            guidance=options.guidance,
            record=True,
            trace=trace,
        )
        estimator = state.estimator.evict_and_insert(
            fresh, frames, state.prompt, seen, keep_frames=state.keep_frames, parity=state.parity
        )
        mel = jnp.where(length_mask(frames, x.shape[1])[..., None], x, 0)
        return replace(state, encoder=encoder, estimator=estimator), mel

    def _empty_states(self, batch: int, steps: int) -> tuple[ConformerState, EstimatorState]:
        """States without room."""
        cfg, dtype = self.cfg, self.policy.compute
        return (
            ConformerState.zeros(cfg.encoder, batch, 0, dtype),
            EstimatorState.zeros(cfg.estimator, steps, batch, 0, dtype),
        )

    def _project_speaker(self, speaker, trace):
        """Speaker vectors to what the estimator takes."""
        x = speaker.astype(jnp.float32)
        x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        return tap(trace, "speaker", self.speaker(x))

    def _encode(self, codes, present, counts, state, max_codes, *, capacity=None, trace=None):
        """Codes to features, with zeros behind so that `max_codes` codes have their look-ahead."""
        missing = max_codes + self.cfg.encoder.lookahead - codes.shape[1]
        codes = jnp.clip(codes, 0, self.cfg.codes - 1)
        x = self.table[...][codes].astype(self.policy.compute)
        x = jnp.where(length_mask(present, x.shape[1])[..., None], x, 0)
        x = jnp.pad(x, [(0, 0), (0, max(missing, 0)), (0, 0)])[:, : codes.shape[1] + missing]
        with jax.named_scope("encoder"):
            x, state = self.encoder(x, present, counts, state, capacity=capacity, trace=trace)
        return tap(trace, "mu", self.to_mel(x)), state

    def _start_noise(self, first, frames, options):
        """Start noise of each row from its own first frame on."""
        if options.noise is None:
            return start_noise(first, frames, self.cfg.mels, options.seed)
        number = first[:, None] + jnp.arange(frames)
        return jnp.asarray(options.noise, jnp.float32)[number % options.noise.shape[0]]

    def _euler(
        self, x, mu, speaker, cond, counts, state, levels, *, guidance, record, trace
    ) -> tuple[Array, Any]:
        """Carry noise to mel frames; gives what the caches need of every step, if recorded."""
        guidance = self.cfg.guidance if guidance is None else guidance
        steps = state.kv.shape[0]

        def both(a):
            return jnp.concatenate([a, jnp.zeros_like(a)])

        voice = jnp.broadcast_to(speaker[:, None], mu.shape)
        fixed = both(jnp.concatenate([mu, voice, cond.astype(mu.dtype)], axis=-1))
        mask = jnp.concatenate([state.slot_order >= 0, length_mask(counts, x.shape[1])], axis=1)
        mask, counts = jnp.concatenate([mask, mask]), jnp.concatenate([counts, counts])

        def euler(x, step):
            index, length, parts = step
            inputs = jnp.concatenate([jnp.concatenate([x, x]).astype(fixed.dtype), fixed], axis=-1)
            v, fresh = self.estimator(inputs, parts, mask, counts, state, index)
            given, free = jnp.split(v, 2)
            noted = {"euler_x": x, "euler_v_cond": given, "euler_v_uncond": free}
            x = x + length * ((1 + guidance) * given - guidance * free)
            return x, (fresh if record else None, noted if trace is not None else None)

        with jax.named_scope("euler"):
            line = jnp.arange(steps), jnp.asarray(schedule(steps)[1]), levels
            x, (fresh, noted) = jax.lax.scan(euler, x, line)
        if trace is not None:
            trace.update(noted)
        return x, fresh


def _lengths_or_full(lengths: Int[Array, "B"] | None, batch: int, full: int) -> Int[Array, "B"]:
    return jnp.full(batch, full, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)


def _concat_ragged(
    first: Int[Array, "B P"], second: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> Int[Array, "B P+T"]:
    """Each row's second part right behind the valid codes of its first."""
    line = jnp.concatenate([first, second], axis=1)
    place = jnp.arange(line.shape[1])[None]
    behind = place - lengths[:, None] + first.shape[1]
    place = jnp.where(place < lengths[:, None], place, jnp.minimum(behind, line.shape[1] - 1))
    return jnp.take_along_axis(line, place, axis=1)


def flow_model(
    cfg: FlowConfig, policy: Policy | None = None, *, stacked: bool = True
) -> Functional[Flow]:
    """The structure of a config's flow, see `nn.structure_of`."""
    return structure_of(Flow, cfg, policy, stacked=stacked)


def unstack_flow(params: Params) -> Params:
    """The same parameters for `flow_model(..., stacked=False)`, which is faster on a CPU."""
    encoder, estimator = params["encoder"], params["estimator"]
    encoder = encoder | {name: unstack(encoder[name]) for name in ("layers", "up_layers")}
    return params | {
        "encoder": encoder,
        "estimator": estimator | {"blocks": unstack(estimator["blocks"])},
    }

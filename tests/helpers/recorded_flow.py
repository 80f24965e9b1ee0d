"""The recorded flow: its checkpoint, what the official code made of it, and compiled calls."""

from functools import cached_property
from pathlib import Path

import jax
import numpy as np

from sa2jax.convert.flow import load
from sa2jax.models.flow import STEPS, FlowOptions, VoicePrompt, flow_model, unstack_flow


class RecordedFlow:
    def __init__(self, golden: Path):
        self.folder = golden / "t2w_golden"
        self.cfg, self.params = load(golden / "token2wav")
        self.model = flow_model(self.cfg)
        self.lookahead = self.cfg.encoder.lookahead
        self.ratio = self.cfg.encoder.upsample
        self.step_traces = 0

    def arrays(self, name: str):
        return np.load(self.folder / f"{name}.npz")

    @cached_property
    def noise(self) -> np.ndarray:
        return self.arrays("rand_noise")["rand_noise"][0].T  # [S, M]

    @cached_property
    def voice(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes, mel and speaker vector of the recorded prompt, each a batch of one."""
        prompt = self.arrays("prepare_prompt")
        return prompt["prompt_tokens"], prompt["prompt_mel_padded"], prompt["spk_emb"]

    def other_voice(self, seed: int, codes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A voice that nobody has."""
        rng, cfg = np.random.default_rng(seed), self.cfg
        mel = rng.normal(-5, 2, (1, self.ratio * codes, cfg.mels)).astype(np.float32)
        return self.codes(seed, codes), mel, rng.normal(size=(1, cfg.speaker)).astype(np.float32)

    def codes(self, seed: int, count: int) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, self.cfg.codes, (1, count))

    @cached_property
    def offline(self):
        """One reply: its mel frames and all stages."""

        def run(params, *args, **kwargs):
            trace = {}
            mel = self._whole(self.model, params, trace, *args, **kwargs)
            return mel, trace

        call = jax.jit(run, static_argnames="steps")
        return lambda *args, **kwargs: call(self.params, *args, **kwargs)

    @cached_property
    def offline_batch(self):
        """Many replies, with layers in a loop."""
        model, params = flow_model(self.cfg, stacked=False), unstack_flow(self.params)
        call = jax.jit(lambda params, *args: self._whole(model, params, None, *args))
        return lambda *args: call(params, *args)

    def _whole(self, model, params, trace, *args, steps=STEPS):
        codes, mel, speaker, reply, *lengths = args
        given, lengths = lengths or (None, None)
        options = FlowOptions(noise=self.noise, steps=steps)
        prompt = VoicePrompt(codes, mel, speaker, given)
        return model.bind(params)(prompt, reply, lengths, options, trace=trace)

    @cached_property
    def start(self):
        def run(params, *voice):
            options = FlowOptions(noise=self.noise, parity=True)
            return self.model.bind(params).start(VoicePrompt(*voice), options)

        call = jax.jit(run)
        return lambda *args: call(self.params, *args)

    @cached_property
    def step(self):
        """Any chunk; `last` an array, so that all chunks of one width share a program."""

        def run(params, state, codes, lengths, last):
            self.step_traces += 1
            trace, bound = {}, self.model.bind(params)
            options = FlowOptions(noise=self.noise)
            state, mel = bound.step(state, codes, lengths, last, options=options, trace=trace)
            return state, mel, trace["mu"]

        call = jax.jit(run)
        return lambda *args: call(self.params, *args)


def stack_rows(rows, width: int | None = None):
    """Rows [1, T, ...] of different lengths as one right-padded batch, and their lengths."""
    lengths = np.array([row.shape[1] for row in rows])
    width = lengths.max() if width is None else width
    batch = np.zeros((len(rows), width, *rows[0].shape[2:]), rows[0].dtype)
    for i, row in enumerate(rows):
        batch[i, : row.shape[1]] = row[0]
    return batch, lengths

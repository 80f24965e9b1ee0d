"""Checkpoints with recordings of what the official code made of them."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sa2jax.config import StepAudio2Config
from sa2jax.convert.hf import load_hf
from sa2jax.models.step_audio import step_audio2
from sa2jax.nn import Functional, Params, Policy


@dataclass(frozen=True)
class Recorded:
    """One checkpoint and the recordings made with it."""

    folder: Path

    @cached_property
    def cfg(self) -> StepAudio2Config:
        return StepAudio2Config.from_hf(self.folder / "llm")

    @cached_property
    def audio_start(self) -> int:
        return json.loads((self.folder / "llm" / "special_ids.json").read_text())["audio_start"]

    def arrays(self, name: str):
        return np.load(self.folder / "golden" / f"{name}.npz")

    def model(self, dtype: str) -> tuple[Functional, Params]:
        policy = Policy(param=jnp.dtype(dtype), compute=jnp.dtype(dtype))
        return step_audio2(self.cfg, policy), load_hf(self.folder / "llm", dtype=dtype)


def first_difference(ours: dict, reference: dict, atol: float) -> str | None:
    """Compare stage by stage, in the order of computation.

    Returns:
        None if all agree, else the first stage that differs and the errors of all.
    """
    report, first = [], None
    for name, expected in reference.items():
        got = np.asarray(ours[name], np.float32)
        if got.shape != expected.shape:
            return f"{name}: shape {got.shape}, expected {expected.shape}"
        error = float(np.abs(got - expected).max())
        report.append(f"{name} {error:.1e}")
        if first is None and not error <= atol:
            first = name
    return first and f"{first!r} is the first stage off by more than {atol}: {', '.join(report)}"


def audio_slots(ids: np.ndarray, counts: np.ndarray, stride: int, audio_start: int) -> np.ndarray:
    """Where clips stand: after each `<audio_start>`, in row-major order over the batch."""
    slots = np.full(ids.shape, -1, np.int32)
    places = np.argwhere(ids == audio_start)
    assert len(places) == len(counts)
    for clip, ((row, start), count) in enumerate(zip(places, counts, strict=True)):
        slots[row, start + 1 : start + 1 + count] = clip * stride + np.arange(count)
    return slots


def clips_of(recording, case: str) -> tuple[np.ndarray, np.ndarray]:
    """Mels of a recorded prompt's clips [C, M, T] and how many frames each has [C]."""
    frames = recording[f"{case}_wav_lens"] + 2
    if f"{case}_wavs" in recording:
        return recording[f"{case}_wavs"], frames
    return recording["two_clips_wavs"][::-1].copy(), frames  # stored once, used in reverse


def forward(model: Functional, params: Params, audio_start: int, recording, case: str):
    """Logits of one recorded prompt without a cache, and all intermediate results."""
    ids = recording[f"{case}_ids"]
    lengths = recording[f"{case}_mask"].sum(1).astype(np.int32)
    features = slots = None
    if f"{case}_wav_lens" in recording:
        mels, frames = clips_of(recording, case)
        listen = jax.jit(lambda p, m, f: model.bind(p).encode_audio(m, f, official_batch=True))
        features = listen(params, mels, frames)
        counts = np.asarray(model.bind(params).feature_length(frames))
        slots = audio_slots(ids, counts, features.shape[1], audio_start)

    @jax.jit
    def run(params, features):
        net, trace = model.bind(params), {}
        hidden, _ = net(ids, features, slots, None, lengths, trace=trace)
        return net.decoder.logits(hidden), trace

    return run(params, features)

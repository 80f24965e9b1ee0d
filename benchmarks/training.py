"""Time a training step of a named size on the devices at hand, with random weights.

python benchmarks/training.py --kind lora --length 2048 --rows 4 --sound 25
"""

import argparse
import json
import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sa2jax.config import StepAudio2Config
from sa2jax.models.step_audio import StepAudio2Model
from sa2jax.nn import Policy, functional, init_params
from sa2jax.train.language.step import LanguageBatch, make_language_step, place_batch
from sa2jax.train.log import peak_flops, training_flops
from sa2jax.train.lora import ONLY_LORA, add_lora, combine, init_lora
from sa2jax.train.optimizer import OptimizerConfig, make_optimizer
from sa2jax.train.state import init_state


def some_batch(cfg, rows: int, length: int, sound: float, packed: int) -> LanguageBatch:
    """Random tokens; the first seconds of every row are heard, in 25 s clips."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, cfg.decoder.vocab, (rows, length + 1), dtype=np.int32)
    batch: dict[str, Any] = {}
    if packed > 1:
        each, place = -(-length // packed), np.arange(length, dtype=np.int32)
        batch["segments"] = np.broadcast_to(1 + place // each, (rows, length))
        batch["positions"] = np.broadcast_to(place % each, (rows, length))
    clips = int(-(-sound // 25))
    if clips:
        frames = min(2502, int(100 * sound))
        room = 3000
        mels = rng.standard_normal((rows * clips, cfg.audio_encoder.mels, room), np.float32)
        slots = np.full((rows, length), -1, np.int32)
        heard = frames // 8
        for row in range(rows):
            for clip in range(clips):
                at = 4 + clip * (heard + 2)
                slots[row, at : at + heard] = (row * clips + clip) * room // 8 + np.arange(heard)
        batch |= {
            "mels": mels,
            "frames": np.full((rows * clips, 1), frames, np.int32),
            "starts": np.zeros((rows * clips, 1), np.int32),
            "feature_index": slots,
        }
    return LanguageBatch(
        ids=ids[:, :-1], targets=ids[:, 1:], weights=np.ones((rows, length), np.float32), **batch
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--kind", choices=("full", "lora", "qlora"), default="lora")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--sound", type=float, default=25.0)
    parser.add_argument("--packed", type=int, default=4)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--layers", type=int, help="of the decoder, in place of the preset's")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--remat", choices=("full", "dots", "none"), default="full")
    given = parser.parse_args()
    half = jnp.dtype(given.dtype)
    whole = jnp.dtype(jnp.int8) if given.kind == "qlora" else None
    policy = Policy(param=half, compute=half, kernel=whole)
    cfg, lora = StepAudio2Config.preset(given.preset), given.kind != "full"
    if given.layers:
        cfg = replace(cfg, decoder=replace(cfg.decoder, layers=given.layers))

    def make(adapted: bool = lora) -> StepAudio2Model:
        rngs = nnx.Rngs(0)
        net = StepAudio2Model(cfg, policy=policy, rngs=rngs)
        if adapted:
            add_lora(net, 16, 32.0, rngs=rngs)
        return net

    model = functional(make)
    rates = ONLY_LORA if lora else {"audio_encoder": 0.0}
    optimizer = make_optimizer(OptimizerConfig(learning_rate_overrides=rates, moment_dtype=half))
    params = init_params(lambda: make(False))
    if lora:
        params = combine(params, init_lora(model, jax.random.key(0)))
    state = init_state(model, optimizer, None, params)
    del params
    step = make_language_step(
        model, optimizer, remat=None if given.remat == "none" else given.remat
    )
    batch = place_batch(some_batch(cfg, given.rows, given.length, given.sound, given.packed), None)
    begun, times = time.perf_counter(), []
    state, report = jax.block_until_ready(step(state, batch))
    compiled = time.perf_counter() - begun
    for _ in range(given.steps):
        begun = time.perf_counter()
        state, report = jax.block_until_ready(step(state, batch))
        times.append(time.perf_counter() - begun)
    tokens, heard = given.rows * given.length, given.rows * given.sound
    token, second = training_flops(cfg, base_trained=not lora, encoder_trained=False)
    best = sorted(times)[len(times) // 2]
    peak, stats = peak_flops(), jax.devices()[0].memory_stats() or {}
    print(
        json.dumps(
            {
                "device": jax.devices()[0].device_kind,
                **vars(given),
                "compile_s": round(compiled, 1),
                "step_ms": round(1e3 * best, 1),
                "tokens_per_s": round(tokens / best),
                "sound_s_per_s": round(heard / best, 1),
                "mfu": round((token * tokens + second * heard) / best / peak, 3) if peak else None,
                "memory_gib": round(stats.get("peak_bytes_in_use", 0) / 2**30, 2),
                "loss": float(report["loss"]),
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()

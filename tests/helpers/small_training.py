"""A small model, and spoken pairs to train it with."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from sa2jax import testing
from sa2jax.config import StepAudio2Config
from sa2jax.train.language.recipe import LanguageRecipe
from sa2jax.train.recipe import build_config


def save_model(folder: Path, cfg: StepAudio2Config | None = None) -> Path:
    """One layer that hears and speaks, as a Hugging Face folder."""
    return testing.save_tiny_checkpoint(
        folder, testing.tiny_config(layers=1) if cfg is None else cfg
    )


def save_pairs(folder: Path, count: int = 12, *, seed: int = 0) -> Path:
    """Chords of half a second, and a spoken answer to each: words and up to 24 codes."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for n in range(count):
        time = np.arange(int(16_000 * rng.uniform(0.4, 0.7))) / 16_000
        tones = [np.sin(2 * np.pi * time * pitch) for pitch in rng.uniform(150, 3000, 4)]
        chord = 0.1 * np.sum(tones, axis=0) + 0.01 * rng.standard_normal(time.size)
        soundfile.write(folder / f"{n}.wav", chord.astype(np.float32), 16_000)
        answer = {
            "role": "assistant",
            "content": f"word {n}",
            "speech": rng.integers(0, 100, int(rng.integers(8, 24))).tolist(),
        }
        messages = [{"role": "user", "content": "<audio>"}, answer]
        lines.append(json.dumps({"messages": messages, "audios": [f"{n}.wav"]}))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def interrupt_after(step: int, seen: list[int]) -> Callable[[int], None]:
    """An `on_step` that keeps every step in `seen` and interrupts this process after one."""

    def on_step(done: int) -> None:
        seen.append(done)
        if done == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step


def values(model: Path, data: Path, /, **changes: Any) -> dict[str, Any]:
    """A recipe of a few updates, as a YAML file would hold it."""
    recipe = {
        "model": {"folder": str(model)},
        "data": {
            "sources": {str(data): 1},
            "length": 192,
            "rows": 2,
            "mel_frames": 400,
            "clips": 5,
        },
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2, "steps": 6},
        "remat": None,
        "intervals": {"log_every": 1, "save_every": 2},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            recipe[section] = recipe[section] | {name: value}
        else:
            recipe[section] = value
    return recipe


def recipe(model: Path, data: Path, /, **changes: Any) -> LanguageRecipe:
    """`values`, built."""
    return build_config(LanguageRecipe, values(model, data, **changes), "small")

"""What int8 costs in quality: teacher-forced logits against those of bfloat16 and float32 weights.

    python benchmarks/int8_quality.py [folder …]

Random weights are the folders given (Hugging Face checkpoints) on random tokens. Trained weights
are made here in a few minutes: a small decoder that reads this project's own texts byte by byte,
judged on texts that it was not trained on.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from sa2jax import testing
from sa2jax.config import AudioEncoderConfig, DecoderConfig, StepAudio2Config
from sa2jax.convert.hf import load_hf
from sa2jax.convert.verify import compare_logits
from sa2jax.families import family_of, read_config
from sa2jax.inference.engine import Engine
from sa2jax.inference.requests import Request
from sa2jax.models.step_audio import step_audio2
from sa2jax.nn import Policy
from sa2jax.quantize import quantize_params
from sa2jax.train.language.step import LanguageBatch, make_language_step
from sa2jax.train.optimizer import OptimizerConfig, make_optimizer
from sa2jax.train.state import init_state

HERE = Path(__file__).parent.parent
SIZE, ROWS, LENGTH, STEPS = 96, 8, 256, 250
HELD_OUT = ("docs/conversations.md", "docs/design.md")
KINDS = {
    "bfloat16": {},
    "int8": {"kernel": jnp.int8},
    "int8, float head": {"kernel": jnp.int8, "head": jnp.bfloat16},
}


def trained():
    """A small model that has learnt something, and texts that it has not seen."""
    cfg = StepAudio2Config(
        decoder=DecoderConfig(
            vocab=512, layers=4, embed=SIZE, mlp=3 * SIZE, heads=4, kv_heads=2, max_positions=1024
        ),
        audio_encoder=AudioEncoderConfig(mels=16, layers=1, embed=16, heads=2),
    )
    texts = [
        path
        for path in sorted(HERE.rglob("*.md")) + sorted(HERE.glob("sa2jax/**/*.py"))
        if str(path.relative_to(HERE)) not in HELD_OUT
    ]
    seen = np.concatenate([np.frombuffer(path.read_bytes(), np.uint8) for path in texts])
    model = step_audio2(cfg)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-3, warmup_steps=20, steps=STEPS))
    step = make_language_step(model, optimizer, remat=None)
    start = jax.tree.map(lambda leaf: leaf / 2, testing.tiny_params(cfg))
    state = init_state(model, optimizer, None, start)
    rng = np.random.default_rng(0)
    for number in range(STEPS):
        places = rng.integers(0, len(seen) - LENGTH - 1, ROWS)[:, None] + np.arange(LENGTH + 1)
        rows = seen[places].astype(np.int32)
        batch = LanguageBatch(
            ids=jnp.asarray(rows[:, :-1]),
            targets=jnp.asarray(rows[:, 1:]),
            weights=jnp.ones((ROWS, LENGTH), jnp.float32),
        )
        state, report = step(state, batch)
        if number % 100 == 99:
            print(f"step {number + 1}: loss {float(report['loss']):.3f}", file=sys.stderr)
    unseen = [np.frombuffer((HERE / name).read_bytes(), np.uint8)[:1000] for name in HELD_OUT]
    return cfg, state.params, [Request(ids.astype(np.int32)) for ids in unseen]


def untrained(folder):
    """A checkpoint of random weights, and random prompts."""
    cfg = read_config(folder)
    rng = np.random.default_rng(0)
    prompts = [Request(rng.integers(0, cfg.decoder.vocab, 400).astype(np.int32)) for _ in range(4)]
    return cfg, load_hf(folder, dtype=np.float32), prompts


def logits(cfg, params, prompts, **kinds):
    compute = jnp.bfloat16 if kinds else jnp.float32
    own = {name: kind for name, kind in kinds.items() if name != "compute"}
    model = family_of(cfg).model(cfg, Policy(param=compute, compute=compute, **own))
    if own:
        params = quantize_params(params, model.abstract)
    else:
        params = jax.tree.map(lambda leaf: leaf.astype(compute), params)
    engine = Engine(model, params, cfg)
    return np.concatenate([engine.logits(prompt) for prompt in prompts])


def main(folders):
    cases = {f"random: {Path(folder).parent.name}": untrained(folder) for folder in folders}
    cases["trained on text"] = trained()
    table = Table("weights", "against", "with", "positions", "same best token", "KL, nats")
    for name, case in cases.items():
        made = {"float32": logits(*case)}
        made |= {kind: logits(*case, compute=True, **extra) for kind, extra in KINDS.items()}
        pairs = [("float32", "bfloat16"), *(("bfloat16", kind) for kind in list(KINDS)[1:])]
        for first, second in pairs:
            found = compare_logits(made[first], made[second])
            table.add_row(
                name,
                first,
                second,
                str(found.positions),
                f"{found.top1_agreement:.1%}",
                f"{found.kl:.2g}",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main(sys.argv[1:] or [HERE / "tests" / "golden" / "micro" / "llm"])

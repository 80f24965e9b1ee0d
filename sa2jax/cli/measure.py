"""The command that measures: `bench`."""

from dataclasses import asdict

import tyro

from sa2jax.cli import common
from sa2jax.cli.common import Dtype


def bench(
    size: tyro.conf.Positional[str] = "qwen2.5-0.5b",
    *,
    prompt: int = 512,
    tokens: int = 300,
    seconds: float = 25.0,
    repeats: int = 3,
    dtype: Dtype | None = None,
    reference: bool = True,
    json: bool = False,
):
    """Time encoder, prefill and decode of a named size with random weights on this machine.

    Args:
        size: Preset from configs/models.
        prompt: Tokens of the prompt.
        tokens: Tokens to generate.
        seconds: Length of the recording that is encoded.
        repeats: Rounds; each times everything once, the median counts.
        dtype: Dtype of weights and computation; by default bfloat16, float32 on a CPU.
        reference: Time transformers beside it, in the same rounds, if torch is installed.
        json: Print JSON.
    """
    from sa2jax.bench import bench, print_bench

    with common.bar("timing", unit="rounds") as tick:
        result = bench(
            size, prompt=prompt, tokens=tokens, seconds=seconds, repeats=repeats, dtype=dtype,
            reference=reference, progress=tick,
        )  # fmt: skip
    if json:
        common.print_json(asdict(result))
    else:
        print_bench(result, common.wide())

"""The command `bench`: timings on this machine."""

from dataclasses import asdict

import tyro

from sa2jax.cli import common
from sa2jax.cli.common import Attention, ModelDtype
from sa2jax.cli.serve import require_packages


def bench(
    size: tyro.conf.Positional[str] = "qwen2.5-0.5b",
    *,
    prompt: int = 512,
    tokens: int = 300,
    seconds: float | None = None,
    streams: tuple[int, ...] | None = None,
    chunk: int = 25,
    repeats: int = 3,
    dtype: ModelDtype | None = None,
    attention: Attention | None = None,
    mesh: str | None = None,
    reference: bool = True,
    model: str = "nano",
    rows: int = 8,
    json: bool = False,
):
    """Time a model with random weights on this machine, the official code beside it.

    Of a language model: encoder, prefill and decode. Of `token2wav`, the released detokenizer:
    voice analysis, flow and vocoder, whole and as streams. Of `serve`: a server of `--model`,
    asked by several clients at once.

    Args:
        size: Preset from configs/models, `token2wav`, or `serve`.
        prompt: Tokens of the prompt.
        tokens: Tokens to generate.
        seconds: Length of the recording; by default 25 for an encoder, 12 for `token2wav`.
        streams: Numbers of streams that advance in one call, by default 1 and 8; of `serve` numbers
            of clients, by default 1, 2, 4 and 8.
        chunk: Codes of a stream's chunk; 25 are a second.
        repeats: Rounds; each times everything once, the median counts.
        dtype: Dtype of weights and computation; by default bfloat16, float32 on a CPU and for
            `token2wav`. int8 is that of the language model's matrices.
        attention: What computes the language model's attention; by default chosen by platform and
            shapes.
        mesh: Devices to spread over, such as `tensor=4`.
        reference: Time transformers, or the official detokenizer, in the same rounds, if torch is
            installed.
        model: What `serve` serves.
        rows: Answers that it makes at a time.
        json: Print JSON.
    """
    from sa2jax import bench
    from sa2jax.errors import ConfigError

    if size == "serve":
        require_packages()
    if size == "token2wav" and attention is not None:
        raise ConfigError("--attention is for language models: the detokenizer has its own")
    with common.progress_bar("timing", unit="rounds") as progress:
        if size == "token2wav":
            result = bench.bench_speech(
                seconds=seconds or 12.0,
                streams=streams or (1, 8),
                chunk=chunk,
                repeats=repeats,
                dtype=dtype or "float32",
                mesh=mesh,
                reference=reference,
                progress=progress,
            )
        elif size == "serve":
            from sa2jax.bench.serve import bench_serve

            result = bench_serve(
                model,
                rows=rows,
                streams=streams or (1, 2, 4, 8),
                repeats=repeats,
                progress=progress,
            )
        else:
            result = bench.bench(
                size,
                prompt=prompt,
                tokens=tokens,
                seconds=seconds or 25.0,
                repeats=repeats,
                dtype=dtype,
                attention=attention,
                mesh=mesh,
                reference=reference,
                progress=progress,
            )
    if json:
        common.print_json(asdict(result))
    else:
        bench.print_bench(result, common.wide_console())

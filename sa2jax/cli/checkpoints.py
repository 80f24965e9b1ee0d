"""Commands on checkpoints: `convert`, `export`, `verify`, `inspect`."""

import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sa2jax.cli import common
from sa2jax.cli.common import Dtype, Out, Source
from sa2jax.cli.options import Hearing

Make = Callable[..., Any]  # of convert/: makes a folder of a source, gives a report


def convert(
    source: Source,
    out: Out,
    *,
    dtype: Dtype | Literal["int8"] | None = None,
    float_head: bool = False,
    tokenizer: Path | None = None,
    init: bool = False,
    encoder: Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
    json: bool = False,
):
    """Turn a Hugging Face checkpoint into a model folder of this library.

    With --init SOURCE is a Qwen2.5, --encoder a Qwen2-Audio, and the result is untrained: what the
    paper's training began with.

    Args:
        source: Hugging Face folder.
        out: Folder to make; it appears only when it is complete.
        dtype: Dtype to store; by default each tensor keeps its own. int8 is that of the matrices.
        float_head: With int8, keep the matrix that makes logits in bfloat16.
        tokenizer: Folder of the tokenizer files, if the source has none.
        init: Make an untrained model of a Qwen2.5 and the encoder of a Qwen2-Audio.
        encoder: With --init, Hugging Face folder of the Qwen2-Audio.
        seed: With --init, of what is drawn: the adapter and the rows of new tokens.
        overwrite: Replace a checkpoint at OUT.
        json: Print JSON.
    """
    common.use_cpu()
    if init or encoder is not None:
        make = _init(dtype, tokenizer, init, encoder, seed, float_head)
        _make_folder(make, source, out, overwrite, json, title="making")
        return
    from sa2jax.convert.hf import convert

    make = partial(convert, dtype=dtype, float_head=float_head, tokenizer=tokenizer)
    _make_folder(make, source, out, overwrite, json, title="converting")


def _init(
    dtype: str | None,
    tokenizer: Path | None,
    init: bool,
    encoder: Path | None,
    seed: int,
    float_head: bool,
) -> Make:
    """What `convert --init` makes a folder with."""
    from sa2jax.convert.init import init as make
    from sa2jax.errors import CheckpointError

    if not init or encoder is None:
        raise CheckpointError(
            "--init and --encoder belong together: expected `sa2jax convert QWEN2.5 OUT --init "
            "--encoder QWEN2_AUDIO`"
        )
    if dtype == "int8" or float_head:
        raise CheckpointError("--init makes a model to train: int8 comes after that")
    return partial(make, encoder=encoder, tokenizer=tokenizer, seed=seed, dtype=dtype)


def export(
    source: Source,
    out: Out,
    *,
    dtype: Dtype | None = None,
    dequantize: bool = False,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    json: bool = False,
):
    """Turn a model folder of this library back into a Hugging Face checkpoint.

    Args:
        source: Folder made by `sa2jax convert`, or nano.
        out: Folder to make; it appears only when it is complete.
        dtype: Dtype to store; by default what each tensor had before it was converted.
        dequantize: Write the numbers that int8 matrices stand for.
        max_shard_size: Largest file.
        overwrite: Replace a checkpoint at OUT.
        json: Print JSON.
    """
    common.use_cpu()
    from sa2jax.assets import model_folder
    from sa2jax.convert.hf import export

    make = partial(export, dtype=dtype, dequantize=dequantize, max_shard_size=max_shard_size)
    _make_folder(make, model_folder(source), out, overwrite, json, title="exporting")


def verify(
    a: Annotated[Source, tyro.conf.arg(metavar="A")],
    b: Annotated[Source, tyro.conf.arg(metavar="B")],
    hearing: Hearing,
    *,
    text: str | None = None,
    wav: Path | None = None,
    json: bool = False,
):
    """Compare two checkpoints, each in either form; the exit code is 1 if they differ.

    Tensors are compared one by one. With --text or --wav also the logits of that prompt.

    Args:
        a: One model folder, or nano.
        b: The other model folder, or nano.
        hearing: Recording.
        text: Text of a prompt.
        wav: A recording in that prompt.
        json: Print JSON.
    """
    from sa2jax.assets import model_folder
    from sa2jax.audio import AudioSource
    from sa2jax.convert.verify import compare_prompt, verify

    a, b = model_folder(a), model_folder(b)
    with common.progress_bar("comparing") as progress:
        result = verify(a, b, progress=progress)
    sound = None if wav is None else AudioSource(wav, hearing.channel)
    logits = None if text is sound is None else compare_prompt(a, b, text or "", sound)
    if json:
        common.print_json(asdict(result) | {"logits": None if logits is None else asdict(logits)})
    else:
        print(result.summary())
        if logits is not None:
            print(logits.summary())
    if not result.same:
        sys.exit(1)


def inspect(folder: Annotated[Source, tyro.conf.arg(metavar="FOLDER")], *, json: bool = False):
    """Show what a checkpoint is made of, without loading it.

    Args:
        folder: Model folder of this library, a Hugging Face folder, or nano.
        json: Print JSON.
    """
    common.use_cpu()
    from sa2jax.assets import model_folder
    from sa2jax.convert.verify import inspect, print_inspection

    inspection = inspect(model_folder(folder))
    if json:
        common.print_json(asdict(inspection))
    else:
        print_inspection(inspection, common.wide_console())


def _make_folder(
    make: Make, source: Path, out: Path, overwrite: bool, as_json: bool, *, title: str
) -> None:
    """Make a checkpoint of another, with a progress bar, and print the report.

    Args:
        make: gives the report, from the two folders, `overwrite` and `progress`.
        source: the folder that is read.
        out: the folder that is made.
        overwrite: replace a checkpoint there.
        as_json: print JSON.
        title: of the progress bar.
    """
    with common.progress_bar(title) as progress:
        report = make(source, out, overwrite=overwrite, progress=progress)
    if as_json:
        common.print_json(asdict(report))
        return
    for note in report.notes:
        common.log(f"note: {note}")
    print(
        f"{out}: {report.tensors} tensors, {report.parameters / 1e6:.1f} M parameters, "
        f"{report.bytes / 1e9:.2f} GB in {report.seconds:.1f} s, "
        f"peak memory {report.peak_bytes / 1e9:.2f} GB"
    )

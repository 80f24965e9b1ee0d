"""The commands `init`, a randomly initialised model folder, and `assemble`, one from parts."""

from pathlib import Path
from typing import Annotated

import tyro

from sa2jax.cli import common
from sa2jax.cli.common import Dtype, Out, Source
from sa2jax.cli.options import Hearing

Preset = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PRESET")]]
Speech = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SPEECH")]]
Texts = tyro.conf.UseAppendAction[tuple[Path, ...]]
Voices = tyro.conf.UseAppendAction[tuple[str, ...]]


def init(
    preset: Preset,
    out: Out,
    *,
    texts: Texts,
    seed: int = 0,
    overwrite: bool = False,
):
    """Make a model of random numbers, with a tokenizer and a detokenizer: training begins here.

    Args:
        preset: Sizes that configs/models and configs/token2wav both have, such as nano.
        out: Folder to make; it appears only when it is complete.
        texts: Data files (.jsonl), or folders of them, from whose texts the tokenizer learns; the
            option may be given several times.
        seed: Of all numbers.
        overwrite: Replace a checkpoint at OUT.
    """
    common.use_cpu()
    from sa2jax.errors import DataError
    from sa2jax.runtime import enable_compilation_cache
    from sa2jax.train.init_model import init_model as make

    enable_compilation_cache()
    if not texts:
        raise DataError("expected --texts FILE: the tokenizer learns from data files")
    print(f"model: {make(preset, out, texts=texts, seed=seed, overwrite=overwrite)}")


def assemble(
    model: Source,
    speech: Speech,
    out: Out,
    hearing: Hearing,
    *,
    dtype: Dtype | None = None,
    single: bool = False,
    voice: Voices = (),
    overwrite: bool = False,
):
    """Put a language model and a detokenizer that were trained apart into one folder.

    Args:
        model: Model folder of this library.
        speech: A detokenizer of this library, or a model folder with one.
        out: Folder to make; it appears only when it is complete.
        hearing: Recordings of voices.
        dtype: Dtype to store; by default each tensor keeps its own.
        single: Write one file of numbers for each, for small models.
        voice: NAME=RECORDING, a voice to make; the option may be given several times, and the
            first is the default voice.
        overwrite: Replace a checkpoint at OUT.
    """
    common.use_cpu()
    from sa2jax.assets import model_folder
    from sa2jax.convert.assemble import assemble as run
    from sa2jax.errors import VoiceError

    named = {}
    for word in voice:
        name, equals, recording = word.partition("=")
        if not (name and equals and recording):
            raise VoiceError(f"--voice {word}: expected NAME=RECORDING, such as anna=anna.wav")
        named[name] = Path(recording)
    notes = run(
        model_folder(model),
        model_folder(speech),
        out,
        dtype=dtype,
        single=single,
        voices=named,
        channel=hearing.channel,
        overwrite=overwrite,
    )
    for note in notes:
        common.log(f"note: {note}")
    print(f"model: {out}")

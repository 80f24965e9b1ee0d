"""The commands `data`: prepare, synthesize and show training data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.table import Table

from sa2jax.cli import common
from sa2jax.cli.options import Hearing

Paths = tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="SOURCE ... OUT")]]
Words = tyro.conf.UseAppendAction[tuple[str, ...]]  # the option may be given several times
Folder = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FOLDER")]]


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What actions that make a folder of recordings share."""

    max_rejects: int = 100
    """Stop if more than these cannot be used."""
    overwrite: bool = False
    """Replace a prepared folder."""
    json: bool = False
    """Print JSON."""

    def options(self) -> dict[str, Any]:
        """Keywords of what writes the folder, see `recordings.WriteOptions`."""
        return {"max_rejects": self.max_rejects, "overwrite": self.overwrite}


Output = Annotated[OutputOptions, tyro.conf.arg(name="")]


def _prepare(
    paths: Paths,
    output: Output,
    hearing: Hearing,
    *,
    model: Path | None = None,
    reader: Literal["soundfile", "tfio"] = "soundfile",
    tfio_python: Path | None = None,
    shard_size: str = "1GB",
    workers: int | None = None,
):
    """Make shards of records and their recordings, which training reads at once.

    Args:
        paths: Records: .jsonl files, folders of them, .json files with an array, or .tfrecord files
            (with --reader tfio); and, last, the folder to make.
        model: Folder of the model to train: its speech tokenizer makes audio codes of spoken
            answers, its tokenizer counts text.
        reader: Who reads recordings: libsndfile, or tensorflow-io, which also reads gs:// and
            TFRecord, in an environment of its own.
        tfio_python: Interpreter of tensorflow-io's environment, such as tfio/bin/python.
        shard_size: Largest shard, such as 500MB, or a plain number of samples.
        workers: Processes that read; by default one for each core.
        output: Output.
        hearing: Recordings.
    """
    from sa2jax.train.data.prepare import PrepareConfig, prepare_dataset

    config = PrepareConfig(
        model=model,
        reader=reader,
        tfio_python=tfio_python,
        shard_size=shard_size,
        workers=workers,
        max_rejects=output.max_rejects,
        channel=hearing.channel,
    )
    make = partial(prepare_dataset, config=config, overwrite=output.overwrite)
    _make_folder(paths, make, output, title="preparing", unit="records")


def _prepare_flow(
    paths: Paths,
    output: Output,
    hearing: Hearing,
    *,
    model: Path,
    perturbations: int = 0,
):
    """Hear recordings for training of the detokenizer's flow: codes, mel frames, speaker vectors.

    Args:
        paths: Recordings (wav, flac, mp3, ogg, opus) of at least 1 s, folders of them, or .jsonl
            files with a line {"audio": "a.wav"} each; and, last, the folder to make.
        model: Folder with the detokenizer to train: its own networks hear the recordings.
        perturbations: Keep each recording as often again with the codes of the same speech with
            another pitch, formants and tilt, so that the flow does not learn from codes who speaks.
        output: Output.
        hearing: Recordings.
    """
    from sa2jax.runtime import enable_compilation_cache
    from sa2jax.train.networks.flow_data import prepare_flow

    enable_compilation_cache()
    make = partial(
        prepare_flow,
        model=model,
        perturbations=perturbations,
        channel=hearing.channel,
        **output.options(),
    )
    _make_folder(paths, make, output, title="hearing")


def _prepare_speech(
    paths: Paths,
    output: Output,
    hearing: Hearing,
    *,
    rate: Literal[16000, 24000] = 16000,
    pitch: bool = False,
    model: Path | None = None,
    max_seconds: float = 25.0,
):
    """Read recordings for training of the networks that hear, and of the vocoder.

    Args:
        paths: Recordings (wav, flac, mp3, ogg, opus), folders of them, or .jsonl files with a line
            {"audio": "a.wav", "text": "what is said", "speaker": "anna"} each; and, last, the
            folder to make.
        rate: Hz: 16000 for the speech tokenizer, the speaker encoder and the audio encoder, 24000
            for the vocoder.
        pitch: Find the pitch, for the vocoder; needs pyworld.
        model: Folder whose flow shall make the mel frames that a vocoder hears, at 24000 Hz.
        max_seconds: Longer recordings are not used.
        output: Output.
        hearing: Recordings.
    """
    from sa2jax.train.networks.speech_data import prepare_speech

    make = partial(
        prepare_speech,
        rate=rate,
        pitch=pitch,
        model=model,
        max_seconds=max_seconds,
        channel=hearing.channel,
        **output.options(),
    )
    _make_folder(paths, make, output, title="reading")


def _synthesize(
    out: common.Out,
    *,
    config: Annotated[str, tyro.conf.arg(metavar="NAME|FILE")] = "nano/corpus",
    seed: int | None = None,
    scale: float = 1.0,
    workers: int | None = None,
    set: Words = (),
    json: bool = False,
):
    """Make a corpus of synthetic speech: conversations to learn, others to test with, and voices.

    The same recipe and seed make the same files. A run that was stopped goes on where it was.

    Args:
        out: The folder to make, or to go on with.
        config: Recipe: a name from configs/recipes, or a YAML file.
        seed: Of everything that is drawn, in place of the recipe's.
        scale: Times all counts of the recipe: 0.01 makes a small one, to look at.
        workers: Processes; by default one for each core.
        set: Other values in place of the recipe's, such as dialogues.counts.asr=100, or
            voices.joe=null for one voice less.
        json: Print JSON.
    """
    common.use_cpu()
    import os

    from sa2jax.train.corpus.plan import read_corpus
    from sa2jax.train.corpus.synthesize import synthesize
    from sa2jax.train.recipe import parse_overrides

    changes = parse_overrides(set) | ({} if seed is None else {"seed": seed})
    recipe = read_corpus(config, changes)
    with common.progress_bar("speaking", unit="recordings") as progress:
        about = synthesize(
            out, recipe, scale=scale, workers=workers or os.cpu_count() or 1, progress=progress
        )
    if json:
        common.print_json(about)
    else:
        common.wide_console().print(_corpus_table(about, out))


def _show(folder: Folder, *, json: bool = False):
    """Show what a prepared folder holds.

    Args:
        folder: Made by `sa2jax data prepare`, `prepare-flow` or `prepare-speech`.
        json: Print JSON.
    """
    common.use_cpu()
    from sa2jax.errors import FileError
    from sa2jax.files.limits import JSON
    from sa2jax.files.raw import read_text
    from sa2jax.train.data.samples import DATASET_JSON, read_dataset_info
    from sa2jax.train.networks import flow_data, speech_data

    try:
        text = read_text(folder / DATASET_JSON, JSON)
    except FileError:
        text = ""  # what is wrong with it, `read_dataset_info` says
    others = {
        flow_data.FORMAT: lambda: flow_data.read_flow_info(folder)[0],
        speech_data.FORMAT: lambda: speech_data.read_speech_info(folder)[0],
    }
    read = (make for form, make in others.items() if f'"{form}"' in text)
    _print(next(read, lambda: read_dataset_info(folder))(), folder, json)


# Each action is run where it is parsed, as the value of `action`.
def data(
    action: Annotated[
        Annotated[Any, tyro.conf.subcommand(name="prepare", constructor=_prepare)]
        | Annotated[Any, tyro.conf.subcommand(name="prepare-flow", constructor=_prepare_flow)]
        | Annotated[Any, tyro.conf.subcommand(name="prepare-speech", constructor=_prepare_speech)]
        | Annotated[Any, tyro.conf.subcommand(name="synthesize", constructor=_synthesize)]
        | Annotated[Any, tyro.conf.subcommand(name="show", constructor=_show)],
        tyro.conf.arg(name=""),
    ],
):
    """Prepare data for training.

    Args:
        action: What to do.
    """


def _make_folder(
    paths: tuple[str, ...],
    make: Callable[..., Mapping[str, Any]],
    output: OutputOptions,
    *,
    title: str,
    unit: str = "recordings",
) -> None:
    """Make a prepared folder of sources, with a progress bar, and print what it holds.

    Args:
        paths: the sources and, last, the folder.
        make: gives what dataset.json says, from the sources, the folder and `progress`.
        output: how it is printed.
        title: of the progress bar.
        unit: what it counts.
    """
    from sa2jax.errors import DataError

    if len(paths) < 2:
        raise DataError(f"expected SOURCE ... OUT, got {' '.join(paths) or 'nothing'}")
    *sources, out = paths
    with common.progress_bar(title, unit=unit) as progress:
        about = make(sources, out, progress=progress)
    _print(about, Path(out), output.json)


def _print(about: Mapping[str, Any], folder: Path, json: bool) -> None:
    if json:
        common.print_json(about)
    else:
        common.wide_console().print(_table(about, folder))


def _table(about: Mapping[str, Any], folder: Path) -> Table:
    """The entries of dataset.json as a table."""
    table = Table(title=str(folder), show_header=False, title_justify="left")

    def hours(seconds: float) -> str:
        return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds:.1f} s"

    shards = about.get("shards")
    size = sum(shard["bytes"] for shard in shards) if shards else about["bytes"]
    where = f" in {len(shards)} shards" if shards else ""
    table.add_row("samples", f"{about['samples']}{where}, {size / 1e6:.1f} MB")
    rejected = about.get("rejected", 0)
    table.add_row("rejected", f"{rejected}, see rejects.jsonl" if rejected else "none")
    table.add_row("audio heard", hours(about["seconds"]))
    if perturbations := about.get("perturbations"):
        table.add_row(
            "kept", f"{1 + perturbations} times, {perturbations} with codes of another mouth"
        )
    if shards:
        table.add_row("speech to say", hours(about.get("seconds_spoken", 0)))
        letters = {k: n for k, n in about.get("characters", {}).items() if n}
        scripts = ", ".join(f"{script} {count}" for script, count in letters.items())
        table.add_row("letters by script", scripts or "none")
        if tokens := about.get("tokens"):
            parts = (("text", "text"), ("audio heard", "heard"), ("audio codes", "codes"))
            table.add_row("tokens", ", ".join(f"{name} {tokens[key]}" for name, key in parts))
        if lengths := about.get("lengths"):
            parts = (f"{name} {value:g}" for name, value in lengths.items() if name != "unit")
            table.add_row(f"length in {lengths['unit']}", ", ".join(parts))
        table.add_row("mel bands", str(about["n_mels"]))
    if speakers := about.get("speakers"):
        table.add_row("speakers", ", ".join(name or "unknown" for name in speakers))
        table.add_row("rate", f"{about['rate']} Hz{', with pitch' if about['pitch'] else ''}")
    else:
        table.add_row("speech tokenizer", str(about.get("speech_tokenizer") or "none was used"))
    table.add_row("fingerprint", about["fingerprint"])
    return table


def _corpus_table(about: Mapping[str, Any], folder: Path) -> Table:
    """The entries of corpus.json as a table."""
    table = Table("file", "records", "hours", title=str(folder), title_justify="left")
    for name, file in about["files"].items():
        table.add_row(name, str(file["records"]), f"{file['hours']:.2f}")
    table.add_section()
    table.add_row("recordings", str(about["recordings"]), f"{about['hours']:.2f}")
    table.add_row("texts, words", f"{about['texts']}, {len(about['vocabulary'])}")
    table.add_row("speakers", str(about["speakers"]))
    return table

"""`sa2jax <command>`: results on stdout, everything else on stderr.

A user's mistake ends with one line and exit code 2. Each command imports what it needs when it
runs, so that help comes at once.
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from sa2jax.errors import Sa2jaxError

if TYPE_CHECKING:
    from sa2jax.pipeline import StepAudio2

Files = tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE ...")]]
Source = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SOURCE")]]
Out = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model to use, and how."""

    model: Path
    """Model folder made by `sa2jax convert`, or a Hugging Face folder."""
    dtype: Dtype | None = None
    """Dtype of weights and computation; by default bfloat16, float32 on a CPU."""
    mesh: str | None = None
    """Devices to spread over, such as `tensor=4`."""
    tokenizer: Path | None = None
    """Folder of the tokenizer files, if not the model's own."""
    style: Literal["chat", "base"] = "chat"
    """`base` for a pre-trained model that knows no turns."""
    batch_size: int = 8
    """Prompts that are answered at once."""

    def load(self) -> "StepAudio2":
        """Read the model, with a progress bar."""
        from sa2jax.pipeline import StepAudio2

        with _bar("loading") as tick:
            return StepAudio2.from_pretrained(
                self.model, dtype=self.dtype, mesh=self.mesh, tokenizer=self.tokenizer,
                style=self.style, batch_size=self.batch_size, progress=tick,
            )  # fmt: skip


Model = Annotated[ModelOptions, tyro.conf.arg(name="")]


def asr(files: Files, options: Model, *, max_new_tokens: int | None = None, json: bool = False):
    """Write down what is said in recordings.

    Args:
        files: Recordings: wav, flac, mp3 or ogg.
        options: Model.
        max_new_tokens: Limit of each text; by default 256 for each 25 s.
        json: Print JSON.
    """
    _text_task(
        files, options, json,
        lambda model, tick: model.transcribe(
            _paths(files), max_new_tokens=max_new_tokens, progress=tick
        ),
    )  # fmt: skip


def translate(
    files: Files,
    options: Model,
    *,
    to: Literal["zh", "en"] = "zh",
    max_new_tokens: int | None = None,
    seed: int = 0,
    json: bool = False,
):
    """Write down in another language what is said in recordings.

    Args:
        files: Recordings: wav, flac, mp3 or ogg.
        options: Model.
        to: Language.
        max_new_tokens: Limit of each text; by default 256 for each 25 s.
        seed: Same seed, same translation.
        json: Print JSON.
    """
    _text_task(
        files, options, json,
        lambda model, tick: model.translate(
            _paths(files), to=to, max_new_tokens=max_new_tokens, seed=seed, progress=tick
        ),
    )  # fmt: skip


def caption(
    files: Files, options: Model, *, max_new_tokens: int = 256, seed: int = 0, json: bool = False
):
    """Describe what happens in recordings.

    Args:
        files: Recordings: wav, flac, mp3 or ogg.
        options: Model.
        max_new_tokens: Limit of each text.
        seed: Same seed, same description.
        json: Print JSON.
    """
    _text_task(
        files, options, json,
        lambda model, tick: model.caption(
            _paths(files), max_new_tokens=max_new_tokens, seed=seed, progress=tick
        ),
    )  # fmt: skip


def chat(
    files: Files,
    options: Model,
    *,
    text: str | None = None,
    system: str = "You are a helpful assistant.",
    think: bool = False,
    temperature: float = 0.7,
    top_p: float = 0.9,
    top_k: int = 50,
    repetition_penalty: float = 1.05,
    max_new_tokens: int = 1024,
    seed: int = 0,
    json: bool = False,
):
    """Ask one question, by recordings, text or both, and get the answer as text.

    Args:
        files: Recordings that belong to the question.
        options: Model.
        text: Written part of the question; it follows the recordings.
        system: System prompt.
        think: Let a Think model think first; the thoughts go to stderr.
        temperature: Divides the logits, 0 for the most likely answer.
        top_p: Keep the most likely tokens that together reach this probability.
        top_k: Keep this many most likely tokens, 0 for all.
        repetition_penalty: Above 1, repeating becomes less likely.
        max_new_tokens: Limit of the answer.
        seed: Same seed, same answer.
        json: Print JSON.
    """
    from sa2jax.chat.template import Text
    from sa2jax.errors import PromptError
    from sa2jax.inference.generate import Options
    from sa2jax.inference.sampling import Sampling

    if not files and text is None:
        raise PromptError("nothing to ask: give a recording or --text")
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty
    )
    generation = Options(sampling=sampling, max_new_tokens=max_new_tokens, seed=seed)
    for path in _paths(files):
        _require_file(path)
    model = options.load()
    conversation = model.chat(system, think=think, options=generation)
    # As a piece: a text that ends in ".wav" is a text here.
    question = [*_paths(files), *([Text(text)] if text is not None else [])]
    reply = conversation.say(question)
    if json:
        _print_json(asdict(reply))
        return
    if reply.thinking:
        _say(reply.thinking.strip())
    print(reply.text)


def convert(
    source: Source,
    out: Out,
    *,
    dtype: Dtype | None = None,
    tokenizer: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
):
    """Turn a Hugging Face checkpoint into a model folder of this library.

    Args:
        source: Hugging Face folder.
        out: Folder to make; it appears only when it is complete.
        dtype: Dtype to store; by default each tensor keeps its own.
        tokenizer: Folder of the tokenizer files, if the source has none.
        overwrite: Replace a checkpoint at OUT.
        json: Print JSON.
    """
    _stay_on_host()
    from sa2jax.convert.hf import convert

    with _bar("converting") as tick:
        report = convert(
            source, out, dtype=dtype, tokenizer=tokenizer, overwrite=overwrite, progress=tick
        )
    _report(report, out, json)


def export(
    source: Source,
    out: Out,
    *,
    dtype: Dtype | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    json: bool = False,
):
    """Turn a model folder of this library back into a Hugging Face checkpoint.

    Args:
        source: Folder made by `sa2jax convert`.
        out: Folder to make; it appears only when it is complete.
        dtype: Dtype to store; by default what each tensor had before it was converted.
        max_shard_size: Largest file.
        overwrite: Replace a checkpoint at OUT.
        json: Print JSON.
    """
    _stay_on_host()
    from sa2jax.convert.hf import export

    with _bar("exporting") as tick:
        report = export(
            source, out, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite,
            progress=tick,
        )  # fmt: skip
    _report(report, out, json)


def verify(
    a: Annotated[Source, tyro.conf.arg(metavar="A")],
    b: Annotated[Source, tyro.conf.arg(metavar="B")],
    *,
    text: str | None = None,
    wav: Path | None = None,
    json: bool = False,
):
    """Compare two checkpoints, each in either form; the exit code is 1 if they differ.

    Tensors are compared one by one. With --text or --wav also the logits of that prompt.

    Args:
        a: One model folder.
        b: The other model folder.
        text: Text of a prompt.
        wav: A recording in that prompt.
        json: Print JSON.
    """
    from sa2jax.convert.verify import compare_prompt, verify

    with _bar("comparing") as tick:
        result = verify(a, b, progress=tick)
    logits = None if text is None and wav is None else compare_prompt(a, b, text or "", wav)
    if json:
        _print_json(asdict(result) | {"logits": None if logits is None else asdict(logits)})
    else:
        print(result.summary())
        if logits is not None:
            print(logits.summary())
    if not result.same:
        sys.exit(1)


def inspect(folder: Annotated[Source, tyro.conf.arg(metavar="FOLDER")], *, json: bool = False):
    """Show what a checkpoint is made of, without loading it.

    Args:
        folder: Model folder of this library, or a Hugging Face folder.
        json: Print JSON.
    """
    _stay_on_host()
    from sa2jax.convert.verify import inspect, print_inspection

    found = inspect(folder)
    if json:
        _print_json(asdict(found))
    else:
        print_inspection(found, _wide())


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

    with _bar("timing", unit="rounds") as tick:
        result = bench(
            size, prompt=prompt, tokens=tokens, seconds=seconds, repeats=repeats, dtype=dtype,
            reference=reference, progress=tick,
        )  # fmt: skip
    if json:
        _print_json(asdict(result))
    else:
        print_bench(result, _wide())


COMMANDS: dict[str, Callable[..., None]] = {
    "asr": asr,
    "translate": translate,
    "caption": caption,
    "chat": chat,
    "convert": convert,
    "export": export,
    "verify": verify,
    "inspect": inspect,
    "bench": bench,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `sa2jax` command."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="sa2jax",
            description="Step-Audio 2 in JAX: listen, think and convert.",
            args=arguments,
        )
        sys.stdout.flush()
    except Sa2jaxError as error:
        _say(f"error: {' '.join(str(error).split())}")
        sys.exit(2)
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as in `sa2jax ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _text_task(
    files: Sequence[Path],
    options: ModelOptions,
    as_json: bool,
    run: Callable[["StepAudio2", Callable[[int, int], None]], list[str]],
) -> None:
    """Run a task with one text per recording and print the texts."""
    from sa2jax.errors import AudioError

    if not files:
        raise AudioError("no recordings: expected at least one wav, flac, mp3 or ogg file")
    for path in files:
        _require_file(path)
    model = options.load()
    with _bar("listening", unit="recordings") as tick:
        texts = run(model, tick)
    if as_json:
        _print_json([{"file": str(f), "text": t} for f, t in zip(files, texts, strict=True)])
        return
    for path, text in zip(files, texts, strict=True):
        print(text if len(files) == 1 else f"{path}\t{text}")


def _stay_on_host() -> None:
    """Do not start an accelerator for work that does not compute; to be called before jax is."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _require_file(path: str | Path) -> None:
    """Fail before the model is loaded if a recording is not there."""
    from sa2jax.errors import AudioError

    if not Path(path).is_file():
        raise AudioError(f"no such file: {path}")


def _paths(files: Sequence[Path]) -> list[str | Path]:
    return list(files)


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def _wide() -> Console:
    """Standard output for tables: a file or a pipe has no width that names must be cut to."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _report(report: Any, out: Path, as_json: bool) -> None:
    """Print what a conversion did."""
    if as_json:
        _print_json(asdict(report))
        return
    for note in report.notes:
        _say(f"note: {note}")
    print(
        f"{out}: {report.tensors} tensors, {report.parameters / 1e6:.1f} M parameters, "
        f"{report.bytes / 1e9:.2f} GB in {report.seconds:.1f} s, "
        f"peak memory {report.peak_bytes / 1e9:.2f} GB"
    )


@contextmanager
def _bar(title: str, unit: str = "bytes") -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr that disappears when its work is done."""
    from rich.progress import DownloadColumn

    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = "[progress.description]{task.description}", BarColumn(), count, TimeElapsedColumn()
    console = Console(stderr=True)
    # Where nobody watches, even a bar that disappears would leave an empty line.
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    main()

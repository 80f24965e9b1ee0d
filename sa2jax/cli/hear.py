"""Commands that hear: `asr`, `translate`, `caption`, `chat`."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from sa2jax.cli import common
from sa2jax.cli.common import Dtype, Files

if TYPE_CHECKING:
    from sa2jax.pipeline import StepAudio2


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

        with common.bar("loading") as tick:
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
            common.paths(files), max_new_tokens=max_new_tokens, progress=tick
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
            common.paths(files), to=to, max_new_tokens=max_new_tokens, seed=seed, progress=tick
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
            common.paths(files), max_new_tokens=max_new_tokens, seed=seed, progress=tick
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
    for path in common.paths(files):
        common.require_file(path)
    model = options.load()
    conversation = model.chat(system, think=think, options=generation)
    # As a piece: a text that ends in ".wav" is a text here.
    question = [*common.paths(files), *([Text(text)] if text is not None else [])]
    reply = conversation.say(question)
    if json:
        common.print_json(asdict(reply))
        return
    if reply.thinking:
        common.say(reply.thinking.strip())
    print(reply.text)


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
        common.require_file(path)
    model = options.load()
    with common.bar("listening", unit="recordings") as tick:
        texts = run(model, tick)
    if as_json:
        common.print_json([{"file": str(f), "text": t} for f, t in zip(files, texts, strict=True)])
        return
    for path, text in zip(files, texts, strict=True):
        print(text if len(files) == 1 else f"{path}\t{text}")

"""What a user imports: `StepAudio2`, its tasks and its conversations.

model = StepAudio2.from_pretrained("Step-Audio-2-mini")
model.transcribe("a.wav")
chat = model.chat()
chat.say("question.wav").text
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sa2jax import audio, checkpoint
from sa2jax.chat import template
from sa2jax.chat.interleave import deinterleave
from sa2jax.chat.template import TASKS, Audio, Message, Piece, Task
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.config import StepAudio2Config
from sa2jax.errors import CheckpointError, ConfigError, PromptError
from sa2jax.inference.generate import Generation, Generator, Options, Request
from sa2jax.inference.sampling import Sampling
from sa2jax.models.step_audio import step_audio2, unstack_decoder
from sa2jax.nn import Params, Policy
from sa2jax.runtime import default_dtype, enable_compilation_cache
from sa2jax.sharding import make_mesh

Style = Literal["chat", "base"]
Content = str | audio.Audio | Piece | Sequence[Any]
Progress = Callable[[int, int], None]  # done, in all


@dataclass(frozen=True)
class Reply:
    """What the model answered.

    Attributes:
        text: the answer's text.
        ids: all generated ids, without the stop token.
        finish: why it ended: `stop`, `string` or `length`.
        thinking: what a Think model thought before.
    """

    text: str
    ids: tuple[int, ...]
    finish: str
    thinking: str = ""


class StepAudio2:
    """A Step-Audio 2 model ready for use.

    Args:
        cfg: its config.
        params: its parameters, decoder layers stacked, as checkpoints have them.
        tokenizer: its tokenizer, or a function that reads it when it is first needed.
        dtype: dtype to compute in.
        mesh: the device mesh the parameters are sharded over.
        style: `chat` for models with turns, `base` for the pre-trained model without.
        batch_size: prompts that are answered at once.
    """

    def __init__(
        self,
        cfg: StepAudio2Config,
        params: Params,
        tokenizer: Tokenizer | Callable[[], Tokenizer],
        *,
        dtype: Any = None,
        mesh: Mesh | None = None,
        style: Style = "chat",
        batch_size: int = 8,
    ):
        self.cfg, self.style, self.batch_size = cfg, style, batch_size
        self._tokenizer = tokenizer
        compute = default_dtype() if dtype is None else jnp.dtype(dtype)
        # A scan over stacked layers copies each layer's weights on a CPU, see `nn.unstack`.
        stacked = jax.default_backend() != "cpu" or (mesh is not None and mesh.size > 1)
        params = params if stacked else unstack_decoder(params)
        model = step_audio2(cfg, Policy(param=compute, compute=compute), stacked=stacked)
        self.generator = Generator(model, params, cfg, mesh=mesh)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: str | None = None,
        mesh: str | Mesh | None = None,
        tokenizer: str | Path | None = None,
        style: Style = "chat",
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> Self:
        """Load a model folder of this library, or a Hugging Face folder as it is.

        Every tensor goes straight into its place on the devices; host memory holds one at a time.

        Args:
            folder: made by `sa2jax convert`, or a Hugging Face checkpoint.
            dtype: dtype of weights and computation; by default bfloat16 on TPU and GPU, and float32
                on a CPU, where bfloat16 is emulated.
            mesh: devices to spread over, such as `"tensor=4"`; by default one device.
            tokenizer: folder of the tokenizer files, if not the model's own.
            style: `chat`, or `base` for a pre-trained model that knows no turns.
            batch_size: prompts that are answered at once.
            progress: told about bytes done and bytes in all while loading.

        Raises:
            CheckpointError: if the folder is damaged, incomplete or of another model.
            ConfigError: if its config.json is not understood, or for another dtype.
            ShardingError: for a mesh that does not fit the devices.
        """
        enable_compilation_cache()
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"no folder {folder}: expected a model folder")
        cfg = StepAudio2Config.from_hf(folder)
        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype {dtype!r}: expected float32, bfloat16 or float16")
        kind = default_dtype() if dtype is None else jnp.dtype(dtype)
        mesh = make_mesh(mesh) if isinstance(mesh, str) else mesh
        model = step_audio2(cfg, Policy(param=kind, compute=kind))
        shardings = None if mesh is None else model.shardings(mesh)
        if checkpoint.is_checkpoint(folder):
            params = checkpoint.load(folder, shardings, dtype=kind)
        else:
            from sa2jax.convert.hf import load_hf

            params = load_hf(folder, shardings=shardings, dtype=kind, progress=progress)
        return cls(
            cfg, params, lambda: Tokenizer.from_folder(tokenizer or folder),
            dtype=kind, mesh=mesh, style=style, batch_size=batch_size,
        )  # fmt: skip

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            TokenizerError: if the folder has none, or one without Step-Audio 2's tokens.
        """
        found = self._tokenizer
        return found if isinstance(found, Tokenizer) else found()

    # --- tasks -----------------------------------------------------------------------------

    @overload
    def transcribe(
        self, sources: list, *, max_new_tokens: int | None = None, progress: Progress | None = None
    ) -> list[str]: ...
    @overload
    def transcribe(
        self,
        sources: audio.Audio,
        *,
        max_new_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> str: ...
    def transcribe(self, sources, *, max_new_tokens=None, progress=None):
        """Write down what is said.

        Recordings of any length: what does not fit in the model's context is transcribed in parts.

        Args:
            sources: a recording (path, bytes, file or `(array, rate)`), or a list of them, which
                are answered in batches.
            max_new_tokens: limit of the text per recording part; by default 256 for each 25 s.
            progress: told about recordings (or parts of long ones) done and how many in all.

        Returns:
            The text, or a list of texts.

        Raises:
            AudioError: if a recording cannot be read.
        """
        return self._over_audio(TASKS["asr"], sources, (), max_new_tokens, progress)

    @overload
    def translate(
        self,
        sources: list,
        *,
        to: str = "zh",
        max_new_tokens: int | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> list[str]: ...
    @overload
    def translate(
        self,
        sources: audio.Audio,
        *,
        to: str = "zh",
        max_new_tokens: int | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> str: ...
    def translate(self, sources, *, to="zh", max_new_tokens=None, seed=0, progress=None):
        """Write down in another language what is said.

        Args:
            sources: as for `transcribe`.
            to: `zh` or `en`.
            max_new_tokens: as for `transcribe`.
            seed: same seed, same translation.
            progress: as for `transcribe`.

        Raises:
            AudioError: if a recording cannot be read.
            PromptError: for another language.
        """
        if f"s2tt_{to}" not in TASKS:
            raise PromptError(f"cannot translate to {to!r}: expected zh or en")
        return self._over_audio(TASKS[f"s2tt_{to}"], sources, (), max_new_tokens, progress, seed)

    @overload
    def caption(
        self,
        sources: list,
        *,
        max_new_tokens: int = 256,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> list[str]: ...
    @overload
    def caption(
        self,
        sources: audio.Audio,
        *,
        max_new_tokens: int = 256,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> str: ...
    def caption(self, sources, *, max_new_tokens=256, seed=0, progress=None):
        """Describe what happens in a recording; arguments as for `translate`."""
        return self._over_audio(TASKS["caption"], sources, (), max_new_tokens, progress, seed)

    def ask(
        self,
        source: audio.Audio,
        question: str,
        choices: Sequence[str] = (),
        *,
        max_new_tokens: int = 256,
    ) -> str:
        """Answer a question about a recording.

        Args:
            source: the recording.
            question: what to ask.
            choices: possible answers; the model is then asked to pick one, as in MMAU.
            max_new_tokens: limit of the answer.
        """
        text = template.choice_question(question, choices) if choices else question
        return self._over_audio(TASKS["mmau"], source, (text,), max_new_tokens, None)

    def chat(
        self,
        system: str | None = TASKS["chat"].system,
        *,
        tools: str | Sequence[Mapping[str, Any]] | None = None,
        think: bool = False,
        options: Options | None = None,
    ) -> "Chat":
        """Start a conversation.

        Args:
            system: the system prompt, None for none.
            tools: JSON schemas of tools the model may call.
            think: let a Think model think before each answer.
            options: sampling and limits; by default those of the official chat example.
        """
        if self.style == "base":
            raise PromptError("a base model knows no turns: expected style='chat'")
        history = [] if system is None else [Message("system", system)]
        if tools:
            history.append(template.tools_turn(tools))
        return Chat(self, history, think=think, options=options or options_of(TASKS["chat"]))

    # --- prompts ---------------------------------------------------------------------------

    def request(self, pieces: Sequence[Piece]) -> Request:
        """Turn the pieces of a prompt (see `chat.template`) into ids and log-mel frames."""
        clips = [
            [audio.log_mel(c, n_mels=self.cfg.audio_encoder.mels) for c in chunks_of(piece.source)]
            for piece in pieces
            if isinstance(piece, Audio)
        ]
        counts = [[audio.num_tokens(mel.shape[1]) for mel in mels] for mels in clips]
        prompt = template.build_prompt(pieces, self.tokenizer, counts)
        # A chunk of a few samples gets markers in the prompt but no frames.
        heard = [clip for clip in prompt.clips if clip.tokens]
        return Request(
            ids=prompt.ids,
            mels=tuple(clips[clip.audio][clip.chunk] for clip in heard),
            starts=tuple(clip.start for clip in heard),
            counts=tuple(clip.tokens for clip in heard),
        )

    def generate(
        self,
        requests: Sequence[Request],
        options: Options,
        *,
        progress: Progress | None = None,
    ) -> list[list[Generation]]:
        """Continue prompts in batches of similar length; see `Generator.generate`."""
        options = replace(options, stop_ids=options.stop_ids or self.stop_ids)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].ids))
        replies: list[list[Generation]] = [[] for _ in requests]
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = [requests[i] for i in chosen]
            # Numbered as given: a sampled reply does not depend on `batch_size`.
            answers = self.generator.generate(
                batch, options, numbers=chosen, decode_text=self.text_of
            )
            for index, answer in zip(chosen, answers, strict=True):
                replies[index] = answer
            if progress is not None:
                progress(min(start + self.batch_size, len(order)), len(order))
        return replies

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The id that ends a reply of this style of model."""
        special = self.tokenizer.special
        return (special.end_of_text if self.style == "base" else special.eot,)

    def text_of(self, ids: Sequence[int]) -> str:
        """The text in generated ids: without audio codes and pads, with everything else."""
        special = self.tokenizer.special
        reply = deinterleave(ids, special)
        return self.tokenizer.decode([*reply.text_ids, *reply.trailing_text_ids])

    def _over_audio(
        self,
        task: Task,
        sources: Any,
        extra: tuple[str, ...],
        max_new_tokens: int | None,
        progress: Progress | None,
        seed: int = 0,
    ) -> Any:
        """Run a task with a text answer over one recording or many."""
        many = isinstance(sources, list)
        requests: list[Request] = []
        owners: list[int] = []
        for index, source in enumerate(sources if many else [sources]):
            for part in self._parts(source, task, extra):
                chunks = -(-len(part[0]) // audio.CHUNK_SAMPLES)
                pieces = (Audio(part), *map(template.Text, extra))
                if self.style == "base":
                    request = self.request(task.raw(*pieces))
                else:
                    request = self.request(template.render(task.messages(*pieces)))
                # A limit of its own: the answer does not depend on what else is in the list.
                limit = task.max_new_tokens * chunks if max_new_tokens is None else max_new_tokens
                requests.append(replace(request, max_new_tokens=limit))
                owners.append(index)
        if not requests:
            return []
        longest = max(request.max_new_tokens or 0 for request in requests)
        options = replace(options_of(task), max_new_tokens=longest, seed=seed)
        replies = self.generate(requests, options, progress=progress)
        texts: list[list[str]] = [[] for _ in (sources if many else [sources])]
        for owner, (reply,) in zip(owners, replies, strict=True):
            texts[owner].append(self.text_of(reply.ids).strip())
        joined = [" ".join(part for part in parts if part) for parts in texts]
        return joined if many else joined[0]

    def _parts(self, source: Any, task: Task, extra: tuple[str, ...]) -> Iterator[tuple]:
        """Cut a recording so that each part fits in the context with room for its answer."""
        samples = audio.load(source)
        words = self.tokenizer.encode_pieces([task.system, *extra])
        room = self.cfg.decoder.max_positions - len(words) - 64  # turn marks
        per_chunk = audio.num_tokens(audio.num_frames(audio.CHUNK_SAMPLES)) + 2
        fits = room // (per_chunk + task.max_new_tokens)
        if fits < 1:
            raise PromptError(
                f"the model's context of {self.cfg.decoder.max_positions} tokens is too short for "
                f"25 s of audio ({per_chunk} tokens) and an answer of {task.max_new_tokens}"
            )
        for part in audio.split(samples, fits * audio.CHUNK_SAMPLES):
            yield part, audio.SAMPLE_RATE


class Chat:
    """A conversation; made by `StepAudio2.chat`.

    Attributes:
        history: all turns so far, replies as the ids that the model generated.
    """

    def __init__(self, model: StepAudio2, history: list[Message], *, think: bool, options: Options):
        self.history = history
        self._model, self._think, self._options = model, think, options

    def say(self, content: Content, *, speak: bool = False) -> Reply:
        """Say something and hear the answer.

        Args:
            content: text; a recording as a `Path`, bytes, file or `(array, rate)`; or a list of
                them in order. A str that ends like an audio file's name counts as a recording.
            speak: whether the answer is to be speech.

        Raises:
            PromptError: if the conversation no longer fits in the model's context.
        """
        match as_pieces(content):
            case [template.Text(text)]:  # one piece with the turn's head, see `template.render`
                turn = Message("human", text)
            case pieces:
                turn = Message("human", pieces)
        options, thinking = self._options, ""
        last = template.reply_turn(spoken=speak)
        if self._think:
            thinking = self._reply(
                [turn, template.think_turn()], replace(options, stop_strings=(template.THINK_END,))
            ).text.partition(template.THINK_END)[0]
            last = template.answer_turn(thinking, spoken=speak)
        reply = replace(self._reply([turn, last], options), thinking=thinking)
        spoken = template.spoken_turn(reply.ids)
        written = Message("assistant", [template.Ids(reply.ids)])
        self.history += [turn, spoken if speak else written]
        return reply

    def _reply(self, turns: list[Message], options: Options) -> Reply:
        model = self._model
        request = model.request(template.render([*self.history, *turns]))
        ((made,),) = model.generate([request], options)
        return Reply(model.text_of(made.ids), made.ids, made.finish)


def options_of(task: Task) -> Options:
    """How the official examples sample a task."""
    temperature = 0.0 if task.greedy else task.temperature
    return Options(
        sampling=Sampling(
            temperature=temperature,
            top_k=task.top_k,
            top_p=task.top_p,
            repetition_penalty=task.repetition_penalty,
        ),
        max_new_tokens=task.max_new_tokens,
    )


def as_pieces(content: Any) -> list[Piece]:
    """What a user says as pieces of a turn: text, recordings, or a list of both."""
    if isinstance(content, list):
        return [piece for item in content for piece in as_pieces(item)]
    if isinstance(content, str) and not _names_audio(content):
        return [template.Text(content)]
    if isinstance(content, str | Path | bytes | tuple) or hasattr(content, "read"):
        return [Audio(content)]
    return [template.as_piece(content)]


def chunks_of(source: Any) -> list[np.ndarray]:
    """A recording at 16 kHz, cut every 25 s."""
    return audio.split(audio.load(source))


def _names_audio(text: str) -> bool:
    suffixes = (".wav", ".flac", ".mp3", ".ogg")
    return text.lower().endswith(suffixes) and "\n" not in text

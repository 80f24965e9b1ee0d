"""What a user imports: `StepAudio2`, its tasks and its conversations.

model = StepAudio2.from_pretrained("Step-Audio-2-mini")
model.transcribe("a.wav")
model.tts("Good morning!", voice="anna").audio
chat = model.chat(voice="default")
chat.say("question.wav").audio
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sa2jax import audio, checkpoint
from sa2jax.assets import model_folder
from sa2jax.chat import template
from sa2jax.chat.history import Heard
from sa2jax.chat.interleave import deinterleave
from sa2jax.chat.template import TASKS, Audio, Message, Piece
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.chat.tool_schema import TIMEOUT
from sa2jax.chat.toolbox import Toolbox
from sa2jax.config import StepAudio2Config
from sa2jax.conversation import Chat, Overflow
from sa2jax.errors import CheckpointError, PromptError
from sa2jax.inference.generate import Generator
from sa2jax.inference.loading import load, policy_of
from sa2jax.inference.requests import Generation, Options, Request
from sa2jax.inference.token2wav import Token2Wav
from sa2jax.models.heads import spread_heads
from sa2jax.models.step_audio import step_audio2, unstack_decoder
from sa2jax.nn import Params, Policy
from sa2jax.runtime import enable_compilation_cache, scans_layers
from sa2jax.speech import AnyVoice, Speech
from sa2jax.tasks import Progress, Style, Tasks, options_of


class StepAudio2(Tasks):
    """A Step-Audio 2 model ready for use.

    Args:
        cfg: its config.
        params: its parameters, decoder layers stacked, as checkpoints have them.
        tokenizer: its tokenizer, or a function that reads it when it is first needed.
        speech: its detokenizer and voices, or a function that opens them when first needed.
        policy: its dtypes; by default those of the platform, see `loading.policy_of`.
        mesh: the device mesh the parameters are sharded over, heads spread as it needs them.
        style: `chat` for models with turns, `base` for the pre-trained model without.
        batch_size: prompts that are answered at once.
    """

    def __init__(
        self,
        cfg: StepAudio2Config,
        params: Params,
        tokenizer: Tokenizer | Callable[[], Tokenizer],
        *,
        speech: Speech | Callable[[], Speech] | None = None,
        policy: Policy | None = None,
        mesh: Mesh | None = None,
        style: Style = "chat",
        batch_size: int = 8,
    ):
        self.cfg, self.style, self.batch_size = cfg, style, batch_size
        self._tokenizer, self._speech, self._turns = tokenizer, speech, itertools.count()
        stacked = scans_layers(mesh)
        params = params if stacked else unstack_decoder(params)
        policy = policy_of(None) if policy is None else policy
        model = step_audio2(spread_heads(cfg, mesh), policy, stacked=stacked)
        self.generator = Generator(model, params, cfg, mesh=mesh)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: str | None = None,
        mesh: str | Mesh | None = None,
        int8_cache: bool = False,
        tokenizer: str | Path | None = None,
        speech: str | Path | Speech | None = None,
        style: Style = "chat",
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> Self:
        """Load a model by name, a model folder of this library, or a Hugging Face folder as it is.

        Every tensor goes straight into its place on the devices; host memory holds one at a time.

        Args:
            folder: made by `sa2jax convert`, a Hugging Face checkpoint, or `nano`, the small model
                that comes with the library.
            dtype: dtype of weights and computation; by default bfloat16 on TPU and GPU, and float32
                on a CPU, where bfloat16 is emulated. `int8` is that of the matrices alone; they
                have it always if the folder was made with it.
            mesh: devices to spread over, such as `"tensor=4"`; by default one device.
            int8_cache: keep what was read (keys and values) as int8: half the memory.
            tokenizer: folder of the tokenizer files, if not the model's own.
            speech: the detokenizer and its voices, or their folder, if not the model's own.
            style: `chat`, or `base` for a pre-trained model that knows no turns.
            batch_size: prompts that are answered at once.
            progress: told about bytes done and bytes in all while loading.

        Raises:
            CheckpointError: if the folder is damaged, incomplete or of another model.
            ConfigError: if its config.json is not understood, or for another dtype.
            ShardingError: for a mesh that does not fit the devices or the model.
        """
        enable_compilation_cache()
        folder = model_folder(folder)
        found = load(folder, dtype=dtype, mesh=mesh, int8_cache=int8_cache, progress=progress)
        home = folder if speech is None else speech
        return cls(
            found.cfg, found.params, lambda: Tokenizer.from_folder(tokenizer or folder),
            speech=home if isinstance(home, Speech)
            else lambda: Speech.from_pretrained(home, mesh=found.mesh),
            policy=found.policy, mesh=found.mesh, style=style, batch_size=batch_size,
        )  # fmt: skip

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            TokenizerError: if the folder has none, or one without Step-Audio 2's tokens.
        """
        found = self._tokenizer
        return found if isinstance(found, Tokenizer) else found()

    @cached_property
    def speech(self) -> Speech:
        """The checkpoint's detokenizer and its voices.

        Raises:
            CheckpointError: if it has none: it cannot speak.
        """
        if self._speech is None:
            raise CheckpointError("this model was made without a detokenizer: it cannot speak")
        return self._speech if isinstance(self._speech, Speech) else self._speech()

    @cached_property
    def replicas(self) -> list[Generator]:
        """Generators that work apart: one for each index of the mesh's data axis."""
        return self.generator.replicas()

    def next_replica(self) -> int:
        """The replica of the next conversation: each in turn."""
        return next(self._turns) % len(self.replicas)

    def token2wav(self, replica: int) -> Token2Wav:
        """What speaks where a replica thinks."""
        if len(self.replicas) == 1:
            return self.speech.token2wav
        voices = self.speech.replicas  # one, if it was opened without the mesh
        return voices[replica % len(voices)]

    @property
    def sample_rate(self) -> int:
        """Of what the model speaks, in Hz."""
        return self.speech.sample_rate

    @cached_property
    def fingerprint(self) -> str:
        """A hash that tells checkpoints apart: of the config and a few numbers of each matrix."""
        return fingerprint_of(self.cfg, self.generator.params)

    # --- conversations ---------------------------------------------------------------------

    def chat(
        self,
        system: str | None = TASKS["chat"].system,
        *,
        voice: AnyVoice | None = None,
        tools: str | Sequence[Any] | None = None,
        functions: Mapping[str, Callable[..., Any]] | None = None,
        think: bool = False,
        options: Options | None = None,
        overflow: Overflow = "drop",
        max_tool_rounds: int = 4,
        tool_timeout: float = TIMEOUT,
    ) -> Chat:
        """Start a conversation.

        Args:
            system: the system prompt, None for none.
            voice: name of a voice, a voice file, a recording of it, or a `Voice`; the answers are
                then speech unless asked otherwise. By default they are text.
            tools: what the model may call: functions, `Tool`s, JSON schemas, or the name of a
                built-in tool (`get_date_time`); or the JSON text of a list of schemas.
            functions: what runs the tools of which only schemas were given, by name. A call of a
                tool that nothing runs ends the answer, to be answered with a `ToolAnswer`.
            think: let a Think model think before each answer.
            options: sampling and limits; by default those of the official chat example.
            overflow: what happens when the context is full: `drop` the oldest turns with a note,
                or `refuse`.
            max_tool_rounds: how often the model may call tools before an answer must stand.
            tool_timeout: seconds after which a tool is given up.

        Raises:
            PromptError: for tools that cannot be understood, or a base model.
            VoiceError: if there is no such voice.
        """
        if self.style == "base":
            raise PromptError("a base model knows no turns: expected style='chat', or `complete`")
        box = Toolbox(tools or (), functions, timeout=tool_timeout)
        head = [] if system is None else [Message("system", system)]
        if box:
            head.append(template.tools_turn(box.text))
        return Chat(
            self, head, voice=voice, tools=box, think=think, overflow=overflow,
            options=options or options_of(TASKS["chat"]), max_tool_rounds=max_tool_rounds,
        )  # fmt: skip

    # --- prompts ---------------------------------------------------------------------------

    def request(self, pieces: Sequence[Piece]) -> Request:
        """Turn the pieces of a prompt (see `chat.template`) into ids and log-mel frames."""
        clips = [
            as_heard(piece.source).mels(self.cfg.audio_encoder.mels)
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


def as_heard(source: Any) -> Heard:
    """A recording, read if it was not yet."""
    return source if isinstance(source, Heard) else Heard.of(source)


def fingerprint_of(cfg: StepAudio2Config, params: Params) -> str:
    """A hash of a config and a few numbers of the first and last layer's matrices.

    The same for every dtype that holds the checkpoint's numbers, and for stacked layers or not.
    """
    layers = params["decoder"]["layers"]
    stacked = "attn" in layers
    parts = {
        "first": jax.tree.map(lambda leaf: leaf[0], layers) if stacked else layers[0],
        "last": jax.tree.map(lambda leaf: leaf[-1], layers) if stacked else layers[len(layers) - 1],
        "norm": params["decoder"]["norm"],
        "adapter": params["adapter"],
    }
    digest = hashlib.sha256(json.dumps(cfg.with_dtype("float32").to_hf(), sort_keys=True).encode())
    for name, leaf in checkpoint.flatten(parts).items():
        corner = leaf[(0,) * (leaf.ndim - 1)][:8]
        digest.update(name.encode() + np.asarray(corner.astype(jnp.bfloat16)).tobytes())
    return digest.hexdigest()[:16]

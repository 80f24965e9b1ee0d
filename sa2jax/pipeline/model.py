"""The public API: `StepAudio2`, its tasks and its conversations.

model = StepAudio2.from_pretrained("Step-Audio-2-mini")
model.transcribe("a.wav")
model.tts("Good morning!", voice="anna").audio
chat = model.chat(voice="default")
chat.say(Path("question.wav")).audio
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from jax.sharding import Mesh

from sa2jax.assets import model_folder
from sa2jax.chat import template
from sa2jax.chat.template import TASKS, Message, PromptStyle
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.chat.tool_schema import TIMEOUT
from sa2jax.chat.toolbox import Toolbox
from sa2jax.checkpoint import Progress
from sa2jax.errors import ConfigError, PromptError
from sa2jax.families import family_of
from sa2jax.inference.loading import load_language_model
from sa2jax.inference.requests import GenerationConfig
from sa2jax.pipeline.conversation import Chat, Overflow
from sa2jax.pipeline.task_runner import task_options
from sa2jax.pipeline.tasks import Tasks
from sa2jax.runtime import enable_compilation_cache
from sa2jax.speech import Speech
from sa2jax.speech.api import AnyVoice


class StepAudio2(Tasks):
    """A Step-Audio 2 model ready for use; see `PipelineBase` for what it is made of."""

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: str | None = None,
        mesh: str | Mesh | None = None,
        int8_cache: bool = False,
        attention: str | None = None,
        tokenizer: str | Path | None = None,
        speech: str | Path | Speech | None = None,
        prompt_style: PromptStyle = "chat",
        batch_size: int = 8,
        parity: bool = False,
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
            attention: what computes the decoder's attention, a name of
                `attention.dispatch.IMPLEMENTATIONS`; by default chosen by platform and shapes.
            tokenizer: folder of the tokenizer files, if not the model's own.
            speech: the detokenizer and its voices, or their folder, if not the model's own.
            prompt_style: `chat`, or `base` for a pre-trained model that knows no turns.
            batch_size: prompts that are answered at once.
            parity: do everything as the official pipeline does, quirks included, to compare with
                it: see docs/parity.md. Special tokens in what is said are recognised then, so that
                whoever says something can open turns.
            progress: called with (bytes_done, bytes_total) while loading.

        Raises:
            CheckpointError: if the folder is damaged, incomplete or of another model.
            ConfigError: if its config.json is not understood, or for another dtype or attention, or
                a `Speech` that was opened with another `parity`.
            ShardingError: for a mesh that does not fit the devices or the model.
        """
        enable_compilation_cache()
        folder = model_folder(folder)
        home = folder if speech is None else speech
        if isinstance(home, Speech) and home.parity != parity:
            raise ConfigError(
                f"expected speech that was opened with parity={parity}, as the model: got "
                f"parity={home.parity}"
            )
        found = load_language_model(
            folder,
            dtype=dtype,
            mesh=mesh,
            int8_cache=int8_cache,
            attention=attention,
            progress=progress,
        )
        special = family_of(found.cfg).special_tokens
        return cls(
            found.cfg,
            found.params,
            lambda: Tokenizer.from_folder(
                tokenizer or folder, special, vocab=found.cfg.decoder.vocab
            ),
            speech=home
            if isinstance(home, Speech)
            else lambda: Speech.from_pretrained(home, mesh=found.mesh, parity=parity),
            policy=found.policy,
            mesh=found.mesh,
            prompt_style=prompt_style,
            batch_size=batch_size,
            parity=parity,
        )

    # --- conversations ---------------------------------------------------------------------

    def chat(
        self,
        system: str | None = TASKS["chat"].system,
        *,
        voice: AnyVoice | None = None,
        tools: str | Sequence[Any] | None = None,
        functions: Mapping[str, Callable[..., Any]] | None = None,
        think: bool = False,
        options: GenerationConfig | None = None,
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
        if self.prompt_style == "base":
            raise PromptError(
                "a base model knows no turns: expected prompt_style='chat', or `complete`"
            )
        box = Toolbox(tools or (), functions, timeout=tool_timeout)
        head = [] if system is None else [Message("system", system)]
        if box:
            head.append(template.tools_turn(box.text))
        return Chat(
            self,
            head,
            voice=voice,
            tools=box,
            think=think,
            overflow=overflow,
            options=options or task_options(TASKS["chat"]),
            max_tool_rounds=max_tool_rounds,
        )

"""The settings of a session: what `session.update` changes and `session.updated` shows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from sa2jax.audio.turns import Eagerness, TurnSettings
from sa2jax.chat.tool_schema import Tool
from sa2jax.errors import Sa2jaxError, VoiceError
from sa2jax.serve.realtime.audio_formats import PCM, AudioFormat, read_format
from sa2jax.serve.realtime.checks import EventError, Fields

MAX_INSTRUCTIONS = 200_000  # characters
MAX_TOOLS = 128
MAX_TOKENS = 4096  # of an answer, where the client gives a number
MIN_SILENCE_MS, MAX_SILENCE_MS = 20, 10_000
# What of a session is not served, and shown as null: a client may send it all the same.
NOT_SERVED = ("include", "tracing", "reasoning", "parallel_tool_calls")
# What `session.created` has shown comes back in updates.
SHOWN = ("id", "object", "expires_at")

CheckVoice = Callable[[str], str]


@dataclass(frozen=True, kw_only=True)
class TurnDetection:
    """How the server finds the user's turns.

    Attributes:
        type: `server_vad`, or `semantic_vad`, which waits longer after a short or halting turn.
        threshold: probability from which on a frame is speech.
        prefix_padding_ms: sound before the first speech that belongs to the turn.
        silence_duration_ms: silence that ends a turn.
        idle_timeout_ms: silence after an answer, from which on the model speaks again; None: never.
        eagerness: of `semantic_vad`: how soon a turn counts as over.
        create_response: whether a turn that ends is answered.
        interrupt_response: whether a turn that begins ends the answer under way.
    """

    type: Literal["server_vad", "semantic_vad"] = "server_vad"
    threshold: float = 0.5
    prefix_padding_ms: int = 300
    silence_duration_ms: int = 500
    idle_timeout_ms: int | None = None
    eagerness: Eagerness = "auto"
    create_response: bool = True
    interrupt_response: bool = True

    @classmethod
    def read(cls, fields: Fields, known: "TurnDetection | None") -> "TurnDetection":
        """It from a client's object; what that does not name stays as it was.

        Raises:
            EventError: if a field is none or has a wrong value.
        """
        kind = fields.choice(
            "type", ("server_vad", "semantic_vad"), known.type if known else "server_vad"
        )
        old = known if known is not None and known.type == kind else cls(type=kind)
        common = {
            "create_response": fields.flag("create_response", old.create_response),
            "interrupt_response": fields.flag("interrupt_response", old.interrupt_response),
        }
        if kind == "semantic_vad":
            own = {"eagerness": fields.choice("eagerness", get_args(Eagerness), old.eagerness)}
            fields.choice("method", ("adaptive_silence",), None)
            fields.refuse_others()
            return cls(type=kind, **common, **own)
        made = cls(
            type=kind,
            **common,
            threshold=fields.number("threshold", old.threshold, least=0.01, most=0.99),
            prefix_padding_ms=fields.number(
                "prefix_padding_ms", old.prefix_padding_ms, least=0, most=5000, whole=True
            ),
            silence_duration_ms=fields.number(
                "silence_duration_ms",
                old.silence_duration_ms,
                least=MIN_SILENCE_MS,
                most=MAX_SILENCE_MS,
                whole=True,
            ),
            idle_timeout_ms=fields.number(
                "idle_timeout_ms", None, least=1000, most=600_000, whole=True
            )
            if "idle_timeout_ms" in fields
            else old.idle_timeout_ms,
        )
        fields.refuse_others()
        return made

    @property
    def settings(self) -> TurnSettings:
        """It for the detector."""
        if self.type == "semantic_vad":
            return TurnSettings.semantic_vad(self.eagerness)
        return TurnSettings.server_vad(
            threshold=self.threshold,
            prefix_padding_ms=self.prefix_padding_ms,
            silence_duration_ms=self.silence_duration_ms,
            idle_timeout_ms=self.idle_timeout_ms,
        )

    @property
    def json(self) -> dict[str, Any]:
        """It as an event has it. `method` says what `semantic_vad` really is here."""
        turns = {
            "create_response": self.create_response,
            "interrupt_response": self.interrupt_response,
        }
        if self.type == "semantic_vad":
            own = {"eagerness": self.eagerness, "method": "adaptive_silence"}
            return {"type": self.type, **own, **turns}
        return {
            "type": self.type,
            "threshold": self.threshold,
            "prefix_padding_ms": self.prefix_padding_ms,
            "silence_duration_ms": self.silence_duration_ms,
            "idle_timeout_ms": self.idle_timeout_ms,
            **turns,
        }


@dataclass(frozen=True, kw_only=True)
class Transcription:
    """Whether and how the user's turns are transcribed too.

    Attributes:
        language: what the client says that is spoken; the model hears that by itself.
    """

    language: str | None = None

    @classmethod
    def read(cls, fields: Fields) -> "Transcription":
        """It from a client's object. Any model's name is taken: there is one model.

        Raises:
            EventError: if a field is none or has a wrong value.
        """
        fields.text("model", None, most=200)
        fields.text("prompt", None, most=10_000)
        fields.take("languages", None)
        made = cls(language=fields.text("language", None, most=40))
        fields.refuse_others()
        return made

    def json(self, model: str) -> dict[str, Any]:
        """It as an event has it."""
        return {"model": model, "language": self.language, "prompt": None}


@dataclass(frozen=True, kw_only=True)
class SessionConfig:
    """The settings of a session, or of one response of it.

    Attributes:
        instructions: the system prompt, "" for none.
        modality: what an answer is, `audio` (with its transcript) or `text`.
        voice: name of the voice.
        max_output_tokens: limit of an answer; None for the model's.
        tools: what the model may call, each `{"type": "function", "name", …}`.
        tool_choice: `auto`, or `none` for none of them.
        truncation: `auto`: the oldest turns go when the context is full; `disabled`: that is an
            error.
        temperature: of sampling; None for the model's default.
        seed: of sampling; None for one that is drawn.
        think: whether a Think model thinks before it answers; its thoughts are not sent.
        input_format: of the sound that the client sends.
        output_format: of the sound that it gets.
        turn_detection: None if the client ends turns itself.
        transcription: None for none.
    """

    instructions: str = ""
    modality: Literal["audio", "text"] = "audio"
    voice: str = "default"
    max_output_tokens: int | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str = "auto"
    truncation: str = "auto"
    temperature: float | None = None
    seed: int | None = None
    think: bool = False
    input_format: AudioFormat = field(default=PCM)
    output_format: AudioFormat = field(default=PCM)
    turn_detection: TurnDetection | None = field(default_factory=TurnDetection)
    transcription: Transcription | None = None

    def updated(
        self, value: Any, check_voice: CheckVoice, path: str = "session"
    ) -> "SessionConfig":
        """The settings after a `session.update`: what it does not name stays.

        Args:
            value: its `session`.
            check_voice: gives a voice's name as the server has it, or a `VoiceError`.
            path: what to call it in errors.

        Raises:
            EventError: if a field is none or has a wrong value; nothing has changed then.
        """
        fields = Fields(value, path)
        fields.choice("type", ("realtime",), "realtime")
        fields.text("model", None, most=200)
        made = self._with_common(fields, check_voice)
        truncation = fields.take("truncation", self.truncation)
        if isinstance(truncation, dict):
            truncation = _read_retention(Fields(truncation, fields.name("truncation")))
        if truncation not in ("auto", "disabled"):
            raise EventError(
                f"{fields.name('truncation')}: expected auto, disabled or a retention ratio",
                param=fields.name("truncation"),
            )
        made = replace(made, truncation=truncation)
        if (sound := fields.inner("audio", None)) is not None:
            if (heard := sound.inner("input", None)) is not None:
                made = made._with_input(heard)
            if (spoken := sound.inner("output", None)) is not None:
                made = made._with_output(spoken, check_voice)
            sound.refuse_others()
        _refuse_prompt(fields)
        fields.refuse_others(allowed=(*NOT_SERVED, *SHOWN))
        return made

    def for_response(self, fields: Fields, check_voice: CheckVoice) -> "SessionConfig":
        """The settings of one response that names some of its own.

        Args:
            fields: those of `response.create`; others than settings have been taken.
            check_voice: see `updated`.

        Raises:
            EventError: if a field is none or has a wrong value.
        """
        made = self._with_common(fields, check_voice)
        if (sound := fields.inner("audio", None)) is not None:
            if (spoken := sound.inner("output", None)) is not None:
                made = made._with_output(spoken, check_voice)
            sound.refuse_others(allowed=("input",))
        _refuse_prompt(fields)
        fields.refuse_others(allowed=NOT_SERVED)
        return made

    def json(self, session_id: str, model: str) -> dict[str, Any]:
        """The whole session as an event has it."""
        detection, transcription = self.turn_detection, self.transcription
        return {
            "type": "realtime",
            "object": "realtime.session",
            "id": session_id,
            "model": model,
            "output_modalities": [self.modality],
            "instructions": self.instructions,
            "tools": list(self.tools),
            "tool_choice": self.tool_choice,
            "max_output_tokens": self.max_output_tokens or "inf",
            "truncation": self.truncation,
            "temperature": self.temperature,
            "seed": self.seed,
            "think": self.think,
            "audio": {
                "input": {
                    "format": self.input_format.json,
                    "transcription": transcription and transcription.json(model),
                    "noise_reduction": None,
                    "turn_detection": detection and detection.json,
                },
                "output": {"format": self.output_format.json, "voice": self.voice, "speed": 1.0},
            },
            **dict.fromkeys((*NOT_SERVED, "prompt")),
        }

    def _with_common(self, fields: Fields, check_voice: CheckVoice) -> "SessionConfig":
        """What a session and a response both may set."""
        modalities = fields.take("output_modalities", None)
        if modalities not in (None, ["audio"], ["text"]):
            raise EventError(
                f"{fields.name('output_modalities')}: expected ['audio'], which includes a "
                f"transcript, or ['text'], got {modalities!r:.80}",
                param=fields.name("output_modalities"),
            )
        return replace(
            self,
            instructions=fields.text("instructions", self.instructions, most=MAX_INSTRUCTIONS),
            modality=modalities[0] if modalities else self.modality,
            max_output_tokens=_read_max_tokens(fields, self.max_output_tokens),
            tools=_read_tools(fields, self.tools),
            tool_choice=_read_tool_choice(fields, self.tool_choice),
            temperature=fields.number("temperature", self.temperature, least=0, most=2),
            seed=fields.number("seed", self.seed, least=0, most=2**31 - 1, whole=True),
            think=fields.flag("think", self.think),
        )

    def _with_input(self, fields: Fields) -> "SessionConfig":
        made = self
        if (form := fields.inner("format", None)) is not None:
            made = replace(made, input_format=read_format(form))
        if "turn_detection" in fields:
            detection = fields.inner("turn_detection", None)
            made = replace(
                made,
                turn_detection=None
                if detection is None
                else TurnDetection.read(detection, self.turn_detection),
            )
        if "transcription" in fields:
            wanted = fields.inner("transcription", None)
            made = replace(
                made, transcription=None if wanted is None else Transcription.read(wanted)
            )
        fields.refuse_others(allowed=("noise_reduction",))
        return made

    def _with_output(self, fields: Fields, check_voice: CheckVoice) -> "SessionConfig":
        form, voice = fields.inner("format", None), fields.take("voice", None)
        speed = fields.number("speed", 1.0, least=0.25, most=1.5)
        if speed != 1:
            raise EventError(
                f"{fields.name('speed')}: this server speaks at speed 1 only; ask for another pace "
                "in the instructions",
                "unsupported_value",
                param=fields.name("speed"),
            )
        fields.refuse_others()
        made = self if form is None else replace(self, output_format=read_format(form))
        if voice is None:
            return made
        if isinstance(voice, dict):
            voice = Fields(voice, fields.name("voice")).text("id")
        if not isinstance(voice, str):
            raise EventError(
                f"{fields.name('voice')}: expected a voice's name",
                "invalid_type",
                param=fields.name("voice"),
            )
        try:
            return replace(made, voice=check_voice(voice))
        except VoiceError as error:
            raise EventError(str(error), "invalid_voice", param=fields.name("voice")) from None


def _read_max_tokens(fields: Fields, known: int | None) -> int | None:
    value = fields.take("max_output_tokens", known)
    if value is None or value == "inf":
        return None if value == "inf" else known
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_TOKENS:
        raise EventError(
            f"{fields.name('max_output_tokens')}: expected 1 to {MAX_TOKENS}, or 'inf', got "
            f"{value!r:.80}",
            param=fields.name("max_output_tokens"),
        )
    return value


def _read_tools(fields: Fields, known: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    if (listed := fields.objects("tools", None, most=MAX_TOOLS)) is None:
        return known
    tools: dict[str, Mapping[str, Any]] = {}
    for entry in listed:
        if (kind := entry.text("type", "function")) != "function":
            raise EventError(
                f"{entry.name('type')}: expected function, got {kind!r:.80}: other tools are not "
                "served",
                "unsupported_value",
                param=entry.name("type"),
            )
        tool = {"type": "function", "name": entry.text("name", most=200)}
        if (description := entry.text("description", None)) is not None:
            tool["description"] = description
        if (parameters := entry.take("parameters", None)) is not None:
            Fields(parameters, entry.name("parameters"))
            tool["parameters"] = parameters
        entry.refuse_others(allowed=("strict",))
        if tool["name"] in tools:
            raise EventError(
                f"{entry.name('name')}: two tools have the name {tool['name']!r:.80}",
                param=entry.name("name"),
            )
        _require_usable(tool, entry)
        tools[tool["name"]] = tool
    return tuple(tools.values())


def _require_usable(tool: Mapping[str, Any], entry: Fields) -> None:
    """Refuse a schema that the model's template cannot show."""
    try:
        Tool(dict(tool))
    except Sa2jaxError as error:
        raise EventError(str(error), param=entry.path) from None


def _read_tool_choice(fields: Fields, known: str) -> str:
    value = fields.take("tool_choice", known)
    if value is None:
        return known
    if value not in ("auto", "none"):
        raise EventError(
            f"{fields.name('tool_choice')}: expected auto or none, got {value!r:.80}: a call "
            "cannot be forced; ask for it in the instructions",
            "unsupported_value",
            param=fields.name("tool_choice"),
        )
    return value


def _read_retention(fields: Fields) -> str:
    """A retention ratio says how much goes at once; here turns go one by one, as with `auto`."""
    fields.choice("type", ("retention_ratio",))
    fields.number("retention_ratio", least=0, most=1)
    fields.refuse_others(allowed=("token_limits",))
    return "auto"


def _refuse_prompt(fields: Fields) -> None:
    if fields.take("prompt", None) is not None:
        raise EventError(
            f"{fields.name('prompt')}: stored prompts are not served; send instructions",
            "unsupported_value",
            param=fields.name("prompt"),
        )

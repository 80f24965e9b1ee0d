"""The body of a request to /v1/chat/completions, and how it wants to be answered."""

import secrets
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sa2jax.chat.template import TASKS
from sa2jax.inference.requests import GenerationConfig
from sa2jax.inference.sampling import SamplingParams
from sa2jax.pipeline.task_runner import task_options
from sa2jax.serve.encoders import require_format
from sa2jax.serve.errors import ApiError
from sa2jax.serve.settings import Settings

SEEDS = 1 << 31  # larger ones, and negative ones, are taken modulo this


class Body(BaseModel):
    """Base of all bodies: fields that are not known are left alone, as OpenAI's clients expect."""

    model_config = ConfigDict(extra="ignore")


class VoiceId(Body):
    """A voice by its id."""

    id: str = Field(max_length=100)


VoiceName = str | VoiceId


def voice_name(voice: VoiceName | None) -> str:
    """The name or id that a request gives, by default that of the model's own choice."""
    if voice is None:
        return "default"
    return voice.id if isinstance(voice, VoiceId) else voice


class AudioOptions(Body):
    """How the answer sounds."""

    voice: VoiceName | None = None
    format: str | None = None


class StreamOptions(Body):
    """What a stream brings besides."""

    include_usage: bool | None = None


class ChatRequest(Body):
    """A request; null is as good as nothing for every field but `messages`."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=10_000)
    model: str | None = None
    modalities: list[Literal["text", "audio"]] | None = None
    audio: AudioOptions | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=128)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1_000_000)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = None
    n: int | None = Field(None, ge=1)
    stop: list[str] | None = Field(None, max_length=16)
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tts_content: bool | None = None
    # What is not done is refused where it asks for something.
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logprobs: bool | None = None
    logit_bias: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    best_of: int | None = None
    use_beam_search: bool | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def require_supported(self, settings: Settings) -> None:
        """Refuse what cannot be done, rather than do something else.

        Raises:
            ApiError: 400, naming the field.
        """
        if (self.n or 1) > settings.max_samples:
            raise ApiError(f"n: expected at most {settings.max_samples}, got {self.n}", param="n")
        if any(not text for text in self.stop or ()):
            raise ApiError("stop: expected texts that are not empty", param="stop")
        if self.audio is not None and self.audio.format is not None:
            require_format(self.audio.format, "audio.format")
        refused = {
            "frequency_penalty": bool(self.frequency_penalty),
            "presence_penalty": bool(self.presence_penalty),
            "logprobs": bool(self.logprobs),
            "logit_bias": bool(self.logit_bias),
            "response_format": (self.response_format or {}).get("type", "text") != "text",
            "best_of": (self.best_of or 1) > (self.n or 1),
            "use_beam_search": bool(self.use_beam_search),
        }
        hints = {
            "frequency_penalty": "; repetition_penalty is supported",
            "presence_penalty": "; repetition_penalty is supported",
        }
        for name, is_asked in refused.items():
            if is_asked:
                message = f"{name} is not supported: leave it out{hints.get(name, '')}"
                raise ApiError(message, param=name, code="unsupported_parameter")
        if self.tool_choice not in (None, "auto", "none"):
            raise ApiError(
                "tool_choice: expected auto or none; the model decides itself whether it calls a "
                "tool",
                param="tool_choice",
                code="unsupported_parameter",
            )

    @property
    def shown_tools(self) -> list[dict[str, Any]]:
        """The schemas that the model is shown."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def wants_audio(self) -> bool:
        """Whether the answer is to be heard."""
        return "audio" in (self.modalities or ())

    def wants_thoughts(self, settings: Settings) -> bool:
        """Whether a Think model thinks first."""
        asked = (self.chat_template_kwargs or {}).get("enable_thinking")
        if self.reasoning_effort == "none":
            return False
        return settings.think if asked is None else bool(asked)

    def generation(self, *, sample: int = 0) -> GenerationConfig:
        """Sampling and limits of an answer; what is not said is as in the official example.

        Args:
            sample: which of the `n` answers.
        """
        options = task_options(TASKS["chat"])
        usual = options.sampling
        sampling = SamplingParams(
            temperature=usual.temperature if self.temperature is None else self.temperature,
            top_p=usual.top_p if self.top_p is None else self.top_p,
            top_k=usual.top_k if self.top_k is None else max(self.top_k, 0),
            repetition_penalty=self.repetition_penalty or usual.repetition_penalty,
        )
        seed = secrets.randbelow(SEEDS) if self.seed is None else self.seed
        limit = self.max_completion_tokens or self.max_tokens or options.max_new_tokens
        return replace(
            options,
            sampling=sampling,
            max_new_tokens=limit,
            max_repeat=min(options.max_repeat, max(limit // 2, 1)),
            stop_strings=tuple(self.stop or ()),
            seed=(seed + sample) % SEEDS,
        )

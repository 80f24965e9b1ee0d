"""A request to /v1/chat/completions, read: its answers, and what surrounds them."""

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sa2jax.chat.tools import ToolCall
from sa2jax.serve.conversation import Conversation, TokenCounts, calls_of
from sa2jax.serve.openai.chat_request import ChatRequest, voice_name
from sa2jax.serve.openai.choices import Choice
from sa2jax.serve.openai.messages import MessageReader
from sa2jax.serve.state import ServerState


class ChatPlan:
    """A request with its conversation read; made in a worker thread.

    Attributes:
        choices: the answers, none of which has begun.
        spoken: whether they are speech.
        audio_format: format of the sound that is sent, None if none is.
        tts_content: whether StepFun's form of speech is sent.
    """

    def __init__(self, state: ServerState, body: ChatRequest):
        self.state, self.body = state, body
        reader = MessageReader(
            state.model.tokenizer,
            lambda key: None if (kept := state.replies.find(key)) is None else kept.turn,
            state.settings.max_seconds,
        )
        dialogue = reader.read(body.messages)
        self.spoken = body.wants_audio or dialogue.opens_speech
        by_mark = dialogue.opens_speech and not body.wants_audio
        self.tts_content = self.spoken and (bool(body.tts_content) or by_mark)
        audio = body.audio
        asked = None if audio is None else audio.format
        self.audio_format = None
        if body.wants_audio:
            self.audio_format = asked or ("pcm16" if body.stream else "wav")
        voice = None
        if self.spoken:
            voice = state.voices.find(voice_name(None if audio is None else audio.voice))
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.choices = [
            Choice(
                state,
                Conversation(
                    model=state.model,
                    system=state.settings.default_system
                    if dialogue.system is None
                    else dialogue.system,
                    rounds=dialogue.rounds,
                    question=dialogue.question,
                    options=body.generation(sample=n),
                    max_len=state.max_len,
                    tools=body.shown_tools,
                    think=body.wants_thoughts(state.settings),
                    voice=voice,
                    first=state.settings.first_codes if body.stream else None,
                    chunk=state.settings.chunk_codes,
                ),
                n,
            )
            for n in range(body.n or 1)
        ]

    def envelope(self, kind: str, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What surrounds the choices of a response or a chunk."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.state.settings.model_id,
            "choices": list(choices),
        }

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens of the prompt, which counts once, and of all answers."""
        return usage_of([choice.counts for choice in self.choices])

    def calls(self, choice: Choice) -> list[dict[str, Any]]:
        """The calls of an answer."""
        calls = calls_of(choice.ended)
        if self.body.parallel_tool_calls is False:
            calls = calls[:1]
        return [_call(n, call) for n, call in enumerate(calls)]

    def headers(self) -> dict[str, str]:
        """How long the answers waited."""
        waited = max(choice.waited for choice in self.choices)
        return {"x-queue-ms": f"{1000 * waited:.1f}"}


def usage_of(counts: Sequence[TokenCounts]) -> dict[str, Any]:
    """Usage of some answers to one prompt, which counts once."""
    first, total = counts[0], sum(counts[1:], counts[0])
    cached = max(count.cached for count in counts)
    return {
        "prompt_tokens": first.prompt,
        "completion_tokens": total.generated,
        "total_tokens": first.prompt + total.generated,
        "prompt_tokens_details": {
            "cached_tokens": cached,
            "audio_tokens": first.prompt_audio,
            "text_tokens": first.prompt - first.prompt_audio,
        },
        "completion_tokens_details": {
            "audio_tokens": total.audio,
            "text_tokens": total.generated - total.audio - total.thinking,
            "reasoning_tokens": total.thinking,
        },
    }


def _call(index: int, call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {
        "index": index,
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": function,
    }

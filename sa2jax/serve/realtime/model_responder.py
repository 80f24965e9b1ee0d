"""The model as what answers in a realtime session."""

import asyncio
import secrets
from dataclasses import dataclass, replace

from sa2jax.audio.recording import Recording
from sa2jax.chat import template
from sa2jax.chat.template import TASKS, Piece
from sa2jax.chat.tool_schema import Tool
from sa2jax.chat.toolbox import ToolAnswer
from sa2jax.chat.tools import ToolCall
from sa2jax.inference.requests import GenerationConfig, Request
from sa2jax.pipeline.conversation import Chat
from sa2jax.pipeline.reply import Reply, ReplyPiece
from sa2jax.pipeline.stream import Stream
from sa2jax.pipeline.task_runner import task_options
from sa2jax.serve.bridge import Answer
from sa2jax.serve.errors import ApiError
from sa2jax.serve.metrics import Watch
from sa2jax.serve.realtime.prompts import ModelUtterance, Prompt, as_prompt
from sa2jax.serve.realtime.responder import Outcome, ResponseRequest, Usage
from sa2jax.serve.realtime.session_config import SessionConfig, Transcription
from sa2jax.serve.state import ServerState


class ModelResponder:
    """Answers of one session, each a stream of the session's conversation.

    Args:
        state: of the server.
        transcribing: held by whoever transcribes: one at a time, so that answers come first.
    """

    def __init__(self, state: ServerState, transcribing: asyncio.Semaphore):
        self.state, self._transcribing = state, transcribing
        self.seed = secrets.randbelow(2**31)
        self._chat: Chat | None = None

    def check_voice(self, name: str) -> str:
        """A voice's name as the server has it.

        Raises:
            VoiceError: if there is no such voice.
        """
        found = self.state.voices.find(name)
        return name if name == "default" else found.name

    def start(self, request: ResponseRequest) -> "ModelResponse":
        """Begin a response."""
        return ModelResponse(self, request)

    async def transcribe(self, recording: Recording, transcription: Transcription) -> str:
        """The words of a recording, "" if nobody speaks; the model hears itself which language.

        Raises:
            ApiError: if the server is too busy.
            Sa2jaxError: if it cannot be transcribed.
        """
        async with self._transcribing:
            replies, _ = await self.state.work(
                lambda check: self.state.model.run("asr", [recording])
            )
        return replies[0].text.strip()

    def chat_for(self, request: ResponseRequest) -> Chat:
        """The conversation to answer in, with the settings of a request; in a worker thread."""
        config = request.config
        fresh = self.state.model.chat(
            config.instructions or None,
            tools=_tools(config),
            think=config.think,
            options=_options(config),
            overflow="drop" if config.truncation == "auto" else "refuse",
        )
        if not request.in_conversation:
            return fresh
        if self._chat is None:
            self._chat = fresh
        chat = self._chat
        # The one that stays knows what was read before.
        chat.head, chat.tools = fresh.head, fresh.tools
        chat.options, chat.overflow = fresh.options, fresh.overflow
        chat.think = fresh.think
        return chat


@dataclass(frozen=True, eq=False)
class _Begun:
    """An answer that has begun, and what its prompt was.

    Attributes:
        chat: its conversation.
        question: turns of its newest round that were there before it.
        prompt: what the model reads.
    """

    chat: Chat
    question: int
    prompt: Request


class ModelResponse:
    """An answer of the model in a session; made by `ModelResponder.start`."""

    def __init__(self, responder: ModelResponder, request: ResponseRequest):
        self._responder, self._request = responder, request
        self._answer: Answer | None = None
        self._watch: Watch | None = None
        self._begun: _Begun | None = None

    def __aiter__(self) -> "ModelResponse":
        return self

    async def __anext__(self) -> ReplyPiece:
        """The next piece; the first waits for a slot.

        Raises:
            ApiError: if the server is too busy.
            Sa2jaxError: what the stream raises.
        """
        state = self._responder.state
        if self._answer is None:
            slot = await state.admission.acquire()
            self._watch = state.metrics.watch(slot.waited)
            self._answer = state.open(self._begin, slot)
        assert self._watch is not None
        try:
            piece = await anext(self._answer)
        except StopAsyncIteration:
            raise
        except Exception:
            self._watch.end("error")
            raise
        self._watch.piece(piece.text, len(piece.audio) / state.sample_rate)
        return piece

    async def outcome(self) -> Outcome:
        """How it came out."""
        assert self._answer is not None
        return await self._sum_up(await self._answer.reply())

    async def cancel(self, sent: float) -> Outcome:
        """End it, of which so many seconds of sound have gone to the client."""
        if self._answer is None:
            return Outcome(utterance=None, finish_reason="cancelled")
        spoken = self._request.config.modality == "audio"
        return await self._sum_up(await self._answer.cancel(sent if spoken else None))

    def cancel_soon(self) -> None:
        """End it, whatever it has said."""
        if self._answer is not None:
            self._answer.cancel_soon()

    def _begin(self) -> Stream:
        """In the worker thread: what the model is to read, and the stream of its answer."""
        state, config = self._responder.state, self._request.config
        chat = self._responder.chat_for(self._request)
        prompt = as_prompt(self._request.turns, state.model.tokenizer)
        chat.rounds = [list(turns) for turns in prompt.rounds]
        read = self._make_room(chat, prompt.question)
        self._begun = _Begun(chat, _question_length(prompt), read)
        spoken = config.modality == "audio"
        return chat.stream(
            prompt.question,
            speak=spoken,
            voice=state.voices.find(config.voice) if spoken else None,
            first=state.settings.first_codes,
            chunk=state.settings.chunk_codes,
            seed=self._responder.seed if config.seed is None else config.seed,
        )

    def _make_room(self, chat: Chat, question: list[Piece] | ToolAnswer) -> Request:
        """Let go of the oldest rounds until prompt and answer fit in what the server allows.

        Returns:
            The prompt.

        Raises:
            ApiError: if they do not fit all the same, or are not to be let go of.
        """
        model, most = self._responder.state.model, self._responder.state.max_len
        spoken = self._request.config.modality == "audio"
        if isinstance(question, ToolAnswer):
            last, needed = template.tool_result_turn(str(question.text)), 1
        else:
            last, needed = template.human_turn(question), 0
        room = min(chat.options.max_new_tokens, most // 4)
        while True:
            turns = [*chat.history, last, template.reply_turn(spoken=spoken)]
            prompt = model.request(model.family.chat_template(turns))
            left = most - len(prompt.ids)
            if left >= room or len(chat.rounds) <= needed or chat.overflow == "refuse":
                break
            chat.rounds.pop(0)
        if left < 1:
            raise ApiError(
                f"the conversation has {len(prompt.ids)} tokens, which leaves none of the {most} "
                "that it may have with its answer: delete items, or send a shorter turn",
                code="context_length_exceeded",
            )
        most_new = min(chat.options.max_new_tokens, left)
        chat.options = replace(chat.options, max_new_tokens=most_new)
        return prompt

    async def _sum_up(self, reply: Reply) -> Outcome:
        outcome = await self._responder.state.bridge.call(self._outcome_of, reply)
        if self._watch is not None:
            used = outcome.usage
            self._watch.end(
                reply.finish_reason,
                prompt_tokens=used.input_text + used.input_audio,
                cached_tokens=used.cached_text + used.cached_audio,
                generated_tokens=used.output_text + used.output_audio,
            )
            self._watch = None
        return outcome

    def _outcome_of(self, reply: Reply) -> Outcome:
        """In a worker thread: what was said, and what it took."""
        assert self._begun is not None
        model, chat = self._responder.state.model, self._begun.chat
        spoken = self._request.config.modality == "audio"
        turns = chat.rounds[-1]
        said = ModelUtterance(tuple(turns[self._begun.question :]), spoken, model.tokenizer)
        calls = tuple(call for call in reply.tool_calls if isinstance(call, ToolCall))
        return Outcome(
            utterance=said,
            finish_reason=reply.finish_reason,
            calls=calls if reply.finish_reason == "tool_calls" else (),
            usage=_usage(self._begun.prompt, said, reply),
        )


def _usage(prompt: Request, said: ModelUtterance, reply: Reply) -> Usage:
    """Tokens of an answer."""
    read = len(prompt.ids) if reply.timings is None else reply.timings.prompt_tokens
    cached = max(len(prompt.ids) - read, 0)
    sound = sum(prompt.counts)
    known = sum(
        min(max(cached - start, 0), count)
        for start, count in zip(prompt.starts, prompt.counts, strict=True)
    )
    text, codes = said.counts
    if reply.finish_reason != "cancelled" and reply.timings is not None:
        text = max(reply.timings.generated_tokens - codes, text)
    return Usage(
        input_text=len(prompt.ids) - sound,
        input_audio=sound,
        cached_text=cached - known,
        cached_audio=known,
        output_text=text,
        output_audio=codes,
    )


def _tools(config: SessionConfig) -> list[Tool] | None:
    """The client's tools: none of them runs here, whatever its name."""
    if config.tool_choice == "none" or not config.tools:
        return None
    inner = ({k: v for k, v in tool.items() if k != "type"} for tool in config.tools)
    return [Tool({"type": "function", "function": function}) for function in inner]


def _options(config: SessionConfig) -> GenerationConfig:
    options = task_options(TASKS["chat"])
    if config.temperature is not None:
        sampling = replace(options.sampling, temperature=config.temperature)
        options = replace(options, sampling=sampling)
    if config.max_output_tokens is not None:
        options = replace(options, max_new_tokens=config.max_output_tokens)
    return options


def _question_length(prompt: Prompt) -> int:
    """Turns of the newest round before its answer, see `Chat.stream`."""
    if isinstance(prompt.question, ToolAnswer):
        return len(prompt.rounds[-1]) + 1
    return 1

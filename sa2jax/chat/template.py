"""Chat template: from messages to the ids of a prompt.

Three steps, each a pure function: `render` turns messages into pieces exactly as the official chat
template does (`stepaudio2.py`), `build_prompt` turns pieces into ids and remembers where each clip
of audio goes, and the turns and `TASKS` below spell out the published prompts.

    messages -> render -> [Text, Ids, Audio] -> build_prompt -> Prompt(ids, clips)

Every piece is tokenised on its own: two pieces of text are not the same as their join. Special
tokens are what the template writes (`Text.prefix`, `Text.suffix`); in what people, tools and models
have said they are text like any other, so that nobody opens a turn there.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import numpy as np
from jaxtyping import Int32

from sa2jax.chat.pieces import Audio, Ids, Piece, Text, as_piece
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.chat.tools import render_tools
from sa2jax.errors import PromptError
from sa2jax.inference.sampling import SamplingParams

PromptStyle = Literal["chat", "base"]  # turns of a chat model; the plain prompt of a base model
PROMPT_STYLES: tuple[PromptStyle, ...] = ("chat", "base")
ROLES = ("system", "human", "assistant", "tool_json_schemas", "input", "function_output")
SPEECH_MARK = "<tts_start>"
SPEECH_START = Text("", suffix=SPEECH_MARK)
THINK_PREFIX = "\n<think>\n"
THINK_END = "</think>"
SUMMARISE_RESULT = "\n\n\n请用口语化形式总结检索结果，简短地回答用户的问题。"
_OTHER_KEYS = {"loss", "name", "tool_call_id"}  # of training data and servers; not in the prompt


# --- messages -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: one of `ROLES`; "user" becomes "human".
        content: text; or pieces, or official items ({"type": "text" | "audio" | "token", …}), in
            order; or None for the turn that the model is to write.
        eot: whether the turn is closed. An open turn is continued by the model.

    Raises:
        PromptError: for an unknown role or content that cannot be used.
    """

    role: str
    content: str | Sequence[Piece | Mapping[str, Any]] | None
    eot: bool = True

    def __post_init__(self):
        role = "human" if self.role == "user" else self.role
        if role not in ROLES:
            raise PromptError(f"unknown role {self.role!r}: expected user, {', '.join(ROLES)}")
        object.__setattr__(self, "role", role)
        if isinstance(self.content, str) or self.content is None:
            return
        if not isinstance(self.content, Sequence):
            raise PromptError(
                f"unsupported content of the {self.role} turn: expected text, a list of items or "
                f"None, got {type(self.content).__name__}"
            )
        object.__setattr__(self, "content", tuple(as_piece(item) for item in self.content))

    @classmethod
    def of(cls, message: "Message | Mapping[str, Any]") -> "Message":
        """A message from its dict form: role, content and eot, as in the official code.

        The role "tool" of OpenAI-style histories becomes `function_output_turn`.
        """
        if isinstance(message, Message):
            return message
        if not isinstance(message, Mapping):
            raise PromptError(f"expected a message, got {type(message).__name__}")
        if unknown := set(message) - {"role", "content", "eot"} - _OTHER_KEYS:
            raise PromptError(f"message has unknown keys {', '.join(sorted(map(str, unknown)))}")
        if missing := {"role", "content"} - set(message):
            raise PromptError(f"message lacks {' and '.join(sorted(missing))}: {message!r}")
        if message["role"] == "tool":
            return function_output_turn(message.get("name") or "", message["content"])
        return cls(message["role"], message["content"], bool(message.get("eot", True)))


def render(messages: Iterable[Message | Mapping[str, Any]]) -> list[Piece]:
    """Pieces of a conversation, exactly as the official chat template cuts them.

    A turn of text, or of one text with marks around it, is one piece; a turn of items is its head,
    each item, and `<|EOT|>`. An assistant's text that ends with `<tts_start>` opens speech:
    officially it is written so.

    Raises:
        PromptError: for no messages, or one that cannot be used.
    """
    pieces: list[Piece] = []
    for message in map(Message.of, messages):
        head = f"<|BOT|>{message.role}\n"
        end = "<|EOT|>" if message.eot else ""
        match message.content:
            case None:
                pieces.append(Text("", head))
            case str(text):
                said = _speech_marked(Text(text), message.role)
                pieces.append(replace(said, prefix=head, suffix=said.suffix + end))
            case [Text() as said] if said.prefix or said.suffix:
                pieces.append(replace(said, prefix=head + said.prefix, suffix=said.suffix + end))
            case items:
                said = [_speech_marked(as_piece(item), message.role) for item in items]
                pieces += [Text("", head), *said, *([Text("", suffix=end)] if end else [])]
    if not pieces:
        raise PromptError("no messages: expected at least one turn")
    return pieces


@overload
def _speech_marked(piece: Text, role: str) -> Text: ...
@overload
def _speech_marked(piece: Piece, role: str) -> Piece: ...
def _speech_marked(piece, role):
    """A piece of a turn, with `<tts_start>` at the end of an assistant's text as a mark."""
    if role != "assistant" or not isinstance(piece, Text) or not piece.text.endswith(SPEECH_MARK):
        return piece
    return replace(
        piece, text=piece.text.removesuffix(SPEECH_MARK), suffix=SPEECH_MARK + piece.suffix
    )


def render_base(items: Iterable[Piece | str | Mapping[str, Any]]) -> list[Piece]:
    """Pieces of a prompt for the Base model, which knows no turns: the items one after another.

    Raises:
        PromptError: for no items, or one that cannot be used.
    """
    pieces = [as_piece(item) for item in ([items] if isinstance(items, str) else items)]
    if not pieces:
        raise PromptError("an empty prompt: expected at least one item")
    return pieces


# --- ids ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """Where one chunk of audio (at most 25 s) goes in a prompt.

    Attributes:
        start: position of its first `<audio_patch>`.
        tokens: how many there are (0 for a chunk of a few samples).
        audio: which audio of the prompt this is a chunk of, from 0.
        chunk: which chunk of it, from 0.
    """

    start: int
    tokens: int
    audio: int
    chunk: int


@dataclass(frozen=True, eq=False)
class Prompt:
    """Ids of a prompt and the places of its audio.

    The places come from building the prompt, never from searching ids: `<audio_start>` typed by a
    user or written by a model is not a clip.

    Attributes:
        ids: int32 [T], read-only.
        clips: the chunks of audio, in order.
    """

    ids: Int32[np.ndarray, " T"]
    clips: tuple[Clip, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


TokenCounts = Callable[[Any], Sequence[int]] | Sequence[Sequence[int]]


def build_prompt(
    pieces: Sequence[Piece],
    tokenizer: Tokenizer,
    token_counts: TokenCounts = (),
    *,
    split_special_tokens: bool = True,
) -> Prompt:
    """Ids of pieces. Audio becomes `<audio_start>` `<audio_patch>`·n `<audio_end>` per chunk.

    Args:
        pieces: from `render` or `render_base`.
        tokenizer: the checkpoint's tokenizer.
        token_counts: for each audio the number of tokens of each of its 25 s chunks: a function
            of `Audio.source`, or a list with one entry per audio.
        split_special_tokens: whether special tokens written in a text are text; else they are
            those tokens, as in the official code: whoever says something can open turns.

    Raises:
        PromptError: if the counts do not fit the audio, or an id is out of range.
    """
    special = tokenizer.special
    sources = [piece.source for piece in pieces if isinstance(piece, Audio)]
    counts = [token_counts(s) for s in sources] if callable(token_counts) else list(token_counts)
    if len(counts) != len(sources):
        raise PromptError(f"{len(sources)} audio items but token counts for {len(counts)}")
    ids: list[int] = []
    clips: list[Clip] = []
    audio = 0
    for piece in pieces:
        if isinstance(piece, Text):
            ids += tokenizer.encode(
                piece.text,
                prefix=piece.prefix,
                suffix=piece.suffix,
                split_special_tokens=split_special_tokens,
            )
        elif isinstance(piece, Ids):
            if any(not 0 <= i < 2**31 for i in piece.ids):
                raise PromptError(f"ids out of range in a prompt: {[*piece.ids][:8]}")
            ids += piece.ids
        else:
            for chunk, tokens in enumerate(map(int, counts[audio])):
                if tokens < 0:
                    raise PromptError(f"negative token count {tokens} for audio {audio}")
                clips.append(Clip(len(ids) + 1, tokens, audio, chunk))
                ids += [special.audio_start, *[special.audio_patch] * tokens, special.audio_end]
            audio += 1
    return Prompt(_frozen(ids), tuple(clips))


def _frozen(ids: Sequence[int]) -> Int32[np.ndarray, " T"]:
    array = np.asarray(ids, np.int32)
    array.flags.writeable = False
    return array


# --- turns -------------------------------------------------------------------------------------


def human_turn(pieces: Sequence[Piece]) -> Message:
    """What a user says; text alone is one piece with the turn's head, as officially."""
    match pieces:
        case [Text(text)]:
            return Message("human", text)
    return Message("human", pieces)


def reply_turn(*, spoken: bool = False) -> Message:
    """The open turn that the model writes: text, or speech (it then starts with `<tts_start>`)."""
    return Message("assistant", SPEECH_MARK, eot=False) if spoken else Message("assistant", None)


def spoken_turn(ids: Iterable[int]) -> Message:
    """An earlier spoken reply as history: its generated ids, without the stop token."""
    return Message("assistant", [Text(SPEECH_MARK), Ids(tuple(int(i) for i in ids))])


def think_turn() -> Message:
    """The open turn in which a Think model thinks; stop it at `</think>`."""
    return Message("assistant", [Text("", THINK_PREFIX)], eot=False)


def answer_turn(thinking: str, *, spoken: bool = True) -> Message:
    r"""The open turn in which a Think model answers, in place of `think_turn`.

    The official code tokenises prefix, thinking and `</think>\n\n<tts_start>` as one piece. History
    keeps the answer only, as `spoken_turn`.

    Args:
        thinking: the text that was generated; it ends where `</think>` starts.
        spoken: whether the answer is speech.
    """
    thinking = thinking.partition(THINK_END)[0]
    end = f"{THINK_END}\n\n{SPEECH_MARK}" if spoken else f"{THINK_END}\n\n"
    return Message("assistant", [Text(thinking, THINK_PREFIX, end)], eot=False)


def tools_turn(tools: str | Sequence[Mapping[str, Any]]) -> Message:
    """The turn that shows the model its tools; it stands after the system turn."""
    return Message("tool_json_schemas", render_tools(tools))


def tool_result_turn(result: str) -> Message:
    """What a tool answered, with the official request to put it in spoken words."""
    return Message("input", [Text(result), Text(SUMMARISE_RESULT)])


def function_output_turn(name: str, content: str) -> Message:
    """What a tool answered, in the form of StepFun's vLLM branch (role "tool" there)."""
    if not name or not isinstance(content, str):
        raise PromptError("a tool's output needs the tool's name and text content")
    return Message("function_output", f"{name}\n{content}")


# --- tasks -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PromptTask:
    """The prompt of a published task: its system prompt and how the official examples sample.

    Attributes:
        system: the system prompt.
        system_en: the same in English, where published.
        spoken: whether the reply is speech.
        needs_speech: whether silence has no reply, and a long recording one for each segment.
        sampling: sampling parameters of the official examples.
        max_new_tokens: length limit of the reply, in tokens.
    """

    system: str
    system_en: str | None = None
    spoken: bool = False
    needs_speech: bool = False
    sampling: SamplingParams
    max_new_tokens: int = 2048

    def messages(self, *content: Piece | str | Mapping[str, Any]) -> list[Message]:
        """Turns for a chat model: system, human, and the open reply."""
        human = human_turn([as_piece(item) for item in content])
        return [Message("system", self.system), human, reply_turn(spoken=self.spoken)]

    def base_pieces(self, *content: Piece | str | Mapping[str, Any]) -> list[Piece]:
        """Pieces for the Base model: the prompt, the content, and `<tts_start>` for speech."""
        return render_base([self.system, *content, *([SPEECH_START] if self.spoken else [])])


GREEDY = SamplingParams(temperature=0)
LOW_TEMPERATURE = SamplingParams(temperature=0.1)
SPOKEN = SamplingParams(temperature=0.7)

TASKS: Mapping[str, PromptTask] = {
    "asr": PromptTask(
        system="请记录下你所听到的语音内容。",
        needs_speech=True,
        sampling=GREEDY,
        max_new_tokens=256,
    ),
    "s2tt_zh": PromptTask(
        system="请仔细聆听这段语音，然后将其内容翻译成中文。",
        system_en="Please listen carefully to this audio and then translate its content into "
        "Chinese.",
        needs_speech=True,
        sampling=LOW_TEMPERATURE,
        max_new_tokens=256,
    ),
    # Into English the models can, but no prompt is published: worded like the one above.
    "s2tt_en": PromptTask(
        system="请仔细聆听这段语音，然后将其内容翻译成英文。",
        system_en="Please listen carefully to this audio and then translate its content into "
        "English.",
        needs_speech=True,
        sampling=LOW_TEMPERATURE,
        max_new_tokens=256,
    ),
    "s2st_zh": PromptTask(
        system="请仔细聆听这段语音，然后将其内容翻译成中文并用语音播报。",
        system_en="Please listen carefully to this audio and then translate its content into "
        "Chinese speech.",
        spoken=True,
        needs_speech=True,
        sampling=SPOKEN,
    ),
    "s2st_en": PromptTask(  # not published either
        system="请仔细聆听这段语音，然后将其内容翻译成英文并用语音播报。",
        system_en="Please listen carefully to this audio and then translate its content into "
        "English speech.",
        spoken=True,
        needs_speech=True,
        sampling=SPOKEN,
    ),
    "t2st_en": PromptTask(  # published for the Base model
        system="将下面的文本翻译成英文，并用语音播报。\n",
        system_en="Translate the following text into English and broadcast it with voice.\n",
        spoken=True,
        sampling=SPOKEN,
    ),
    "t2st_zh": PromptTask(  # not published: worded like the one above
        system="将下面的文本翻译成中文，并用语音播报。\n",
        system_en="Translate the following text into Chinese and broadcast it with voice.\n",
        spoken=True,
        sampling=SPOKEN,
    ),
    "tts": PromptTask(  # published for the Base model only
        system="以自然的语速读出下面的文字。\n",
        system_en="Read this paragraph at a natural pace.\n",
        spoken=True,
        sampling=SPOKEN,
    ),
    "caption": PromptTask(
        system="Please briefly explain the important events involved in this audio clip.",
        sampling=LOW_TEMPERATURE,
        max_new_tokens=256,
    ),
    "chat": PromptTask(
        system="You are a helpful assistant.",
        sampling=SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.05),
        max_new_tokens=4096,
    ),
    "think": PromptTask(
        system="你的名字叫小跃，你是由阶跃星辰(StepFun)公司训练出来的语音大模型，你能听见用户的声音特征并在"
        "思维过程中描述出来，请激活深度思考模式，通过逐步分析、逻辑推理来解决用户的问题。",
        spoken=True,
        sampling=SPOKEN,
    ),
    "paralinguistic": PromptTask(system="请用语音与我交流。", spoken=True, sampling=SPOKEN),
    "mmau": PromptTask(  # the official example searches with two beams; greedy here
        system="You are an expert in audio analysis, please analyze the audio content and answer "
        "the questions accurately.",
        sampling=GREEDY,
        max_new_tokens=256,
    ),
}


def choice_question(question: str, choices: Sequence[str]) -> str:
    """A multiple-choice question as the MMAU example asks it; it follows the audio."""
    return (
        f"{question} Please choose the answer from the following options: [{', '.join(choices)}] "
        "Output the final answer in <RESPONSE> </RESPONSE>."
    )

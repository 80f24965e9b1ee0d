"""A decoder that says what it is told, and a voice that speaks codes as numbers."""

import time
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np

from helpers.sound import voice
from sa2jax.device_loop import DeviceLoop
from sa2jax.errors import VoiceError
from sa2jax.inference.generation import Generation
from sa2jax.pipeline.chat_state import ChatState
from sa2jax.speech.voices import Voice

# Of the tiny tokenizer: the released ids less 151392, one id per byte.
END_OF_TEXT, TOOL_CALL, TOOL_CALL_END, EOT, BOT = 251, 265, 266, 273, 274
AUDIO_START, AUDIO_END, AUDIO_PATCH, TTS_START, TTS_END, TTS_PAD = 296, 297, 298, 301, 302, 303
CODE_0, CODES = 304, 208
SAMPLES = 960  # of a code
LOOK = 3  # codes that a chunk needs to hear ahead


def turn(role: str, *content: str | list[int], close: bool = True) -> list[int]:
    """Ids of a turn, by hand."""
    ids = [BOT, *role.encode(), 10]
    for item in content:
        ids += item.encode() if isinstance(item, str) else item
    return [*ids, EOT] if close else ids


def heard(tokens: int) -> list[int]:
    """Ids of a clip."""
    return [AUDIO_START, *[AUDIO_PATCH] * tokens, AUDIO_END]


def groups(text: str, codes: Sequence[int], *, end: bool = True) -> list[int]:
    """A spoken reply of one byte a group, by hand."""
    ids, left = [], list(codes)
    words = list(text.encode())
    while words or left:
        ids.append(words.pop(0) if words else TTS_PAD)
        now, left = left[:4], left[4:]
        ids += [CODE_0 + c for c in now] + [TTS_PAD] * (4 - len(now))
    return [*ids, TTS_END] if end else ids


class Script:
    """What the decoder will say, and what it was asked."""

    def __init__(self):
        self.replies: list[tuple[list[int], str]] = []
        self.prompts: list[list[int]] = []
        self.requests, self.options, self.prompt_indices = [], [], []
        self.left = 0  # replies that were not taken to their end
        self.pace = 0.0  # seconds for a block of ids: by default no voice can follow
        self.loop = DeviceLoop()  # as of an `Engine`

    def will_say(self, *replies: bytes | str | list[int], finish_reason: str = "stop") -> "Script":
        for reply in replies:
            ids = reply.encode() if isinstance(reply, str) else reply
            self.replies.append((list(ids), finish_reason))
        return self

    def submit(self, request, options, *, prompt_index=0, conversation=None) -> "ScriptedReply":
        """Stands in for `Engine.submit`."""
        self.prompts.append(request.ids.tolist())
        self.requests.append(request)
        self.options.append(options)
        self.prompt_indices.append(prompt_index)
        return ScriptedReply(self, Generation(request, options), *self.replies.pop(0))

    def stand_in(self, monkeypatch) -> "Script":
        """Let all conversations be answered by it."""
        monkeypatch.setattr(ChatState, "engine", self)
        return self


class ScriptedReply:
    """Stands in for a `Generation`."""

    def __init__(self, script: Script, generation: Generation, ids: list[int], finish_reason: str):
        self.script, self.generation = script, generation
        limit = generation.options.max_new_tokens
        self.told = (ids[:limit], "length") if len(ids) > limit else (ids, finish_reason)
        self.prefilled, self.finish_reason = len(generation.request.ids), "abandoned"
        self.pieces = self.run()
        script.left += 1

    def run(self, block: int = 5):
        ids, finish_reason = self.told
        for start in range(0, len(ids), block):
            time.sleep(self.script.pace)
            visible, ended = self.generation.accept(ids[start : start + block])
            if visible:
                yield visible
            if ended is not None:
                finish_reason = ended
                break
        self.finish_reason = finish_reason
        self.script.left -= 1

    def __iter__(self):
        return self.pieces

    def close(self) -> None:
        self.pieces.close()


class Token2Wav:
    """Speaks each code as 960 samples of its own value."""

    sample_rate = 24_000

    def __init__(self):
        self.spoken: list[int] = []
        self.together: list[int] = []  # how many replies were spoken in one call
        self.parity: bool | None = None  # whether the newest stream is the official one
        self.delay = 0.0  # seconds that a chunk takes

    lookahead, max_streams = LOOK, 32

    def warm_up(self, voice, *, streams=1, chunk=25) -> None:
        """It has no programs."""

    def start(self, voices, *, seed=0, parity=False) -> SimpleNamespace:
        self.parity = parity
        return SimpleNamespace(waiting=[], num_codes=[len(voices[0].codes)])

    def step(self, state, codes, last=False) -> tuple[SimpleNamespace, list[np.ndarray]]:
        given = [*state.waiting, *codes[0]]
        count = len(given) if last else len(given) - LOOK
        num_codes = [state.num_codes[0] + count]
        wave = self._wave(given[:count])
        return SimpleNamespace(waiting=given[count:], num_codes=num_codes), [wave]

    def step_each(self, states, codes, last) -> tuple[list, list[np.ndarray]]:
        self.together.append(len(states))
        made = [
            self.step(state, [own], end)
            for state, own, end in zip(states, codes, last, strict=True)
        ]
        return [state for state, _ in made], [piece for _, (piece,) in made]

    def validate_codes(self, codes, *, empty=False, first=0) -> np.ndarray:
        return np.array([code for code in codes if code < CODES], np.int32)

    def _wave(self, codes) -> np.ndarray:
        time.sleep(self.delay)
        self.spoken += codes
        return np.repeat(np.array(codes, np.float32), SAMPLES) / 1000


def voice_called(name: str) -> Voice:
    numbers = np.zeros(1, np.int32), np.zeros(2, np.float32), np.zeros((2, 3), np.float32)
    return Voice(name, *numbers, audio_hash=name, analysis_hash="")


class Speech:
    """A detokenizer with two voices."""

    sample_rate = 24_000

    def __init__(self):
        self.token2wav = Token2Wav()
        self.folder = SimpleNamespace(voices={"anna": None, "bert": None})

    def voice(self, wanted="default") -> Voice:
        if isinstance(wanted, Voice):
            return wanted
        name = "anna" if wanted == "default" else wanted
        if name not in self.folder.voices:
            raise VoiceError(f"no voice {name!r}: expected one of anna, bert")
        return voice_called(name)

    def speak(self, replies, voice="default", *, seed=0) -> list[np.ndarray]:
        return [
            np.repeat(np.array([c for c in codes if c < CODES], np.float32), SAMPLES) / 1000
            for codes in replies
        ]


def sound(codes: Sequence[int]) -> np.ndarray:
    """What these codes sound like."""
    return np.repeat(np.array(codes, np.float32), SAMPLES) / 1000


def pcm16(wave: np.ndarray) -> np.ndarray:
    """The 16-bit numbers that a file has of it."""
    return np.round(wave * np.float32(32768)).astype(np.int16)


def call(name: str, arguments: str = "{}") -> list[int]:
    return [TOOL_CALL, *f"function\n{name}\n{arguments}".encode(), TOOL_CALL_END]


def until_sound(stream) -> list[np.ndarray]:
    """Take pieces up to the first sound."""
    taken = []
    for piece in stream:
        if len(piece.audio):
            return [*taken, piece.audio]
    raise AssertionError("no sound")


def interrupt(*args, **more):
    raise KeyboardInterrupt


CTRL_C = "\a"  # a command is interrupted while it says this
HELLO = groups("hello", range(10, 30))
RATE = 16_000
CLIP = voice(1), RATE  # 13 tokens
SYSTEM = turn("system", "You are a helpful assistant.")
OPEN = turn("assistant", close=False)
SPOKEN = turn("assistant", [TTS_START], close=False)
QUERY = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
SEARCH = {"type": "function", "function": {"name": "search", "parameters": QUERY}}
TOOLS = [SEARCH, {"name": "get_date_time", "description": "Now."}]
WHERE = ("--model", "nowhere")  # options of a command; never loaded, a `Script` stands in
SUMMARISE = "\n\n\n请用口语化形式总结检索结果，简短地回答用户的问题。"

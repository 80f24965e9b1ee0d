"""Dialogues of a synthetic corpus as text: the turns of each task; no audio yet.

    dialogues = plan_dialogues(config, seed=0)

Everything is drawn from a seed and the dialogue's own key, so that no dialogue depends on others.
Open texts (transcribing, reading aloud, repeating) are split by a hash of the text: a held-out one
is in no training file.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from typing import TypeVar

import numpy as np

from sa2jax.chat.template import TASKS
from sa2jax.chat.toolbox import Toolbox
from sa2jax.errors import ConfigError
from sa2jax.evaluate.normalizer import number_words
from sa2jax.train.corpus import grammar
from sa2jax.train.corpus.grammar import DAYS, Exchange, exchanges

T = TypeVar("T")

CLOCK = "get_date_time"
TOOLS = json.loads(Toolbox([CLOCK]).text)  # its schema, as the model is shown it
REPEAT = "Please repeat what you hear."

# --- conversations ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """An utterance of the user, heard as audio.

    Attributes:
        text: its words.
        voice: the voice, unmodified; None for a random one, which may be warped.
        loud: whether it is loud or soft; None for any level.
    """

    text: str
    voice: str | None = None
    loud: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        role: as in `records.ROLES`.
        text: written text, or the words of a spoken reply.
        utterance: audio of the user in its place.
        spoken: whether the assistant's reply is spoken.
    """

    role: str
    text: str = ""
    utterance: Utterance | None = None
    spoken: bool = False


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """A conversation.

    Attributes:
        file: the jsonl file it belongs to, such as "talks/asr".
        index: its number there.
        turns: its turns.
        tools: whether the model is offered the clock.
    """

    file: str
    index: int
    turns: tuple[Turn, ...]
    tools: bool = False

    @property
    def key(self) -> str:
        """What its randomness is drawn from, and the name of its recordings."""
        return f"{self.file}/{self.index:05d}"


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """What is kept for evaluation.

    Attributes:
        fraction: of open texts of at least three words that no training file holds.
        counts: conversations by file of heldout/.
        unseen_voice: the voice that is heard there only.
    """

    fraction: float
    counts: Mapping[str, int]
    unseen_voice: str

    def __post_init__(self):
        if not 0 < self.fraction < 0.5:
            raise ConfigError(f"held_out.fraction: expected between 0 and 0.5, got {self.fraction}")


@dataclass(frozen=True, kw_only=True)
class DialogueConfig:
    """What conversations a corpus holds.

    Attributes:
        counts: conversations by task: asr, short (transcribing one word, as often a digit as any
            other), tts, repeat, sums, chat, tools, voices, text, clock (asking for it in text).
        open: parts of what is transcribed: sentence, digits, number, word, question; the last two
            are never held out and not read aloud.
        chat: parts: greeting, opposite, count, again, name, two.
        tools: parts: time, day, other (nothing that the clock could answer).
        voices: parts: who, loud.
        text: parts: written, spoken (answered so), heard (answered in text), mixed, clock.
        english_prompt_fraction: part of the tts prompts that are the English ones.
        held_out: what is kept for evaluation.
        known_voices: the voices that are to be known by name.
        templates: sentences in place of the grammar's, with its slots and those of `slot_values`,
            such as "bring the {color} {instrument}"; none for the grammar's own.
        slot_values: words for more slots, or other words for the grammar's: "piano guitar drum".
    """

    counts: Mapping[str, int]
    open: Mapping[str, float]
    chat: Mapping[str, float]
    tools: Mapping[str, float]
    voices: Mapping[str, float]
    text: Mapping[str, float]
    english_prompt_fraction: float
    held_out: HeldOutConfig
    known_voices: tuple[str, ...] = field(default=())
    templates: tuple[str, ...] = ()
    slot_values: Mapping[str, str] = field(default_factory=dict)

    @property
    def grammar(self) -> Sequence[str]:
        """Forms of sentences."""
        return self.templates or grammar.SENTENCES

    @cached_property
    def slots(self) -> Mapping[str, Sequence[str]]:
        """What each slot of a form may hold."""
        return {**grammar.WORDS} | {
            name: tuple(words.split()) for name, words in self.slot_values.items()
        }

    def __post_init__(self):
        if empty := [name for name, words in self.slot_values.items() if not words.split()]:
            raise ConfigError(f"dialogues.slot_values.{empty[0]}: expected words")
        for form in self.templates:
            if not form or re.sub(r"\{\w+\}|[a-z']+", "a", form).strip("a ") or "  " in form:
                raise ConfigError(
                    f"dialogues.templates: expected words and {{slots}}, got {form!r}"
                )
            if strange := [name for name in grammar.slots(form) if name not in self.slots]:
                raise ConfigError(
                    f"dialogues.templates: {form!r} has a slot {strange[0]}; there are "
                    + ", ".join(sorted(self.slots))
                )
        for name, known in _PARTS.items():
            given = getattr(self, name)
            if strange := [key for key in given if key not in known]:
                raise ConfigError(
                    f"dialogues.{name}: there is no {strange[0]}; expected {', '.join(known)}"
                )
            if min(given.values(), default=0) < 0 or sum(given.values()) <= 0:
                raise ConfigError(f"dialogues.{name}: expected parts of 0 or more, not all 0")
        for name, counts, makers in (
            ("counts", self.counts, _TASKS),
            ("held_out.counts", self.held_out.counts, _HELD_OUT),
        ):
            if strange := [key for key in counts if key not in makers]:
                raise ConfigError(
                    f"dialogues.{name}: there is no {strange[0]}; expected {', '.join(makers)}"
                )


def plan_dialogues(config: DialogueConfig, seed: int, scale: float = 1.0) -> list[Dialogue]:
    """All conversations of a corpus, first those for training.

    Args:
        config: what there shall be.
        seed: same seed, same talks.
        scale: times all counts; a task that is asked for keeps at least two.
    """
    found = []
    for folder, counts, makers in (
        ("talks", config.counts, _TASKS),
        ("heldout", config.held_out.counts, _HELD_OUT),
    ):
        for name, count in counts.items():
            task = makers[name]
            for index in range(max(2, round(count * scale)) if count else 0):
                # Heard by other voices, the held-out texts are the same.
                key = f"{folder}/{name.split('_')[0]}/{index:05d}"
                draw = _Sampler(grammar.random(seed, key), config, index, folder == "heldout", name)
                turns = task(draw)
                offered = task is _tools or any(turn.role == "tool_call" for turn in turns)
                found.append(
                    Dialogue(file=f"{folder}/{name}", index=index, turns=turns, tools=offered)
                )
    return found


# --- tasks --------------------------------------------------------------------------------------


class _Sampler:
    """What one conversation is made from: chance, and which one it is."""

    def __init__(
        self,
        rng: np.random.Generator,
        config: DialogueConfig,
        index: int,
        held_out: bool,
        name: str,
    ):
        self.rng, self.config, self.index = rng, config, index
        self.held_out, self.name = held_out, name

    def one(self, items: Sequence[T]) -> T:
        return items[int(self.rng.integers(len(items)))]

    def part(self, parts: Mapping[str, float]) -> str:
        return grammar.weighted(self.rng, parts)

    def text(self, *, transcribed: bool = False) -> str:
        """An open text of the right side of the split."""
        parts = dict(self.config.open)
        for kind in ("word", "question"):
            if (self.held_out or not transcribed) and len(parts) > 1:
                parts.pop(kind, None)
        while True:
            kind = self.part(parts)
            text = self._open(kind)
            if kind == "question" or (
                grammar.is_held_out(text, self.config.held_out.fraction) == self.held_out
            ):
                return text

    def _open(self, kind: str) -> str:
        if kind == "sentence":
            return grammar.sentence(self.rng, self.config.grammar, self.config.slots)
        if kind == "digits":
            return " ".join(self.one(grammar.DIGITS) for _ in range(int(self.rng.integers(1, 8))))
        if kind == "number":
            return number_words(int(self.rng.integers(1000)))
        if kind == "word":
            return self.one(grammar.single_words())
        if self.rng.random() < 0.7:
            return self.exchange()[0]
        return self.one((*grammar.ASK_TIME, *grammar.ASK_DAY, grammar.ASK_NAME, grammar.AGAIN))

    def exchange(self, *kinds: str) -> Exchange:
        return self.one(exchanges(self.one(kinds or tuple(grammar.EXCHANGES))))


def _system(task: str) -> Turn:
    return Turn(role="system", text=TASKS[task].system)


def _heard(text: str, **how: str | bool | None) -> Turn:
    return Turn(role="user", utterance=Utterance(text=text, **how))  # type: ignore


def _typed(text: str) -> Turn:
    return Turn(role="user", text=text)


def _said(text: str) -> Turn:
    return Turn(role="assistant", text=text, spoken=True)


def _written(text: str) -> Turn:
    return Turn(role="assistant", text=text)


def _asr(draw: _Sampler) -> tuple[Turn, ...]:
    text = draw.text(transcribed=True)
    voice = draw.config.held_out.unseen_voice if draw.name.endswith("_unseen") else None
    return _system("asr"), _heard(text, voice=voice), _written(text)


def _short(draw: _Sampler) -> tuple[Turn, ...]:
    text = draw.one(grammar.DIGITS if draw.rng.integers(2) else grammar.single_words())
    return _system("asr"), _heard(text), _written(text)


def _tts(draw: _Sampler) -> tuple[Turn, ...]:
    task = TASKS["tts"]
    english = draw.rng.random() < draw.config.english_prompt_fraction
    text = draw.text()
    prompt = task.system_en or "" if english else task.system
    return Turn(role="system", text=prompt), _typed(text), _said(text)


def _repeat(draw: _Sampler) -> tuple[Turn, ...]:
    text = draw.text()
    return Turn(role="system", text=REPEAT), _heard(text), _said(text)


def _sum(draw: _Sampler) -> tuple[Turn, ...]:
    """All pairs in turn, so that none is missing."""
    pairs = exchanges("sum")
    wording = int(draw.rng.integers(len(pairs) // 100))
    question, answer = pairs[100 * wording + draw.index % 100]
    return _system("chat"), _heard(question), _said(answer)


def _chat(draw: _Sampler) -> tuple[Turn, ...]:
    kind, system = draw.part(draw.config.chat), _system("chat")
    if kind == "name":
        name = draw.one(grammar.WORDS["name"])
        return (
            system,
            _heard(f"my name is {name}"),
            _said(f"hello {name} nice to meet you"),
            _heard(grammar.ASK_NAME),
            _said(f"your name is {name}"),
        )
    question, answer = draw.exchange(*([] if kind in ("again", "two") else [kind]))
    lines = system, _heard(question), _said(answer)
    if kind == "again":
        lines += _heard(grammar.AGAIN), _said(answer)
    elif kind == "two":
        question, answer = draw.exchange()
        lines += _heard(question), _said(answer)
    return lines


def _clock(draw: _Sampler, kind: str, *, spoken: bool) -> tuple[Turn, ...]:
    """A question that the clock answers."""
    now = datetime(2024, 1, 1) + timedelta(seconds=int(draw.rng.integers(3 * 366 * 86400)))
    zone = int(draw.rng.integers(-11, 13))
    day = DAYS[now.weekday()]
    result = f"{now} {day.capitalize()} UTC{zone:+03d}:00"
    if kind == "time":
        clock = grammar.clock(now.hour, now.minute)
        question, answer = draw.one(grammar.ASK_TIME), f"it is {clock}"
    else:
        question, answer = draw.one(grammar.ASK_DAY), f"today is {day}"
    call = Turn(role="tool_call", text=json.dumps({"name": CLOCK, "arguments": {}}))
    told = Turn(role="tool_response", text=result)
    if spoken:
        return _heard(question), _said(grammar.LOOKING), call, told, _said(answer)
    return _typed(question), call, told, _written(answer)


def _tools(draw: _Sampler) -> tuple[Turn, ...]:
    kind = draw.part(draw.config.tools)
    if kind != "other":
        return _system("chat"), *_clock(draw, kind, spoken=True)
    question, answer = draw.exchange()
    return _system("chat"), _heard(question), _said(answer)


def _voices(draw: _Sampler) -> tuple[Turn, ...]:
    if draw.part(draw.config.voices) == "who":
        voice = draw.one(draw.config.known_voices)
        return (
            _system("paralinguistic"),
            _heard(draw.one(grammar.ASK_WHO), voice=voice),
            _said(f"this is {voice}"),
        )
    loud = bool(draw.rng.integers(2))
    answer = f"you are {'loud' if loud else 'soft'}"
    return _system("paralinguistic"), _heard(draw.one(grammar.ASK_LOUD), loud=loud), _said(answer)


def _clock_in_text(draw: _Sampler) -> tuple[Turn, ...]:
    """What the clock says is learnt here, a thousand times of day: no sound, few tokens."""
    kind = "time" if draw.rng.random() < 0.8 else "day"
    return _system("chat"), *_clock(draw, kind, spoken=False)


def _text(draw: _Sampler) -> tuple[Turn, ...]:
    kind, system = draw.part(draw.config.text), _system("chat")
    if kind == "clock":
        return system, *_clock(draw, draw.one(("time", "day")), spoken=False)
    question, answer = draw.exchange()
    if kind == "mixed":
        other = draw.exchange() if draw.rng.random() < 0.5 else (grammar.AGAIN, answer)
        return system, _typed(question), _written(answer), _heard(other[0]), _said(other[1])
    ask = _heard if kind == "heard" else _typed
    return system, ask(question), (_said if kind == "spoken" else _written)(answer)


_TASKS: Mapping[str, Callable[[_Sampler], tuple[Turn, ...]]] = {
    "asr": _asr,
    "short": _short,
    "tts": _tts,
    "repeat": _repeat,
    "sums": _sum,
    "chat": _chat,
    "tools": _tools,
    "voices": _voices,
    "text": _text,
    "clock": _clock_in_text,
}
_HELD_OUT = {("asr_seen" if name == "asr" else name): task for name, task in _TASKS.items()} | {
    "asr_unseen": _asr
}
_PARTS: Mapping[str, tuple[str, ...]] = {
    "open": ("sentence", "digits", "number", "word", "question"),
    "chat": ("greeting", "opposite", "count", "again", "name", "two"),
    "tools": ("time", "day", "other"),
    "voices": ("who", "loud"),
    "text": ("written", "spoken", "heard", "mixed", "clock"),
}

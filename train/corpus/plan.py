"""The recipe of a synthetic corpus, and the recordings that it asks for.

config = read_corpus("nano/corpus", {"seed": 1})
plan = Plan.of(config, scale=0.01)  # conversations and jobs; nothing is made yet
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from sa2jax.errors import ConfigError, DataError
from sa2jax.train.corpus import grammar
from sa2jax.train.corpus.acoustics import Effects, Range
from sa2jax.train.corpus.conversations import Clip, Talk, Talks, plan_talks
from sa2jax.train.corpus.tts_engines import Manner, VoiceSpec
from sa2jax.train.recipe import apply_overrides, build_config, read_recipe_values

KIND = "corpus"  # of recipes
OPEN = ("asr", "tts", "repeat")  # tasks whose texts are split


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All of a recipe but its voices.

    Attributes:
        seed: of everything.
        talks: what is said.
        effects: what happens to what is heard.
        held_out_effects: the same for evaluation.
        loud: peak of loud voices, dB of full scale.
        soft: peak of soft ones.
        level: RMS level of replies and clean speech, dB.
        silence: before and after replies, s.
        answers: replies of at most so many words are said by all of `conversations.known`, for
            `speech.jsonl`: who speaks in one of these voices has heard short answers in it.
        clean: part of the clips to transcribe that `speech.jsonl` has without effects.
        prompt: what voices/NAME.wav says; {name} is the voice's.
    """

    seed: int = 0
    talks: Talks
    effects: Effects
    held_out_effects: Effects
    loud: Range
    soft: Range
    level: float
    silence: Range
    clean: float
    prompt: str
    answers: int = 0


@dataclass(frozen=True, kw_only=True)
class CorpusConfig(Settings):
    """A recipe.

    Attributes:
        voices: by name; the first of `conversations.known` is the assistant's own.
    """

    voices: Mapping[str, VoiceSpec]

    def __post_init__(self):
        known, unseen = self.talks.known, self.talks.held_out.unseen
        for name in (*known, unseen):
            if name not in self.voices:
                raise ConfigError(f"there is no voice {name!r}: the recipe has {list(self.voices)}")
        if not known or unseen in known or self.voices[unseen].weight:
            raise ConfigError("expected known voices, and an unseen one of weight 0 beside them")
        if not any(spec.weight for spec in self.voices.values()):
            raise ConfigError("expected a voice with a weight above 0")


def read_corpus(source: str | Path, changes: Mapping[str, Any] | None = None) -> CorpusConfig:
    """A recipe by its name or file.

    Args:
        source: a name from configs/recipes, or a YAML file.
        changes: values by dotted key that replace those of the file.

    Raises:
        ConfigError: for a key that does not exist, or a value of another kind.
    """
    values = apply_overrides(read_recipe_values(source), changes or {})
    if (kind := values.pop("kind", None)) != KIND:
        raise ConfigError(f"{source} is a recipe of kind {kind}: expected one of kind {KIND}")
    given = values.pop("voices", None)
    if not isinstance(given, dict):
        raise ConfigError(f"{source}: expected voices by name")
    voices = {}
    for name, spec in given.items():
        if spec is None:  # `--set voices.joe=null` leaves a voice out
            continue
        if not isinstance(spec, dict):
            raise ConfigError(f"{source}: voices.{name}: expected values by name, got {spec!r}")
        voices[name] = build_config(VoiceSpec, spec, f"{source}: voices.{name}")
    settings = build_config(Settings, values, str(source))
    own = {item.name: getattr(settings, item.name) for item in fields(settings)}
    return CorpusConfig(voices=voices, **own)


# --- what there is to make ----------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A recording to make.

    Attributes:
        path: where, as seen from OUT.
        text: what is said.
        manner: by whom.
        key: what chance is drawn from; None for a clean one.
        peak: its level, if that is asked for, dB.
        clean: where it goes without effects, too.
        held_out: which effects it has.
    """

    path: str
    text: str
    manner: Manner
    key: str | None = None
    peak: Range | None = None
    clean: str | None = None
    held_out: bool = False


@dataclass(frozen=True, eq=False)
class Plan:
    """All conversations and recordings of a corpus, by the recordings' paths."""

    talks: list[Talk]
    jobs: dict[str, Job]

    @classmethod
    def of(cls, config: CorpusConfig, scale: float) -> Self:
        """All that a recipe asks for, its counts times `scale`."""
        talks = plan_talks(config.talks, config.seed, scale)
        _check_split(talks)
        jobs = [
            Job(f"voices/{name}.wav", config.prompt.format(name=name), _own(config, name))
            for name in config.talks.known
        ]
        own = _own(config, config.talks.known[0])
        for talk in talks:
            for turn, line in enumerate(talk.lines):
                if line.clip is not None:
                    jobs.append(_heard(config, talk, turn, line.clip))
                elif line.speak:
                    held_out = talk.file.startswith("heldout/")
                    path = reply_path(talk, line.text)
                    jobs.append(Job(path, line.text, own, held_out=held_out))
                    if not held_out and len(line.text.split()) <= config.answers:
                        folder, name = path.rsplit("/", 1)
                        jobs += [
                            Job(f"{folder}/{voice}/{name}", line.text, _own(config, voice))
                            for voice in config.talks.known[1:]
                        ]
        return cls(talks, {job.path: job for job in jobs})


def _own(config: CorpusConfig, name: str) -> Manner:
    """A voice as it is."""
    return Manner(voice=name, speed=config.voices[name].speed)


def _heard(config: CorpusConfig, talk: Talk, turn: int, clip: Clip) -> Job:
    """What a user says: a voice, a manner and effects by chance."""
    path = clip_path(talk, turn)
    rng, held_out = grammar.random(config.seed, f"{path} voice"), talk.file.startswith("heldout/")
    drawn = grammar.weighted(rng, {name: spec.weight for name, spec in config.voices.items()})
    name, bent = clip.voice or drawn, clip.voice is None and not held_out
    manner = Manner.draw(rng, name, config.voices[name], bent=bent)
    level = {None: None, True: config.loud, False: config.soft}[clip.loud]
    transcribed = talk.file.split("/")[1].startswith("asr")
    keep = transcribed and (held_out or rng.random() < config.clean)
    clean = path.replace("/heard/", "/clean/") if keep else None
    return Job(path, clip.text, manner, path, level, clean, held_out)


def clip_path(talk: Talk, turn: int) -> str:
    """Where what a user says in a turn is, as seen from OUT."""
    folder, name = talk.file.split("/")
    return f"{folder}/heard/{name}/{talk.index:05d}_{turn}.flac"


def reply_path(talk: Talk, text: str) -> str:
    """Where a reply is, as seen from OUT; those of the same words are one recording."""
    return f"{talk.file.split('/')[0]}/said/{text.replace(' ', '_')}.flac"


def _check_split(talks: Iterable[Talk]) -> None:
    """No open text of heldout/ may be in what is learnt.

    Raises:
        DataError: if one is, which is a fault of the grammar.
    """
    texts: dict[bool, set[str]] = {True: set(), False: set()}
    for talk in talks:
        held_out, task = talk.file.startswith("heldout/"), talk.file.split("/")[1].split("_")[0]
        if task in OPEN or not held_out:
            texts[held_out] |= {
                line.clip.text if line.clip else line.text for line in talk.lines[1:]
            }
    if both := sorted(texts[True] & texts[False]):
        raise DataError(f"held-out texts are in the training data: {', '.join(both[:3])}")

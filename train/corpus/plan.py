"""Recipe of a synthetic corpus, and the utterances that it asks for.

config = read_corpus("nano/corpus", {"seed": 1})
plan = CorpusPlan.of(config, scale=0.01)  # conversations and jobs; nothing is made yet
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from sa2jax.errors import ConfigError, DataError
from sa2jax.train.corpus import grammar
from sa2jax.train.corpus.acoustics import AcousticAugmentation, Range
from sa2jax.train.corpus.conversations import Dialogue, DialogueConfig, Utterance, plan_dialogues
from sa2jax.train.corpus.tts_engines import VoiceSpec, VoiceStyle
from sa2jax.train.recipe import apply_overrides, build_config, read_recipe_values

KIND = "corpus"  # of recipes
OPEN = ("asr", "tts", "repeat")  # tasks whose texts are split


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """All of a recipe but its voices.

    Attributes:
        seed: of everything.
        dialogues: what is said.
        augmentation: acoustic data augmentation of the user's utterances.
        held_out_augmentation: the same for evaluation.
        loud_peak_db: peak of loud voices, dB of full scale.
        soft_peak_db: peak of soft voices, dB of full scale.
        speech_rms_db: RMS level of replies and clean speech, dB.
        silence_seconds: before and after replies, s.
        short_reply_words: replies of at most so many words are synthesised in all of
            `dialogues.known_voices` for `speech.jsonl`, so that each voice has short replies.
        clean_fraction: share of the utterances to transcribe that `speech.jsonl` has without
            augmentation.
        voice_prompt_text: text of voices/NAME.wav; {name} is the voice's.
    """

    seed: int = 0
    dialogues: DialogueConfig
    augmentation: AcousticAugmentation
    held_out_augmentation: AcousticAugmentation
    loud_peak_db: Range
    soft_peak_db: Range
    speech_rms_db: float
    silence_seconds: Range
    clean_fraction: float
    voice_prompt_text: str
    short_reply_words: int = 0


@dataclass(frozen=True, kw_only=True)
class CorpusConfig(CorpusSettings):
    """A recipe.

    Attributes:
        voices: by name; the first of `dialogues.known_voices` is the assistant's own.
    """

    voices: Mapping[str, VoiceSpec]

    def __post_init__(self):
        known, unseen = self.dialogues.known_voices, self.dialogues.held_out.unseen_voice
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
    settings = build_config(CorpusSettings, values, str(source))
    own = {item.name: getattr(settings, item.name) for item in fields(settings)}
    return CorpusConfig(voices=voices, **own)


# --- what there is to make ----------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A recording to synthesise.

    Attributes:
        path: where, as seen from OUT.
        text: what is said.
        style: voice and style.
        key: key of its random numbers; None for a clean one.
        peak: its level, if that is asked for, dB.
        clean: path of the same without augmentation, too.
        held_out: whether its augmentation is that of evaluation.
    """

    path: str
    text: str
    style: VoiceStyle
    key: str | None = None
    peak: Range | None = None
    clean: str | None = None
    held_out: bool = False


@dataclass(frozen=True, eq=False)
class CorpusPlan:
    """All conversations and recordings of a corpus, by the recordings' paths."""

    dialogues: list[Dialogue]
    jobs: dict[str, Job]

    @classmethod
    def of(cls, config: CorpusConfig, scale: float) -> Self:
        """All that a recipe asks for, its counts times `scale`."""
        dialogues = plan_dialogues(config.dialogues, config.seed, scale)
        _check_split(dialogues)
        jobs = [
            Job(
                f"voices/{name}.wav", config.voice_prompt_text.format(name=name), _own(config, name)
            )
            for name in config.dialogues.known_voices
        ]
        own = _own(config, config.dialogues.known_voices[0])
        for dialogue in dialogues:
            for number, turn in enumerate(dialogue.turns):
                if turn.utterance is not None:
                    jobs.append(_heard(config, dialogue, number, turn.utterance))
                elif turn.spoken:
                    held_out = dialogue.file.startswith("heldout/")
                    path = reply_path(dialogue, turn.text)
                    jobs.append(Job(path, turn.text, own, held_out=held_out))
                    if not held_out and len(turn.text.split()) <= config.short_reply_words:
                        folder, name = path.rsplit("/", 1)
                        jobs += [
                            Job(f"{folder}/{voice}/{name}", turn.text, _own(config, voice))
                            for voice in config.dialogues.known_voices[1:]
                        ]
        return cls(dialogues, {job.path: job for job in jobs})


def _own(config: CorpusConfig, name: str) -> VoiceStyle:
    """A voice as it is."""
    return VoiceStyle(voice=name, speed=config.voices[name].speed)


def _heard(config: CorpusConfig, dialogue: Dialogue, turn: int, utterance: Utterance) -> Job:
    """The recording of a user's utterance: random voice, style and level."""
    path = utterance_path(dialogue, turn)
    rng = grammar.random(config.seed, f"{path} voice")
    held_out = dialogue.file.startswith("heldout/")
    drawn = grammar.weighted(rng, {name: spec.weight for name, spec in config.voices.items()})
    name, warped = utterance.voice or drawn, utterance.voice is None and not held_out
    style = VoiceStyle.draw(rng, name, config.voices[name], warped=warped)
    level = {None: None, True: config.loud_peak_db, False: config.soft_peak_db}[utterance.loud]
    transcribed = dialogue.file.split("/")[1].startswith("asr")
    keep = transcribed and (held_out or rng.random() < config.clean_fraction)
    clean = path.replace("/heard/", "/clean/") if keep else None
    return Job(path, utterance.text, style, path, level, clean, held_out)


def utterance_path(dialogue: Dialogue, turn: int) -> str:
    """Where what a user says in a turn is, as seen from OUT."""
    folder, name = dialogue.file.split("/")
    return f"{folder}/heard/{name}/{dialogue.index:05d}_{turn}.flac"


def reply_path(dialogue: Dialogue, text: str) -> str:
    """Where a reply is, as seen from OUT; those of the same words are one recording."""
    return f"{dialogue.file.split('/')[0]}/said/{text.replace(' ', '_')}.flac"


def _check_split(dialogues: Iterable[Dialogue]) -> None:
    """No open text of heldout/ may be in what is learnt.

    Raises:
        DataError: if one is, which is a fault of the grammar.
    """
    texts: dict[bool, set[str]] = {True: set(), False: set()}
    for dialogue in dialogues:
        held_out, task = (
            dialogue.file.startswith("heldout/"),
            dialogue.file.split("/")[1].split("_")[0],
        )
        if task in OPEN or not held_out:
            texts[held_out] |= {
                turn.utterance.text if turn.utterance else turn.text for turn in dialogue.turns[1:]
            }
    if both := sorted(texts[True] & texts[False]):
        raise DataError(f"held-out texts are in the training data: {', '.join(both[:3])}")

"""Families of checkpoints: everything that depends on which model a `config.json` names.

cfg = read_config(folder)             # of the family that config.json names
model = family_of(cfg).model(cfg)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa2jax.chat.template import Piece, render
from sa2jax.chat.tokenizer import SpecialTokens
from sa2jax.config import StepAudio2Config, architectures_of, read_json
from sa2jax.convert.rules import Rule
from sa2jax.convert.step_audio2 import llm_rules
from sa2jax.errors import ConfigError
from sa2jax.models.step_audio import StepAudio2Model, step_audio2
from sa2jax.nn import Functional


@dataclass(frozen=True, kw_only=True)
class Family:
    """What one architecture is made of.

    Attributes:
        config: its sizes, read with `from_hf`.
        module: the network, made of a config, `policy` and `rngs`.
        model: the structure of a config (and policy) without numbers, see `step_audio2`.
        rules: the conversion table of a config: released names and this library's.
        special_tokens: finds the ids that carry structure in a tokenizer.
        chat_template: messages to the pieces of a prompt.
    """

    config: type[StepAudio2Config]
    module: type[StepAudio2Model]
    model: Callable[..., Functional[StepAudio2Model]]
    rules: Callable[[Any], list[Rule]]
    special_tokens: type[SpecialTokens]
    chat_template: Callable[..., list[Piece]]


FAMILIES: dict[str, Family] = {
    StepAudio2Config.architecture: Family(
        config=StepAudio2Config,
        module=StepAudio2Model,
        model=step_audio2,
        rules=llm_rules,
        special_tokens=SpecialTokens,
        chat_template=render,
    )
}


def read_config(source: Mapping[str, Any] | str | Path) -> StepAudio2Config:
    """Read a Hugging Face `config.json` with the config class of the architecture that it names.

    Args:
        source: the parsed JSON, or a path to the file or its folder.

    Raises:
        ConfigError: for an architecture that is not known, or what that class refuses.
    """
    raw = source if isinstance(source, Mapping) else read_json(source)
    named = architectures_of(raw)
    for architecture, family in FAMILIES.items():
        if architecture in named or family.config.model_type in named:
            return family.config.from_hf(raw)
    raise ConfigError(
        f"config.json names {named!r}: this is another model's checkpoint, expected "
        f"{' or '.join(FAMILIES)}"
    )


def family_of(cfg: StepAudio2Config) -> Family:
    """The family of a config.

    Raises:
        ConfigError: for a config class that no family has.
    """
    for family in FAMILIES.values():
        if family.config is type(cfg):
            return family
    raise ConfigError(f"no family has the config {type(cfg).__name__}: see families.FAMILIES")

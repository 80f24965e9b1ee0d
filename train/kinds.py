"""Kinds of training: the table of what a recipe's `kind` may name, and how each is run.

    kind = find_kind("flow", "own.yaml")
    recipe = build_config(kind.recipe, values, "own.yaml")
    result = kind.run(recipe, "runs/anna")

`KINDS` is the one list of them. A new kind is a row of it: a function, so that only what is asked
for is imported. What a row names lies in modules of the kind's own, which know nothing of this one.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from sa2jax.errors import ConfigError
from sa2jax.train.dry_run import DryRun

RecipeT = TypeVar("RecipeT")
OptionValues = Callable[[Any], dict[str, Any]]


class RunResult(Protocol):
    """How a run ended: a dataclass, such as `loop.TrainResult`."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def finished(self) -> bool:
        """Whether all is done; if not, the same run goes on."""
        ...

    @property
    def progress(self) -> str:
        """What is done, such as `step 3`."""
        ...

    @property
    def results(self) -> Mapping[str, Path]:
        """What was written, by name."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainingKind(Generic[RecipeT]):
    """One kind of training, as the command `train` sees it.

    Attributes:
        recipe: the dataclass that a recipe's values make, see `recipe.build_config`.
        run: trains, `run(recipe, out, **options)`: `out` is the run's folder, made if need be; if
            it holds the same run already, that goes on.
        dry_run: counts parameters and memory and trains nothing; None if there is nothing to count.
        options: those of the command's `model`, `data`, `steps` and `mesh` that it takes; each
            with the function that makes recipe values by dotted key of the option's value.
        run_options: those of the command's `fresh` and `profile` that `run` takes by keyword.
    """

    recipe: type[RecipeT]
    run: Callable[..., RunResult]
    dry_run: Callable[[RecipeT], DryRun] | None = None
    options: Mapping[str, OptionValues] = field(default_factory=dict)
    run_options: tuple[str, ...] = ("fresh", "profile")

    def require_options(self, names: Iterable[str], where: str) -> None:
        """Refuse options of the command that this kind does not take.

        Args:
            names: of the options that were given, such as `dry_run`.
            where: the recipe, for the error.

        Raises:
            ConfigError: naming them, and those that it takes.
        """
        dry_run = () if self.dry_run is None else ("dry_run",)
        known = (*self.options, *self.run_options, *dry_run)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ConfigError(
                f"{where}: a recipe of this kind takes no {_as_options(unknown)}; expected "
                f"{_as_options(known)} at most"
            )

    def option_values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Recipe values by dotted key, of options of the command by name.

        Raises:
            ConfigError: for an option's value that cannot be one of the recipe.
        """
        values: dict[str, Any] = {}
        for name, value in given.items():
            values |= self.options[name](value)
        return values


def find_kind(name: Any, where: str) -> TrainingKind[Any]:
    """A kind of training by its name.

    Args:
        name: what a recipe has as `kind`.
        where: the recipe, for the error.

    Raises:
        ConfigError: for a kind that there is not.
    """
    if not isinstance(name, str) or name not in KINDS:
        raise ConfigError(f"{where}: kind {name!r}: expected {', '.join(KINDS)}")
    return KINDS[name]()


def option_key(key: str) -> OptionValues:
    """Makes an option's value that of one key of the recipe."""

    def values(value: Any) -> dict[str, Any]:
        return {key: str(value) if isinstance(value, Path) else value}

    return values


# What all recipes with an `optimizer` and a `mesh` take.
LOOP_OPTIONS = {"steps": option_key("optimizer.steps"), "mesh": option_key("mesh")}


def _as_options(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


# --- the kinds ------------------------------------------------------------------------------------


def _language() -> TrainingKind[Any]:
    from sa2jax.train.language.dry_run import dry_run_language
    from sa2jax.train.language.recipe import LanguageRecipe, model_values, source_values
    from sa2jax.train.language.task import train_language_model

    return TrainingKind(
        recipe=LanguageRecipe,
        run=train_language_model,
        dry_run=dry_run_language,
        options={"model": model_values, "data": source_values, **LOOP_OPTIONS},
    )


def _network(name: str) -> TrainingKind[Any]:
    from sa2jax.train.networks.dry_run import dry_run_network
    from sa2jax.train.networks.recipes import folder_values
    from sa2jax.train.networks.task import TRAINERS, train_network

    folder = partial(folder_values, name)
    return TrainingKind(
        recipe=TRAINERS[name].recipe,
        run=train_network,
        dry_run=dry_run_network,
        options={"model": option_key("network.folder"), "data": folder, **LOOP_OPTIONS},
    )


def _stages() -> TrainingKind[Any]:
    from sa2jax.train.stages import StagesRecipe, run_stages

    return TrainingKind(recipe=StagesRecipe, run=run_stages, run_options=("fresh",))


KINDS: dict[str, Callable[[], TrainingKind[Any]]] = {
    "language": _language,
    "audio_encoder": partial(_network, "audio_encoder"),
    "speech_tokenizer": partial(_network, "speech_tokenizer"),
    "speaker_encoder": partial(_network, "speaker_encoder"),
    "flow": partial(_network, "flow"),
    "vocoder": partial(_network, "vocoder"),
    "stages": _stages,
}

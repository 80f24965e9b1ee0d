"""Recipes: read strictly, changed by key, compared."""

import shlex
from dataclasses import replace

import pytest

from sa2jax.cli import COMMANDS
from sa2jax.errors import ConfigError, DataError
from sa2jax.models.flow import flow_model
from sa2jax.speech_config import Token2WavConfig
from sa2jax.train.corpus.plan import read_corpus
from sa2jax.train.language.model_io import open_base_model
from sa2jax.train.language.recipe import LanguageRecipe, read_language_recipe
from sa2jax.train.language.task import optimizer_config
from sa2jax.train.networks.flow import FlowRecipe
from sa2jax.train.networks.task import read_network_recipe
from sa2jax.train.optimizer import make_optimizer
from sa2jax.train.recipe import (
    build_config,
    differences,
    moves,
    parse_overrides,
    read_recipe_values,
    recipe_names,
    split_kind,
)
from sa2jax.train.stages import StagesRecipe

LEAST = {"model": {"preset": "tiny", "tokenizer": "bytes"}, "data": {"sources": {"a.jsonl": 1}}}


OF_MODELS = [name for name in recipe_names() if read_recipe_values(name).get("kind") is None]


@pytest.mark.parametrize("name", [name for name in OF_MODELS if "/" not in name])
def test_recipes_that_come_along(name):
    """They can be read, train what they mean to, and keep their rates."""
    recipe = read_language_recipe(name)
    spec = recipe.model
    if spec.preset is None:  # the folder is the user's; of the same sizes as mini
        spec = replace(spec, folder=None, preset="tiny", tokenizer="bytes", dtype="bfloat16")
    base = open_base_model(spec, recipe.lora)
    optimizer = make_optimizer(optimizer_config(recipe))
    trained, frozen = optimizer.partition(base.model.abstract)
    if name == "align":
        assert set(trained) == {"adapter"}
    elif recipe.lora is not None:
        assert "adapter" in frozen
        assert "lora_a" in trained["decoder"]["layers"]["mlp"]["up"]
        assert "kernel" in frozen["decoder"]["layers"]["mlp"]["up"]
    elif name != "smoke":
        assert set(frozen) == {"audio_encoder"}
    assert ("table" in trained.get("decoder", {})) is (
        name != "align" and name not in ("lora", "qlora")
    )


def test_the_recipe_of_the_flow():
    recipe = read_network_recipe("flow", {"optimizer.learning_rate_overrides": {"table": 0}})
    model = flow_model(Token2WavConfig.released().flow)
    trained, frozen = make_optimizer(recipe.optimizer).partition(model.abstract)
    assert set(trained) == {"encoder", "estimator", "speaker", "to_mel"}
    assert set(frozen) == {"table"}
    plain = recipe.to_dict()
    assert build_config(FlowRecipe, split_kind(plain)[1], "x") == recipe
    assert plain["kind"] == "flow"


def test_kinds():
    with pytest.raises(ConfigError, match=r"flow is a recipe of kind flow: expected .* language"):
        read_language_recipe("flow")
    with pytest.raises(ConfigError, match=r"smoke is a recipe of kind language: expected .* flow"):
        read_network_recipe("smoke")
    with pytest.raises(ConfigError, match=r"of kind \[\]: expected .* language"):
        read_language_recipe("smoke", {"kind": []})
    assert read_language_recipe("smoke", {"kind": "language"}) == read_language_recipe("smoke")


def test_stages_have_the_rates_of_the_paper():
    rates = {}
    for name in ("align", "vocabulary", "main", "cooldown", "sft"):
        config = read_language_recipe(name).optimizer
        rates[name] = (
            config.learning_rate,
            pytest.approx(config.learning_rate * config.final_fraction),
        )
    assert rates == {
        "align": (1e-4, 2e-5),
        "vocabulary": (2e-5, 2e-5),
        "main": (2e-5, 2e-5),
        "cooldown": (2e-5, 5e-6),
        "sft": (1e-5, 1e-6),
    }
    config = read_language_recipe("vocabulary").optimizer
    named = [
        config.learning_rate_of(f"{part}.kernel")
        for part in ("decoder.layers.mlp.up", "adapter.up", "decoder.table", "decoder.head")
    ]
    assert named == [2e-5, 5e-5, 5e-5, 4e-5]


def test_numbers_as_people_write_them():
    recipe = build_config(
        LanguageRecipe,
        LEAST | {"optimizer": {"learning_rate": "1e-5", "max_grad_norm": None, "weight_decay": 0}},
        "x",
    )
    assert recipe.optimizer.learning_rate == 1e-5
    assert recipe.optimizer.max_grad_norm is None
    assert isinstance(recipe.optimizer.weight_decay, float)
    assert recipe.data.sources == {"a.jsonl": 1.0}


def test_changes_by_key(tmp_path):
    changes = parse_overrides(
        ("optimizer.learning_rate=1e-5", "data.epochs=2", "lora={rank: 4}", "mesh=null")
    )
    assert changes == {
        "optimizer.learning_rate": "1e-5",
        "data.epochs": 2,
        "lora": {"rank": 4},
        "mesh": None,
    }
    recipe = read_language_recipe("smoke", changes)
    assert (recipe.optimizer.learning_rate, recipe.data.epochs, recipe.lora.rank) == (1e-5, 2, 4)
    assert recipe.optimizer.steps == read_language_recipe("smoke").optimizer.steps
    file = tmp_path / "own.yaml"
    file.write_text("model: {folder: there}\ndata: {sources: {a.jsonl: 2}}\n")
    assert read_language_recipe(file, {"data.rows": 8}).data.rows == 8


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"optimiser": {}}, "there is no optimiser; expected one of model, data, optimizer"),
        ({"data": {"sources": {"a": 1}, "rowz": 2}}, "there is no data.rowz; expected .* rows,"),
        ({"lora": {"rang": 2}}, "there is no lora.rang; expected one of rank"),
        (
            {"optimizer": {"learning_rate": "fast"}},
            "optimizer.learning_rate: expected a number, got 'fast'",
        ),
        ({"seed": "x"}, "seed"),
        ({"model": {}}, "either a folder or a preset, got neither"),
        ({"model": {"folder": "a", "preset": "b"}}, "got both"),
        ({"model": {"preset": "tiny"}}, "needs a tokenizer"),
        ({"model": {"folder": "a", "dtype": "int8"}}, "give a `lora` section"),
        ({"model": {"folder": "a", "dtype": "float8"}}, "model.dtype"),
        ({"intervals": {"keep": 0}}, "intervals.keep: expected at least 1"),
        ({"data": 3}, "data"),
    ],
)
def test_mistakes(values, said):
    with pytest.raises(ConfigError, match=said):
        build_config(LanguageRecipe, LEAST | values, "own.yaml")


def test_mistakes_in_files(tmp_path):
    with pytest.raises(ConfigError, match=r"no recipe 'smok': expected align, .*smoke"):
        read_recipe_values("smok")
    with pytest.raises(ConfigError, match="no such file"):
        read_recipe_values(tmp_path / "none.yaml")
    for text, said in (("a: [", "is no YAML"), ("- a\n", "expected `key: value` lines")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_recipe_values(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="expected key=value"):
        parse_overrides(("optimizer.learning_rate",))
    with pytest.raises(DataError, match="expected one or more sources"):
        build_config(LanguageRecipe, LEAST | {"data": {"sources": {}}}, "x")


def test_differences_name_what_counts():
    was = read_language_recipe("smoke").to_dict()
    now = read_language_recipe(
        "smoke", {"mesh": "fsdp=2", "intervals.keep": 7, "data.max_rejects": 3, "seed": 1}
    ).to_dict()
    assert differences(was, now) == ["seed: 0 → 1"]
    now = read_language_recipe(
        "smoke", {"optimizer.learning_rate_overrides": {"adapter": 0}, "lora": {"rank": 2}}
    ).to_dict()
    assert len(differences(was, now)) == 2
    assert differences(was, was) == []


def test_where_things_lie_is_no_difference():
    was = read_language_recipe("smoke").to_dict()
    now = read_language_recipe(
        "smoke", {"data.sources": {"x" * 300: 1.0}, "model.tokenizer": "elsewhere"}
    ).to_dict()
    assert differences(was, now) == []
    said = moves(was, now, "data")
    assert said.startswith(" (data.sources: ")
    assert "; model.tokenizer: " in said
    assert len(said) < 400
    assert moves(was, now, "model") == moves(was, was, "data") == ""
    two = read_language_recipe("smoke", {"data.sources": {"a": 1.0, "b": 2.0}}).to_dict()
    assert differences(was, two) == ["the weights in data.sources: [1.0] → [1.0, 2.0]"]


@pytest.mark.parametrize("name", [name for name in recipe_names() if name not in OF_MODELS])
def test_recipes_of_other_kinds(name):
    """Each can be read as what it is."""
    kind = read_recipe_values(name)["kind"]
    if kind == "corpus":
        assert read_corpus(name, {}).voices
    elif kind == "stages":
        values = {key: value for key, value in read_recipe_values(name).items() if key != "kind"}
        assert build_config(StagesRecipe, values, name).stages
    else:
        assert read_network_recipe(name, kind=kind).kind == kind


@pytest.mark.parametrize(("family", "others"), [("nano", set()), ("words", {"nano/corpus"})])
def test_stages_say_what_commands_take(family, others):
    """Every recipe of a family, and no other that is not named here, is a stage: a command."""
    stages = read_recipe_values(f"{family}/all")["stages"]
    commands = [shlex.split(command) for command in stages.values()]
    named = {words[words.index("--config") + 1] for words in commands if "--config" in words}
    own = {name for name in recipe_names() if name.startswith(f"{family}/")}
    assert named == own - {f"{family}/all"} | others
    assert {words[0] for words in commands} <= set(COMMANDS)


def test_a_recipe_that_extends_another_gives_what_differs(tmp_path):
    (tmp_path / "first.yaml").write_text("kind: a\nx: {y: 1, z: [2, 3]}\n")
    (tmp_path / "second.yaml").write_text(f"extends: {tmp_path / 'first.yaml'}\nx.z: [4]\nw: 5\n")
    (tmp_path / "third.yaml").write_text(f"extends: {tmp_path / 'second.yaml'}\nkind: b\n")
    assert read_recipe_values(tmp_path / "second.yaml") == {
        "kind": "a",
        "x": {"y": 1, "z": [4]},
        "w": 5,
    }
    assert read_recipe_values(tmp_path / "third.yaml")["kind"] == "b"
    (tmp_path / "third.yaml").write_text(f"extends: {tmp_path / 'fourth.yaml'}\n")
    (tmp_path / "fourth.yaml").write_text(f"extends: {tmp_path / 'third.yaml'}\n")
    with pytest.raises(ConfigError, match="in a circle"):
        read_recipe_values(tmp_path / "third.yaml")
    (tmp_path / "fourth.yaml").write_text("extends: nowhere\n")
    with pytest.raises(ConfigError, match="no recipe 'nowhere'"):
        read_recipe_values(tmp_path / "third.yaml")

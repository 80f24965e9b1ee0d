"""The table of checkpoint families, and a second one all the way in and out."""

from dataclasses import fields, replace

import numpy as np
import pytest
import safetensors.numpy

from sa2jax import checkpoint, testing
from sa2jax.chat.template import Text, render
from sa2jax.chat.tokenizer import SpecialTokens, Tokenizer
from sa2jax.config import StepAudio2Config
from sa2jax.convert import hf
from sa2jax.convert.step_audio2 import llm_rules
from sa2jax.errors import ConfigError, PromptError
from sa2jax.families import FAMILIES, family_of, read_config
from sa2jax.inference.loading import load_language_model
from sa2jax.pipeline import StepAudio2


class ToyConfig(StepAudio2Config):
    """Step-Audio 2 by another name."""

    architecture = "ToyForCausalLM"
    model_type = "toy"


class ToyTokens(SpecialTokens):
    """The same tokens."""


def toy_rules(cfg):
    """Names begin with `toy.`."""
    return [replace(r, sources=tuple(f"toy.{name}" for name in r.sources)) for r in llm_rules(cfg)]


def toy_template(messages):
    return [Text("toy: "), *render(messages)]


@pytest.fixture
def toy(monkeypatch):
    like = FAMILIES[StepAudio2Config.architecture]
    family = replace(
        like,
        config=ToyConfig,
        rules=toy_rules,
        special_tokens=ToyTokens,
        chat_template=toy_template,
    )
    monkeypatch.setitem(FAMILIES, ToyConfig.architecture, family)
    cfg = testing.tiny_config()
    return ToyConfig(**{f.name: getattr(cfg, f.name) for f in fields(cfg)})


def test_the_table():
    assert list(FAMILIES) == ["StepAudio2ForCausalLM"]
    for architecture, family in FAMILIES.items():
        assert family.config.architecture == architecture
    cfg = testing.tiny_config()
    assert family_of(cfg).config is StepAudio2Config
    assert read_config(cfg.to_hf()) == cfg


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "['Qwen2ForCausalLM']"),
        ({"model_type": "qwen2"}, "['qwen2']"),
        ({}, "[None]"),
    ],
)
def test_an_unknown_architecture_is_refused_with_the_known_ones(raw, named):
    with pytest.raises(ConfigError) as error:
        read_config(raw)
    assert str(error.value) == (
        f"config.json names {named}: this is another model's checkpoint, expected "
        "StepAudio2ForCausalLM"
    )


def test_the_known_ones_are_those_of_the_table(toy):
    with pytest.raises(ConfigError, match=r"expected StepAudio2ForCausalLM or ToyForCausalLM$"):
        read_config({"architectures": ["Qwen2ForCausalLM"]})


def test_a_config_is_of_the_architecture_that_is_named(toy):
    raw = toy.to_hf()
    assert (raw["architectures"], raw["model_type"]) == (["ToyForCausalLM"], "toy")
    assert type(read_config(raw)) is ToyConfig
    assert type(read_config({**raw, "architectures": None})) is ToyConfig
    assert family_of(toy).rules is toy_rules


def test_a_family_is_converted_loaded_and_exported_by_its_own_table(toy, tmp_path):
    source = testing.save_tiny_checkpoint(tmp_path / "source", toy)
    names = safetensors.numpy.load_file(source / "model.safetensors").keys()
    assert all(name.startswith("toy.") for name in names)
    hf.convert(source, tmp_path / "ours")
    for folder in (source, tmp_path / "ours"):
        found = load_language_model(folder)
        assert type(found.cfg) is ToyConfig
        expected = checkpoint.flatten(testing.tiny_params(toy))
        for name, leaf in checkpoint.flatten(found.params).items():
            np.testing.assert_array_equal(leaf, expected[name].astype(leaf.dtype))
    hf.export(tmp_path / "ours", tmp_path / "back")
    again = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    assert again.keys() == names


def test_a_family_has_its_tokens_and_its_template(toy, tmp_path, monkeypatch):
    source = testing.save_tiny_checkpoint(tmp_path / "source", toy)
    assert type(Tokenizer.from_folder(source, ToyTokens).special) is ToyTokens
    model = StepAudio2.from_pretrained(source)
    assert type(model.tokenizer.special) is ToyTokens

    def seen(pieces):
        raise PromptError(pieces[0].text)

    monkeypatch.setattr(model, "request", seen)
    with pytest.raises(PromptError, match=r"^toy: $"):
        model.chat(system=None).say("hello")


def test_a_config_that_no_family_has():
    cfg = testing.tiny_config()
    stray = ToyConfig(**{f.name: getattr(cfg, f.name) for f in fields(cfg)})
    with pytest.raises(ConfigError, match="no family has the config ToyConfig"):
        family_of(stray)

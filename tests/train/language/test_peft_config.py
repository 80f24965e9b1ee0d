"""What an adapter_config.json of PEFT asks for: followed, or refused by name."""

import json
from pathlib import Path

import pytest

from sa2jax.errors import TrainError
from sa2jax.train.language.peft_config import CONFIG, read_lora_config

RANK, ALPHA = 3, 6.0


@pytest.fixture(autouse=True)
def plain(tmp_path) -> None:
    """A plain LoRA, to be changed."""
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj"]}
    (tmp_path / CONFIG).write_text(json.dumps(config))


def edit(folder: Path, **changes) -> None:
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(raw | changes))


def test_names_of_modules_are_matched_as_peft_matches_them(tmp_path):
    q0, q1, v0 = (f"model.layers.{i}.self_attn.{n}_proj" for i, n in ((0, "q"), (1, "q"), (0, "v")))

    def adapted(**changes):
        edit(tmp_path, **changes)
        config = read_lora_config(tmp_path)
        names = (q0, q1, v0, "encoder.blocks.1.attn.out", "lm_head")
        return "".join("01"[bool(config.adapts(name))] for name in names)

    assert adapted(target_modules=["q_proj", "out"]) == "11010"
    assert adapted(target_modules=["proj"]) == "00000"
    # A whole name counts in any layer.
    assert adapted(target_modules=["q_proj", "out", v0], layers_to_transform=[1]) == "01110"
    assert adapted(layers_pattern=["layers"]) == "01100"
    assert adapted(layers_to_transform=0) == "10100"
    # And so does a pattern.
    assert adapted(target_modules=r"model\..*\.(q|v)_proj", exclude_modules=["v_proj"]) == "11000"
    assert adapted(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"]) == "10000"
    patterns = {"^" + q1: 8, "q_proj": 1}
    edit(tmp_path, rank_pattern={"q_proj": 2, "layers.1": 9}, alpha_pattern=patterns)
    config = read_lora_config(tmp_path)
    assert [config.rank_of(name) for name in (q0, v0)] == [2, RANK]
    assert [config.scale_of(name) for name in (q0, q1, v0)] == [1 / 2, 8 / 2, ALPHA / RANK]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alora_invocation_tokens": [10, 11]}, "alora_invocation_tokens=[10, 11]"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config={'beta': 0.0001}"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora={'nblocks': 2}"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config={'top_k': 3}"),
        ({"target_parameters": ["mlp.up"]}, "target_parameters=['mlp.up']"),
        ({"layer_replication": [[0, 1]]}, "layer_replication=[[0, 1]]"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"something_new": 1}, "something_new=1"),
        ({"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}, "asks for a=1, b=2, c=3, d=4 and 1 more"),
        ({"bias": "some"}, "bias='some'"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' (it changes the base)"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga' (it changes the base)"),
        ({"peft_type": "IA3"}, "expected peft_type 'LORA', got 'IA3'"),
        ({"r": 0}, "expected r >= 1"),
        ({"lora_alpha": "16"}, "a number lora_alpha"),
        ({"lora_alpha": 10**400}, "a number of 401 digits, expected one of 64 bits"),
        ({"use_dora": "yes"}, "expected true or false, got use_dora='yes'"),
        ({"rank_pattern": {"q": 0}}, "expected rank_pattern['q'] >= 1, got 0"),
        ({"alpha_pattern": {"q": None}}, "expected a number alpha_pattern['q']"),
        ({"rank_pattern": {"(": 4}}, "expected a pattern, got rank_pattern '('"),
        ({"target_modules": "(a+)+b"}, "no repeated group"),
        ({"target_modules": ".*.*.*.*.*b"}, "at most 4 repeats"),
        (
            {"rank_pattern": {f".*.*.*.*x{n}": 1 for n in range(9)}},
            "at most 32 repeats in all of rank_pattern, got 36",
        ),
        ({"alpha_pattern": {f"a{n}": 1 for n in range(1025)}}, "at most 1024 of alpha_pattern"),
        ({"target_modules": ["a"] * 1025}, "at most 1024 of target_modules, got 1025"),
        ({"layers_to_transform": [0] * 1025}, "at most 1024 of layers_to_transform"),
        (
            {"trainable_token_indices": {f"a{n}": [1] for n in range(1025)}},
            "at most 1024 of trainable_token_indices",
        ),
        ({"target_modules": {"q": 1}}, "expected names, got target_modules={'q': 1}"),
        ({"layers_to_transform": [1.5]}, "expected whole numbers, got layers_to_transform=[1.5]"),
        ({"trainable_token_indices": 7}, "got trainable_token_indices=7"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path, changes, message):
    edit(tmp_path, **changes)
    with pytest.raises(TrainError) as found:
        read_lora_config(tmp_path)
    assert message in str(found.value)
    assert len(str(found.value)) < 450 + len(str(tmp_path))

"""`flow.pt` to parameters and back, and `flow.yaml` as data."""

import csv
from pathlib import Path

import numpy as np
import pytest

from sa2jax import checkpoint
from sa2jax.convert import torch_file
from sa2jax.convert.flow import flow_rules, leaf_shapes, load, save, to_official
from sa2jax.convert.rules import match
from sa2jax.convert.weights import Arrays
from sa2jax.errors import CheckpointError, ConfigError
from sa2jax.speech_config import ConformerConfig, EstimatorConfig, FlowConfig


@pytest.fixture(scope="module")
def folder(golden) -> Path:
    return golden / "token2wav"


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


@pytest.fixture(scope="module")
def yaml(folder) -> str:
    return (folder / "flow.yaml").read_text()


def released(shapes) -> FlowConfig:
    """The released sizes: SPEC section 6 for the heads, the names' shapes for the rest."""

    def count(prefix):
        return len(
            {name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)}
        )

    codes, inputs = shapes["input_embedding.weight"]
    mels, speaker = shapes["spk_embed_affine_layer.weight"]
    heads, head_dim = shapes["encoder.encoders.0.self_attn.pos_bias_u"]
    block = "decoder.estimator.blocks.0"
    width, embed = shapes[f"{block}.attn.to_q.weight"]
    (dit_dim,) = shapes[f"{block}.attn.q_norm.weight"]
    return FlowConfig(
        codes=codes,
        mels=mels,
        speaker=speaker,
        encoder=ConformerConfig(
            inputs=inputs,
            embed=heads * head_dim,
            heads=heads,
            mlp=shapes["encoder.encoders.0.feed_forward.w_1.weight"][0],
            layers=count("encoder.encoders."),
            up_layers=count("encoder.up_encoders."),
            lookahead=shapes["encoder.pre_lookahead_layer.conv1.weight"][2] - 1,
        ),
        estimator=EstimatorConfig(
            embed=embed,
            heads=width // dit_dim,
            head_dim=dit_dim,
            layers=count("decoder.estimator.blocks."),
            mlp_ratio=shapes[f"{block}.mlp.fc1.weight"][0] / embed,
        ),
    )


def test_table_is_complete_at_the_released_sizes(golden):
    with (golden / "names" / "names_flow_pt.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    shapes = {row["name"]: tuple(map(int, row["shape"].split("x"))) for row in rows}
    cfg = released(shapes)
    assert (cfg.encoder.layers, cfg.encoder.up_layers, cfg.estimator.layers) == (6, 4, 16)
    placements = match(flow_rules(cfg), shapes, leaf_shapes(cfg), "flow.pt")
    assert sum(len(p.sources) for p in placements) == len(rows)
    assert all(p.rule.exact for p in placements)


def test_back_bit_for_bit(folder, loaded, tmp_path):
    cfg, params = loaded
    before = torch_file.read(folder / "flow.pt")
    save(tmp_path / "flow.pt", params, cfg)
    after = torch_file.read(tmp_path / "flow.pt")
    assert set(after) == set(before)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, strict=True)
    (tmp_path / "flow.yaml").write_text(cfg.to_yaml())
    again, twice = load(tmp_path)
    assert again == cfg
    first, second = checkpoint.flatten(params), checkpoint.flatten(twice)
    assert set(first) == set(second)
    assert all(np.array_equal(first[name], second[name]) for name in first)


def converted(folder: Path, tensors: dict, cfg: FlowConfig) -> checkpoint.Params:
    """Parameters of a file with these tensors."""
    torch_file.write(folder / "flow.pt", tensors)
    return load(folder, cfg)[1]


def test_a_key_without_bias(loaded, tmp_path):
    """`key_bias: false` leaves tensors and leaves out alike."""
    cfg, params = loaded
    bare = FlowConfig(
        codes=cfg.codes,
        mels=cfg.mels,
        speaker=cfg.speaker,
        estimator=cfg.estimator,
        encoder=ConformerConfig(**{**vars(cfg.encoder), "key_bias": False}),
    )
    tensors = to_official(params, cfg)
    fewer = {name: t for name, t in tensors.items() if not name.endswith("linear_k.bias")}
    assert set(to_official(converted(tmp_path, fewer, bare), bare)) == set(fewer) < set(tensors)
    with pytest.raises(CheckpointError, match=r"unknown tensors.*linear_k\.bias"):
        converted(tmp_path, tensors, bare)


def test_wrong_tensors_are_named_together(loaded, tmp_path):
    cfg, params = loaded
    tensors = to_official(params, cfg)
    kept = tensors.pop("encoder_proj.bias")
    tensors["decoder.estimator.blocks.9.attn.to_q.weight"] = kept
    tensors["encoder.after_norm.weight"] = kept[:3]
    with pytest.raises(CheckpointError) as caught:
        converted(tmp_path, tensors, cfg)
    message = str(caught.value)
    for part in (
        str(tmp_path / "flow.pt"),
        "encoder_proj.bias",
        "blocks.9",
        "encoder.after_norm.weight",
    ):
        assert part in message
    with pytest.raises(CheckpointError, match="other things under epoch"):
        Arrays({"epoch": 3}, "flow.pt")
    params = params | {"table": params["table"][:5]}
    with pytest.raises(CheckpointError, match=r"do not fit.*table"):
        to_official(params, cfg)


def test_missing_files(tmp_path, yaml):
    with pytest.raises(ConfigError, match=r"no flow\.yaml"):
        load(tmp_path)
    (tmp_path / "flow.yaml").write_text(yaml)
    with pytest.raises(CheckpointError, match=r"flow\.pt"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_up_blocks", "num_upper_blocks", "unknown key encoder.num_upper_blocks"),
        ("num_up_blocks", "num_upper_blocks", "encoder lacks num_up_blocks"),
        ("decoder_dit.DiT", "decoder.UNet", "expected !new:cosyvoice2.flow.decoder_dit.DiT"),
        ("normalize_before: True", "normalize_before: False", "False is not supported"),
        ("'rel_pos_espnet'", "'abs_pos'", "'abs_pos' is not supported"),
        ("up_scale_factor: 2", "up_scale_factor: 3", "up_scale_factor is 3, but the rest needs 2"),
        ("in_channels: 320", "in_channels: 240", "in_channels is 240, but the rest needs 320"),
        ("spk_embed_dim: 192", "spk_embed_dim: many", "a whole number above 0, got 'many'"),
        ("depth: 2", "depth: 0", "estimator.depth: expected a whole number above 0, got 0"),
        ("key_bias: True", "key_bias: 1", "encoder.key_bias: expected true or false, got 1"),
        ("spk_embed_dim: 192", "spk_embed_dim: !ref <dim>", "!ref <dim>: expected <key>"),
        ("flow: !new", "seed: 1\nflow: !new", "unknown key seed"),
        ("'mel'", "!!python/object/apply:os.system ['true']", "a flow.yaml as released"),
        ("'mel'", "!apply:os.system ['true']", "a flow.yaml as released"),
        ("flow: !new", "flaw: !new", "expected a key 'flow'"),
    ],
)
def test_bad_yaml(yaml, tmp_path, old, new, message):
    assert old in yaml
    (tmp_path / "flow.yaml").write_text(yaml.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        FlowConfig.from_yaml(tmp_path)
    assert message in str(caught.value)


def test_tags_are_names_and_refs_are_values(yaml, loaded, tmp_path, monkeypatch):
    """Nothing is imported, whatever module a tag names."""
    path = tmp_path / "flow.yaml"
    text = yaml.replace("!new:cosyvoice2.flow.decoder_dit.DiT", "!new:antigravity.DiT")
    text = text.replace("spk_embed_dim: 192", "spk_embed_dim: !ref <speaker_size>")
    path.write_text("speaker_size: 192\n" + text)
    monkeypatch.setitem(__import__("sys").modules, "antigravity", None)
    assert FlowConfig.from_yaml(path) == loaded[0]

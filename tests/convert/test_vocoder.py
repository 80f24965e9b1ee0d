"""`hift.pt` to parameters and back."""

import csv
import json

import numpy as np
import pytest

from sa2jax import checkpoint
from sa2jax.convert import torch_file
from sa2jax.convert.rules import match
from sa2jax.convert.vocoder import (
    SPELLINGS,
    WeightNorm,
    config_of,
    leaf_shapes,
    load,
    save,
    to_official,
    vocoder_rules,
)
from sa2jax.errors import CheckpointError, ConfigError
from sa2jax.speech_config import VocoderConfig


@pytest.fixture(scope="module")
def path(golden):
    return golden / "token2wav" / "hift.pt"


@pytest.fixture(scope="module")
def sizes(golden):
    return json.loads((golden / "token2wav" / "tiny_dims.json").read_text())


def test_table_is_complete_at_the_released_sizes(golden):
    with (golden / "names" / "names_hift_pt.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    shapes = {row["name"]: tuple(map(int, row["shape"].split("x"))) for row in rows}
    cfg = config_of(shapes)
    assert cfg == VocoderConfig()
    placements = match(vocoder_rules(cfg), shapes, leaf_shapes(cfg), "hift.pt")
    assert sum(len(p.sources) for p in placements) == len(rows)


def test_sizes_are_those_of_the_constructor(path, sizes):
    cfg, _ = load(path)
    assert cfg == VocoderConfig.from_official(sizes["HiFTGenerator"], sizes["ConvRNNF0Predictor"])
    assert cfg != VocoderConfig()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_chanels": 3}, "unknown arguments base_chanels"),
        ({"upsample_rates": [8, 5]}, "one length"),
        ({"istft_params": {"n_fft": 16, "hop_len": 5}}, "multiple of 2 hop"),
        ({"upsample_kernel_sizes": [16, 10, 7]}, "even number"),
        ({"in_channels": 4}, "in_channels 80 must be 4"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        VocoderConfig.from_official(arguments, {"in_channels": 80})


def test_round_trip(path, tmp_path):
    """What is not folded comes back bit for bit; lengths of weight norm to 1e-6."""
    before = torch_file.read(path)
    cfg, params = load(path)
    save(tmp_path / "hift.pt", params, cfg)
    after = torch_file.read(tmp_path / "hift.pt")
    assert set(after) == set(before)
    folded = 0
    for name, array in before.items():
        if "original0" in name:
            np.testing.assert_allclose(after[name], np.abs(array), rtol=1e-6)  # measured: 1e-7
            folded += 1
        elif "original1" not in name:
            np.testing.assert_array_equal(after[name], array, strict=True)
    assert folded > 10
    _, again = load(tmp_path / "hift.pt")
    again, params = checkpoint.flatten(again), checkpoint.flatten(params)
    assert set(again) == set(params)
    for name, array in params.items():
        np.testing.assert_allclose(again[name], array, atol=1e-6)  # measured: 1e-7


def test_kernels_are_the_folded_ones(path):
    """A transposed convolution, too, is normalised over its first axis, the inputs."""
    tensors = torch_file.read(path)
    _, params = load(path)
    for name, kernel, order in (
        ("ups.1", params["stage1"]["up"]["kernel"], (2, 0, 1)),
        ("conv_post", params["post"]["kernel"], (2, 1, 0)),
        ("resblocks.4.convs1.2", params["stage1"]["block1"]["first2"]["kernel"], (2, 1, 0)),
    ):
        g, v = (tensors[f"generator.{name}.parametrizations.weight.original{i}"] for i in (0, 1))
        norm = np.sqrt((v.astype(float) ** 2).sum((1, 2), keepdims=True))
        np.testing.assert_allclose(kernel, (g * v / norm).transpose(order), rtol=1e-6)


@pytest.mark.parametrize("prefix", ["", "generator."])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_both_spellings_and_no_prefix(path, tmp_path, prefix, spelling):
    cfg, params = load(path)
    tensors = to_official(params, cfg, prefix=prefix, spelling=spelling)
    assert all(name.startswith(prefix) for name in tensors)
    torch_file.write(tmp_path / "hift.pt", tensors)
    found, again = load(tmp_path / "hift.pt")
    assert found == cfg
    params, again = checkpoint.flatten(params), checkpoint.flatten(again)
    for name, array in params.items():
        np.testing.assert_allclose(again[name], array, atol=1e-6)


def test_weight_norm_of_a_zero_direction():
    length, direction = np.ones((2, 1, 1), np.float32), np.zeros((2, 3, 4), np.float32)
    direction[0] = 1
    kernel = WeightNorm().forward([length, direction])
    np.testing.assert_allclose(kernel[0], 12**-0.5, rtol=1e-6)
    np.testing.assert_array_equal(kernel[1], 0)
    shapes = WeightNorm().inverse_shape(kernel.shape)
    assert [a.shape for a in WeightNorm().inverse(kernel)] == shapes


def test_all_faults_are_named(path, tmp_path):
    tensors = torch_file.read(path)
    tensors["generator.extra"] = np.zeros(3, np.float32)
    del tensors["generator.ups.1.bias"]
    tensors["generator.conv_post.bias"] = np.zeros(7, np.float32)
    torch_file.write(tmp_path / "hift.pt", tensors)
    with pytest.raises(CheckpointError) as error:
        load(tmp_path / "hift.pt")
    for part in ("generator.extra", "generator.ups.1.bias", "expected [18], got [7]"):
        assert part in str(error.value)


def test_another_models_file(golden):
    with pytest.raises(CheckpointError, match="another model"):
        load(golden / "token2wav" / "flow.pt")

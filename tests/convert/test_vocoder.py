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


OTHER_SIZES = [
    {"kernels": (12, 7, 5), "source_kernels": (5, 9, 3), "block_kernels": (5, 3, 9)},
    {"rates": (5, 4, 6), "kernels": (11, 8, 12), "n_fft": 24, "harmonics": 5, "f0_layers": 3},
    {
        "rates": (12, 10),
        "kernels": (24, 20),
        "block_kernels": (3, 7),
        "block_dilations": ((1, 3, 5), (1, 3)),
        "source_kernels": (7, 11),
        "source_dilations": ((1,), (1, 3)),
        "mels": 40,
        "channels": 16,
        "f0_channels": 24,
    },
    {
        "rates": (30, 4, 1),
        "kernels": (30, 6, 3),
        "block_kernels": (3,),
        "block_dilations": ((1, 3, 5),),
    },
]


def shapes_of(cfg: VocoderConfig, **form) -> dict[str, tuple[int, ...]]:
    """The shapes of a `hift.pt` of these sizes."""
    params = {name: np.ones(shape, np.float32) for name, shape in leaf_shapes(cfg).items()}
    tensors = to_official(checkpoint.unflatten(params), cfg, **form)
    return {name: array.shape for name, array in tensors.items()}


@pytest.mark.parametrize("prefix", ["", "generator."])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("sizes", OTHER_SIZES, ids=range(len(OTHER_SIZES)))
def test_every_size_that_tensors_show_is_read_from_them(sizes, prefix, spelling):
    cfg = VocoderConfig(**{"channels": 32} | sizes)
    shapes = shapes_of(cfg, prefix=prefix, spelling=spelling)
    assert config_of(shapes) == cfg
    rules = vocoder_rules(cfg, prefix=prefix, spelling=spelling)
    match(rules, shapes, leaf_shapes(cfg), "hift.pt")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("source_downs.0.weight", (16, 18, 14), "120 steps cannot become [7, 3, 1] by whole"),
        ("ups.1.parametrizations.weight.original1", (16, 8, 10), "must exceed rates by an even"),
        ("resblocks.9.convs1.0.bias", (4,), "3 upsamplings cannot share their residual blocks"),
        (
            "source_resblocks.2.convs1.3.parametrizations.weight.original1",
            (4, 4, 3),
            "expected 1 to 3 pairs of convolutions a block, got 4",
        ),
    ],
)
def test_sizes_that_contradict_each_other(name, shape, message):
    shapes = shapes_of(VocoderConfig(channels=32)) | {f"generator.{name}": shape}
    with pytest.raises(CheckpointError) as error:
        config_of(shapes)
    assert message in str(error.value)


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


@pytest.mark.parametrize("prefix", ["", "generator.", "generator.generator."])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_both_spellings_and_any_prefix(path, tmp_path, prefix, spelling):
    """A trainer of generator and discriminator puts its own prefix before that of the release."""
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

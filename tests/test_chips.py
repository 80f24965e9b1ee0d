"""The table of chips, and names of topologies."""

import pytest
from helpers.devices import needs_libtpu

from sa2jax import chips
from sa2jax.chips import CHIPS, GIB, SHAPES
from sa2jax.errors import PlanError
from sa2jax.sharding import make_mesh


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_figures_are_plausible(chip):
    assert 0.9 * chip.hbm < chip.usable <= chip.hbm
    assert 10e9 < chip.usable < 200e9
    assert 200e9 < chip.bandwidth < 10e12
    assert 10e12 < chip.bf16 <= chip.int8 < 10e15
    assert 10e9 < chip.network < 1e12
    assert chip.source


def test_usable_memory_as_measured():
    assert CHIPS["v5e"].usable == 15.75 * GIB
    assert CHIPS["v6e"].usable == 31.24 * GIB


@pytest.mark.parametrize(
    ("name", "full", "shape", "count"),
    [
        ("v5e:2x4", "v5e:2x4", (2, 4), 8),
        (" V5P:2x2x4 ", "v5p:2x2x4", (2, 2, 4), 16),
        ("v6e", "v6e:1x1", (1, 1), 1),
        ("h100:8", "h100:8", (8,), 8),
        ("a100", "a100-80gb:1", (1,), 1),
    ],
)
def test_topology(name, full, shape, count):
    found = chips.topology(name)
    assert (found.name, found.shape, found.chips) == (full, shape, count)


@pytest.mark.parametrize(
    "name", ["v7:2x2", "v5e:3x3", "v5e:2x2x1", "v5litepod-8", "v5e:", "h100:3", "", "v5e:2x4:1"]
)
def test_unknown_topology(name):
    with pytest.raises(PlanError) as error:
        chips.topology(name)
    message = str(error.value)
    assert message.startswith(f"unknown topology {name!r}; known: ")
    assert all(f"{kind}" in message for kind in CHIPS)
    assert "1x1|2x2|2x4|4x4|4x8|8x8" in message
    assert "1x1x1|2x2x1|2x2x2|2x2x4|2x4x4|4x4x4" in message


def test_topologies_ascend():
    for kind in SHAPES:
        counts = [place.chips for place in chips.topologies(kind)]
        assert counts[0] == 1
        assert counts == sorted(set(counts))
    with pytest.raises(PlanError, match="unknown chip 'v9'; known: v4, v5e, "):
        chips.topologies("v9")


@pytest.mark.parametrize(
    ("name", "links"),
    [("v5e:1x1", 0), ("v5e:2x2", 2), ("v5e:2x4", 3), ("v5e:4x4", 4), ("v5p:2x2x1", 2)],
)
def test_links_that_have_a_neighbour(name, links):
    place = chips.topology(name)
    each = place.chip.network / (6 if place.chip.name == "v5p" else 4)
    assert place.network == pytest.approx(links * each)


def test_links_of_gpus():
    assert chips.topology("h100:1").network == 0
    assert chips.topology("h100:2").network == CHIPS["h100"].network


@needs_libtpu
@pytest.mark.parametrize(
    "name",
    [f"{kind}:{shape}" for kind in SHAPES if CHIPS[kind].kind == "tpu" for shape in SHAPES[kind]],
)
def test_libtpu_knows_them_all(name):
    """One device for each chip, whatever cores it has."""
    place = chips.topology(name)
    devices = chips.devices(place)
    assert len(devices) == place.chips
    assert devices[0].platform == "tpu"


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(chips, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match=r"needs libtpu.*pip install 'sa2jax\[plan\]'"):
        chips.devices(chips.topology("v5e:2x2"))


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "mesh"), [("v6e:8x8", "data=16,tensor=4"), ("v5p:4x4x4", "fsdp=8,tensor=8")]
)
def test_a_mesh_may_split_a_side_of_the_grid(topology, mesh):
    made = make_mesh(mesh, devices=chips.devices(chips.topology(topology)))
    assert made.size == 64
    assert len({device.id for device in made.devices.flat}) == 64

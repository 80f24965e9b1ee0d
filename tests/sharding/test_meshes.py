"""Every program on every kind of mesh gives what one device gives."""

import json
import math
import os
from dataclasses import replace

import pytest
from helpers import on_meshes
from helpers.devices import run_on_devices

from sa2jax import testing

# Each axis alone, all three, and one that divides neither the heads nor the vocabularies nor,
# alone, the rows. They share a process, which answers without a mesh first.
MESHES = ("data=2,fsdp=2,tensor=2", "data=2,tensor=3", "data=8", "tensor=8")
MORE = ("data=1,fsdp=1,tensor=1", "fsdp=2,tensor=4", "fsdp=8")
LONG = pytest.mark.skipif("SA2JAX_LONG" not in os.environ, reason="minutes: set SA2JAX_LONG")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    cfg = replace(testing.tiny_config(), decoder=on_meshes.DECODER)
    return testing.save_tiny_checkpoint(tmp_path_factory.mktemp("model"), cfg)


@pytest.mark.slow
@pytest.mark.parametrize("meshes", [MESHES, pytest.param(MORE, marks=LONG)])
def test_every_program_on_a_mesh(meshes, folder, tmp_path):
    command = [on_meshes.__file__, folder, *meshes]
    run = run_on_devices(8, command, tmp_path)
    assert "rematerialization" not in run.stderr, run.stderr
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    assert [found["mesh"] for found in reports] == list(meshes)
    for found in reports:
        assert found["devices"] == 8
        assert found["logits"] <= 1e-4
        assert found["ids"]
        assert found["length"] == [on_meshes.TOKENS] * 3
        check_traces(found)
        check_places(found["mesh"], found)
    spoken = [report for report in reports if "speech" in report]
    assert [report["mesh"] for report in spoken] == [m for m in meshes if m in on_meshes.SPEAKING]
    dealt = [check_speech(report["mesh"], report["speech"]) for report in spoken]
    assert dealt == ["tensor=3" not in report["mesh"] for report in spoken]


def check_traces(found):
    """One program of each kind."""
    once = ("empty_state", "encode_audio", "scatter_features", "prefill_chunk", "start_rows")
    assert found["traces"] == dict.fromkeys([*once, "decode", "logits"], 1)
    assert found["new"], "the second time nothing is traced"


def check_places(mesh, found):
    """Where the arrays of a batch under way are, as one host reads it off their shardings."""
    sizes = dict(pair.split("=") for pair in mesh.split(","))
    data, fsdp, tensor = (int(sizes.get(axis, 1)) for axis in ("data", "fsdp", "tensor"))

    def split(ways, axis):
        return axis if ways > 1 else "None"

    layers, rows, heads, slots, width = found["cache_shape"]
    # 14 heads on 2 key heads become 16 on 4, and 16 on 8.
    assert heads == {4: 4, 8: 8}.get(tensor, 2)
    divides = tensor in (1, 2, 4, 8)
    ways = tensor if divides else 1
    rows_on = named(data=data, fsdp=fsdp)
    assert found["cache_shard"] == [layers, rows // (data * fsdp), heads // ways, slots, width]
    assert padded(found["cache"], 5) == ["None", rows_on, split(ways, "tensor"), "None", "None"]
    assert padded(found["token"], 1) == ["None"]
    assert padded(found["seen"], 2) == [rows_on, "None"]
    if data * fsdp * tensor > 1:
        assert padded(found["q"], 4) == ["None", split(ways, "tensor"), "None", split(fsdp, "fsdp")]
        assert padded(found["k"], 4)[1] == split(ways, "tensor")
        vocab = split(ways, "tensor")  # 512 divides as the heads do
        assert padded(found["head"], 2) == [vocab, split(fsdp, "fsdp")]


def check_speech(mesh, found):
    """The sound is that of one device, of one program each; a stream's rows are dealt."""
    assert found["wave"] <= 1e-4
    assert found["traces"] == {"mel": 1, "wave": 1, "start": 1, "step": 1}
    assert found["new"], "the second time nothing is traced"
    sizes = {axis: int(size) for axis, size in (pair.split("=") for pair in mesh.split(","))}
    dealt = found["kv"][4] % math.prod(sizes.values()) == 0
    assert padded(found["stream"], 8)[4] == (named(**sizes) if dealt else "None")
    return dealt


def named(**sizes):
    """How a spec names several axes: those of one device are left out."""
    axes = tuple(axis for axis, size in sizes.items() if size > 1)
    return str(axes) if len(axes) > 1 else "".join(axes) or "None"


def padded(spec, count):
    """A spec leaves out what it does not split at its end."""
    return spec + ["None"] * (count - len(spec))

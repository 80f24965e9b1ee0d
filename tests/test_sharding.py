"""Meshes, rules, and a sharded model that answers like an unsharded one."""

import json
import logging
import textwrap

import jax
import numpy as np
import pytest
from helpers.devices import run_on_devices
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from sa2jax import sharding, testing
from sa2jax.config import StepAudio2Config
from sa2jax.errors import ShardingError
from sa2jax.models.step_audio import step_audio2
from sa2jax.pipeline import StepAudio2
from sa2jax.sharding import make_mesh, spec_of


def mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    return AbstractMesh((data, fsdp, tensor), sharding.MESH_AXES)


@pytest.fixture(autouse=True)
def fresh_log():
    sharding._warn_once.cache_clear()


# --- make_mesh ---


class Device:
    """Enough of a device to count."""


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("tensor=1", (1, 1, 1)),
        ("", (1, 1, 1)),
        (" data = 1 , tensor=1,", (1, 1, 1)),
        ({"fsdp": 1}, (1, 1, 1)),
        (None, (1, 1, jax.device_count())),
    ],
)
def test_make_mesh(spec, shape):
    mesh = make_mesh(spec)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == shape
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("model=2", "mesh 'model=2': expected sizes of at least 1 for data, fsdp, tensor"),
        ("tensor=0", "mesh 'tensor=0': expected sizes of at least 1"),
        ("tensor=-4", "expected sizes of at least 1"),
        ({"tensor": 0}, "expected sizes of at least 1"),
        ("tensor", "mesh 'tensor': expected one axis=size pair per axis, such as 'data=2,tensor"),
        ("tensor=two", "expected one axis=size pair per axis"),
        ("tensor=1=1", "expected one axis=size pair per axis"),
        ("tensor=1,tensor=1", "expected one axis=size pair per axis"),
        ("4", "expected one axis=size pair per axis"),
    ],
)
def test_bad_mesh(spec, message):
    with pytest.raises(ShardingError) as error:
        make_mesh(spec)
    assert message in str(error.value)


def test_mesh_larger_than_the_machine():
    count = jax.device_count()
    with pytest.raises(ShardingError, match=rf"needs {count + 1} devices, but there are {count}"):
        make_mesh({"tensor": count + 1})
    with pytest.raises(ShardingError, match="needs 4 devices, but there are 3"):
        make_mesh("data=2,tensor=2", devices=[Device() for _ in range(3)])


# --- spec_of ---


@pytest.mark.parametrize(
    ("shape", "axes", "spec"),
    [
        ((512, 64), ("vocab", "embed"), ("tensor", "fsdp")),
        ((64, 8, 16), ("embed", "heads", "head_dim"), ("fsdp", "tensor", None)),
        ((2, 64, 8, 16), ("embed", "heads", "head_dim"), (None, "fsdp", "tensor", None)),
        ((8, 100, 64), ("batch", None, None), (("data", "fsdp"), None, None)),
        ((7,), ("whatever",), (None,)),
        ((), (), ()),
    ],
)
def test_rules(shape, axes, spec):
    assert spec_of(shape, axes, mesh_of(data=2, fsdp=2, tensor=4)) == PartitionSpec(*spec)


def test_axes_of_size_one_are_not_named():
    spec = spec_of((512, 64), ("vocab", "embed"), mesh_of(tensor=4))
    assert spec == PartitionSpec("tensor", None)
    assert spec_of((512, 64), ("vocab", "embed"), mesh_of()) == PartitionSpec(None, None)


def test_what_does_not_divide_is_replicated_and_said_once(caplog):
    mesh = mesh_of(fsdp=2, tensor=8)
    with caplog.at_level(logging.WARNING, logger="sa2jax.sharding"):
        for _ in range(3):
            spec = spec_of((64, 4, 16), ("embed", "kv_heads", "head_dim"), mesh)
    assert spec == PartitionSpec("fsdp", None, None)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["kv_heads of size 4 does not divide over tensor=8: replicated"]


def test_a_batch_that_does_not_divide_is_replicated(caplog):
    spec = spec_of((2, 5), ("batch", None), mesh_of(data=2, fsdp=2))
    assert spec == PartitionSpec(None, None)
    assert "batch of size 2 does not divide over ('data', 'fsdp')=4" in caplog.text


def test_more_axes_than_dimensions_is_a_mistake():
    with pytest.raises(ValueError, match="zip"):
        spec_of((4,), ("embed", "heads"), mesh_of())


def test_a_mesh_with_other_axes_is_refused():
    model = step_audio2(testing.tiny_config())
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    with pytest.raises(ShardingError, match="axes data, fsdp, tensor, got model: make it with"):
        model.shardings(mesh)


def test_shard_without_a_mesh_changes_nothing():
    x = jax.numpy.ones((2, 3))
    assert sharding.shard(x, "batch", None) is x


def test_every_parameter_of_the_released_model_has_a_place():
    """On 8 chips nothing large is left whole, and no dimension of mini is refused on 4."""
    model = step_audio2(StepAudio2Config.preset("mini"))
    mesh = mesh_of(fsdp=2, tensor=4)

    def is_axes(leaf):
        return isinstance(leaf, tuple)

    leaves = jax.tree.leaves(model.abstract)
    axes = jax.tree.leaves(model.axes, is_leaf=is_axes)
    assert len(leaves) == len(axes)
    kept = 0
    for leaf, names in zip(leaves, axes, strict=True):
        spec = spec_of(leaf.shape, names, mesh)
        ways = [mesh.shape[axis] for axis in spec if axis is not None]
        kept += leaf.size // int(np.prod(ways, dtype=int))
    total = sum(leaf.size for leaf in leaves)
    assert total > 8.3e9
    assert kept < 1.02 * total / 8
    assert sharding._warn_once.cache_info().currsize == 0


# --- a sharded model ---

SHARDED = """
    import json, sys
    import jax, numpy as np
    from sa2jax.inference.requests import GenerationConfig, Request
    from sa2jax.inference.programs import TRACES
    from sa2jax.pipeline import StepAudio2

    def replies(model, block):
        rng = np.random.default_rng(0)
        mel = rng.standard_normal((model.cfg.audio_encoder.mels, 100), np.float32)
        ids = rng.integers(0, 256, 40).astype(np.int32)
        heard = Request(ids, (mel,), (3,), (12,))
        prompts = [heard, Request(ids), Request(ids[:5]), heard]
        model.engine.scheduler.block = block
        options = GenerationConfig(max_new_tokens=12)
        stopped = GenerationConfig(max_new_tokens=12, stop_strings=("none of these",))
        made = [model.engine.generate(prompts, options)]
        made += [model.engine.generate(prompts[1:3] * 2, options)]
        made += [model.engine.generate(prompts, stopped, decode_text=str)]
        return [[list(reply.ids) for (reply,) in batch] for batch in made]

    def converse(model):
        # Three turns; each but the first goes on from a cache.
        rng = np.random.default_rng(1)
        ids, made = rng.integers(0, 256, 40), []
        for turn in range(3):
            mel = rng.standard_normal((model.cfg.audio_encoder.mels, 100), np.float32)
            request = Request(ids.astype(np.int32), (mel,), (len(ids) - 15,), (12,))
            options = GenerationConfig(max_new_tokens=12)
            blocks = model.engine.submit(request, options, conversation=model)
            made.append([i for block in blocks for i in block])
            ids = np.concatenate([ids, made[-1], rng.integers(0, 256, 30)])
        return made

    folder = sys.argv[1]
    alone = StepAudio2.from_pretrained(folder)
    expected = replies(alone, 12)
    TRACES.clear()
    model = StepAudio2.from_pretrained(folder, mesh="data=2,fsdp=2,tensor=2")
    q = model.engine.params["decoder"]["layers"]["attn"]["q"]["kernel"]
    got, traces = replies(model, 4), dict(TRACES)
    TRACES.clear()
    talk, again = converse(model), dict(TRACES)
    TRACES.clear()
    converse(model)
    print(json.dumps({
        "talk": [talk, converse(alone)], "talk_traces": again, "new": TRACES,
        "devices": jax.device_count(),
        "shard": q.sharding.shard_shape(q.shape), "whole": q.shape,
        "expected": expected, "got": got, "traces": traces,
    }))
"""


@pytest.mark.slow
def test_sharded_model_gives_the_same_ids(tmp_path):
    """Eight devices, every kind of batch: same greedy ids, and one program of each kind."""
    folder = testing.save_tiny_checkpoint(tmp_path / "model")
    run = run_on_devices(8, ["-c", textwrap.dedent(SHARDED), folder], tmp_path)
    result = json.loads(run.stdout)
    assert result["devices"] == 8
    layers, heads, head_dim, embed = result["whole"]
    assert result["shard"] == [layers, heads // 2, head_dim, embed // 2]
    assert result["got"] == result["expected"]
    first = result["expected"][0]
    assert first[0] == first[3] != first[1] != first[2]
    # Text only, with clips and with stop strings: the same programs, though shardings could differ.
    assert result["traces"] == {
        "empty_state": 1,
        "encode_audio": 1,
        "scatter_features": 1,
        "prefill_chunk": 1,
        "start_rows": 1,
        "decode": 1,
    }
    assert result["talk"][0] == result["talk"][1]
    # Further turns are read behind what is known.
    assert result["talk_traces"] == {"prefill_chunk": 1}


def test_mesh_of_one_device_is_no_mesh(tmp_path):
    """A size-1 mesh loads the loop-style decoder a CPU wants."""
    folder = testing.save_tiny_checkpoint(tmp_path / "model", testing.tiny_config(layers=1))
    model = StepAudio2.from_pretrained(folder, mesh="tensor=1")
    assert list(model.engine.params["decoder"]["layers"]) == [0]

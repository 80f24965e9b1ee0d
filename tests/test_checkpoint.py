import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa2jax import atomic_io, checkpoint
from sa2jax.errors import CheckpointError

pytestmark = pytest.mark.both_pairs

FIRST = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture
def params(rng) -> checkpoint.Params:
    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return {"layers": {"w": draw(3, 4, 5), "b": draw(3, 4)}, "table": draw(7, 4)}


def test_flatten_and_back(params):
    flat = checkpoint.flatten(params)
    assert list(flat) == ["layers.b", "layers.w", "table"]
    assert checkpoint.unflatten(flat) == params


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_save_and_load(params, tmp_path, dtype):
    checkpoint.save_params(tmp_path / "c", params)
    loaded = checkpoint.load_params(tmp_path / "c", dtype=dtype)
    expected = jax.tree.map(lambda x: x.astype(dtype or x.dtype), params)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype(dtype or jnp.float32)}


@pytest.mark.parametrize("kind", ["shapes", "shardings"])
def test_load_as_asked(params, tmp_path, kind):
    checkpoint.save_params(tmp_path / "c", params)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    if kind == "shardings":
        like = jax.tree.map(lambda x: FIRST, params)
    loaded = checkpoint.load_params(tmp_path / "c", like)
    assert {x.dtype.name for x in jax.tree.leaves(loaded)} == {
        "bfloat16" if kind == "shapes" else "float32"
    }


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_leaves_are_read_in_small_parts(params, tmp_path, monkeypatch, on_cpu, dtype):
    checkpoint.save_params(tmp_path / "c", params)
    parts, read = [], checkpoint._read
    monkeypatch.setattr(checkpoint, "_on_cpu", lambda place: on_cpu)
    monkeypatch.setattr(checkpoint, "PART_BYTES", 40)
    monkeypatch.setattr(checkpoint, "_read", lambda *a: (parts.append(a[2].nbytes), read(*a)))
    loaded = checkpoint.load_params(tmp_path / "c", dtype=dtype)
    expected = jax.tree.map(lambda x: x.astype(dtype or x.dtype), params)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    assert sum(parts) == sum(x.nbytes for x in jax.tree.leaves(loaded))
    assert max(parts) <= 4 * 5 * 4  # one layer of w


def test_scalars_are_loaded(tmp_path):
    checkpoint.save_params(tmp_path / "c", {"step": jnp.float32(3)})
    assert checkpoint.load_params(tmp_path / "c")["step"] == 3


def test_save_refuses_a_taken_path(params, tmp_path):
    checkpoint.save_params(tmp_path / "c", params)
    with pytest.raises(CheckpointError, match="exists already"):
        checkpoint.save_params(tmp_path / "c", params)
    checkpoint.save_params(tmp_path / "c", {"other": params["table"]}, overwrite=True)
    assert list(checkpoint.load_params(tmp_path / "c")) == ["other"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        checkpoint.save_params(tmp_path / "mine", params, overwrite=True)


def test_load_names_all_misfits(params, tmp_path):
    checkpoint.save_params(tmp_path / "c", params)
    like = {
        "layers": {"w": jax.ShapeDtypeStruct((3, 4, 6), jnp.float32)},
        "head": jax.ShapeDtypeStruct((1,), jnp.float32),
        "table": jax.ShapeDtypeStruct((7, 4), jnp.float32),
    }
    with pytest.raises(CheckpointError) as error:
        checkpoint.load_params(tmp_path / "c", like)
    for part in (
        "head is missing",
        "layers.b is not expected",
        "layers.w: expected [3, 4, 6], got [3, 4, 5]",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: (c / "layers.w" / "0.0.0").unlink(), r"layers\.w is damaged"),
        (lambda c: os.truncate(c / "table" / "0.0", 8), r"table is damaged"),
        (lambda c: (c / "layers.w" / ".zarray").unlink(), "is damaged"),
        (lambda c: (c / "_METADATA").unlink(), "no Orbax checkpoint"),
        (lambda c: (c / "_METADATA").write_text("{"), "is damaged"),
    ],
)
def test_load_of_a_damaged_folder(params, tmp_path, damage, message, capfd):
    checkpoint.save_params(tmp_path / "c", params)
    damage(tmp_path / "c")
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.load_params(tmp_path / "c")
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_load_of_a_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no Orbax checkpoint"):
        checkpoint.load_params(tmp_path / "nothing")


def test_created_arrays_are_filled_slice_by_slice(tmp_path, rng):
    w = rng.standard_normal((3, 4, 5)).astype(np.float32)
    w[1] = 0  # zeros are stored too, or a lost file would read as zeros
    arrays = checkpoint.create(tmp_path / "c", {"layers.w": (w.shape, w.dtype)})
    for layer in (2, 0, 1):
        arrays["layers.w"][layer].write(w[layer]).result()
    np.testing.assert_array_equal(checkpoint.load_params(tmp_path / "c")["layers"]["w"], w)
    opened = checkpoint.open_leaves(tmp_path / "c")
    np.testing.assert_array_equal(opened["layers.w"][1:].read().result(), w[1:])


def test_zeros_are_stored(tmp_path):
    shape = (2, 600, 600)
    arrays = checkpoint.create(tmp_path / "c", {"w": (shape, np.dtype(np.float32))})
    arrays["w"].write(np.zeros(shape, np.float32)).result()
    assert (tmp_path / "c" / "w" / "1.0.0").stat().st_size == 600 * 600 * 4
    (tmp_path / "c" / "w" / "1.0.0").unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load_params(tmp_path / "c")


def test_leaves_of_a_default_orbax_checkpoint_can_be_opened(params, tmp_path):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", params)
    opened = checkpoint.open_leaves(tmp_path / "c")
    for name, leaf in checkpoint.flatten(params).items():
        np.testing.assert_array_equal(opened[name].read().result(), leaf)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load_params(tmp_path / "c"), params)


@pytest.mark.parametrize(
    ("shape", "chunk"),
    [
        ((28, 3584), [28, 3584]),
        ((28, 3584, 18944), [1, 1792, 2368]),
        ((158720, 3584), [2480, 1792]),
        ((3,), [3]),
    ],
)
def test_chunks_stay_within_a_layer_and_a_size(shape, chunk):
    assert checkpoint.chunk_shape(shape, 2) == chunk
    assert np.prod(chunk) * 2 <= checkpoint.CHUNK_BYTES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        (json.dumps({"format": 99}), "format 99, expected 2: update sa2jax"),
        (json.dumps({"format": 1}), "format 1, expected 2: convert the model again"),
    ],
)
def test_info_that_cannot_be_understood(tmp_path, text, message):
    (tmp_path / checkpoint.INFO).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read_info(tmp_path)


def test_two_runs_cannot_write_one_folder(tmp_path):
    with atomic_io.new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("first")
        with (
            pytest.raises(CheckpointError, match="another run is writing"),
            atomic_io.new_folder(tmp_path / "out"),
        ):
            pass
    assert (tmp_path / "out" / "a").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_new_folder_where_nothing_can_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match="cannot write"),
        atomic_io.new_folder(tmp_path / "file" / "out"),
    ):
        pass

"""int8 matrices and caches: numbers, answers, and how they get into a model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx

from sa2jax import checkpoint, testing
from sa2jax.cli import main
from sa2jax.config import StepAudio2Config
from sa2jax.convert import hf
from sa2jax.convert.verify import compare_logits, inspect, verify
from sa2jax.errors import CheckpointError, ConfigError
from sa2jax.inference.engine import Engine
from sa2jax.inference.loading import resolve_policy
from sa2jax.inference.requests import GenerationConfig, Request
from sa2jax.inference.runner import Chunk
from sa2jax.models.step_audio import StepAudio2Model, step_audio2
from sa2jax.nn import Policy, init_params
from sa2jax.pipeline import StepAudio2
from sa2jax.quantize import (
    dequantize_block,
    qarrays,
    quantize_params,
    quantize_rows,
    quantized_leaves,
)

INT8 = Policy(kernel=jnp.int8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("int8")
    source = testing.save_tiny_checkpoint(home / "hf", dtype="bfloat16")
    hf.convert(source, home / "int8", dtype="int8")
    hf.convert(source, home / "head", dtype="int8", float_head=True)
    return source, home / "int8", home / "head"


def logits(model):
    rng = np.random.default_rng(0)
    return model.engine.logits(Request(rng.integers(0, 256, 120).astype(np.int32)))


# --- numbers ---


def test_rows_are_off_by_half_a_step_at_most(rng):
    x = rng.standard_normal((3, 5, 64)).astype(np.float32)
    numbers, scale = quantize_rows(jnp.asarray(x))
    assert numbers.dtype == jnp.int8
    assert scale.shape == (3, 5)
    np.testing.assert_allclose(scale, np.abs(x).max(-1) / 127.5, rtol=1e-6)
    gap = np.abs(np.asarray(dequantize_block(numbers, scale)) - x)
    # The largest number of a row would be 127.5 steps; it becomes 127 or -128.
    assert (gap <= 0.501 * np.asarray(scale)[..., None]).all()


def test_a_row_of_zeros_stays_zero():
    numbers, scale = quantize_rows(jnp.zeros((2, 8)))
    assert not np.asarray(numbers).any()
    assert np.isfinite(scale).all()


def test_the_product_is_that_of_qwix(rng):
    cfg = testing.tiny_config()
    model = step_audio2(cfg, INT8)
    params = quantize_params(testing.tiny_params(cfg), model.abstract)
    arrays = qarrays(params)
    assert set(arrays) == set(quantized_leaves(checkpoint.flatten(model.abstract)))
    kernel = jax.tree.map(lambda x: x[0], arrays["decoder.layers.mlp.up.kernel"])
    x = rng.standard_normal((3, cfg.decoder.embed)).astype(np.float32)
    theirs = qwix.dot_general(jnp.asarray(x), kernel, (((1,), (1,)), ((), ())), precision="highest")
    layer = jax.tree.map(lambda x: x[0], params["decoder"]["layers"]["mlp"]["up"])
    ours = x @ np.asarray(layer["kernel"], np.float32).T * np.asarray(layer["scale"])
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", [None, jnp.float32])
def test_what_becomes_int8(head):
    policy = Policy(kernel=jnp.int8, head=head)
    leaves = checkpoint.flatten(step_audio2(testing.tiny_config(), policy).abstract)
    whole = [name for name, leaf in leaves.items() if leaf.dtype == jnp.int8]
    assert ("decoder.head.kernel" in whole) == (head is None)
    assert "decoder.layers.attn.q.kernel" in whole
    assert "audio_encoder.layers.mlp.up.kernel" in whole
    assert "decoder.table" not in whole
    assert not [name for name in whole if "norm" in name or "bias" in name or "conv" in name]


def test_mini_takes_at_most_55_percent():
    cfg = StepAudio2Config.preset("mini")
    sizes = []
    for dtype in ("bfloat16", "int8"):
        policy = Policy(
            param=jnp.bfloat16, compute=jnp.bfloat16, kernel=jnp.int8 if dtype == "int8" else None
        )
        leaves = jax.tree.leaves(step_audio2(cfg, policy).abstract)
        sizes.append(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves))
    assert sizes[0] > 16.6e9
    assert sizes[1] <= 0.55 * sizes[0]


def test_random_int8_parameters_are_of_the_usual_size():
    """What `bench` runs on: rows of the same size as those of a float model."""
    cfg = testing.tiny_config()
    params = init_params(lambda: StepAudio2Model(cfg, policy=INT8, rngs=nnx.Rngs(0)))
    up = params["decoder"]["layers"]["mlp"]["up"]
    size = np.std(np.asarray(dequantize_block(up["kernel"], up["scale"])))
    np.testing.assert_allclose(size, cfg.decoder.embed**-0.5, rtol=0.05)


# --- answers ---


def test_answers_stay_near(folders):
    source, whole, head = folders
    reference = logits(StepAudio2.from_pretrained(source, dtype="float32"))
    near = {
        folder.name: compare_logits(reference, logits(StepAudio2.from_pretrained(folder)))
        for folder in (whole, head)
    }
    assert near["int8"].top1_agreement >= 0.9
    assert near["int8"].kl <= 0.02
    assert near["head"].kl <= near["int8"].kl


def test_int8_while_loading_is_int8_on_disk(folders):
    source, whole, _ = folders
    stored = StepAudio2.from_pretrained(whole)
    made = StepAudio2.from_pretrained(source, dtype="int8")
    np.testing.assert_array_equal(logits(stored), logits(made))
    assert stored.fingerprint == made.fingerprint


def test_a_checkpoint_of_floats_of_this_library_becomes_int8(folders, tmp_path):
    source, whole, _ = folders
    hf.convert(source, tmp_path / "bf16")
    made = StepAudio2.from_pretrained(tmp_path / "bf16", dtype="int8")
    np.testing.assert_array_equal(logits(made), logits(StepAudio2.from_pretrained(whole)))


def test_int8_matrices_stay_int8_in_every_dtype(folders):
    for dtype in (None, "float32", "bfloat16", "int8"):
        params = StepAudio2.from_pretrained(folders[1], dtype=dtype).engine.params
        assert params["decoder"]["head"]["kernel"].dtype == jnp.int8
    assert resolve_policy("bfloat16", stored={"head": False}).head == jnp.bfloat16


def test_an_int8_cache_holds_what_was_said():
    """Reading on from an int8 cache is near reading on from a float one."""
    cfg, params = testing.tiny_config(), testing.tiny_params(testing.tiny_config())
    request = Request(np.random.default_rng(1).integers(0, 256, 60).astype(np.int32))
    hidden = []
    for kind in (None, jnp.int8):
        runner = Engine(step_audio2(cfg, Policy(cache=kind)), params, cfg).runner
        runner.reserve(1, 64)
        runner.prefill_chunk([Chunk(0, request, 0, 40, {})])
        cache = runner.state.cache
        if kind is not None:
            assert cache.k.dtype == jnp.int8
            assert cache.scales[0].shape == cache.k.shape[:-1]
        hidden.append(np.asarray(runner.prefill_chunk([Chunk(0, request, 40, 20, {})])))
    size = np.abs(hidden[0]).max()
    assert 0 < np.abs(hidden[0] - hidden[1]).max() < 0.05 * size


def test_batches_and_conversations_share_an_int8_cache(folders):
    model = StepAudio2.from_pretrained(folders[0], int8_cache=True)
    request = Request(np.arange(40, dtype=np.int32))
    options = GenerationConfig(max_new_tokens=12, samples=2)
    first, second = model.engine.generate([request], options)[0]
    assert first == second
    assert len(first.ids) == 12
    runner = model.engine.runner
    runner.reserve(1, 64)
    runner.reserve(2, 2000)
    assert runner.state.cache.scales[0].shape[1::2] == (2, 1024)  # the model's context


# --- folders ---


def test_verify_knows_what_rounding_is(folders):
    source, whole, head = folders
    for folder in (whole, head):
        assert verify(source, folder).same
    found = inspect(whole)
    assert found.memory["int8"] < inspect(source).memory["bfloat16"]
    assert json.loads((whole / "sa2jax.json").read_text())["int8"] == {"head": True}


def test_export_needs_to_be_told_to_round(folders, tmp_path, capsys):
    _, whole, _ = folders
    with pytest.raises(CheckpointError, match="export it with --dequantize"):
        hf.export(whole, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as stop:
        main(["export", str(whole), str(tmp_path / "out"), "--dtype", "bfloat16"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--dequantize" in line
    main(["export", str(whole), str(tmp_path / "out"), "--dequantize"])
    assert "rounded" in capsys.readouterr().err
    assert verify(tmp_path / "out", whole).casts
    hf.export(whole, tmp_path / "wide", dtype="float32", dequantize=True)
    both = [
        StepAudio2.from_pretrained(path, dtype="float32") for path in (tmp_path / "wide", whole)
    ]
    np.testing.assert_allclose(*map(logits, both), atol=1e-3)


def test_bad_dtypes(folders, tmp_path):
    with pytest.raises(ConfigError, match="expected float32, bfloat16, float16 or int8"):
        StepAudio2.from_pretrained(folders[0], dtype="int4")
    with pytest.raises(CheckpointError, match="float_head is for dtype int8"):
        hf.convert(folders[0], tmp_path / "x", dtype="bfloat16", float_head=True)

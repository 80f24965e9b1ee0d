"""Adapters in PEFT's files: written, merged as PEFT merges them, refused if not understood."""

import json
import shutil
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from helpers.qwen2_oracle import qwen2_decoder, released_tensors

from sa2jax import testing
from sa2jax.errors import CheckpointError, Sa2jaxError, TrainError
from sa2jax.models.step_audio import StepAudio2Model, step_audio2
from sa2jax.nn import Policy, functional
from sa2jax.train.language.peft import PREFIX, TENSORS, save_adapter
from sa2jax.train.language.peft_config import CONFIG
from sa2jax.train.language.peft_merge import merge_adapter, read_adapter
from sa2jax.train.lora import DECODER_MATRICES, add_lora, combine, merge_lora, split_lora

CFG = testing.tiny_config()
RANK, ALPHA = 3, 6.0
ALL = r"decoder\.layers\..*|decoder\.head|adapter\.(up|down)|audio_encoder\..*"


@cache
def with_lora(targets: str = DECODER_MATRICES):
    def make():
        rngs = nnx.Rngs(0)
        net = StepAudio2Model(CFG, policy=Policy(), rngs=rngs)
        add_lora(net, RANK, ALPHA, targets, rngs=rngs)
        return net

    return functional(make)


def noisy(targets: str = DECODER_MATRICES, dtype=jnp.float32):
    """Low-rank matrices, no two numbers equal."""
    rng = np.random.default_rng(0)
    _, like = split_lora(with_lora(targets).abstract)

    def draw(leaf):
        return jnp.asarray(0.3 * rng.standard_normal(leaf.shape), dtype)

    return jax.tree.map(draw, like)


def save(folder: Path, lora=None, **options) -> Path:
    return save_adapter(
        folder,
        noisy() if lora is None else lora,
        CFG,
        **{"rank": RANK, "alpha": ALPHA, "base": "some/base"} | options,
    )


def edit(folder: Path, **changes) -> None:
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(raw | changes))


def edit_tensors(folder: Path, change) -> None:
    tensors = safetensors.numpy.load_file(folder / TENSORS)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / TENSORS)


@cache
def base() -> dict:
    return testing.tiny_params(CFG)


def merged(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of the tiny model with an adapter in them, by released name."""
    return released(merge_adapter(read_adapter(folder), base(), CFG))


def released(params) -> dict[str, np.ndarray]:
    return released_tensors(params, CFG)


def changed(found: dict[str, np.ndarray]) -> set[str]:
    """Names of the tensors that are not those of the base."""
    return {name for name, array in released(base()).items() if (found[name] != array).any()}


@pytest.mark.parametrize("targets", [DECODER_MATRICES, ALL, r"decoder\.layers\.attn\.[qv]"])
def test_what_is_saved_is_merged_as_it_was_trained(tmp_path, targets):
    lora = noisy(targets)
    found = merged(save(tmp_path / "adapter", lora))
    expected = released(merge_lora(combine(base(), lora), ALPHA / RANK))
    assert len(changed(found)) > 3
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=1e-5, err_msg=name)


def test_dtypes_are_kept_and_the_base_is_not_changed(tmp_path):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base())
    before = released(params)
    folder = save(tmp_path / "adapter", noisy(dtype=jnp.bfloat16))
    found = merge_adapter(read_adapter(folder), params, CFG)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    for name, array in released(params).items():
        np.testing.assert_array_equal(array, before[name])


def test_int8_matrices_are_not_merged_into(tmp_path):
    params = {"decoder": {"head": {"kernel": jnp.zeros((4, 4), jnp.int8)}}}
    with pytest.raises(TrainError, match="cannot be merged into int8"):
        merge_adapter(read_adapter(save(tmp_path / "adapter")), params, CFG)


def test_names_and_shapes_are_pefts(tmp_path):
    lora = noisy(ALL)
    tensors = safetensors.numpy.load_file(save(tmp_path / "adapter", lora) / TENSORS)
    shapes = {name: array.shape for name, array in tensors.items()}
    at = "base_model.model"
    assert shapes[f"{at}.model.layers.1.self_attn.q_proj.lora_A.weight"] == (RANK, 32)
    assert shapes[f"{at}.model.layers.1.self_attn.k_proj.lora_B.weight"] == (16, RANK)
    assert shapes[f"{at}.model.layers.0.mlp.down_proj.lora_A.weight"] == (RANK, 48)
    assert shapes[f"{at}.encoder.blocks.0.mlp.2.lora_A.weight"] == (RANK, 64)
    assert shapes[f"{at}.lm_head.lora_B.weight"] == (512, RANK)
    assert len(shapes) == 2 * (2 * 7 + 2 * 6 + 1 + 2)
    q = lora["decoder"]["layers"]["attn"]["q"]["lora_b"][1]  # [N, H, r]
    saved = tensors[f"{at}.model.layers.1.self_attn.q_proj.lora_B.weight"]
    np.testing.assert_array_equal(saved[9], q[1, 1])  # heads are 8 wide


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (DECODER_MATRICES, "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
        (r"audio_encoder\.layers\.mlp\.down|adapter\.up", "linear1 mlp.2"),
        (r"decoder\.head|audio_encoder\.layers\.attn\.o", "lm_head out"),
    ],
)
def test_target_modules_mean_these_modules_alone(tmp_path, targets, names):
    folder = save(tmp_path / "adapter", noisy(targets))
    raw = json.loads((folder / CONFIG).read_text())
    assert raw["target_modules"] == names.split()
    expected = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "task_type": "CAUSAL_LM"}
    assert expected.items() <= raw.items()
    assert raw["base_model_name_or_path"] == "some/base"


def test_some_of_the_matrices(tmp_path):
    found = merged(save(tmp_path / "adapter", targets=r"decoder\.layers\.mlp\..*"))
    parts = ("gate_proj", "up_proj", "down_proj")
    assert changed(found) == {f"model.layers.{i}.mlp.{p}.weight" for i in range(2) for p in parts}


RECORDED = sorted(p.name for p in (Path(__file__).parents[2] / "golden" / "peft").iterdir())


@pytest.mark.parametrize("kind", RECORDED)
def test_merged_as_peft_merges(kind):
    """Every tensor that PEFT changed, and no other."""
    folder = Path(__file__).parents[2] / "golden" / "peft" / kind
    found = merged(folder)
    with np.load(folder / "merged.npz") as file:
        expected = dict(file)
    assert changed(found) == set(expected)
    for name, array in expected.items():
        rows = [5, 500] if "embed_tokens" in name else slice(3)
        np.testing.assert_allclose(found[name][rows], array, atol=2e-6, err_msg=name)


SPELLINGS = {  # some versions keep the adapter's own name, and what wraps a module
    "rslora": (".lora_A.weight", ".lora_A.default.weight"),
    "dora": (".lora_magnitude_vector", ".lora_magnitude_vector.default.weight"),
    "modules_to_save": ("model.norm.", "model.norm.modules_to_save.default."),
    "bias_all": (".base_layer.bias", ".bias"),
}


@pytest.mark.parametrize("kind", SPELLINGS)
def test_other_spellings_of_names(tmp_path, kind):
    old, new = SPELLINGS[kind]
    recorded = Path(__file__).parents[2] / "golden" / "peft" / kind
    shutil.copytree(recorded, tmp_path / kind)

    def rename(tensors):
        for name in [n for n in tensors if old in n]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    edit_tensors(tmp_path / kind, rename)
    expected = merged(recorded)
    for name, array in merged(tmp_path / kind).items():
        np.testing.assert_array_equal(array, expected[name])


def test_a_convolution_is_merged_tap_by_tap(tmp_path, rng):
    folder, at = save(tmp_path / "adapter"), f"{PREFIX}adapter.conv"
    edit(folder, target_modules=["adapter.conv"])
    outputs, inputs, taps = released(base())["adapter.conv.weight"].shape
    a = rng.standard_normal((RANK, inputs, taps)).astype(np.float32)
    b = rng.standard_normal((outputs, RANK, 1)).astype(np.float32)

    def replace_all(tensors):
        tensors.clear()
        tensors |= {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}

    edit_tensors(folder, replace_all)
    change = merged(folder)["adapter.conv.weight"] - released(base())["adapter.conv.weight"]
    expected = ALPHA / RANK * np.einsum("or,rik->oik", b[:, :, 0], a)
    np.testing.assert_allclose(change, expected, atol=1e-5)


def test_modules_of_which_there_are_no_matrices_are_missed(tmp_path):
    folder = save(tmp_path / "adapter", targets=r"decoder\.layers\.attn\.q")
    edit(folder, target_modules=["q_proj", "v_proj"])
    with pytest.raises(CheckpointError, match=r"4 missing tensors: .*v_proj\.lora_A"):
        merged(folder)
    edit(folder, target_modules=["v_proj"])
    with pytest.raises(CheckpointError, match=r"4 unknown tensors: .*q_proj\.lora_A"):
        merged(folder)


def test_settings_that_change_nothing_are_passed_over(tmp_path):
    folder = save(tmp_path / "adapter")
    expected = merged(folder)
    edit(
        folder,
        peft_version="0.21.2",
        megatron_core="megatron.core",
        qalora_group_size=16,
        loftq_config={},
        eva_config={"rho": 2.0},
        init_lora_weights="orthogonal",
        something_new=None,
        another=False,
    )
    for name, array in merged(folder).items():
        np.testing.assert_array_equal(array, expected[name])


def drop(end: str):
    return lambda folder: edit_tensors(
        folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if n.endswith(end)]
    )


def add(name: str, *shape: int):
    return lambda folder: edit_tensors(
        folder, lambda tensors: tensors.update({name: np.zeros(shape, np.float32)})
    )


Q = "base_model.model.model.layers.0.self_attn.q_proj"
QA = f"{Q}.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / CONFIG).unlink(), TrainError, f"no {CONFIG} in"),
        (
            lambda f: (f / CONFIG).write_text("{}"),
            TrainError,
            "expected peft_type 'LORA', got None",
        ),
        (lambda f: (f / CONFIG).write_text("{"), TrainError, "is damaged"),
        (lambda f: (f / CONFIG).write_text("[" * 9**6), TrainError, "is damaged"),
        (lambda f: (f / CONFIG).write_text("[]"), TrainError, "expected peft_type 'LORA', got []"),
        (lambda f: (f / TENSORS).unlink(), TrainError, "expected an adapter saved by PEFT"),
        (lambda f: (f / TENSORS).rename(f / "adapter_model.bin"), TrainError, "as safetensors"),
        (lambda f: (f / TENSORS).write_bytes(b"x" * 20), TrainError, "is damaged"),
        (add("odd", 2), CheckpointError, "1 unknown tensors: odd"),
        (
            add("base_model.model.model.embed_tokens.lora_embedding_A", 3, 512),
            CheckpointError,
            "1 unknown tensors: base_model.model.model.embed_tokens.lora_embedding_A",
        ),
        (drop("layers.1.self_attn.q_proj.lora_A.weight"), CheckpointError, "1 missing tensors"),
        (drop("o_proj.lora_B.weight"), CheckpointError, "2 missing tensors"),
        (drop("layers.1.mlp.up_proj.lora_B.weight"), CheckpointError, "1 missing tensors"),
        (add("base_model.model.model.norm.weight", 31), CheckpointError, "expected [32], got [31]"),
        (
            lambda f: edit(f, modules_to_save=["lm_head"]),
            CheckpointError,
            "1 missing tensors: base_model.model.lm_head.weight",
        ),
        (
            lambda f: edit(f, trainable_token_indices=[512]),
            CheckpointError,
            "trainable_token_indices are not 1 rows of 512",
        ),
        (
            lambda f: edit_tensors(f, lambda t: t.update({QA: t[QA] * np.nan})),
            TrainError,
            "model.layers.0.self_attn.q_proj.weight is not finite",
        ),
        (add(f"{Q}.lora_A.weight", 4, 32), CheckpointError, "expected [3, 32], got [4, 32]"),
        (lambda f: edit(f, r=5), CheckpointError, "wrong shape"),
    ],
)
def test_damaged_adapters(tmp_path, damage, error, message):
    folder = save(tmp_path / "adapter")
    damage(folder)
    with pytest.raises(error) as found:
        merged(folder)
    assert message in str(found.value)


@pytest.mark.parametrize(
    ("lora", "options"),
    [
        ({}, {}),
        (None, {"rank": 4}),
        (None, {"targets": "nothing"}),
        ({"decoder": {"head": {"lora_a": np.zeros((RANK, 32), np.float32)}}}, {}),
        ({"odd": {"lora_a": np.zeros(3), "lora_b": np.zeros(3)}}, {}),
    ],
)
def test_what_cannot_be_saved(tmp_path, lora, options):
    with pytest.raises(TrainError, match="expected LoRA matrices of rank"):
        save(tmp_path / "adapter", lora, **options)
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_is_not_overwritten_unasked(tmp_path):
    save(tmp_path / "adapter")
    with pytest.raises(Sa2jaxError, match="choose another folder"):
        save(tmp_path / "adapter")
    save(tmp_path / "adapter", overwrite=True)


# --- against PEFT -------------------------------------------------------------------------------


@pytest.fixture
def qwen():
    """The tiny decoder as a model of transformers, and `peft`."""
    reason = "compares with peft: install torch, transformers and peft"
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package, reason=reason)
    return qwen2_decoder(CFG, attn_implementation="eager")


IDS = np.random.default_rng(0).integers(0, 512, (2, 11))


def theirs(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.numpy()


def ours(params) -> np.ndarray:
    net = step_audio2(CFG).bind(params)
    return np.asarray(net.decoder.logits(net(IDS)[0]))


@pytest.mark.oracle
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"bias": "all"},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"o_proj": 9}},
        {"modules_to_save": ["lm_head", "model.norm", "input_layernorm"]},
        {"layers_to_transform": [1]},
        {"target_modules": r".*\.1\..*(q|down)_proj"},
        {"target_modules": ["embed_tokens", "up_proj", "lm_head"]},
    ],
    ids=str,
)
def test_merged_logits_equal_those_of_peft(qwen, tmp_path, options):
    import peft
    import torch

    names = ["q_proj", "v_proj", "o_proj", "up_proj"]
    settings = {"r": 4, "lora_alpha": 6, "target_modules": names, "task_type": "CAUSAL_LM"}
    plain = theirs(qwen)
    model = peft.get_peft_model(qwen, peft.LoraConfig(**settings | options)).eval()
    torch.manual_seed(0)
    for value in model.parameters():
        if value.requires_grad:
            value.data += 0.2 * torch.randn_like(value)
    model.save_pretrained(tmp_path / "adapter")
    params = merge_adapter(read_adapter(tmp_path / "adapter"), base(), CFG)
    expected = theirs(model)
    assert np.abs(expected - plain).max() > 0.5
    np.testing.assert_allclose(ours(params), expected, atol=2e-3)


@pytest.mark.oracle
def test_peft_reads_what_we_write(qwen, tmp_path):
    import peft

    save(tmp_path / "adapter")
    expected = ours(merge_lora(combine(base(), noisy()), ALPHA / RANK))
    model = peft.PeftModel.from_pretrained(qwen, str(tmp_path / "adapter")).eval()
    np.testing.assert_allclose(theirs(model), expected, atol=2e-3)

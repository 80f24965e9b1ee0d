"""Adapters in PEFT's files: there and back, refused if more than LoRA, and equal to PEFT's."""

import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from sa2jax import checkpoint, testing
from sa2jax.convert.rules import expand
from sa2jax.convert.step_audio2 import llm_rules
from sa2jax.errors import CheckpointError, Sa2jaxError, TrainError
from sa2jax.models.step_audio import StepAudio2Model, step_audio2
from sa2jax.nn import Policy, functional
from sa2jax.train.language.peft import CONFIG, TENSORS, load_adapter, save_adapter, targets_of
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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("targets", [DECODER_MATRICES, ALL, r"decoder\.layers\.attn\.[qv]"])
def test_there_and_back_bit_for_bit(tmp_path, targets, dtype):
    lora = noisy(targets, dtype)
    save(tmp_path / "adapter", lora)
    found, rank, alpha = load_adapter(tmp_path / "adapter", step_audio2(CFG))
    assert (rank, alpha) == (RANK, ALPHA)
    assert jax.tree.structure(found) == jax.tree.structure(lora)

    def same(a, b):
        return np.testing.assert_array_equal(a, b, strict=True)

    jax.tree.map(same, found, lora)
    again = split_lora(with_lora(targets_of(found)).abstract)[1]
    assert jax.tree.structure(again) == jax.tree.structure(lora)


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
    save(tmp_path / "adapter", targets=r"decoder\.layers\.mlp\..*")
    found, *_ = load_adapter(tmp_path / "adapter", step_audio2(CFG))
    assert list(found["decoder"]["layers"]) == ["mlp"]


def test_rank_stabilised_adapters_keep_their_scale(tmp_path):
    folder = save(tmp_path / "adapter")
    edit(folder, use_rslora=True)
    _, rank, alpha = load_adapter(folder, with_lora())
    assert alpha / rank == pytest.approx(ALPHA / RANK**0.5)


def test_the_adapters_own_name_may_be_in_the_way(tmp_path):
    folder = save(tmp_path / "adapter")

    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)

    edit_tensors(folder, rename)
    found, *_ = load_adapter(folder, step_audio2(CFG))
    jax.tree.map(np.testing.assert_array_equal, found, noisy())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern="),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern="),
        ({"layers_to_transform": [1]}, "layers_to_transform="),
        ({"layer_replication": [[0, 1]]}, "layer_replication="),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"trainable_token_indices": [7]}, "trainable_token_indices="),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
        ({"peft_type": "IA3"}, "expected peft_type 'LORA', got 'IA3'"),
        ({"r": 0}, "expected r >= 1"),
        ({"lora_alpha": "16"}, "a number lora_alpha"),
    ],
)
def test_more_than_lora_is_refused_by_name(tmp_path, changes, message):
    folder = save(tmp_path / "adapter")
    edit(folder, **changes)
    with pytest.raises(TrainError) as found:
        load_adapter(folder, step_audio2(CFG))
    assert message in str(found.value)


def drop(end: str):
    return lambda folder: edit_tensors(
        folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if n.endswith(end)]
    )


def add(name: str, *shape: int):
    return lambda folder: edit_tensors(
        folder, lambda tensors: tensors.update({name: np.zeros(shape, np.float32)})
    )


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / CONFIG).unlink(), TrainError, f"no {CONFIG} in"),
        (lambda f: (f / CONFIG).write_text("{}"), TrainError, "is damaged (KeyError('peft_type'))"),
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
        (add(f"{Q}.lora_A.weight", 4, 32), CheckpointError, "expected [3, 32], got [4, 32]"),
        (lambda f: edit(f, r=5), CheckpointError, "wrong shape"),
    ],
)
def test_damaged_adapters(tmp_path, damage, error, message):
    folder = save(tmp_path / "adapter")
    damage(folder)
    with pytest.raises(error) as found:
        load_adapter(folder, step_audio2(CFG))
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
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    pytest.importorskip("peft", reason=reason)
    d = CFG.decoder
    config = transformers.Qwen2Config(
        vocab_size=d.vocab,
        hidden_size=d.embed,
        intermediate_size=d.mlp,
        rope_theta=d.rope_theta,
        num_hidden_layers=d.layers,
        num_attention_heads=d.heads,
        num_key_value_heads=d.kv_heads,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "eager"
    leaves = checkpoint.flatten(testing.tiny_params(CFG))
    state = {}
    for p in expand(llm_rules(CFG), {name: leaf.shape for name, leaf in leaves.items()}):
        leaf = leaves[p.leaf] if p.layer is None else leaves[p.leaf][p.layer]
        if p.leaf.startswith("decoder."):
            state[p.sources[0]] = torch.from_numpy(np.array(p.rule.inverse(np.asarray(leaf))[0]))
    model = transformers.Qwen2ForCausalLM(config).eval()
    model.load_state_dict(state)
    return model


IDS = np.random.default_rng(0).integers(0, 512, (2, 11))


def theirs(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.numpy()


def ours(lora, scale: float) -> np.ndarray:
    params = merge_lora(combine(testing.tiny_params(CFG), lora), scale)
    net = step_audio2(CFG).bind(params)
    return np.asarray(net.decoder.logits(net(IDS)[0]))


@pytest.mark.oracle
@pytest.mark.parametrize("stabilised", [False, True])
def test_merged_logits_equal_those_of_peft(qwen, tmp_path, stabilised):
    import peft
    import torch

    names = ["q_proj", "v_proj", "o_proj", "up_proj"]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=names, use_rslora=stabilised, task_type="CAUSAL_LM"
    )
    plain = theirs(qwen)
    model = peft.get_peft_model(qwen, config).eval()
    torch.manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    lora, rank, alpha = load_adapter(tmp_path / "adapter", step_audio2(CFG))
    expected = theirs(model)
    assert np.abs(expected - plain).max() > 0.5
    np.testing.assert_allclose(ours(lora, alpha / rank), expected, atol=2e-3)


@pytest.mark.oracle
def test_peft_reads_what_we_write(qwen, tmp_path):
    import peft

    save(tmp_path / "adapter")
    expected = ours(noisy(), ALPHA / RANK)
    model = peft.PeftModel.from_pretrained(qwen, str(tmp_path / "adapter")).eval()
    np.testing.assert_allclose(theirs(model), expected, atol=2e-3)

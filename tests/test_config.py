"""Configs: read from config.json, written back, and refused with a reason."""

import copy
import json

import pytest

from sa2jax.config import AdapterConfig, AudioEncoderConfig, DecoderConfig, StepAudio2Config
from sa2jax.errors import ConfigError
from sa2jax.models.step_audio import step_audio2

# The released config.json of Step-Audio-2-mini.
MINI = {
    "architectures": ["StepAudio2ForCausalLM"],
    "model_type": "step_audio_2",
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_attention_groups": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 28,
        "max_seq_len": 16384,
        "vocab_size": 158720,
        "rms_norm_eps": 1e-06,
        "eos_token_id": 151643,
        "pad_token_id": 151643,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 16384,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
    },
    "audio_encoder_config": {
        "n_mels": 128,
        "n_audio_ctx": 1500,
        "n_audio_state": 1280,
        "n_audio_head": 20,
        "n_audio_layer": 32,
        "n_codebook_size": 4096,
        "llm_dim": 3584,
        "kernel_size": 3,
        "adapter_stride": 2,
    },
}
# A 32 B sibling: the text fields lie at the top level.
LARGE = {
    "architectures": ["StepAudio2ForCausalLM"],
    "model_type": "step_audio_2",
    **MINI["text_config"],
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_attention_heads": 40,
    "num_attention_groups": 8,
    "num_key_value_heads": 8,
    "num_hidden_layers": 64,
    "audio_encoder_config": MINI["audio_encoder_config"] | {"llm_dim": 5120},
}


def changed(base: dict, path: str, value) -> dict:
    """A copy of a config with the key at `section.key` set, or removed for `...`."""
    config = copy.deepcopy(base)
    *sections, key = path.split(".")
    place = config
    for section in sections:
        place = place[section]
    if value is ...:
        del place[key]
    else:
        place[key] = value
    return config


# --- there and back ---


def test_mini():
    cfg = StepAudio2Config.from_hf(MINI)
    assert cfg.decoder == DecoderConfig(
        vocab=158720,
        layers=28,
        embed=3584,
        mlp=18944,
        heads=28,
        kv_heads=4,
        head_dim=128,
        max_positions=16384,
        norm_eps=1e-6,
        rope_theta=1e6,
    )
    assert cfg.audio_encoder == AudioEncoderConfig(
        mels=128, layers=32, embed=1280, heads=20, max_positions=1500
    )
    assert cfg.adapter == AdapterConfig(hidden=2048, kernel=3, stride=2)
    assert (cfg.dtype, cfg.flat) == ("bfloat16", False)


def test_flat_sibling():
    cfg = StepAudio2Config.from_hf(LARGE)
    decoder = cfg.decoder
    assert (decoder.embed, decoder.mlp, decoder.heads, decoder.kv_heads) == (5120, 27648, 40, 8)
    assert (decoder.layers, decoder.head_dim, cfg.dtype) == (64, 128, "bfloat16")
    assert cfg.audio_encoder == StepAudio2Config.from_hf(MINI).audio_encoder
    assert cfg.flat


@pytest.mark.parametrize("raw", [MINI, LARGE], ids=["nested", "flat"])
def test_round_trip_is_word_for_word(raw):
    before = copy.deepcopy(raw)
    assert StepAudio2Config.from_hf(raw).to_hf() == before
    assert raw == before  # reading changes nothing


def test_recorded_checkpoint_round_trip(recorded_checkpoint):
    folder = recorded_checkpoint / "llm"
    cfg = StepAudio2Config.from_hf(folder)
    assert cfg.to_hf() == json.loads((folder / "config.json").read_text())
    assert StepAudio2Config.from_hf(folder / "config.json") == cfg


def test_mini_preset_is_the_released_model():
    preset = StepAudio2Config.preset("mini")
    assert preset == StepAudio2Config.from_hf(MINI)
    assert step_audio2(preset) is step_audio2(StepAudio2Config.from_hf(MINI))  # so no second trace


@pytest.mark.parametrize("name", ["mini", "tiny"])
def test_preset_survives_export(name):
    preset = StepAudio2Config.preset(name)
    again = StepAudio2Config.from_hf(json.loads(json.dumps(preset.to_hf())))
    assert again == preset


def test_flat_config_without_a_source_survives_export():
    cfg = StepAudio2Config(
        decoder=StepAudio2Config.from_hf(LARGE).decoder,
        audio_encoder=StepAudio2Config.from_hf(LARGE).audio_encoder,
        flat=True,
    )
    assert "text_config" not in cfg.to_hf()
    assert StepAudio2Config.from_hf(cfg.to_hf()) == cfg


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"no model preset 'micro': expected one of .*mini.*tiny"):
        StepAudio2Config.preset("micro")


# --- what may be left out ---


def test_missing_keys_have_the_values_of_the_released_class():
    raw = MINI
    for section, key in (
        ("text_config", "max_seq_len"),
        ("text_config", "rms_norm_eps"),
        ("text_config", "rope_theta"),
        ("text_config", "rope_scaling"),
        ("text_config", "num_key_value_heads"),
        ("text_config", "torch_dtype"),
        ("audio_encoder_config", "n_mels"),
        ("audio_encoder_config", "n_audio_ctx"),
        ("audio_encoder_config", "kernel_size"),
        ("audio_encoder_config", "adapter_stride"),
    ):
        raw = changed(raw, f"{section}.{key}", ...)
    assert StepAudio2Config.from_hf(raw) == StepAudio2Config.from_hf(MINI)
    bare = {"architectures": ["StepAudio2ForCausalLM"], "text_config": {}}
    cfg = StepAudio2Config.from_hf(bare | {"audio_encoder_config": {}})
    assert cfg.decoder == DecoderConfig(
        vocab=64012, layers=48, embed=4096, mlp=11008, heads=32, kv_heads=4, max_positions=8192
    )
    assert cfg.audio_encoder == AudioEncoderConfig(mels=128, layers=6, embed=512, heads=8)
    assert StepAudio2Config.from_hf(cfg.to_hf()) == cfg
    # A default that does not fit what is there is no silent one.
    assert "llm_dim=4096 and hidden_size=3584" in refused(
        changed(MINI, "audio_encoder_config.llm_dim", ...)
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("text_config.rope_scaling", {"rope_type": "default"}),
        ("text_config.rope_scaling", {"type": "default", "rope_theta": 1e6}),
        ("text_config.rope_parameters", {"rope_theta": 1e6}),
        ("text_config.layer_types", ["full_attention"] * 28),
        ("text_config.num_experts", None),
        ("text_config._attn_implementation_autoset", True),
        ("text_config.speed", 3),
        ("audio_encoder_config.n_extra", 1),
        ("audio_encoder_config.tie_word_embeddings", True),
        ("tie_word_embeddings", True),  # of the class around: text_config tells
        ("use_sliding_window", True),
        ("vision_config", {}),
    ],
)
def test_keys_that_change_nothing_are_kept(path, value):
    raw = changed(MINI, path, value)
    cfg = StepAudio2Config.from_hf(raw)
    assert cfg == StepAudio2Config.from_hf(MINI)
    assert cfg.to_hf() == raw


def test_the_base_of_the_rotary_embedding_may_stand_in_rope_parameters():
    raw = changed(MINI, "text_config.rope_theta", ...)
    raw["text_config"]["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "default"}
    cfg = StepAudio2Config.from_hf(raw)
    assert cfg.decoder.rope_theta == 5e5
    assert StepAudio2Config.from_hf(cfg.to_hf()) == cfg


def test_context_length_falls_back_to_max_seq_len():
    raw = changed(MINI, "text_config.max_position_embeddings", ...)
    raw["text_config"]["max_seq_len"] = 8192
    assert StepAudio2Config.from_hf(raw).decoder.max_positions == 8192
    raw["text_config"]["max_position_embeddings"] = 4096
    assert StepAudio2Config.from_hf(raw).decoder.max_positions == 4096


@pytest.mark.parametrize("value", [None, 128, 64])
def test_explicit_head_dim(value):
    cfg = StepAudio2Config.from_hf(changed(MINI, "text_config.head_dim", value))
    assert cfg.decoder.head_dim == (value or 128)
    assert StepAudio2Config.from_hf(cfg.to_hf()) == cfg


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_dtype_of_the_release(key):
    raw = changed(MINI, "text_config.torch_dtype", ...)
    raw["text_config"][key] = "float32"
    assert StepAudio2Config.from_hf(raw).dtype == "float32"


# --- refused ---


def refused(raw) -> str:
    with pytest.raises(ConfigError) as error:
        StepAudio2Config.from_hf(raw)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("architectures", ["Qwen2ForCausalLM"], "got ['Qwen2ForCausalLM']: this is another"),
        ("architectures", "LlamaForCausalLM", "LlamaForCausalLM"),
        ("text_config.num_experts", 8, "num_experts=8 is not supported (expected None)"),
        ("text_config.layer_types", ["sliding_attention"], "layer_types=['sliding_attention']"),
        ("text_config.layer_types", 28, "layer_types=28 is not supported"),
        ("text_config.partial_rotary_factor", 0.5, "partial_rotary_factor=0.5 is not supported"),
        ("text_config.pruned_heads", {"0": [1]}, "pruned_heads={'0': [1]} is not supported"),
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config={'quant_method': "),
        ("audio_encoder_config.quantization_config", {}, "quantization_config={} is not supported"),
        ("text_config.torch_dtype", {"a": 1}, "torch_dtype must be a name such as 'bfloat16'"),
        ("audio_encoder_config", ..., "expected an object under 'audio_encoder_config', got None"),
        ("audio_encoder_config", [1], "expected an object under 'audio_encoder_config', got [1]"),
        ("text_config", None, "expected an object under 'text_config', got None"),
        ("text_config.rope_scaling", {"type": "yarn"}, "rope_scaling={'type': 'yarn'} is not supp"),
        (
            "text_config.rope_scaling",
            {"factor": 4.0},
            "rope_scaling={'factor': 4.0} is not supported",
        ),
        ("text_config.rope_scaling", "linear", "rope_scaling='linear' is not supported"),
        ("text_config.rope_scaling", {"rope_type": "default", "type": "yarn"}, "rope_scaling={"),
        (
            "text_config.rope_scaling",
            {"rope_type": "default", "mrope_section": [16, 24, 24]},
            "'mrope_section': [16, 24, 24]",
        ),
        (
            "text_config.rope_parameters",
            {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6},
            "rope_parameters={'factor': 4.0, 'rope_theta': 1000000.0, 'rope_type': 'yarn'}",
        ),
        (
            "text_config.rope_parameters",
            {"rope_type": "default", "rope_theta": 1e4},
            "rope_theta=1000000.0 and rope_parameters.rope_theta=10000.0 must be equal",
        ),
        (
            "text_config.rope_parameters",
            {"rope_type": "default", "rope_theta": "1e6"},
            "rope_parameters.rope_theta must be a number above 0, got '1e6'",
        ),
        ("text_config.tie_word_embeddings", True, "tie_word_embeddings=True is not supported"),
        ("text_config.hidden_act", "gelu", "hidden_act='gelu' is not supported (expected 'silu')"),
        ("text_config.use_sliding_window", True, "use_sliding_window=True is not supported"),
        ("text_config.attention_bias", False, "attention_bias=False is not supported"),
        ("text_config.num_attention_groups", 7, "num_attention_groups=7 and num_key_value_heads=4"),
        ("audio_encoder_config.llm_dim", 4096, "llm_dim=4096 and hidden_size=3584 must be equal"),
        (
            "text_config.hidden_size",
            "3584",
            "hidden_size must be a whole number above 0, at most 16777216, got '358",
        ),
        (
            "text_config.hidden_size",
            None,
            "hidden_size must be a whole number above 0, at most 16777216, got None",
        ),
        ("text_config.num_hidden_layers", 28.0, "num_hidden_layers must be a whole number above 0"),
        ("text_config.num_hidden_layers", True, "num_hidden_layers must be a whole number above 0"),
        ("text_config.num_key_value_heads", 0, "num_key_value_heads must be a whole number above"),
        (
            "text_config.vocab_size",
            -5,
            "vocab_size must be a whole number above 0, at most 16777216, got -5",
        ),
        ("text_config.num_hidden_layers", 10**9, "at most 16777216, got 1000000000"),
        ("audio_encoder_config.n_audio_state", 10**30, "at most 16777216, got 1000000000"),
        ("text_config.rope_theta", 0, "rope_theta must be a number above 0, got 0"),
        ("text_config.rope_theta", float("inf"), "rope_theta must be a number above 0, got inf"),
        ("text_config.rms_norm_eps", float("nan"), "rms_norm_eps must be a number above 0, got n"),
        ("text_config.max_position_embeddings", "all", "max_position_embeddings must be a whole"),
        ("audio_encoder_config.adapter_stride", 0, "adapter_stride must be a whole number above"),
        ("text_config.num_attention_heads", 27, "decoder embed must divide into its heads"),
        ("text_config.num_attention_heads", 14, "decoder heads must be a multiple of kv_heads"),
        ("text_config.head_dim", 127, "decoder head_dim must be even"),
        ("audio_encoder_config.n_audio_head", 19, "encoder embed must be a multiple of heads"),
    ],
)
def test_refused(path, value, message):
    assert message in refused(changed(MINI, path, value))


def test_model_type_alone_is_enough_to_know_the_model():
    raw = changed(MINI, "architectures", ...)
    assert StepAudio2Config.from_hf(raw) == StepAudio2Config.from_hf(MINI)
    assert "got ['qwen2']" in refused(raw | {"model_type": "qwen2"})
    assert "got [None]" in refused({})


def test_all_problems_are_reported_together():
    raw = changed(MINI, "text_config.vocab_size", "all")
    raw["text_config"] |= {"rope_scaling": {"factor": 4}, "num_experts": 8, "hidden_size": -1}
    raw["audio_encoder_config"] |= {"quantization_config": 2, "n_mels": "many"}
    with pytest.raises(ConfigError) as caught:
        StepAudio2Config.from_hf(raw)
    assert len(str(caught.value)) <= 480  # of a longer message the beginning and the end are shown
    (message,) = caught.value.args
    for part in (
        "vocab_size must be",
        "rope_scaling={'factor': 4}",
        "num_experts=8",
        "quantization_config=2",
        "hidden_size must be",
        "n_mels must be",
        "llm_dim=3584 and hidden_size=-1",
    ):
        assert part in message


def test_flat_form_is_checked_as_well():
    message = refused(changed(LARGE, "rope_scaling", {"factor": 4}) | {"num_experts": 8})
    assert "rope_scaling={'factor': 4}" in message
    assert "num_experts=8" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"architectures": [', "not valid JSON"),
        (b"\xff\xfe", "not UTF-8 but UTF-16"),
        (b"[1, 2]", "expected a JSON object, got list"),
    ],
)
def test_file_that_is_no_config(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    assert message in refused(tmp_path)


def test_missing_file(tmp_path):
    assert "expected a Step-Audio 2 folder" in refused(tmp_path)
    assert "expected a Step-Audio 2 folder" in refused(tmp_path / "nowhere")
    (tmp_path / "config.json").mkdir()
    assert "expected a file, got a folder" in refused(tmp_path)


@pytest.mark.parametrize(
    "sizes",
    [
        {"layers": 0},
        {"embed": "64"},
        {"heads": 3},
        {"kv_heads": 3},
        {"head_dim": -2},
        {"rope_theta": "1e6"},  # what YAML makes of 1e6 without a point
    ],
)
def test_sizes_are_checked_when_made_by_hand(sizes):
    good = {"vocab": 512, "layers": 2, "embed": 64, "mlp": 160, "heads": 4, "kv_heads": 2}
    assert DecoderConfig(**good).head_dim == 16
    with pytest.raises(ConfigError):
        DecoderConfig(**good | sizes)


def test_an_adapter_of_another_width_survives():
    """The released code has 2048 only, so its config.json has no key for it."""
    cfg = StepAudio2Config.preset("smoke")
    raw = cfg.to_hf()
    assert raw["audio_encoder_config"]["adapter_hidden"] == cfg.adapter.hidden == 128
    assert StepAudio2Config.from_hf(raw).adapter == cfg.adapter
    assert "adapter_hidden" not in StepAudio2Config.preset("mini").to_hf()["audio_encoder_config"]

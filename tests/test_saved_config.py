"""config.json as `save_pretrained` of several versions of transformers makes it."""

import pytest

from sa2jax.config import AudioEncoderConfig, DecoderConfig, StepAudio2Config

# What `save_pretrained` made of tests/golden/micro/llm/config.json, by the release's class.
TEXT_4_49 = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "max_position_embeddings": 1024,
    "model_type": "qwen2",
    "num_attention_groups": 2,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 512,
}
AUDIO_4_49 = {
    "llm_dim": 64,
    "model_type": "step_audio_2_encoder",
    "n_audio_head": 4,
    "n_audio_layer": 2,
    "n_audio_state": 48,
    "n_codebook_size": 4096,
}
GENERIC_5 = {  # of every config class
    "_name_or_path": "",
    "architectures": None,
    "chunk_size_feed_forward": 0,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "output_attentions": False,
    "output_hidden_states": False,
    "problem_type": None,
    "return_dict": True,
}
TEXT_5 = {
    **{k: v for k, v in TEXT_4_49.items() if k not in ("rope_theta", "torch_dtype")},
    **GENERIC_5,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "dtype": "bfloat16",
    "eos_token_id": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "layer_types": ["full_attention", "full_attention"],
    "max_window_layers": 28,
    "pad_token_id": None,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
}
AUDIO_5 = {
    **AUDIO_4_49,
    **GENERIC_5,
    "adapter_stride": 2,
    "dtype": None,
    "kernel_size": 3,
    "n_audio_ctx": 1500,
    "n_mels": 128,
}
SAVED = {
    "4.49.0": (TEXT_4_49, AUDIO_4_49, {"torch_dtype": "bfloat16"}),
    "5.24.0": (TEXT_5, AUDIO_5, {"dtype": "bfloat16"}),
}


def saved_by(version: str) -> dict:
    text, audio, top = SAVED[version]
    return {
        "architectures": ["StepAudio2ForCausalLM"],
        "audio_encoder_config": audio,
        "auto_map": {"AutoConfig": "configuration_step_audio_2.StepAudio2Config"},
        "model_type": "step_audio_2",
        "text_config": text,
        "transformers_version": version,
        **top,
    }


@pytest.mark.parametrize("version", SAVED)
def test_what_save_pretrained_makes_of_a_config(version):
    raw = saved_by(version)
    cfg = StepAudio2Config.from_hf(raw)
    assert cfg == StepAudio2Config(
        decoder=DecoderConfig(
            vocab=512, layers=2, embed=64, mlp=160, heads=4, kv_heads=2, max_positions=1024
        ),
        audio_encoder=AudioEncoderConfig(mels=128, layers=2, embed=48, heads=4),
    )
    again = cfg.to_hf()
    assert StepAudio2Config.from_hf(again) == cfg
    for section in ("text_config", "audio_encoder_config"):  # nothing that was there is lost
        assert all(again[section][key] == value for key, value in raw[section].items())

"""The conversion table of Step-Audio 2's language side."""

from sa2jax.config import StepAudio2Config
from sa2jax.convert import whisper
from sa2jax.convert.rules import Rule, Split, Transpose, rule


def llm_rules(cfg: StepAudio2Config) -> list[Rule]:
    """The table for encoder, adapter and decoder: released name, our leaf, what happens between."""
    d, e = cfg.decoder, cfg.audio_encoder
    q, kv = (d.heads, d.head_dim), (d.kv_heads, d.head_dim)
    conv = Transpose(2, 1, 0)  # torch keeps [out, in, time]
    dec, hf_dec = "decoder.layers", "model.layers.{layer}"
    enc, hf_enc = "audio_encoder.layers", "encoder.blocks.{layer}"
    return [
        rule("model.embed_tokens.weight", "decoder.table"),
        rule(f"{hf_dec}.input_layernorm.weight", f"{dec}.attn_norm.scale"),
        rule(f"{hf_dec}.self_attn.q_proj.weight", f"{dec}.attn.q.kernel", Split(0, q)),
        rule(f"{hf_dec}.self_attn.q_proj.bias", f"{dec}.attn.q.bias", Split(0, q)),
        rule(f"{hf_dec}.self_attn.k_proj.weight", f"{dec}.attn.k.kernel", Split(0, kv)),
        rule(f"{hf_dec}.self_attn.k_proj.bias", f"{dec}.attn.k.bias", Split(0, kv)),
        rule(f"{hf_dec}.self_attn.v_proj.weight", f"{dec}.attn.v.kernel", Split(0, kv)),
        rule(f"{hf_dec}.self_attn.v_proj.bias", f"{dec}.attn.v.bias", Split(0, kv)),
        rule(f"{hf_dec}.self_attn.o_proj.weight", f"{dec}.attn.o.kernel"),
        rule(f"{hf_dec}.post_attention_layernorm.weight", f"{dec}.mlp_norm.scale"),
        rule(f"{hf_dec}.mlp.gate_proj.weight", f"{dec}.mlp.gate.kernel"),
        rule(f"{hf_dec}.mlp.up_proj.weight", f"{dec}.mlp.up.kernel"),
        rule(f"{hf_dec}.mlp.down_proj.weight", f"{dec}.mlp.down.kernel"),
        rule("model.norm.weight", "decoder.norm.scale"),
        rule("lm_head.weight", "decoder.head.kernel"),
        *whisper.conv_rules("encoder.", "audio_encoder."),
        rule("encoder.positional_embedding.weight", "audio_encoder.positions"),
        *whisper.attention_rules(hf_enc, enc, (e.heads, e.head_dim)),
        *whisper.mlp_rules(hf_enc, enc, f"{enc}.mlp"),
        rule("encoder.after_norm.weight", "audio_encoder.norm.scale"),
        rule("encoder.after_norm.bias", "audio_encoder.norm.bias"),
        rule("adapter.conv.weight", "adapter.conv.kernel", conv),
        rule("adapter.conv.bias", "adapter.conv.bias"),
        rule("adapter.linear1.weight", "adapter.up.kernel"),
        rule("adapter.linear1.bias", "adapter.up.bias"),
        rule("adapter.linear2.weight", "adapter.down.kernel"),
        rule("adapter.linear2.bias", "adapter.down.bias"),
    ]

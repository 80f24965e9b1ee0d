"""The conversion table of Step-Audio 2's language side."""

from sa2jax.config import StepAudio2Config
from sa2jax.convert.rules import Rule, Split, Transpose, rule


def llm_rules(cfg: StepAudio2Config) -> list[Rule]:
    """The table for encoder, adapter and decoder: released name, our leaf, what happens between."""
    d, e = cfg.decoder, cfg.audio_encoder
    q, kv, heads = (d.heads, d.head_dim), (d.kv_heads, d.head_dim), (e.heads, e.head_dim)
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
        rule("encoder.conv1.weight", "audio_encoder.conv1.kernel", conv),
        rule("encoder.conv1.bias", "audio_encoder.conv1.bias"),
        rule("encoder.conv2.weight", "audio_encoder.conv2.kernel", conv),
        rule("encoder.conv2.bias", "audio_encoder.conv2.bias"),
        rule("encoder.positional_embedding.weight", "audio_encoder.positions"),
        rule(f"{hf_enc}.attn_ln.weight", f"{enc}.attn_norm.scale"),
        rule(f"{hf_enc}.attn_ln.bias", f"{enc}.attn_norm.bias"),
        rule(f"{hf_enc}.attn.query.weight", f"{enc}.attn.q.kernel", Split(0, heads)),
        rule(f"{hf_enc}.attn.query.bias", f"{enc}.attn.q.bias", Split(0, heads)),
        rule(f"{hf_enc}.attn.key.weight", f"{enc}.attn.k.kernel", Split(0, heads)),
        rule(f"{hf_enc}.attn.value.weight", f"{enc}.attn.v.kernel", Split(0, heads)),
        rule(f"{hf_enc}.attn.value.bias", f"{enc}.attn.v.bias", Split(0, heads)),
        rule(f"{hf_enc}.attn.out.weight", f"{enc}.attn.o.kernel"),
        rule(f"{hf_enc}.attn.out.bias", f"{enc}.attn.o.bias"),
        rule(f"{hf_enc}.mlp_ln.weight", f"{enc}.mlp_norm.scale"),
        rule(f"{hf_enc}.mlp_ln.bias", f"{enc}.mlp_norm.bias"),
        rule(f"{hf_enc}.mlp.0.weight", f"{enc}.mlp.up.kernel"),
        rule(f"{hf_enc}.mlp.0.bias", f"{enc}.mlp.up.bias"),
        rule(f"{hf_enc}.mlp.2.weight", f"{enc}.mlp.down.kernel"),
        rule(f"{hf_enc}.mlp.2.bias", f"{enc}.mlp.down.bias"),
        rule("encoder.after_norm.weight", "audio_encoder.norm.scale"),
        rule("encoder.after_norm.bias", "audio_encoder.norm.bias"),
        rule("adapter.conv.weight", "adapter.conv.kernel", conv),
        rule("adapter.conv.bias", "adapter.conv.bias"),
        rule("adapter.linear1.weight", "adapter.up.kernel"),
        rule("adapter.linear1.bias", "adapter.up.bias"),
        rule("adapter.linear2.weight", "adapter.down.kernel"),
        rule("adapter.linear2.bias", "adapter.down.bias"),
    ]

"""Conversion tables of layers of Whisper's form, which several networks have.

They are those of Step-Audio 2's audio encoder and of the S3 speech tokenizer.
"""

from sa2jax.convert.rules import Rule, Split, Transpose, rule


def conv_rules(source: str, leaf: str) -> list[Rule]:
    """The two convolutions before the layers.

    Args:
        source: beginning of the released names.
        leaf: beginning of our leaves.
    """
    conv = Transpose(2, 1, 0)  # torch keeps [out, in, time]
    return [
        rule(f"{source}conv1.weight", f"{leaf}conv1.kernel", conv),
        rule(f"{source}conv1.bias", f"{leaf}conv1.bias"),
        rule(f"{source}conv2.weight", f"{leaf}conv2.kernel", conv),
        rule(f"{source}conv2.bias", f"{leaf}conv2.bias"),
    ]


def attention_rules(source: str, leaf: str, heads: tuple[int, int]) -> list[Rule]:
    """The attention of all layers and the norm before it; keys have no bias.

    Args:
        source: released name of a layer, with `{layer}`.
        leaf: our name of the layers.
        heads: how many heads, and their width.
    """
    split = Split(0, heads)
    return [
        rule(f"{source}.attn_ln.weight", f"{leaf}.attn_norm.scale"),
        rule(f"{source}.attn_ln.bias", f"{leaf}.attn_norm.bias"),
        rule(f"{source}.attn.query.weight", f"{leaf}.attn.q.kernel", split),
        rule(f"{source}.attn.query.bias", f"{leaf}.attn.q.bias", split),
        rule(f"{source}.attn.key.weight", f"{leaf}.attn.k.kernel", split),
        rule(f"{source}.attn.value.weight", f"{leaf}.attn.v.kernel", split),
        rule(f"{source}.attn.value.bias", f"{leaf}.attn.v.bias", split),
        rule(f"{source}.attn.out.weight", f"{leaf}.attn.o.kernel"),
        rule(f"{source}.attn.out.bias", f"{leaf}.attn.o.bias"),
    ]


def mlp_rules(source: str, leaf: str, mlp: str) -> list[Rule]:
    """The MLP of all layers and the norm before it.

    Args:
        source: released name of a layer, with `{layer}`.
        leaf: our name of the layers.
        mlp: our name of what holds `up` and `down`.
    """
    return [
        rule(f"{source}.mlp_ln.weight", f"{leaf}.mlp_norm.scale"),
        rule(f"{source}.mlp_ln.bias", f"{leaf}.mlp_norm.bias"),
        rule(f"{source}.mlp.0.weight", f"{mlp}.up.kernel"),
        rule(f"{source}.mlp.0.bias", f"{mlp}.up.bias"),
        rule(f"{source}.mlp.2.weight", f"{mlp}.down.kernel"),
        rule(f"{source}.mlp.2.bias", f"{mlp}.down.bias"),
    ]

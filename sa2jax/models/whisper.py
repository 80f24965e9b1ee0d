"""What networks of Whisper's form have in common: the audio encoder and the S3 speech tokenizer."""

from flax import nnx

from sa2jax.nn import Linear, Policy


class AttentionProjections(nnx.Module):
    """Queries, keys, values and output of an attention; the key projection has no bias.

    Args:
        embed: width of what it reads and writes.
        heads: how many heads.
        head_dim: width of a head.
        policy: dtypes.
        rngs: source of randomness.
    """

    def __init__(self, embed: int, heads: int, head_dim: int, *, policy: Policy, rngs: nnx.Rngs):
        outside, inside = {"embed": embed}, {"heads": heads, "head_dim": head_dim}
        self.q = Linear(outside, inside, policy=policy, rngs=rngs)
        self.k = Linear(outside, inside, bias=False, policy=policy, rngs=rngs)
        self.v = Linear(outside, inside, policy=policy, rngs=rngs)
        self.o = Linear(inside, outside, policy=policy, rngs=rngs)

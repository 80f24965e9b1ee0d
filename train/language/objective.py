"""Next-token cross-entropy, a chunk of positions at a time.

A vocabulary of 158 720 words makes 2.4 GiB of float32 logits out of one row of 4096 positions. So
positions are taken a chunk at a time, and a gradient computes each chunk's logits a second time.

On a mesh every group of rows has a head of its own, a copy: its gradient is added up over chunks
where it is made, and over groups once at the end, not once a chunk.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sa2jax.sharding import axis_size, shard

LOSS_CHUNK = 512  # positions of each row whose logits are held at a time
Head = Callable[[Float[Array, "B C D"]], Float[Array, "B C V"]]


@partial(
    jax.tree_util.register_dataclass, data_fields=["loss", "correct", "weight"], meta_fields=[]
)
@dataclass(frozen=True)
class LossSums:
    """What is exact to add over batches and devices; means are made of it at the end.

    Attributes:
        loss: weighted sum of negative log-likelihoods, nats.
        correct: weighted count of targets that no other word outscored.
        weight: sum of weights.
    """

    loss: Float[Array, ""]
    correct: Float[Array, ""]
    weight: Float[Array, ""]

    def __add__(self, other: "LossSums") -> "LossSums":
        return LossSums(
            self.loss + other.loss, self.correct + other.correct, self.weight + other.weight
        )

    def means(self) -> dict[str, Float[Array, ""]]:
        """`loss` and `accuracy` per unit of weight; 0 where nothing has weight."""
        weight = jnp.where(self.weight > 0, self.weight, 1)
        return {"loss": self.loss / weight, "accuracy": self.correct / weight}


def next_token_loss(
    head: Head,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    metric_masks: Mapping[str, Bool[Array, "B T"]] | None = None,
    loss_chunk: int = LOSS_CHUNK,
) -> tuple[Float[Array, ""], dict[str, LossSums]]:
    """The weighted sum of all positions' losses, and what there is to report.

    Args:
        head: hidden states to logits; a pytree, such as the module `Decoder.head`.
        hidden: normed hidden states.
        targets: the token that follows each position.
        weights: of each position; 0 where nothing is to be learnt.
        metric_masks: positions to report apart, by name, such as text and audio.
        loss_chunk: positions of each row whose logits are held at a time.

    Returns:
        The sum to minimise, and `LossSums` of `all` positions and of each mask.
    """
    loss, hit = token_losses(head, hidden, targets, loss_chunk=loss_chunk)
    weights = weights.astype(jnp.float32)
    marked = {"all": jnp.ones_like(targets, bool), **(metric_masks or {})}
    sums = {}
    for name, mask in marked.items():
        kept = jnp.where(mask, weights, 0)
        sums[name] = LossSums(jnp.sum(kept * loss), jnp.sum(kept * hit), jnp.sum(kept))
    return sums["all"].loss, sums


def token_losses(
    head: Head,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    *,
    loss_chunk: int = LOSS_CHUNK,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """The loss of each position in nats, and whether no other word had a higher score."""
    batch, steps, _ = hidden.shape
    chunk = min(loss_chunk, steps)
    more = -steps % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, more), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, more)))
    groups = axis_size("batch")
    groups = groups if batch % groups == 0 else 1

    def chunks(x):  # [B, T, ...] to [T/C, G, B/G, C, ...]
        return jnp.moveaxis(x.reshape(groups, batch // groups, -1, chunk, *x.shape[2:]), 2, 0)

    @partial(jax.checkpoint, prevent_cse=False)
    def one(heads, hidden, targets):
        hidden = shard(hidden, "batch", None, None, None)
        logits = jax.vmap(lambda head, x: head(x))(heads, hidden).astype(jnp.float32)
        logits = shard(logits, "batch", None, None, "vocab")
        # A gather would bring a split vocabulary together.
        words = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        own = jnp.sum(jnp.where(words == targets[..., None], logits, 0), axis=-1)
        best = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
        total = best + jnp.log(jnp.sum(jnp.exp(logits - best[..., None]), axis=-1))
        return total - own, own >= best

    with jax.named_scope("loss"):
        heads = _head_per_group(head, groups, hidden.dtype)
        found = jax.lax.map(lambda xs: one(heads, *xs), (chunks(hidden), chunks(targets)))

    def join(x):
        return jnp.moveaxis(x, 0, 2).reshape(batch, -1)[:, :steps]

    return join(found[0]), join(found[1])


def _head_per_group(head: Head, groups: int, dtype: DTypeLike) -> Head:
    """The head once for each group of rows, on the group's devices: leaves are [G, ...]."""

    def copy(leaf):
        axes, value = (None,) * leaf.ndim, leaf
        if isinstance(leaf, nnx.Variable):
            # Rows take the devices over which an axis of width would be split.
            value = leaf[...]
            axes = tuple(None if axis == "embed" else axis for axis in leaf.get_metadata("axes"))
        if value.ndim > 1 and jnp.issubdtype(value.dtype, jnp.floating):
            value = value.astype(dtype)  # as its product will: fewer bytes to copy
        value = shard(jnp.broadcast_to(value, (groups, *value.shape)), "batch", *axes)
        return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value

    return jax.tree.map(copy, head, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))

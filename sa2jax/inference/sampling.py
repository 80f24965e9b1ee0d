"""From logits to the next token: repetition penalty, temperature, top-k, top-p, in that order.

Semantics follow transformers' logits processors, which the official code samples with: the penalty
covers the prompt too, top-k keeps every token that ties with the k-th, and top-p fills up from the
most likely token with ties taken from the highest id down.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sa2jax.errors import PromptError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token (greedy).
        top_k: keep the k most likely tokens, 0 for all. 50 is what the official code uses whenever
            it samples: transformers turns it on by default.
        top_p: keep the most likely tokens that together reach this probability.
        repetition_penalty: makes every token of prompt and reply less likely, 1 for none.
    """

    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        limits = (
            (self.temperature >= 0, "temperature", "at least 0"),
            (self.top_k >= 0, "top_k", "at least 0"),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1"),
            (self.repetition_penalty > 0, "repetition_penalty", "above 0"),
        )
        for valid, name, expected in limits:
            if not valid:
                raise PromptError(f"{name}={getattr(self, name)}: expected {expected}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0

    def arrays(self) -> "SamplingArrays":
        """These settings for a compiled program."""
        return SamplingArrays(
            temperature=np.float32(1.0 if self.greedy else self.temperature),
            top_p=np.float32(self.top_p),
            repetition_penalty=np.float32(self.repetition_penalty),
            top_k=self.top_k,
            greedy=self.greedy,
            nucleus=self.top_p < 1,
        )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_p", "repetition_penalty"],
    meta_fields=["top_k", "greedy", "nucleus"],
)
@dataclass(frozen=True, kw_only=True)
class SamplingArrays:
    """`SamplingParams` as a pytree: arrays that change freely, and choices that shape the program.

    Attributes:
        temperature: divides the logits.
        top_p: probability mass that is kept.
        repetition_penalty: 1 for none.
        top_k: candidates that are kept, 0 for all (static).
        greedy: take the most likely token (static).
        nucleus: whether top-p applies (static).
    """

    temperature: Float[Array, ""] | np.float32
    top_p: Float[Array, ""] | np.float32
    repetition_penalty: Float[Array, ""] | np.float32
    top_k: int
    greedy: bool
    nucleus: bool


def penalise(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, ""] | np.float32
) -> Float[Array, "B V"]:
    """Divide positive and multiply negative logits of the tokens seen so far."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Set to −inf what is below the k-th largest logit."""
    threshold = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits < threshold, -jnp.inf, logits)


def keep_top_p(
    logits: Float[Array, "B V"], p: Float[Array, ""] | np.float32, among: int = 0
) -> Float[Array, "B V"]:
    """Keep the most likely tokens until their probability reaches p; at least one.

    Args:
        logits: may hold −inf for tokens already ruled out.
        p: the probability to reach.
        among: how many of the largest logits to sort, when top-k has ruled out the rest but for
            ties with the last of them; 0 sorts all.
    """
    size = logits.shape[-1]
    ordered = jax.lax.top_k(logits, min(among, size) if among else size)[0]
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chances = jnp.exp(ordered - total)
    before = jnp.cumsum(chances, axis=-1) - chances  # probability of all more likely tokens
    kept = (before < p).at[:, 0].set(True)
    last = jnp.sum(kept, axis=-1, keepdims=True) - 1
    edge = jnp.take_along_axis(ordered, last, axis=-1)  # the smallest logit that stays
    # Of several tokens at the edge only as many stay as fit, those with the highest ids first.
    above = jnp.sum(jnp.where(logits > edge, jnp.exp(logits - total), 0), -1, keepdims=True)
    ties = logits == edge
    rank = jnp.cumsum(ties[:, ::-1], axis=-1)[:, ::-1] - 1
    fits = above + rank * jnp.exp(edge - total) < p
    first = jnp.all(logits <= edge, axis=-1, keepdims=True) & (rank == 0)
    return jnp.where((logits > edge) | (ties & (fits | first)), logits, -jnp.inf)


def process(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], sampling: SamplingArrays
) -> Float[Array, "B V"]:
    """All of the above in the official order; −inf marks tokens that cannot be drawn."""
    logits = penalise(logits, seen, sampling.repetition_penalty)
    if sampling.greedy:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.nucleus:
        logits = keep_top_p(logits, sampling.top_p, sampling.top_k)
    return logits


def sample(
    keys: PRNGKeyArray,
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    sampling: SamplingArrays,
) -> Int[Array, "B"]:
    """The next token of each row, drawn with the row's own key."""
    with jax.named_scope("sample"):
        logits = process(logits, seen, sampling)
        if sampling.greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        draw = jax.vmap(jax.random.categorical)
        return draw(keys, logits).astype(jnp.int32)

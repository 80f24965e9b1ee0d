"""From logits to the next token: repetition penalty, temperature, top-k, top-p, in that order.

Semantics follow transformers' logits processors, which the official code samples with: the penalty
covers the prompt too, top-k keeps every token that ties with the k-th, and top-p fills up from the
most likely token with ties taken from the highest id down. All settings are data, one of each per
row: no request compiles anything, and none waits for another's settings.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sa2jax.errors import PromptError

SORTED = 64  # logits that are sorted where that is enough


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


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_k", "top_p", "repetition_penalty"],
    meta_fields=[],
)
@dataclass(frozen=True, kw_only=True)
class SamplingArrays:
    """`SamplingParams` of each row of a batch, a pytree: none of them changes the program.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: candidates that are kept, 0 for all.
        top_p: probability mass that is kept.
        repetition_penalty: 1 for none.
    """

    temperature: Float[Array, "B"] | np.ndarray
    top_k: Int[Array, "B"] | np.ndarray
    top_p: Float[Array, "B"] | np.ndarray
    repetition_penalty: Float[Array, "B"] | np.ndarray

    @classmethod
    def of(cls, rows: Sequence[SamplingParams]) -> Self:
        """The settings of some rows."""

        def floats(numbers: Iterable[float]) -> np.ndarray:
            return np.fromiter(numbers, np.float32)

        return cls(
            temperature=floats(row.temperature for row in rows),
            top_k=np.fromiter((row.top_k for row in rows), np.int32),
            top_p=floats(row.top_p for row in rows),
            repetition_penalty=floats(row.repetition_penalty for row in rows),
        )

    @property
    def greedy(self) -> Bool[Array, "B"]:
        """Rows whose most likely token is taken."""
        return jnp.asarray(self.temperature) == 0

    @property
    def needs_full_sort(self) -> Bool[Array, "B"]:
        """Rows whose candidates are not among the `SORTED` most likely ones."""
        nucleus_of_all = (self.top_k == 0) & (self.top_p < 1)
        return ~self.greedy & ((self.top_k > SORTED) | nucleus_of_all)


def penalise(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Divide positive and multiply negative logits of the tokens seen so far."""
    by = jnp.asarray(penalty)[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * by, logits / by), logits)


def keep_top_k(
    logits: Float[Array, "B V"], k: Int[Array, "B"], ordered: Float[Array, "B S"]
) -> Float[Array, "B V"]:
    """Set to −inf what is below each row's k-th largest logit; nothing where k is 0.

    Args:
        logits: of all tokens.
        k: candidates to keep, at most S.
        ordered: the S largest logits, largest first.
    """
    place = jnp.clip(k - 1, 0, ordered.shape[-1] - 1)
    threshold = jnp.take_along_axis(ordered, place[:, None], axis=-1)
    return jnp.where((logits < threshold) & (k > 0)[:, None], -jnp.inf, logits)


def keep_top_p(
    logits: Float[Array, "B V"],
    p: Float[Array, "B"],
    k: Int[Array, "B"],
    ordered: Float[Array, "B S"],
) -> Float[Array, "B V"]:
    """Keep the most likely tokens until their probability reaches each row's p; at least one.

    Args:
        logits: may hold −inf for tokens already ruled out.
        p: the probability to reach; all are kept where it is 1.
        k: how many of the ordered logits count, when top-k has ruled out the rest but for ties
            with the last of them; 0 for all.
        ordered: the S largest logits, largest first.
    """
    p = jnp.asarray(p)[:, None]
    rank = jnp.arange(ordered.shape[-1])
    counts = (rank < k[:, None]) | (k == 0)[:, None]
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chances = jnp.where(counts, jnp.exp(ordered - total), 0)
    before = jnp.cumsum(chances, axis=-1) - chances  # probability of all more likely tokens
    kept = (counts & (before < p)).at[:, 0].set(True)
    last = jnp.sum(kept, axis=-1, keepdims=True) - 1
    edge = jnp.take_along_axis(ordered, last, axis=-1)  # the smallest logit that stays
    # Of several tokens at the edge only as many stay as fit, those with the highest ids first.
    above = jnp.sum(jnp.where(logits > edge, jnp.exp(logits - total), 0), -1, keepdims=True)
    ties = logits == edge
    later = jnp.cumsum(ties[:, ::-1], axis=-1)[:, ::-1] - 1
    fits = above + later * jnp.exp(edge - total) < p
    first = jnp.all(logits <= edge, axis=-1, keepdims=True) & (later == 0)
    stays = (logits > edge) | (ties & (fits | first)) | (p >= 1)
    return jnp.where(stays, logits, -jnp.inf)


def process(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], sampling: SamplingArrays
) -> Float[Array, "B V"]:
    """All of the above in the official order; −inf marks tokens that cannot be drawn.

    Of greedy rows only the penalty counts.
    """
    logits = penalise(logits, seen, jnp.asarray(sampling.repetition_penalty))
    return _restricted(logits, sampling, full=True)


def sample(
    keys: PRNGKeyArray,
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    sampling: SamplingArrays,
    running: Bool[Array, "B"] | None = None,
) -> Int[Array, "B"]:
    """The next token of each row, drawn with the row's own key and settings.

    What no row needs is not computed; a row's token does not depend on the settings of others.

    Args:
        keys: random key of each row.
        logits: scores of the next token.
        seen: tokens of prompt and reply.
        sampling: settings of each row.
        running: rows whose token is wanted, by default all.
    """
    drawn = ~sampling.greedy if running is None else ~sampling.greedy & running
    full = sampling.needs_full_sort if running is None else sampling.needs_full_sort & running
    with jax.named_scope("sample"):
        logits = penalise(logits, seen, jnp.asarray(sampling.repetition_penalty))
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)

        def draw(logits, *, full: bool):
            allowed = _restricted(logits, sampling, full=full)
            token = jax.vmap(jax.random.categorical)(keys, allowed).astype(jnp.int32)
            return jnp.where(sampling.greedy, best, token)

        cases = (lambda _: best, partial(draw, full=False), partial(draw, full=True))
        needed = jnp.any(drawn).astype(jnp.int32) + jnp.any(full).astype(jnp.int32)
        return jax.lax.switch(needed, cases, logits)


def _restricted(
    logits: Float[Array, "B V"], sampling: SamplingArrays, *, full: bool
) -> Float[Array, "B V"]:
    """Logits over temperature, −inf where top-k or top-p rule a token out.

    With `full` also rows that need all logits sorted get theirs; the other rows are as without.
    """
    greedy = sampling.greedy
    scaled = logits / jnp.where(greedy, 1.0, jnp.asarray(sampling.temperature))[:, None]
    k, p = jnp.where(greedy, 0, jnp.asarray(sampling.top_k)), jnp.asarray(sampling.top_p)
    p = jnp.where(greedy, 1.0, p)

    def among(size: int) -> Float[Array, "B V"]:
        ordered = jax.lax.top_k(scaled, min(size, scaled.shape[-1]))[0]
        return keep_top_p(keep_top_k(scaled, k, ordered), p, k, ordered)

    few = among(SORTED)
    if not full:
        return few
    return jnp.where(sampling.needs_full_sort[:, None], among(scaled.shape[-1]), few)

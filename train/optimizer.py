"""Optimizer: AdamW by optax, learning rates per parameter group, gradient clipping.

Parts are named by regular expressions that match the beginning of a parameter's dotted name:

    adapter   audio_encoder   decoder.table   decoder.head   decoder.layers

Frozen parts have neither gradients nor moments: they are split off before either is made.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sa2jax.errors import TrainError
from sa2jax.nn import Params

# The leaves that are matrices. Stacked vectors have several dimensions too, so names tell.
MATRICES = ("kernel", "table", "lora_a", "lora_b")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up and a decaying rate.

    Attributes:
        learning_rate: learning rate after warm-up.
        final_fraction: share of it that is left after the last step.
        warmup_steps: steps of linear warm-up.
        steps: steps in all.
        schedule: of the decay, a half `cosine` or `linear`.
        learning_rate_overrides: other rates by part; the first match counts, and 0 freezes.
        betas: decay of the first and second moment.
        eps: added to the square root of the second moment.
        weight_decay: weight decay of matrices; vectors have none.
        max_grad_norm: largest norm of the whole gradient, None for any.
        moment_dtype: dtype of moments, by default that of their parameters. bfloat16 keeps 8 bits:
            a second moment with a decay above 0.99 would stand still in it.
    """

    learning_rate: float = 1e-5
    final_fraction: float = 0.1
    warmup_steps: int = 100
    steps: int = 1000
    schedule: Literal["cosine", "linear"] = "cosine"
    learning_rate_overrides: Mapping[str, float] = field(default_factory=dict, hash=False)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float | None = 1.0
    moment_dtype: DTypeLike | None = None

    def learning_rate_of(self, name: str) -> float:
        """The learning rate after warm-up of the parameter of this dotted name."""
        found = (
            rate for part, rate in self.learning_rate_overrides.items() if re.match(part, name)
        )
        return next(found, self.learning_rate)


@dataclass(frozen=True)
class Optimizer:
    """What a train step needs to know.

    Attributes:
        transform: of the gradients of trained parameters, and only of those.
        schedule: learning rate of each step, of parts without a rate of their own.
        is_trained: whether the parameter of a dotted name is trained.
    """

    transform: optax.GradientTransformation
    schedule: Callable[[Int[Array, ""]], Float[Array, ""]]
    is_trained: Callable[[str], bool]

    def partition(self, params: Params) -> tuple[Params, Params]:
        """Trained and frozen leaves of parameters, or of any tree like them.

        Raises:
            TrainError: if nothing is trained, or if integers would be.
        """
        trained, frozen = partition(params, self.is_trained)
        if not trained:
            raise TrainError(
                "nothing to train: every part has a learning rate of 0. Give one another in "
                "`learning_rate_overrides`"
            )
        for path, leaf in jax.tree.leaves_with_path(trained):
            if not jnp.issubdtype(getattr(leaf, "dtype", jnp.float32), jnp.floating):
                raise TrainError(
                    f"{param_name(path)} is {leaf.dtype} and cannot be trained: load the model in "
                    "bfloat16 or float32, or train LoRA alone"
                )
        return trained, frozen


def make_optimizer(config: OptimizerConfig) -> Optimizer:
    """AdamW as the config says.

    Raises:
        TrainError: if the numbers make no schedule.
    """
    if config.schedule not in ("cosine", "linear"):
        raise TrainError(f"schedule {config.schedule!r}: expected cosine or linear")
    if not (
        0 <= config.warmup_steps <= config.steps and config.steps > 0 and config.learning_rate > 0
    ):
        raise TrainError(
            f"expected learning_rate above 0 and 0 <= warmup_steps <= steps, got learning_rate "
            f"{config.learning_rate}, warmup_steps {config.warmup_steps}, steps {config.steps}"
        )

    def schedule(step):  # counts from 0: the first step already moves, the last still does
        warm = jnp.minimum((step + 1) / max(config.warmup_steps, 1), 1)
        done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
        done = jnp.clip(done, 0, 1)
        left = 1 - done if config.schedule == "linear" else (1 + jnp.cos(jnp.pi * done)) / 2
        return (
            config.learning_rate
            * warm
            * (config.final_fraction + (1 - config.final_fraction) * left)
        )

    def of_part(updates, params):
        del params

        def share(path, x):
            return x * (config.learning_rate_of(param_name(path)) / config.learning_rate)

        return jax.tree.map_with_path(share, updates)

    first, second = config.betas
    transform = optax.chain(
        optax.stateless(lambda updates, params: _to_float32(updates)),
        optax.identity()
        if config.max_grad_norm is None
        else optax.clip_by_global_norm(config.max_grad_norm),
        _with_state_dtype(config.moment_dtype, optax.scale_by_adam(first, second, config.eps)),
        optax.add_decayed_weights(config.weight_decay, mask=matrix_mask),
        optax.stateless(of_part),
        optax.scale_by_learning_rate(schedule),
    )
    return Optimizer(transform, schedule, lambda name: config.learning_rate_of(name) > 0)


def apply_updates(params: Params, updates: Params, step: Int[Array, ""]) -> Params:
    """Parameters plus updates, with stochastic rounding to bfloat16.

    The nearest bfloat16 to a sum is the parameter itself if the update is less than about 1/256 of
    it, as nearly all are at usual rates: nothing would be learnt. By chance a sum comes out right
    on average.
    """
    leaves, structure = jax.tree.flatten(params)
    moved = []
    for place, (leaf, update) in enumerate(zip(leaves, jax.tree.leaves(updates), strict=True)):
        total = leaf.astype(jnp.float32) + update.astype(jnp.float32)
        if leaf.dtype == jnp.bfloat16:
            key = jax.random.fold_in(jax.random.key(step), place)
            moved.append(stochastic_round(total, key))
        else:
            moved.append(total.astype(leaf.dtype))
    return jax.tree.unflatten(structure, moved)


def stochastic_round(x: Float[Array, "*B"], key: Array) -> Float[Array, "*B"]:
    """bfloat16 neighbours of float32 numbers, the nearer the likelier."""
    # bfloat16 is the upper half of float32: whatever the lower half carries over, it rounds up.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return upper.astype(jnp.bfloat16)


# --- parts of a plain dict --------------------------------------------------------------------


def param_name(path: Any) -> str:
    """The dotted name of a leaf."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def partition(
    tree: Params, chosen: Callable[[str], bool], prefix: str = ""
) -> tuple[Params, Params]:
    """Two nested dicts: the leaves whose dotted names are chosen, and the others."""
    ours: Params = {}
    others: Params = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            inner = partition(value, chosen, f"{name}.")
            for part, found in zip((ours, others), inner, strict=True):
                if found:
                    part[key] = found
        else:
            (ours if chosen(name) else others)[key] = value
    return ours, others


def combine(first: Params, second: Params) -> Params:
    """What `partition` split."""
    tree = dict(first)
    for key, value in second.items():
        tree[key] = combine(tree[key], value) if key in tree else value
    return tree


def matrix_mask(tree: Any) -> Any:
    """True for the leaves that are matrices, in the same tree."""
    return jax.tree.map_with_path(lambda path, _: param_name(path[-1:]) in MATRICES, tree)


def _to_float32(tree: Any) -> Any:
    def floating(x):
        return jnp.issubdtype(x.dtype, jnp.floating)

    return jax.tree.map(lambda x: x.astype(jnp.float32) if floating(x) else x, tree)


def _with_state_dtype(
    dtype: DTypeLike | None, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The same computation in float32 with its state in another dtype between steps."""

    def init(params):
        return inner.init(optax.tree.cast(params, dtype))

    def update(updates, state, params=None):
        updates, moved = inner.update(updates, _to_float32(state), params)
        return updates, jax.tree.map(lambda new, old: new.astype(old.dtype), moved, state)

    return optax.GradientTransformation(init, update)

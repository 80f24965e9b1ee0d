"""Train state on a mesh, and a compiled training step.

    state = init_state(model, optimizer, mesh, params)
    state, report = step(state, batch)  # the old state is used up

Parameters, gradients and moments are split alike. The steps are made in `language.step` and
`networks.step`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from sa2jax.nn import Functional, Params, unrolling
from sa2jax.sharding import use_mesh, with_shardings
from sa2jax.train.optimizer import Optimizer, apply_updates, combine

BatchT = TypeVar("BatchT")
Report = dict[str, Float[Array, ""]]  # float32 scalars of a step


@partial(
    jax.tree_util.register_dataclass, data_fields=["params", "opt_state", "step"], meta_fields=[]
)
@dataclass(frozen=True)
class TrainState:
    """All that a training carries from step to step.

    Attributes:
        params: trained and frozen, a plain nested dict.
        opt_state: optax's, of the trained ones.
        step: steps done.
    """

    params: Params
    opt_state: Any
    step: Int[Array, ""]


@dataclass(frozen=True)
class TrainStep(Generic[BatchT]):
    """A compiled step: `state, report = step(state, batch)`; the old state is used up."""

    function: Any
    mesh: Mesh | None
    unroll: bool = False

    def __call__(self, state: TrainState, batch: BatchT) -> tuple[TrainState, Report]:
        """One update.

        Returns:
            The new state, and float32 scalars to report: `loss` (nats per weight) and `accuracy`,
            those of each stream as `text/loss`, the gradient's `grad_norm` before it is
            clipped, the `learning_rate` and the batch's `target_weight`.
        """
        with use_mesh(self.mesh), unrolling(self.unroll):
            return self.function(state, batch)

    def lower(self, state: TrainState, batch: BatchT) -> Any:
        """For a state as `abstract_state` gives it and an abstract batch; then `.compile()`."""
        # Devices may be a topology's, which nothing can run on; constants are made meanwhile.
        with _abstract_mesh(self.mesh), unrolling(self.unroll):
            return self.function.lower(state, batch)


def _abstract_mesh(mesh: Mesh | None) -> AbstractContextManager[Any]:
    return nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def apply_gradient(
    optimizer: Optimizer, state: TrainState, gradient: Params
) -> tuple[TrainState, Float[Array, ""]]:
    """The state after a gradient's update, and the gradient's norm before it is clipped."""
    trained, frozen = optimizer.partition(state.params)
    with jax.named_scope("update"):
        updates, opt_state = optimizer.transform.update(gradient, state.opt_state, trained)
        trained = apply_updates(trained, cast(Params, updates), state.step)
        norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), gradient))
    return TrainState(combine(trained, frozen), opt_state, state.step + 1), norm


def jit_step(
    step: Callable[[TrainState, BatchT], tuple[TrainState, Report]],
    model: Functional[Any],
    optimizer: Optimizer,
    mesh: Mesh | None,
    *,
    unroll: bool = False,
) -> TrainStep[BatchT]:
    """A step that uses up its state and leaves the new one in the same places."""
    options: dict[str, Any] = {"donate_argnums": 0}
    if mesh is not None:
        whole = NamedSharding(mesh, PartitionSpec())
        options["out_shardings"] = (state_shardings(model, optimizer, mesh), whole)
    return TrainStep(jax.jit(step, **options), mesh, unroll)


def state_shardings(model: Functional[Any], optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """Where each leaf of a state lives: moments where their parameters do, scalars everywhere."""
    whole: Any = NamedSharding(mesh, PartitionSpec())
    places = model.shardings(mesh)
    like, split_places = (optimizer.partition(tree)[0] for tree in (model.abstract, places))
    structure, shapes = jax.tree.structure(like), [leaf.shape for leaf in jax.tree.leaves(like)]

    def are_like(node):  # a moment has a leaf of the same shape for every parameter
        if jax.tree.structure(node) != structure:
            return False
        return [leaf.shape for leaf in jax.tree.leaves(node)] == shapes

    opt_state = jax.tree.map(
        lambda node: split_places if are_like(node) else whole,
        jax.eval_shape(optimizer.transform.init, like),
        is_leaf=are_like,
    )
    return TrainState(places, opt_state, whole)


def abstract_state(
    model: Functional[Any], optimizer: Optimizer, mesh: Mesh | None = None
) -> TrainState:
    """Shapes, dtypes and places of a state, to compile a step for or read a checkpoint into."""

    def make(params):
        trained, _ = optimizer.partition(params)
        return TrainState(params, optimizer.transform.init(trained), jnp.zeros((), jnp.int32))

    state = jax.eval_shape(make, model.abstract)
    return state if mesh is None else with_shardings(state, state_shardings(model, optimizer, mesh))


def init_state(
    model: Functional[Any], optimizer: Optimizer, mesh: Mesh | None, params: Params
) -> TrainState:
    """The state before the first step.

    Args:
        model: the model's structure.
        optimizer: what is trained.
        mesh: devices; None for one.
        params: loaded parameters, moved to their places if they are not there. The first step uses
            them up.
    """
    init, step = optimizer.transform.init, jnp.zeros((), jnp.int32)
    if mesh is None:
        state = TrainState(params, jax.jit(init)(optimizer.partition(params)[0]), step)
        # Moments that are bound to no device would make the second step another program.
        return jax.device_put(state, jax.local_devices()[0])
    places = state_shardings(model, optimizer, mesh)
    params = jax.device_put(params, places.params)
    opt_state = jax.jit(init, out_shardings=places.opt_state)(optimizer.partition(params)[0])
    return TrainState(params, opt_state, jax.device_put(step, places.step))

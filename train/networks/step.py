"""The training step and the evaluation of single networks.

    step = make_loss_step(flow_loss, model, optimizer, FlowLossConfig(), mesh, seed=0)
    state, report = step(state, place_network_batch(batch, mesh))

A batch is a dataclass of arrays whose first axis is that of its rows. A loss is a function of a
structure, its parameters, a batch, the key of all that is drawn, and how is taught; it gives a
number to make small and others to report. Losses are in `flow`, `vocoder`, `speech_tokenizer`,
`audio_encoder` and `speaker_encoder`.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from sa2jax.nn import Functional, Params
from sa2jax.sharding import sharding_of, use_mesh, with_shardings
from sa2jax.train.optimizer import Optimizer, combine
from sa2jax.train.state import Report, TrainState, TrainStep, apply_gradient, jit_step

TRACES: Counter[str] = Counter()  # how often steps and evaluations have been traced

BatchT = TypeVar("BatchT")
# Of a structure, parameters, a batch, a key, and how is taught.
LossFunction = Callable[
    [Functional[Any], Params, BatchT, Array, Any], tuple[Float[Array, ""], Report]
]


def make_loss_step(
    loss: LossFunction[BatchT],
    model: Functional[Any],
    optimizer: Optimizer,
    config: Any = None,
    mesh: Mesh | None = None,
    *,
    seed: int = 0,
    unroll: bool = False,
) -> TrainStep[BatchT]:
    """The step of a loss: `state, report = step(state, batch)`; see `train.state`.

    What is drawn depends on the seed and on `state.step`, so a run that goes on from a checkpoint
    draws what it would have drawn. The report has `loss`, `grad_norm`, `learning_rate` and what
    the loss reports.

    Args:
        loss: what is made small.
        model: the structure of the parameters.
        optimizer: what is trained, and how.
        config: how is taught; by default as the loss has it.
        mesh: devices; None for one.
        seed: of all that is drawn.
        unroll: write out layers, see `nn.unrolling`.
    """
    places = None if mesh is None else optimizer.partition(model.shardings(mesh))[0]

    def step(state: TrainState, batch: BatchT) -> tuple[TrainState, Report]:
        TRACES["step"] += 1
        trained, frozen = optimizer.partition(state.params)
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def of_trained(part):
            return loss(model, combine(part, frozen), batch, key, config)

        (value, report), gradient = jax.value_and_grad(of_trained, has_aux=True)(trained)
        if mesh is not None:
            gradient = jax.lax.with_sharding_constraint(gradient, places)
        new, norm = apply_gradient(optimizer, state, gradient)
        report = report | {
            "loss": value,
            "grad_norm": norm,
            "learning_rate": optimizer.schedule(state.step),
        }
        return new, {name: jnp.asarray(scalar, jnp.float32) for name, scalar in report.items()}

    return jit_step(step, model, optimizer, mesh, unroll=unroll)


def make_loss_evaluation(
    measure: Callable[..., Any],
    model: Functional[Any],
    config: Any = None,
    mesh: Mesh | None = None,
) -> Callable[..., Any]:
    """A loss, or what else is made of a batch, compiled for a mesh; nothing is learnt.

    Args:
        measure: a function of the same arguments as a loss.
        model: the structure of the parameters.
        config: how is taught; by default as `measure` has it.
        mesh: devices; None for one.

    Returns:
        A function of parameters, a batch on its devices, and the key of all that is drawn: None
        to draw nothing, where `measure` can.
    """

    def evaluate(params: Params, batch: Any, key: Array | None) -> Any:
        TRACES["evaluation"] += 1
        return measure(model, params, batch, key, config)

    function = jax.jit(evaluate)

    def run(params: Params, batch: Any, key: Array | None = None) -> Any:
        with use_mesh(mesh):
            return function(params, batch, key)

    return run


def place_network_batch(batch: BatchT, mesh: Mesh | None) -> BatchT:
    """A batch on its devices, split by rows; in a run of one host."""
    return jax.device_put(batch, None if mesh is None else _shardings(batch, mesh))


def abstract_network_batch(make: Callable[[], BatchT], mesh: Mesh | None) -> BatchT:
    """Shapes and places of the batch that `make` builds; nothing is allocated."""
    batch = jax.eval_shape(make)
    return batch if mesh is None else with_shardings(batch, _shardings(batch, mesh))


def _shardings(batch: Any, mesh: Mesh) -> Any:
    def rows(leaf):
        return ("batch", *(None,) * (leaf.ndim - 1))

    return jax.tree.map(lambda leaf: sharding_of(leaf.shape, rows(leaf), mesh), batch)

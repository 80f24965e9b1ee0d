"""One step of training, whole or LoRA: a pure function of state and batch, compiled for a mesh.

    optimizer = make_optimizer(OptimizerConfig(rate=1e-5, steps=1000))
    step = make_step(model, optimizer, mesh)
    state = init_state(model, optimizer, mesh, params)
    state, report = step(state, batch)  # the old state is used up

Parameters, gradients and moments are split alike, batches by rows. With a `Policy` of float32
parameters and bfloat16 computation the parameters are the master weights: each layer casts its own.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sa2jax.config import StepAudio2Config
from sa2jax.errors import TrainError
from sa2jax.models.step_audio import StepAudio2Model
from sa2jax.nn import Functional, Params, Remat, unrolling
from sa2jax.sharding import placed, shard, sharding_of, using
from sa2jax.train.objective import CHUNK, Sums, next_token_loss
from sa2jax.train.optimizer import Optimizer, apply_updates, join

TRACES: Counter[str] = Counter()  # how often a step has been traced

# Logical axes of each field of a batch; a leading axis of parts is not split.
BATCH_AXES: Mapping[str, tuple[str | None, ...]] = {
    "ids": ("batch", None),
    "targets": ("batch", None),
    "weights": ("batch", None),
    "mels": ("batch", None, None),
    "frames": ("batch", None),
    "starts": ("batch", None),
    "slots": ("batch", None),
    "streams": ("batch", None),
    "segments": ("batch", None),
    "positions": ("batch", None),
}


@partial(jax.tree_util.register_dataclass, data_fields=list(BATCH_AXES), meta_fields=[])
@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of one shape. All fields may have a leading axis [A, ...] of parts that share an update.

    Attributes:
        ids: right-padded tokens, [B, T].
        targets: the token that follows each, [B, T].
        weights: of each target in the loss, 0 for none, [B, T].
        mels: rows of log-mel frames (100 Hz) with up to N packed clips each, [C, M, L].
        frames: mel frames of each clip, 0 for none, [C, N].
        starts: where in its row each clip begins, see `AudioEncoder`, [C, N].
        slots: for each position, which frame of the clips' embeddings (flattened) stands there, −1
            for a token, see `StepAudio2Model.embed`, [B, T].
        streams: positions whose loss is reported apart, by name, [B, T] each.
        segments: which of its row's packed sequences each token belongs to, from 1; 0 for padding,
            [B, T]. Without them a row is one sequence.
        positions: of each token in its sequence, [B, T].
    """

    ids: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    mels: Float[Array, "C M L"] | None = None
    frames: Int[Array, "C N"] | None = None
    starts: Int[Array, "C N"] | None = None
    slots: Int[Array, "B T"] | None = None
    streams: dict[str, Bool[Array, "B T"]] | None = None
    segments: Int[Array, "B T"] | None = None
    positions: Int[Array, "B T"] | None = None


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


def loss_of(
    model: Functional[StepAudio2Model],
    params: Params,
    batch: Batch,
    *,
    remat: Remat | None = "full",
    chunk: int = CHUNK,
) -> tuple[Float[Array, ""], dict[str, Sums]]:
    """The sum of the losses of a batch's targets; see `objective.next_token_loss`.

    Args:
        model: the model's structure.
        params: its parameters.
        batch: rows, without an axis of parts.
        remat: what the gradient computes again, see `nn.over_layers`.
        chunk: positions of each row whose logits are held at a time.
    """
    net = model.bind(params)
    features = None
    if batch.mels is not None and batch.frames is not None:
        features = net.listen(batch.mels, batch.frames, batch.starts, remat=remat)
        # All clips on every device: a row's clips may have been heard anywhere.
        features = shard(features, None, None, None)
    x = net.embed(batch.ids, features, batch.slots)
    with jax.named_scope("decoder"):
        hidden, _ = net.decoder(
            x, segments=batch.segments, positions=batch.positions, remat=remat
        )  # fmt: skip
    return next_token_loss(
        net.decoder.head, hidden, batch.targets, batch.weights,
        streams=batch.streams, chunk=chunk,
    )  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A compiled step: `state, report = step(state, batch)`; the old state is used up."""

    function: Any
    mesh: Mesh | None
    unroll: bool = False

    def __call__(
        self, state: TrainState, batch: Batch
    ) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        """One update.

        Returns:
            The new state, and float32 scalars to report: `loss` (nats per weight) and `accuracy`,
            those of each stream as `text/loss`, the gradient's `norm` before it is clipped, the
            learning `rate` and the `weight` of the batch.
        """
        with using(self.mesh), unrolling(self.unroll):
            return self.function(state, batch)

    def lower(self, state: TrainState, batch: Batch) -> Any:
        """For arguments as `abstract_state` and `abstract_batch` give them; then `.compile()`."""
        # Devices may be a topology's, which nothing can run on; constants are made meanwhile.
        with _describing(self.mesh), unrolling(self.unroll):
            return self.function.lower(state, batch)


def _describing(mesh: Mesh | None) -> AbstractContextManager[Any]:
    return nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def make_step(
    model: Functional[StepAudio2Model],
    optimizer: Optimizer,
    mesh: Mesh | None = None,
    *,
    remat: Remat | None = "full",
    chunk: int = CHUNK,
    gradients: DTypeLike = jnp.float32,
    unroll: bool = False,
) -> Step:
    """The step of a model and an optimizer on a mesh.

    Only what the optimizer trains has gradients: with `lora.ONLY_LORA` the base is only read.

    Args:
        model: the model's structure.
        optimizer: what is trained, and how.
        mesh: devices; None for one.
        remat: what the gradient computes again, see `nn.over_layers`.
        chunk: positions of each row whose logits are held at a time.
        gradients: dtype in which those of a batch's parts are added up.
        unroll: write out layers, see `nn.unrolling`.
    """
    loss = partial(loss_of, model, remat=remat, chunk=chunk)
    places = None if mesh is None else optimizer.split(model.shardings(mesh))[0]

    def pinned(gradient: Params) -> Params:
        return gradient if mesh is None else jax.lax.with_sharding_constraint(gradient, places)

    def gradient_of(trained, frozen, part, total):
        def mean(trained):
            value, sums = loss(join(trained, frozen), part)
            return value / total, sums

        gradient, sums = jax.grad(mean, has_aux=True)(trained)
        return pinned(gradient), sums

    def step(state: TrainState, batch: Batch):
        TRACES["step"] += 1
        trained, frozen = optimizer.split(state.params)
        # The mean is over all parts and devices: what each adds is divided by the whole weight.
        weight = jnp.sum(batch.weights, dtype=jnp.float32)
        total = jnp.where(weight > 0, weight, 1)
        if batch.ids.ndim == 2:
            gradient, sums = gradient_of(trained, frozen, batch, total)
        else:

            def add(so_far, part):
                new = gradient_of(trained, frozen, part, total)
                plus = lambda old, new: old + new.astype(old.dtype)  # noqa: E731
                return jax.tree.map(plus, so_far, new), None

            like = jax.tree.map(lambda leaf: leaf[0], batch)
            like = jax.eval_shape(gradient_of, trained, frozen, like, total)
            zeros = pinned(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, gradients), like[0]))
            nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like[1])
            (gradient, sums), _ = jax.lax.scan(add, (zeros, nothing), batch)
        new, norm = updated(optimizer, state, gradient)
        report = {"norm": norm, "rate": optimizer.schedule(state.step), "weight": weight}
        for name, found in sums.items():
            start = "" if name == "all" else f"{name}/"
            report |= {f"{start}{key}": value for key, value in found.means().items()}
        report = {key: jnp.asarray(value, jnp.float32) for key, value in report.items()}
        return new, report

    return compiled(step, model, optimizer, mesh, unroll=unroll)


def updated(
    optimizer: Optimizer, state: TrainState, gradient: Params
) -> tuple[TrainState, Float[Array, ""]]:
    """The state after a gradient's update, and the gradient's norm before it is clipped."""
    trained, frozen = optimizer.split(state.params)
    with jax.named_scope("update"):
        updates, opt_state = optimizer.transform.update(gradient, state.opt_state, trained)
        trained = apply_updates(trained, updates, state.step)
        norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), gradient))
    return TrainState(join(trained, frozen), opt_state, state.step + 1), norm


def compiled(
    step: Callable[..., Any],
    model: Functional[Any],
    optimizer: Optimizer,
    mesh: Mesh | None,
    *,
    unroll: bool = False,
) -> Step:
    """A step that uses up its state and leaves the new one in the same places."""
    options: dict[str, Any] = {"donate_argnums": 0}
    if mesh is not None:
        whole = NamedSharding(mesh, PartitionSpec())
        options["out_shardings"] = (state_shardings(model, optimizer, mesh), whole)
    return Step(jax.jit(step, **options), mesh, unroll)


def make_evaluation(
    model: Functional[StepAudio2Model], mesh: Mesh | None = None, *, chunk: int = CHUNK
) -> Callable[[Params, Batch], dict[str, Sums]]:
    """What a step would report of a batch, as `Sums` to be added up; nothing is learnt.

    Args:
        model: the model's structure.
        mesh: devices; None for one.
        chunk: positions of each row whose logits are held at a time.
    """

    def evaluate(params: Params, batch: Batch) -> dict[str, Sums]:
        TRACES["evaluation"] += 1
        return loss_of(model, params, batch, remat=None, chunk=chunk)[1]

    function = jax.jit(evaluate)

    def run(params: Params, batch: Batch) -> dict[str, Sums]:
        with using(mesh):
            return function(params, batch)

    return run


# --- state and batches ------------------------------------------------------------------------


def state_shardings(
    model: Functional[StepAudio2Model], optimizer: Optimizer, mesh: Mesh
) -> TrainState:
    """Where each leaf of a state lives: moments where their parameters do, scalars everywhere."""
    whole: Any = NamedSharding(mesh, PartitionSpec())
    places = model.shardings(mesh)
    like, split_places = (optimizer.split(tree)[0] for tree in (model.abstract, places))
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
    model: Functional[StepAudio2Model], optimizer: Optimizer, mesh: Mesh | None = None
) -> TrainState:
    """Shapes, dtypes and places of a state, to compile a step for or read a checkpoint into."""

    def make(params):
        trained, _ = optimizer.split(params)
        return TrainState(params, optimizer.transform.init(trained), jnp.zeros((), jnp.int32))

    state = jax.eval_shape(make, model.abstract)
    return state if mesh is None else placed(state, state_shardings(model, optimizer, mesh))


def init_state(
    model: Functional[StepAudio2Model], optimizer: Optimizer, mesh: Mesh | None, params: Params
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
        state = TrainState(params, jax.jit(init)(optimizer.split(params)[0]), step)
        # Moments that are bound to no device would make the second step another program.
        return jax.device_put(state, jax.local_devices()[0])
    places = state_shardings(model, optimizer, mesh)
    params = jax.device_put(params, places.params)
    opt_state = jax.jit(init, out_shardings=places.opt_state)(optimizer.split(params)[0])
    return TrainState(params, opt_state, jax.device_put(step, places.step))


def batch_shardings(batch: Batch, mesh: Mesh) -> Batch:
    """Where each array of a batch goes: rows and clips are split, all else is whole."""

    def place(path, leaf):
        return sharding_of(leaf.shape, BATCH_AXES[path[0].name], mesh)

    return jax.tree.map_with_path(place, batch)


def place_batch(batch: Batch, mesh: Mesh | None) -> Batch:
    """A batch on its devices; in a multi-host run of the rows that `host_part` gives this host."""
    if mesh is None or jax.process_count() == 1:
        return jax.device_put(batch, None if mesh is None else batch_shardings(batch, mesh))

    def put(path, leaf):
        axes = BATCH_AXES[path[0].name]
        rows = leaf.ndim - len(axes)
        shape = tuple(size * (parts if axis == rows else 1) for axis, size in enumerate(leaf.shape))
        place = sharding_of(shape, axes, mesh)
        return jax.make_array_from_process_local_data(place, np.asarray(leaf), shape)

    parts = host_part(mesh, batch.ids.shape[-2] * jax.process_count())[1]
    return jax.tree.map_with_path(put, batch)


def host_part(mesh: Mesh | None, rows: int) -> tuple[int, int]:
    """Which part of a batch's rows this host has to bring, and of how many.

    Hosts whose devices share rows, as along a tensor axis, bring the same ones.

    Raises:
        TrainError: if hosts would need overlapping parts.
    """
    if mesh is None or jax.process_count() == 1:
        return 0, 1
    place = sharding_of((rows, 1), BATCH_AXES["ids"], mesh)
    found = place.addressable_devices_indices_map((rows, 1)).values()
    ranges = {index[0].indices(rows)[:2] for index in found if index is not None}
    first, last = min(start for start, _ in ranges), max(stop for _, stop in ranges)
    size = last - first
    if rows % size or first % size or sum(stop - start for start, stop in ranges) != size:
        raise TrainError(
            f"rows {first} to {last} of {rows} are on this host's devices, which is no even part: "
            "take a mesh whose data and fsdp axes follow the hosts"
        )
    return first // size, rows // size


def abstract_batch(
    cfg: StepAudio2Config,
    mesh: Mesh | None,
    rows: int,
    length: int,
    *,
    clips: int = 0,
    frames: int = 3000,
    packed: int = 0,
    parts: int = 0,
    streams: tuple[str, ...] = (),
) -> Batch:
    """A batch's shapes and places.

    Args:
        cfg: the model's sizes.
        mesh: devices; None for one.
        rows: of all devices together.
        length: tokens of each row.
        clips: rows of mel frames, of all rows of tokens together.
        frames: mel frames of each such row (100 Hz).
        packed: clips that each of them may hold; 0 where neither these nor tokens are packed.
        parts: that share one update; 0 for no axis of parts.
        streams: names of positions that are reported apart.
    """
    lead = (parts,) if parts else ()
    zeros = lambda dtype, *shape: jnp.zeros((*lead, *shape), dtype)  # noqa: E731

    def make():
        ids = zeros(jnp.int32, rows, length)
        return Batch(
            ids=ids,
            targets=ids,
            weights=zeros(jnp.float32, rows, length),
            mels=zeros(jnp.float32, clips, cfg.audio_encoder.mels, frames) if clips else None,
            frames=zeros(jnp.int32, clips, packed or 1) if clips else None,
            starts=zeros(jnp.int32, clips, packed or 1) if clips else None,
            slots=ids if clips else None,
            segments=ids if packed else None,
            positions=ids if packed else None,
            streams={name: zeros(jnp.bool_, rows, length) for name in streams} or None,
        )

    batch = jax.eval_shape(make)
    return batch if mesh is None else placed(batch, batch_shardings(batch, mesh))

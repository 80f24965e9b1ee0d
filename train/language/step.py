"""The training step, full or LoRA: a pure function of state and batch, compiled for a mesh.

    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-5, steps=1000))
    step = make_language_step(model, optimizer, mesh)
    state = init_state(model, optimizer, mesh, params)
    state, report = step(state, batch)  # the old state is used up

Parameters, gradients and moments are split alike, batches by rows. With a `Policy` of float32
parameters and bfloat16 computation the parameters are the master weights: each layer casts its own.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Generic

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sa2jax.config import StepAudio2Config
from sa2jax.errors import TrainError
from sa2jax.models.step_audio import StepAudio2Model
from sa2jax.nn import ArrayT, Functional, Params, Remat
from sa2jax.sharding import shard, sharding_of, use_mesh, with_shardings
from sa2jax.train.language.objective import LOSS_CHUNK, LossSums, next_token_loss
from sa2jax.train.optimizer import Optimizer, combine
from sa2jax.train.state import TrainState, TrainStep, apply_gradient, jit_step

TRACES: Counter[str] = Counter()  # how often a step has been traced

# Logical axes of each field of a batch; a leading axis of parts is not split.
BATCH_AXES: Mapping[str, tuple[str | None, ...]] = {
    "ids": ("batch", None),
    "targets": ("batch", None),
    "weights": ("batch", None),
    "mels": ("batch", None, None),
    "frames": ("batch", None),
    "starts": ("batch", None),
    "feature_index": ("batch", None),
    "metric_masks": ("batch", None),
    "segments": ("batch", None),
    "positions": ("batch", None),
}


@partial(jax.tree_util.register_dataclass, data_fields=list(BATCH_AXES), meta_fields=[])
@dataclass(frozen=True, kw_only=True)
class LanguageBatch(Generic[ArrayT]):
    """Rows of one shape. All fields may have a leading axis [A, ...] of parts that share an update.

    Attributes:
        ids: right-padded tokens, [B, T].
        targets: the token that follows each, [B, T].
        weights: of each target in the loss, 0 for none, [B, T].
        mels: rows of log-mel frames (100 Hz) with up to N packed clips each, [C, M, L].
        frames: mel frames of each clip, 0 for none, [C, N].
        starts: where in its row each clip begins, see `AudioEncoder`, [C, N].
        feature_index: for each position, which frame of the clips' embeddings (flattened) stands
            there, −1 for a token, see `StepAudio2Model.embed`, [B, T].
        metric_masks: positions whose loss is reported apart, by name, [B, T] each.
        segments: which of its row's packed sequences each token belongs to, from 1; 0 for padding,
            [B, T]. Without them a row is one sequence.
        positions: of each token in its sequence, [B, T].
    """

    ids: Int[ArrayT, "B T"]
    targets: Int[ArrayT, "B T"]
    weights: Float[ArrayT, "B T"]
    mels: Float[ArrayT, "C M L"] | None = None
    frames: Int[ArrayT, "C N"] | None = None
    starts: Int[ArrayT, "C N"] | None = None
    feature_index: Int[ArrayT, "B T"] | None = None
    metric_masks: dict[str, Bool[ArrayT, "B T"]] | None = None
    segments: Int[ArrayT, "B T"] | None = None
    positions: Int[ArrayT, "B T"] | None = None


def language_loss(
    model: Functional[StepAudio2Model],
    params: Params,
    batch: LanguageBatch[Array],
    *,
    remat: Remat | None = "full",
    loss_chunk: int = LOSS_CHUNK,
) -> tuple[Float[Array, ""], dict[str, LossSums]]:
    """The sum of the losses of a batch's targets; see `objective.next_token_loss`.

    Args:
        model: the model's structure.
        params: its parameters.
        batch: rows, without an axis of parts.
        remat: what the gradient computes again, see `nn.over_layers`.
        loss_chunk: positions of each row whose logits are held at a time.
    """
    net = model.bind(params)
    features = None
    if batch.mels is not None and batch.frames is not None:
        features = net.encode_audio(batch.mels, batch.frames, batch.starts, remat=remat)
        # All clips on every device: a row's clips may have been heard anywhere.
        features = shard(features, None, None, None)
    x = net.embed(batch.ids, features, batch.feature_index)
    with jax.named_scope("decoder"):
        hidden, _ = net.decoder(x, segments=batch.segments, positions=batch.positions, remat=remat)
    return next_token_loss(
        net.decoder.head,
        hidden,
        batch.targets,
        batch.weights,
        metric_masks=batch.metric_masks,
        loss_chunk=loss_chunk,
    )


def make_language_step(
    model: Functional[StepAudio2Model],
    optimizer: Optimizer,
    mesh: Mesh | None = None,
    *,
    remat: Remat | None = "full",
    loss_chunk: int = LOSS_CHUNK,
    grad_dtype: DTypeLike = jnp.float32,
    unroll: bool = False,
) -> TrainStep[LanguageBatch[Array]]:
    """The step of a model and an optimizer on a mesh.

    Only what the optimizer trains has gradients: with `lora.ONLY_LORA` the base is only read.

    Args:
        model: the model's structure.
        optimizer: what is trained, and how.
        mesh: devices; None for one.
        remat: what the gradient computes again, see `nn.over_layers`.
        loss_chunk: positions of each row whose logits are held at a time.
        grad_dtype: dtype in which gradients of a batch's parts are added up.
        unroll: write out layers, see `nn.unrolling`.
    """
    loss = partial(language_loss, model, remat=remat, loss_chunk=loss_chunk)
    places = None if mesh is None else optimizer.partition(model.shardings(mesh))[0]

    def pinned(gradient: Params) -> Params:
        return gradient if mesh is None else jax.lax.with_sharding_constraint(gradient, places)

    def gradient_of(trained, frozen, part, total):
        def mean(trained):
            value, sums = loss(combine(trained, frozen), part)
            return value / total, sums

        gradient, sums = jax.grad(mean, has_aux=True)(trained)
        return pinned(gradient), sums

    def accumulate_gradients(trained, frozen, parts, total):
        """Gradients of the parts of a batch, one part at a time, added up in `grad_dtype`."""

        def add(so_far, part):
            new = gradient_of(trained, frozen, part, total)
            return jax.tree.map(lambda old, new: old + new.astype(old.dtype), so_far, new), None

        first = jax.tree.map(lambda leaf: leaf[0], parts)
        gradient, sums = jax.eval_shape(gradient_of, trained, frozen, first, total)
        zeros = pinned(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, grad_dtype), gradient))
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), sums)
        return jax.lax.scan(add, (zeros, nothing), parts)[0]

    def step(state: TrainState, batch: LanguageBatch[Array]):
        TRACES["step"] += 1
        trained, frozen = optimizer.partition(state.params)
        # The mean is over all parts and devices: what each adds is divided by the whole weight.
        weight = jnp.sum(batch.weights, dtype=jnp.float32)
        total = jnp.where(weight > 0, weight, 1)
        if batch.ids.ndim == 2:
            gradient, sums = gradient_of(trained, frozen, batch, total)
        else:
            gradient, sums = accumulate_gradients(trained, frozen, batch, total)
        new, norm = apply_gradient(optimizer, state, gradient)
        report = {
            "grad_norm": norm,
            "learning_rate": optimizer.schedule(state.step),
            "target_weight": weight,
        }
        for name, found in sums.items():
            start = "" if name == "all" else f"{name}/"
            report |= {f"{start}{key}": value for key, value in found.means().items()}
        report = {key: jnp.asarray(value, jnp.float32) for key, value in report.items()}
        return new, report

    return jit_step(step, model, optimizer, mesh, unroll=unroll)


def make_language_evaluation(
    model: Functional[StepAudio2Model], mesh: Mesh | None = None, *, loss_chunk: int = LOSS_CHUNK
) -> Callable[[Params, LanguageBatch], dict[str, LossSums]]:
    """What a step would report of a batch, as `LossSums` to be added up; nothing is learnt.

    Args:
        model: the model's structure.
        mesh: devices; None for one.
        loss_chunk: positions of each row whose logits are held at a time.
    """

    def evaluate(params: Params, batch: LanguageBatch[Array]) -> dict[str, LossSums]:
        TRACES["evaluation"] += 1
        return language_loss(model, params, batch, remat=None, loss_chunk=loss_chunk)[1]

    function = jax.jit(evaluate)

    def run(params: Params, batch: LanguageBatch[Array]) -> dict[str, LossSums]:
        with use_mesh(mesh):
            return function(params, batch)

    return run


# --- batches ----------------------------------------------------------------------------------


def batch_shardings(batch: LanguageBatch[Array], mesh: Mesh) -> LanguageBatch:
    """Where each array of a batch goes: rows and clips are split, all else is whole."""

    def place(path, leaf):
        return sharding_of(leaf.shape, BATCH_AXES[path[0].name], mesh)

    return jax.tree.map_with_path(place, batch)


def place_batch(batch: LanguageBatch[Array], mesh: Mesh | None) -> LanguageBatch:
    """A batch on its devices; in a multi-host run of the rows that `host_shard` gives this host."""
    if mesh is None or jax.process_count() == 1:
        return jax.device_put(batch, None if mesh is None else batch_shardings(batch, mesh))

    def put(path, leaf):
        axes = BATCH_AXES[path[0].name]
        rows = leaf.ndim - len(axes)
        shape = tuple(size * (parts if axis == rows else 1) for axis, size in enumerate(leaf.shape))
        place = sharding_of(shape, axes, mesh)
        return jax.make_array_from_process_local_data(place, np.asarray(leaf), shape)

    parts = host_shard(mesh, batch.ids.shape[-2] * jax.process_count())[1]
    return jax.tree.map_with_path(put, batch)


def host_shard(mesh: Mesh | None, rows: int) -> tuple[int, int]:
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


def abstract_language_batch(
    cfg: StepAudio2Config,
    mesh: Mesh | None,
    rows: int,
    length: int,
    *,
    clips: int = 0,
    frames: int = 3000,
    packed: int = 0,
    accumulation_steps: int = 0,
    metric_masks: tuple[str, ...] = (),
) -> LanguageBatch:
    """A batch's shapes and places.

    Args:
        cfg: the model's sizes.
        mesh: devices; None for one.
        rows: of all devices together.
        length: tokens of each row.
        clips: rows of mel frames, of all rows of tokens together.
        frames: mel frames of each such row (100 Hz).
        packed: clips that each of them may hold; 0 where neither these nor tokens are packed.
        accumulation_steps: micro-batches that share one update; 0 for no axis of them.
        metric_masks: names of positions that are reported apart.
    """
    lead = (accumulation_steps,) if accumulation_steps else ()

    def zeros(dtype, *shape):
        return jnp.zeros((*lead, *shape), dtype)

    def make():
        ids = zeros(jnp.int32, rows, length)
        return LanguageBatch(
            ids=ids,
            targets=ids,
            weights=zeros(jnp.float32, rows, length),
            mels=zeros(jnp.float32, clips, cfg.audio_encoder.mels, frames) if clips else None,
            frames=zeros(jnp.int32, clips, packed or 1) if clips else None,
            starts=zeros(jnp.int32, clips, packed or 1) if clips else None,
            feature_index=ids if clips else None,
            segments=ids if packed else None,
            positions=ids if packed else None,
            metric_masks={name: zeros(jnp.bool_, rows, length) for name in metric_masks} or None,
        )

    batch = jax.eval_shape(make)
    return batch if mesh is None else with_shardings(batch, batch_shardings(batch, mesh))

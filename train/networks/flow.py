"""Training of the flow by conditional flow matching: its loss, recipe and trainer.

    model = flow_model(speech.cfg.flow)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-5, weight_decay=0.0))
    step = make_loss_step(flow_loss, model, optimizer, FlowLossConfig())
    state = init_state(model, optimizer, None, speech.params(["flow"])["flow"])
    state, report = step(state, batch)  # the old state is used up

Source: flow matching (arXiv 2210.02747) with optimal-transport paths, as CosyVoice 2 (arXiv
2412.10117) trains it: noise levels that dwell near noise, conditions dropped together for
classifier-free guidance, and the beginning of a recording given as that of a prompt. Rows may be
heard chunk by chunk, so that a stream sounds like a whole reply (section 2.3 there).
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from sa2jax.errors import TrainError
from sa2jax.models.flow import flow_model
from sa2jax.models.flow.dit import EstimatorState
from sa2jax.models.flow.flow_matching import Flow, start_noise
from sa2jax.models.flow.upsample_conformer import ConformerState, chunk_mask
from sa2jax.nn import Functional, Params, Policy, init_params, length_mask
from sa2jax.speech.token2wav import CHUNK
from sa2jax.speech_config import FlowConfig
from sa2jax.train.networks.batches import FlowBatch, abstract_flow_batch
from sa2jax.train.networks.flow_data import FlowData, FlowDataConfig
from sa2jax.train.networks.model_io import DetokenizerNetwork, open_detokenizer_network
from sa2jax.train.networks.recipes import NetworkRecipe
from sa2jax.train.networks.trainer import Measure, NetworkTrainer

_MIN_CHUNK = 5  # codes of the shortest chunks; a reply begins after 0.2 s


@dataclass(frozen=True, kw_only=True)
class FlowLossConfig:
    """How the flow is taught.

    Attributes:
        cfg_dropout: share of rows without any condition, for classifier-free guidance.
        prompt_prob: share of rows whose beginning is given as a prompt's.
        max_prompt_fraction: most of a row's frames that are given; how many is drawn anew for each
            row.
        streaming_prob: share of rows that are heard in chunks, as a stream is: what is given of a
            row, then chunks of one size, 5 to 25 codes, the first of them any part of it. The
            others are heard whole.
        sigma_min: deviation of the noise that is left at the end of a path.
        prior_weight: weight of the distance between the encoder's frames and the mel frames, as
            Grad-TTS (arXiv 2105.06337) has it: codes that begin from nothing are understood
            sooner. The released detokenizer is not taught so.
    """

    cfg_dropout: float = 0.2
    prompt_prob: float = 0.5
    max_prompt_fraction: float = 0.3
    streaming_prob: float = 0.0
    sigma_min: float = 1e-6
    prior_weight: float = 0.0

    def __post_init__(self):
        for name in (
            "cfg_dropout",
            "prompt_prob",
            "max_prompt_fraction",
            "streaming_prob",
            "sigma_min",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainError(f"{name}={getattr(self, name)}: expected a number from 0 to 1")
        if self.prior_weight < 0:
            raise TrainError(f"prior_weight={self.prior_weight}: expected a number of 0 or more")


def flow_loss(
    model: Functional[Flow],
    params: Params,
    batch: FlowBatch[Array],
    key: Array,
    config: FlowLossConfig | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """How far the velocity is off on random places of the paths from noise to mel frames.

    The frame at level t of a path is `(1 − (1 − σ)·t)·z + t·x`, its velocity `x − (1 − σ)·z`, with
    z the noise, x the mel frame and `t = 1 − cos(π/2·u)`, u uniform: a level for each row. What is
    drawn for a row depends on the key and its place only, not on the padding of the batch.

    Args:
        model: the flow's structure, layers stacked or not.
        params: its parameters.
        batch: rows.
        key: of all that is drawn.
        config: how, by default `FlowLossConfig()`.

    Returns:
        The squared error, its mean over all valid frames and bands, plus the prior's share; and
        float32 scalars to report: both, the valid `frames`, how many rows were `dropped`, how many
        `prompted`, and of how many `rows`.
    """
    config = FlowLossConfig() if config is None else config
    net = model.bind(params)
    cfg, dtype = net.cfg, net.policy.compute
    batch_size, room = batch.codes.shape
    ratio, lookahead = cfg.encoder.upsample, cfg.encoder.lookahead
    lengths, frames = batch.lengths, ratio * batch.lengths
    valid = length_mask(frames, ratio * room)[..., None]  # [B, Q, 1]
    uniform, seeds = _random_draws(key, batch_size)

    with jax.named_scope("condition"):
        codes = jnp.clip(batch.codes, 0, cfg.codes - 1)
        x = net.table[...][codes].astype(dtype)
        x = jnp.where(length_mask(lengths, room)[..., None], x, 0)
        x = jnp.pad(x, [(0, 0), (0, lookahead), (0, 0)])
        given = uniform[0] * config.max_prompt_fraction * frames
        prompted = uniform[1] < config.prompt_prob
        given = jnp.where(prompted, given.astype(jnp.int32), 0)
        chunks = None
        if config.streaming_prob:
            chunks = _chunks(-(-given // ratio), uniform[4], uniform[6], room)
            chunks = jnp.where(uniform[5, :, None] < config.streaming_prob, chunks, 0)
        nothing = ConformerState.zeros(cfg.encoder, batch_size, 0, dtype)
        x, _ = net.encoder(x, lengths, lengths, nothing, chunks=chunks)
        mu = net.to_mel(x)
        voice = batch.speaker.astype(jnp.float32)
        voice = voice / jnp.maximum(jnp.linalg.norm(voice, axis=-1, keepdims=True), 1e-12)
        voice = jnp.broadcast_to(net.speaker(voice)[:, None], mu.shape)
        mel = jnp.where(valid, batch.mels.astype(jnp.float32), 0)
        cond = jnp.where(length_mask(given, mel.shape[1])[..., None], mel, 0).astype(dtype)
        dropped = uniform[2] < config.cfg_dropout
        known = jnp.concatenate([mu, voice, cond], axis=-1)
        known = jnp.where(dropped[:, None, None], 0, known)

    with jax.named_scope("path"):
        level: Any = 1 - jnp.cos(jnp.pi / 2 * uniform[3])
        noise = start_noise(jnp.zeros_like(lengths), mel.shape[1], cfg.mels, seeds)
        t = level[:, None, None]
        path = (1 - (1 - config.sigma_min) * t) * noise + t * mel
        target = mel - (1 - config.sigma_min) * noise

    with jax.named_scope("estimator"):
        blocks, out = net.estimator.timestep_modulation(level)  # [B, L, 9, D], [B, 2, D]
        # One level a row: what it means is a row's own, for all of its frames.
        parts = blocks.transpose(1, 2, 0, 3)[:, :, :, None], out.swapaxes(0, 1)[:, :, None]
        inputs = jnp.concatenate([path.astype(dtype), known], axis=-1)
        mask = valid[..., 0]
        if chunks is not None:
            mask = mask[:, None] & chunk_mask(jnp.repeat(chunks, ratio, axis=1))
        velocity, _ = net.estimator(
            inputs, parts, mask, frames, _empty_estimator_state(net, batch_size), 0
        )

    with jax.named_scope("loss"):
        error = jnp.where(valid, jnp.square(velocity - target), 0)
        count = jnp.sum(frames, dtype=jnp.float32)
        numbers = jnp.maximum(count, 1) * cfg.mels
        loss = jnp.sum(error) / numbers
        prior = jnp.sum(jnp.where(valid, jnp.abs(mu.astype(jnp.float32) - mel), 0)) / numbers
    real = lengths > 0
    report = {
        "flow": loss,
        "prior": prior,
        "frames": count,
        "rows": jnp.sum(real),
        "dropped": jnp.sum(dropped & real),
        "prompted": jnp.sum(prompted & ~dropped & real),
    }
    report = {name: jnp.asarray(value, jnp.float32) for name, value in report.items()}
    return loss + config.prior_weight * prior, report


def init_flow(cfg: FlowConfig, seed: int = 0, mesh: Mesh | None = None) -> Params:
    """Random parameters of which no block changes anything yet (adaLN-zero, arXiv 2212.09748).

    Args:
        cfg: the flow's sizes.
        seed: of the parameters.
        mesh: devices; None for one.
    """
    places = None if mesh is None else flow_model(cfg).shardings(mesh)
    params = init_params(lambda: Flow(cfg, policy=Policy(), rngs=nnx.Rngs(seed)), places)
    estimator = params["estimator"]
    blocks = estimator["blocks"]
    for part in (blocks["modulation"], estimator["modulation"], estimator["out"]):
        part |= jax.tree.map(jnp.zeros_like, part)
    return params


def _chunks(
    given: Int[Array, "B"], first: Float[Array, "B"], size: Float[Array, "B"], room: int
) -> Int[Array, "B P"]:
    """The chunk in which a stream would hear each code, after `given` ones of a prompt.

    Sizes are drawn, with `size` and `first` uniform in [0, 1): chunks have from `_MIN_CHUNK` codes
    to as many as streams have by default, the first one from one code to as many as the others.
    """
    sizes = _MIN_CHUNK + ((CHUNK + 1 - _MIN_CHUNK) * size).astype(jnp.int32)
    first = given + 1 + (sizes * first).astype(jnp.int32)
    place = jnp.arange(room)
    later = 2 + (place - first[:, None]) // sizes[:, None]
    return jnp.where(place < given[:, None], 0, jnp.where(place < first[:, None], 1, later))


def _random_draws(key: Array, rows: int) -> tuple[Float[Array, "7 B"], Int[Array, "B"]]:
    """Seven uniform numbers for each row, and the seed of its noise."""

    def row(number):
        uniform, seed = jax.random.split(jax.random.fold_in(key, number))
        most = jnp.iinfo(jnp.int32).max
        return jax.random.uniform(uniform, (7,)), jax.random.randint(seed, (), 0, most)

    uniform, seeds = jax.vmap(row)(jnp.arange(rows))
    return uniform.T, seeds


def _empty_estimator_state(net: Flow, rows: int) -> EstimatorState:
    """What the estimator remembers before a recording: nothing, and of one branch only."""
    empty = EstimatorState.zeros(net.cfg.estimator, 1, rows, 0, net.policy.compute)
    return EstimatorState(empty.slot_order, empty.conv[:, :, :1], empty.kv[:, :, :, :1])


# --- training -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FlowRecipe(NetworkRecipe):
    """Of the flow; its parts are `table`, `speaker`, `encoder`, `to_mel` and `estimator`."""

    kind = "flow"
    data: FlowDataConfig
    loss: FlowLossConfig = field(default_factory=FlowLossConfig)


class FlowTrainer(NetworkTrainer[DetokenizerNetwork, FlowRecipe, FlowData]):
    """How the flow is trained."""

    recipe = FlowRecipe
    loss = staticmethod(flow_loss)
    open = staticmethod(partial(open_detokenizer_network, "flow"))
    unit = "codes"

    def open_data(
        self,
        network: DetokenizerNetwork,
        recipe: FlowRecipe,
        *,
        seed: int,
        training: FlowData | None = None,
    ) -> FlowData:
        """Recordings that were heard by the networks beside this flow."""
        return FlowData(recipe.data, seed=seed, analysis=network.speech.analysis_hash)

    def abstract_batch(
        self, network: DetokenizerNetwork, recipe: FlowRecipe, mesh: Mesh | None, rows: int
    ) -> FlowBatch:
        """Shapes and places of a batch of the longest rows."""
        return abstract_flow_batch(network.cfg, mesh, rows, self.longest_row(recipe))

    def make_measure(
        self, model: Functional[Flow], recipe: FlowRecipe, mesh: Mesh | None = None
    ) -> Measure:
        """The mean loss, of which no condition is dropped."""
        whole = replace(recipe, loss=replace(recipe.loss, cfg_dropout=0.0))
        return super().make_measure(model, whole, mesh)


FLOW_TRAINER = FlowTrainer()

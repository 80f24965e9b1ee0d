"""Workloads: the programs that `plan` compiles ahead of time, from abstract arrays.

To add one: a function of a spec and a mesh that gives a `Work`, and a line in `WORKLOADS`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from sa2jax.audio.rates import CODE_RATE, MEL_RATE
from sa2jax.config import StepAudio2Config
from sa2jax.errors import PlanError
from sa2jax.families import family_of, read_config
from sa2jax.inference import programs
from sa2jax.inference.engine import BLOCK
from sa2jax.inference.loading import resolve_policy
from sa2jax.models.audio_encoder import adapter_length, encoder_length
from sa2jax.models.decoder import KVCache
from sa2jax.models.heads import pad_heads_for_mesh
from sa2jax.models.step_audio import StepAudio2Model
from sa2jax.nn import Functional, Policy, functional
from sa2jax.sharding import ALL, batch_axis_size, shard_rows

Where = Any  # a Mesh, or an AbstractMesh where nothing is compiled

DTYPES = ("bfloat16", "int8", "float32")
TOKENS_PER_SECOND = 31.25  # of speech that is generated: 25 codes and 6.25 words' tokens
FRAMES_PER_ROW, CLIPS_PER_ROW = 3000, 8  # what each row of a training batch may hold
VOICE_SECONDS = 5  # of the recording whose voice speaks


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What to plan.

    Attributes:
        model: preset, or folder with a config.json.
        topology: such as `v5e:2x4` or `h100:8`.
        workload: what to run, see `workloads`.
        batch: rows of all chips together; 0 for the usual: one, or in training one for each part
            that the mesh splits a batch into.
        length: of each, see `workloads.WORKLOADS`; 0 for the usual.
        dtype: bfloat16, float32, or int8 for the matrices alone. In training it is that of the
            parameters: products are of bfloat16 numbers.
        float_head: with int8, the matrix that makes logits is not.
        int8_cache: keys and values are cached as int8.
        mesh: such as `data=2,tensor=4`; by default all chips on the axis that is usual: tensor, or
            fsdp for training.
    """

    model: str = "mini"
    topology: str = "v5e:1x1"
    workload: str = "decode"
    batch: int = 0
    length: int = 0
    dtype: str = "bfloat16"
    float_head: bool = False
    int8_cache: bool = False
    mesh: str | None = None

    def __post_init__(self):
        if self.workload not in WORKLOADS:
            raise PlanError(f"unknown workload {self.workload!r}; known: {', '.join(WORKLOADS)}")
        if self.dtype not in DTYPES:
            raise PlanError(f"dtype {self.dtype!r}: expected {', '.join(DTYPES)}")
        if self.batch < 0 or self.length < 0:
            raise PlanError(
                f"batch {self.batch}, length {self.length}: expected at least 1, or 0 for the usual"
            )
        if not self.batch and not self.training:
            object.__setattr__(self, "batch", 1)
        if not self.length:
            object.__setattr__(self, "length", WORKLOADS[self.workload].length)

    @property
    def training(self) -> bool:
        """Whether the workload is a step of training."""
        return WORKLOADS[self.workload].training


@dataclass(frozen=True, kw_only=True)
class Work:
    """A program to compile, and its inputs and outputs.

    Attributes:
        lower: traces it; may take a while.
        weights: parameters that it reads, with shardings.
        rest: parameters of the model's other parts, which stay in memory beside it.
        cache: keys and values, with shardings.
        moments: the optimizer's memory, with shardings.
        ideal: bytes that each chip must move in a step, whatever the program; 0 if nobody knows.
        exact: whether products are of float32 numbers.
        turns: steps that one run makes.
        output: tokens, or seconds of sound, that a step gives, all rows together.
        unit: `tokens` or `seconds`.
        real: how many of them are a second of conversation; 0 if that means nothing.
    """

    lower: Callable[[], jax.stages.Lowered]
    weights: Any
    rest: Any = field(default_factory=dict)
    cache: Any = field(default_factory=dict)
    moments: Any = field(default_factory=dict)
    ideal: float = 0
    exact: bool = False
    turns: int = 1
    output: float
    unit: str = "tokens"
    real: float = 0


def policy(spec: Spec) -> Policy:
    """The dtypes of a spec."""
    result = resolve_policy("bfloat16" if spec.dtype == "int8" else spec.dtype)
    if spec.training:  # float32 parameters are master weights
        result = replace(result, compute=jnp.dtype(jnp.bfloat16))
    if spec.dtype == "int8":
        head = result.param if spec.float_head else None
        result = replace(result, kernel=jnp.dtype(jnp.int8), head=head)
    return replace(result, cache=jnp.dtype(jnp.int8) if spec.int8_cache else None)


def config(spec: Spec) -> StepAudio2Config:
    """The model's config: a preset's, or that of a folder."""
    if Path(spec.model).is_dir():
        return read_config(spec.model)
    return StepAudio2Config.preset(spec.model)


def per_chip(tree: Any) -> float:
    """Bytes of the abstract arrays of a tree on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def decode(spec: Spec, mesh: Where) -> Work:
    """A block of steps of a batch of replies; `length` is the cache's slots."""
    model, weights = _model(spec, mesh)
    state = programs.abstract_state(model, mesh, rows=spec.batch, slots=spec.length)

    def lower() -> jax.stages.Lowered:
        run = jax.jit(
            partial(programs.decode, model), static_argnames=("block", "read"), donate_argnums=(1,)
        )
        active = _replicated(mesh, spec.batch, dtype=jnp.bool_)
        return run.lower(weights, state, active, block=BLOCK, read=spec.length)

    work = _decoder_work(spec, mesh, lower, weights, state.cache)
    return replace(work, turns=BLOCK, real=TOKENS_PER_SECOND)


def prefill(spec: Spec, mesh: Where) -> Work:
    """Prompts of `length` tokens, read at once: one in each part of the data axis."""
    model, weights = _model(spec, mesh)
    parts, length = batch_axis_size(mesh), spec.length
    if spec.batch != parts:
        raise PlanError(
            f"--batch {spec.batch}: expected {parts}; a prompt is read at a time, or one in each "
            "part of a mesh's data axis"
        )
    state = programs.abstract_state(model, mesh, rows=spec.batch, slots=length)
    embed = config(spec).decoder.embed
    batch = programs.Batch(
        ids=_replicated(mesh, parts, length),
        lengths=_replicated(mesh, parts),
        features=_replicated(
            mesh, parts * length, embed, dtype=model.abstract["decoder"]["table"].dtype
        ),
        feature_index=_replicated(mesh, parts, length),
    )

    def lower() -> jax.stages.Lowered:
        run = jax.jit(
            partial(programs.prefill_chunk, model),
            static_argnames=("read", "cache_is_empty"),
            donate_argnums=(1,),
        )
        rows = _replicated(mesh, parts)
        return run.lower(weights, state, rows, rows, batch, read=length, cache_is_empty=True)

    work = _decoder_work(spec, mesh, lower, weights, state.cache, tokens=length)
    return replace(work, output=parts * length)


def encode(spec: Spec, mesh: Where) -> Work:
    """A batch of clips of `length` seconds through the audio encoder."""
    model, weights = _model(spec, mesh)
    cfg = config(spec).audio_encoder
    mels = _replicated(mesh, spec.batch, cfg.mels, MEL_RATE * spec.length, dtype=jnp.float32)

    def lower() -> jax.stages.Lowered:
        run = jax.jit(partial(programs.encode_audio, model), static_argnames=("size",))
        size = adapter_length(encoder_length(mels.shape[2]), config(spec).adapter)
        return run.lower(weights, mels, _replicated(mesh, spec.batch), size=size)

    return _speech_work(spec, lower, _encoder_params(weights), rest=_decoder_params(weights))


def token2wav(spec: Spec, mesh: Where) -> Work:
    """Codes of `length` seconds to sound, with a voice of `VOICE_SECONDS`."""
    from sa2jax.models.flow import VoicePrompt, flow_model
    from sa2jax.models.vocoder import vocoder
    from sa2jax.speech_config import Token2WavConfig

    _refuse_int8(spec, "bfloat16 or float32")
    cfg, dtype = Token2WavConfig.released(), jnp.dtype(spec.dtype)
    flow = flow_model(cfg.flow, Policy(param=dtype, compute=dtype))
    vocode = vocoder(cfg.vocoder)

    def place(leaf):
        return _replicated(mesh, *leaf.shape, dtype=leaf.dtype)

    weights = jax.tree.map(place, {"flow": flow.abstract, "vocoder": vocode.abstract})
    rows, codes, voice = spec.batch, CODE_RATE * spec.length, CODE_RATE * VOICE_SECONDS
    ratio = cfg.flow.encoder.upsample

    def run(weights, prompt, codes, lengths):
        mel = flow.bind(weights["flow"])(prompt, codes, lengths)
        keys = jax.random.split(jax.random.key(0), len(codes))
        return vocode.bind(weights["vocoder"])(mel, ratio * lengths, key=keys)[0]

    def lower() -> jax.stages.Lowered:
        dealt = shard_rows(run, mesh, (ALL, 0, 0, 0), 0)
        prompt = VoicePrompt(
            _replicated(mesh, rows, voice),
            _replicated(mesh, rows, ratio * voice, cfg.flow.mels, dtype=jnp.float32),
            _replicated(mesh, rows, cfg.flow.speaker, dtype=jnp.float32),
        )
        return jax.jit(dealt).lower(
            weights, prompt, _replicated(mesh, rows, codes), _replicated(mesh, rows)
        )

    return _speech_work(spec, lower, weights)


def train(spec: Spec, mesh: Where) -> Work:
    """A step of fine-tuning on rows of `length` tokens; all but the audio encoder is trained."""
    from sa2jax.train.optimizer import OptimizerConfig, make_optimizer

    _refuse_int8(spec, "bfloat16, float32 (master weights), or lora")
    cfg = config(spec)
    model = family_of(cfg).model(cfg, policy(spec))
    optimizer = make_optimizer(OptimizerConfig(learning_rate_overrides={"audio_encoder": 0.0}))
    return _training(spec, mesh, model, optimizer)


def lora(spec: Spec, mesh: Where) -> Work:
    """A step that trains low-rank additions to the decoder's matrices; int8 is QLoRA."""
    from sa2jax.train.lora import ONLY_LORA, add_lora
    from sa2jax.train.optimizer import OptimizerConfig, make_optimizer

    cfg = config(spec)

    def make() -> StepAudio2Model:
        rngs = nnx.Rngs(0)
        net = family_of(cfg).module(cfg, policy=policy(spec), rngs=rngs)
        add_lora(net, RANK, 2.0 * RANK, rngs=rngs)
        return net

    optimizer = make_optimizer(OptimizerConfig(learning_rate_overrides=ONLY_LORA))
    return _training(spec, mesh, functional(make), optimizer)


def _refuse_int8(spec: Spec, expected: str) -> None:
    if spec.dtype == "int8":
        raise PlanError(f"{spec.workload} in int8: expected {expected}")


def _decoder_work(
    spec: Spec,
    mesh: Where,
    lower: Callable[[], jax.stages.Lowered],
    weights: Any,
    kv_cache: KVCache,
    tokens: int = 1,
) -> Work:
    """The work of so many tokens of each row through the decoder, over a cache."""
    reads = _decoder_params(weights)
    cache = {"k": kv_cache.k, "v": kv_cache.v, "scales": kv_cache.scales}
    return Work(
        lower=lower,
        weights=reads,
        rest=_encoder_params(weights),
        cache=cache,
        ideal=_decoder_traffic(spec, mesh, reads, tokens=tokens) + per_chip(cache),
        output=spec.batch * tokens,
        exact=spec.dtype == "float32",
    )


def _speech_work(
    spec: Spec, lower: Callable[[], jax.stages.Lowered], weights: Any, rest: Any = None
) -> Work:
    """The work of rows of `length` seconds of sound, each weight read once."""
    return Work(
        lower=lower,
        weights=weights,
        rest=rest or {},
        ideal=per_chip(weights),
        output=spec.batch * spec.length,
        unit="seconds",
        real=1,
        exact=spec.dtype == "float32",
    )


def _training(spec: Spec, mesh: Where, model: Functional, optimizer: Any) -> Work:
    from sa2jax.train.language.step import abstract_language_batch, make_language_step
    from sa2jax.train.state import abstract_state

    rows = spec.batch
    state = abstract_state(model, optimizer, mesh)
    batch = abstract_language_batch(
        config(spec),
        mesh,
        rows,
        spec.length,
        clips=rows,
        frames=FRAMES_PER_ROW,
        packed=CLIPS_PER_ROW,
    )
    return Work(
        lower=lambda: make_language_step(model, optimizer, mesh).lower(state, batch),
        weights=state.params,
        moments=state.opt_state,
        output=rows * spec.length,
    )


@dataclass(frozen=True)
class Workload:
    """A row of `WORKLOADS`.

    Attributes:
        work: makes the program of a spec on a mesh.
        length: the usual `Spec.length`.
        counted: what that counts.
        training: whether it is a step of training.
    """

    work: Callable[[Spec, Where], Work]
    length: int
    counted: str
    training: bool = False


WORKLOADS = {
    "decode": Workload(decode, 4096, "slots of the cache"),
    "prefill": Workload(prefill, 2048, "tokens of a prompt"),
    "encode": Workload(encode, 25, "seconds of a clip"),
    "token2wav": Workload(token2wav, 10, "seconds of sound"),
    "train": Workload(train, 4096, "tokens of a sequence", training=True),
    "lora": Workload(lora, 2048, "tokens of a sequence", training=True),
}
RANK = 16  # of LoRA


def _model(spec: Spec, mesh: Where) -> tuple[Functional[StepAudio2Model], dict[str, Any]]:
    """The model on a mesh, and where its parameters are."""
    cfg = config(spec)
    model = family_of(cfg).model(pad_heads_for_mesh(cfg, mesh), policy(spec))
    return model, model.with_shardings(mesh)


def _replicated(mesh: Where, *shape: int, dtype: Any = jnp.int32) -> Any:
    """A replicated input: small ones are not sharded."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def _decoder_params(weights: dict[str, Any]) -> Any:
    """The language model's parameters."""
    return {"decoder": weights["decoder"]}


def _encoder_params(weights: dict[str, Any]) -> Any:
    """The audio encoder's and adapter's parameters."""
    return {name: part for name, part in weights.items() if name != "decoder"}


def _decoder_traffic(spec: Spec, mesh: Where, reads: Any, tokens: int = 1) -> float:
    """Bytes of the language model that a chip reads in a step: of the table, the tokens' rows."""
    decoder = dict(reads["decoder"])
    table = decoder.pop("table")
    rows = spec.batch * tokens * table.shape[1] * table.dtype.itemsize
    return per_chip(decoder) + min(per_chip(table), rows / batch_axis_size(mesh))

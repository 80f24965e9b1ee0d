"""Initialise a model from Qwen2-Audio's encoder and Qwen2.5's decoder; the rest is random.

Source: Step-Audio 2 technical report (arXiv 2507.16632), section 3. The vocabulary grows behind the
tokens that Qwen2.5 has. New rows of the table and of the head are drawn from a normal distribution
with the mean and, dimension by dimension, the deviation of the rows that are there (Hewitt 2021,
"Initializing new word embeddings for pretrained language models"): they begin as likely as the
others, not louder. Rows of Qwen2.5 without a token (its table is padded to 152064) are drawn too.
The adapter is drawn as torch draws `nn.Conv1d` and `nn.Linear`: uniform within `fan_in ** -0.5`.
"""

import time
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sa2jax import atomic_io, checkpoint
from sa2jax.checkpoint import Progress
from sa2jax.config import AudioEncoderConfig, StepAudio2Config
from sa2jax.convert.extend_tokenizer import (
    check_tokenizer,
    copy_files,
    extend_tokenizer,
    read_vocab,
    write_json,
)
from sa2jax.convert.hf import leaf_shapes
from sa2jax.convert.rules import Rule, Split, Transpose, expand, rule
from sa2jax.convert.transfer import (
    Report,
    TransferPlan,
    make_plan,
    make_report,
    pack_dtypes,
    part_progress,
    usual_dtype,
    write,
)
from sa2jax.convert.weights import SafetensorsFolder, TensorInfo, Weights, parse_dtype
from sa2jax.errors import CheckpointError, ConfigError, FileError, MissingFileError, reason_of
from sa2jax.families import family_of
from sa2jax.files.json_files import read_json

VOCAB = 158720  # rows of the released table
CONTEXT = 16384  # tokens of the released context
# What transformers takes for a key that a Qwen2's config.json does not have.
QWEN2: Mapping[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LARGE = ("decoder.table", "decoder.head.kernel")
_PREFIXES = ("audio_tower.", "model.audio_tower.", "")  # of the encoder, by version of its folder


def encoder_rules(cfg: AudioEncoderConfig) -> list[Rule]:
    """The table for the encoder of Qwen2-Audio: transformers' Whisper names, our leaf."""
    heads, conv = Split(0, (cfg.heads, cfg.head_dim)), Transpose(2, 1, 0)
    leaves, source = "audio_encoder", "layers.{layer}"
    parts = [  # with a weight and a bias: theirs, ours, what our weight is called, what happens
        ("conv1", "conv1", "kernel", conv),
        ("conv2", "conv2", "kernel", conv),
        (f"{source}.self_attn_layer_norm", "layers.attn_norm", "scale", None),
        (f"{source}.self_attn.q_proj", "layers.attn.q", "kernel", heads),
        (f"{source}.self_attn.v_proj", "layers.attn.v", "kernel", heads),
        (f"{source}.self_attn.out_proj", "layers.attn.o", "kernel", None),
        (f"{source}.final_layer_norm", "layers.mlp_norm", "scale", None),
        (f"{source}.fc1", "layers.mlp.up", "kernel", None),
        (f"{source}.fc2", "layers.mlp.down", "kernel", None),
        ("layer_norm", "norm", "scale", None),
    ]
    rules = [
        rule("embed_positions.weight", f"{leaves}.positions"),
        rule(f"{source}.self_attn.k_proj.weight", f"{leaves}.layers.attn.k.kernel", heads),
    ]
    for name, leaf, weight, op in parts:
        of_bias = [op] if op is heads else []
        rules.append(rule(f"{name}.weight", f"{leaves}.{leaf}.{weight}", *([op] if op else [])))
        rules.append(rule(f"{name}.bias", f"{leaves}.{leaf}.bias", *of_bias))
    return rules


def init(
    decoder: str | Path,
    out: str | Path,
    *,
    encoder: str | Path,
    tokenizer: str | Path | None = None,
    vocab: int = VOCAB,
    seed: int = 0,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Make a model folder of this library for a training from the beginning.

    Args:
        decoder: Hugging Face folder of a Qwen2.5 (or Qwen2) with its tokenizer.
        out: folder to make; appears only when it is complete.
        encoder: Hugging Face folder of a Qwen2-Audio; only its audio encoder is read.
        tokenizer: folder of a Step-Audio 2 tokenizer; by default the decoder's own is given the
            released tokens behind its last, which is where the release has them.
        vocab: rows of the table and of the head, as released.
        seed: of all that is drawn.
        dtype: `float32`, `bfloat16` or `float16`; by default each tensor keeps its own.
        overwrite: replace a checkpoint at `out`.
        progress: called with (bytes_done, bytes_total); see `weights.progress_bar`.

    Raises:
        CheckpointError: if a source is damaged or of another model, or `out` cannot be made.
        ConfigError: if a config.json is not that of a Qwen2-Audio or Qwen2.5 that fits.
        TokenizerError: if the tokenizer does not continue the decoder's.
    """
    started = time.perf_counter()
    decoder, encoder, cast = Path(decoder), Path(encoder), parse_dtype(dtype)
    text, audio = _read_config(decoder, "qwen2"), _read_config(encoder, "qwen2_audio")
    used = read_vocab(decoder)
    rows = 1 + max(used.values())
    cfg = _config(text, audio, vocab)
    with (
        SafetensorsFolder(decoder) as decoder_weights,
        SafetensorsFolder(encoder) as encoder_weights,
    ):
        cfg = cfg.with_dtype((cast or usual_dtype(decoder_weights.tensors)).name)
        grown = _ExtendedVocab(
            decoder_weights, rows, vocab, bool(text.get("tie_word_embeddings")), seed
        )
        plans = _plans(cfg, grown, _EncoderWeights(encoder_weights), seed, cast)
        leaves = {name: info for plan in plans for name, info in plan.leaves.items()}
        total = sum(plan.bytes for plan in plans)
        sources = decoder, encoder, tokenizer
        with atomic_io.new_folder(out, overwrite=overwrite, sources=sources) as folder:
            atomic_io.need_space(folder, total)
            if tokenizer is None:
                extend_tokenizer(decoder, used, folder, vocab)
            else:
                copy_files(Path(tokenizer), folder)
            special = check_tokenizer(folder, tokenizer or decoder, used, vocab).special
            forms = {name: (info.shape, info.dtype) for name, info in leaves.items()}
            arrays, done = checkpoint.create(folder / checkpoint.PARAMS, forms), 0
            for plan in plans:
                write(plan, arrays, part_progress(progress, done, total))
                done += plan.bytes
            tensors = _released(cfg, leaves)
            info = {
                "format": checkpoint.FORMAT,
                "dtype": usual_dtype(leaves).name,
                "source_dtypes": pack_dtypes(tensors),
            }
            config = cfg.to_hf()
            ends = dict.fromkeys(("eos_token_id", "pad_token_id"), special.end_of_text)
            config["text_config"] |= ends | {"max_seq_len": cfg.decoder.max_positions}
            write_json(folder / checkpoint.INFO, info, indent=2)
            write_json(folder / "config.json", config, indent=2)
    notes = [
        f"drawn with seed {seed}: the adapter, and rows {rows} to {vocab - 1} of table and head",
        f"{out} has no detokenizer: it hears and writes; for speech, put a token2wav/ inside",
    ]
    if tokenizer is None:
        notes.insert(0, f"the tokenizer is that of {decoder} with the released tokens behind it")
    return make_report(tensors, total, started, (), notes)


# --- configs ----------------------------------------------------------------------------------


def _read_config(folder: Path, kind: str) -> dict[str, Any]:
    """The sizes in a source's config.json: of Qwen2-Audio those of its encoder."""
    name = {"qwen2": "Qwen2.5", "qwen2_audio": "Qwen2-Audio"}[kind]
    if checkpoint.is_checkpoint(folder):
        raise CheckpointError(f"{folder} is a folder of sa2jax: expected one of {name} as released")
    path = folder / "config.json"
    try:
        raw = read_json(path, dict)
        model_type = raw.get("model_type")
        if model_type in (kind, f"{kind}_encoder"):
            return dict(raw["audio_config"] if model_type == "qwen2_audio" else raw)
    except MissingFileError:
        raise ConfigError(f"no config.json in {folder}: expected a folder of {name}") from None
    except (FileError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({reason_of(error)}): download it again") from None
    raise ConfigError(
        f"{path} is of a {model_type!r}: expected {kind!r}, the config.json of {name}"
    )


def _config(text: Mapping[str, Any], audio: Mapping[str, Any], vocab: int) -> StepAudio2Config:
    """The model that both sources make; what it would compute otherwise than they is an error."""
    # What transformers takes for a key that is not there.
    sizes = {
        "num_mel_bins": 128,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "d_model": 1280,
        "max_source_positions": 1500,
        "activation_function": "gelu",
        "scale_embedding": False,
    }
    sizes |= {key: audio[key] for key in sizes if key in audio}
    expected: dict[str, Any] = {"activation_function": "gelu", "scale_embedding": False}
    if isinstance(width := sizes["d_model"], int):  # if not, the config below says so
        expected |= {"encoder_ffn_dim": 4 * width}
    bad = [k for k, value in expected.items() if sizes[k] != value]
    wrong = [f"{k}={sizes[k]!r} is not supported (expected {expected[k]!r})" for k in bad]
    if wrong:
        raise ConfigError("; ".join(wrong))
    seen = {"model_type", "architectures", "tie_word_embeddings"}
    kept = {**QWEN2} | {key: value for key, value in text.items() if key not in seen}
    rope = text.get("rope_parameters")
    base = rope.get("rope_theta") if isinstance(rope, Mapping) else None
    kept.setdefault("rope_theta", 10_000.0 if base is None else base)
    kept["vocab_size"] = vocab
    if isinstance(context := kept.get("max_position_embeddings", CONTEXT), int):
        kept["max_position_embeddings"] = min(context, CONTEXT)
    cfg = StepAudio2Config.from_hf(
        {
            "model_type": "step_audio_2",
            "text_config": kept,
            "audio_encoder_config": {
                "n_mels": sizes["num_mel_bins"],
                "n_audio_ctx": sizes["max_source_positions"],
                "n_audio_state": sizes["d_model"],
                "n_audio_head": sizes["encoder_attention_heads"],
                "n_audio_layer": sizes["encoder_layers"],
                "llm_dim": kept["hidden_size"],
            },
        }
    )
    return replace(cfg, hf={})


# --- weights ----------------------------------------------------------------------------------


class _EncoderWeights:
    """The audio encoder in a folder of Qwen2-Audio, under its own names."""

    def __init__(self, weights: SafetensorsFolder):
        self._weights = weights
        prefixes = [p for p in _PREFIXES if f"{p}conv1.weight" in weights.tensors]
        if not prefixes:
            raise CheckpointError(
                f"{weights.folder} has no audio encoder: expected {_PREFIXES[0]}conv1.weight, as "
                "Qwen2-Audio has it"
            )
        self._prefix = prefixes[0]
        self.tensors = {
            name.removeprefix(self._prefix): info
            for name, info in weights.tensors.items()
            if name.startswith(self._prefix)
        }

    def get(self, name: str) -> np.ndarray:
        return self._weights.get(self._prefix + name)

    def drop(self, name: str) -> None:
        self._weights.drop(self._prefix + name)


class _ExtendedVocab:
    """A Qwen2.5 whose table and head have `vocab` rows, all from `rows` on drawn.

    A tied head is a copy of the table.
    """

    def __init__(self, weights: SafetensorsFolder, rows: int, vocab: int, tied: bool, seed: int):
        self._weights, self._rows, self._vocab, self._seed = weights, rows, vocab, seed
        self.tensors = dict(weights.tensors)
        if tied and TABLE in self.tensors:
            self.tensors.setdefault(HEAD, self.tensors[TABLE])
        self._head = HEAD if HEAD in weights.tensors else TABLE
        for name in {TABLE, HEAD} & set(self.tensors):
            info = self.tensors[name]
            if len(info.shape) != 2 or info.shape[0] < rows:
                raise CheckpointError(
                    f"{weights.folder}: {name} is {list(info.shape)}, its tokenizer has {rows} "
                    "tokens: use the tokenizer and the weights of one and the same model"
                )
            self.tensors[name] = TensorInfo((vocab, info.shape[1]), info.dtype)

    def get(self, name: str) -> np.ndarray:
        if name not in (TABLE, HEAD):
            return self._weights.get(name)
        source = self._head if name == HEAD else TABLE
        old = self._weights.get(source)[: self._rows]
        grown = np.empty((self._vocab, old.shape[1]), old.dtype)
        total, squares = np.zeros((2, old.shape[1]))
        for start in range(0, self._rows, 1024):
            part = old[start : start + 1024].astype(np.float64)
            total += part.sum(0)
            squares += (part**2).sum(0)
            grown[start : start + len(part)] = old[start : start + 1024]
            self._weights.drop(source)
        mean = total / self._rows
        deviation = np.sqrt(np.maximum(squares / self._rows - mean**2, 0))
        rng = _rng(self._seed, source)
        for row in range(self._rows, self._vocab):  # a row at a time: as many rows, the same ones
            grown[row] = mean + deviation * rng.standard_normal(old.shape[1])
        return grown

    def drop(self, name: str) -> None:
        if name in self._weights.tensors:
            self._weights.drop(name)


class _RandomWeights:
    """Weights and biases of convolutions and linear layers as torch draws them."""

    def __init__(self, tensors: Mapping[str, TensorInfo], seed: int):
        self.tensors, self._seed = dict(tensors), seed

    def get(self, name: str) -> np.ndarray:
        info = self.tensors[name]
        weight = self.tensors[f"{name.rpartition('.')[0]}.weight"].shape  # [out, in, …]
        bound = np.prod(weight[1:]) ** -0.5
        return _rng(self._seed, name).uniform(-bound, bound, info.shape).astype(info.dtype)

    def drop(self, name: str) -> None:
        pass


def _rng(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _plans(
    cfg: StepAudio2Config, decoder: _ExtendedVocab, encoder: _EncoderWeights, seed: int, cast: Any
) -> list[TransferPlan]:
    """A transfer plan for each source; the problems of all are reported together."""
    plans, problems = [], []
    shapes, rules = leaf_shapes(cfg), family_of(cfg).rules(cfg)
    drawn = expand(rules, {n: s for n, s in shapes.items() if n.startswith("adapter.")})
    dtype = np.dtype(cfg.dtype)
    fresh = _RandomWeights({p.sources[0]: TensorInfo(p.shapes[0], dtype) for p in drawn}, seed)
    sources: list[tuple[str, list[Rule], Weights, str]] = [
        ("decoder.", rules, decoder, "the Qwen2.5 folder"),
        ("audio_encoder.", encoder_rules(cfg.audio_encoder), encoder, "the Qwen2-Audio folder"),
        ("adapter.", rules, fresh, "the adapter"),
    ]
    for start, table, weights, where in sources:
        part = {name: shape for name, shape in shapes.items() if name.startswith(start)}
        table = [r for r in table if r.target in part]
        try:
            plans.append(make_plan(table, weights, part, where, cast=cast))
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("; ".join(problems))
    # Each for itself: `write` lets go of a tensor when it has the next, and these are large.
    large = [_only(plans[0], {leaf}) for leaf in LARGE]
    return [*large, _only(plans[0], set(plans[0].leaves) - set(LARGE)), *plans[1:]]


def _only(plan: TransferPlan, names: set[str]) -> TransferPlan:
    """The part of a plan that fills these leaves."""
    leaves = {name: info for name, info in plan.leaves.items() if name in names}
    return replace(plan, placements=[p for p in plan.placements if p.leaf in names], leaves=leaves)


def _released(cfg: StepAudio2Config, leaves: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of the model that was made, as an export would have them."""
    places = expand(family_of(cfg).rules(cfg), {name: info.shape for name, info in leaves.items()})
    return {
        name: TensorInfo(shape, leaves[p.leaf].dtype)
        for p in places
        for name, shape in zip(p.sources, p.shapes, strict=True)
    }

"""The smallest networks that hear and speak, and clips with letters that can be told apart."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import soundfile
from jax import jit

from sa2jax.models.flow import flow_model
from sa2jax.nn import Policy
from sa2jax.speech_config import (
    ConformerConfig,
    EstimatorConfig,
    FlowConfig,
    SpeakerEncoderConfig,
    SpeechTokenizerConfig,
    Token2WavConfig,
    VocoderConfig,
)
from sa2jax.train.networks.batches import SoundBatch
from sa2jax.train.networks.model_io import STRUCTURES, save_detokenizer
from sa2jax.train.networks.recognition import letter_ids
from sa2jax.train.networks.step import TRACES, make_loss_step
from sa2jax.train.optimizer import OptimizerConfig, make_optimizer, param_name
from sa2jax.train.state import init_state

TEXTS = ("abca", "cb", "ba ca")
SMALL = Token2WavConfig(
    flow=FlowConfig(
        codes=81,
        mels=80,
        speaker=8,
        encoder=ConformerConfig(inputs=8, embed=8, heads=2, mlp=8, layers=1, up_layers=1),
        estimator=EstimatorConfig(embed=8, heads=2, head_dim=4, layers=1, frequencies=8),
    ),
    vocoder=VocoderConfig(
        channels=32,
        harmonics=3,
        rates=(30,),
        kernels=(60,),
        n_fft=64,
        hop=16,
        block_kernels=(3,),
        block_dilations=((1,),),
        source_kernels=(3,),
        source_dilations=((1,),),
        f0_channels=16,
        f0_layers=1,
    ),
    speech_tokenizer=SpeechTokenizerConfig(
        mels=16, layers=1, embed=32, mlp=64, memory=5, digits=4, head_dim=16
    ),
    speaker_encoder=SpeakerEncoderConfig(
        mels=16,
        head=4,
        stages=(1,),
        channels=16,
        growth=8,
        bottleneck=8,
        mask=4,
        layers=(2,),
        dilations=(1,),
        embed=8,
    ),
)


# The same with as many codes as a released model: for tests that need a voice, but no real one.
SPEAKER = replace(
    SMALL,
    flow=replace(SMALL.flow, codes=6561),
    speech_tokenizer=replace(SMALL.speech_tokenizer, digits=8),
)


def small_networks(cfg: Token2WavConfig = SPEAKER, scale: float = 0.1) -> dict[str, Any]:
    """Random numbers of this scale for every network of a detokenizer."""
    rng = np.random.default_rng(0)

    def numbers(path, leaf):
        middle = param_name(path).endswith(("scale", "variance"))
        return (middle + scale * rng.standard_normal(leaf.shape)).astype(np.float32)

    return {
        name: jax.tree.map_with_path(numbers, make(getattr(cfg, name), Policy()).abstract)
        for name, make in STRUCTURES.items()
    }


class SmallFlow:
    """The smallest flow, with random numbers; the estimator's output is not 0."""

    def __init__(self) -> None:
        self.cfg = SMALL.flow
        self.model = flow_model(self.cfg)
        self.params = small_networks(SMALL, 0.4)["flow"]

    def codes(self, seed: int, count: int) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, self.cfg.codes, (1, count))


def save_networks(folder: Path, cfg: Token2WavConfig = SMALL) -> Path:
    """A detokenizer of these sizes and random numbers."""
    save_detokenizer(folder, cfg, small_networks(cfg))
    return folder


def tones(texts=TEXTS, *, room: int = 0, rows: int = 0) -> SoundBatch:
    """A chord of 120 ms for each letter, right-padded with noise that must not be heard."""
    place = np.arange(1920) / 16_000
    said = [letter_ids(text) for text in texts] + [[]] * rows
    total = 1920 * max(map(len, said)) + room
    sound = np.random.default_rng(0).normal(size=(len(said), total))
    letters = np.zeros((len(said), max(map(len, said)) + bool(room)), np.int32)
    for row, ids in enumerate(said):
        for n, letter in enumerate(ids):
            chord = sum(np.sin(2 * np.pi * place * letter * f) for f in (150, 390))
            sound[row, 1920 * n : 1920 * (n + 1)] = 0.1 * chord * np.hanning(1920)
        letters[row, : len(ids)] = ids
    counts = np.array([len(ids) for ids in said], np.int32)
    return SoundBatch(
        sound=sound.astype(np.float32),
        lengths=1920 * counts,
        letters=letters,
        letter_counts=counts,
        speaker=0 * counts,
    )


def save_tones(folder: Path, texts=TEXTS) -> Path:
    """The same as recordings at 16 kHz, of two speakers in turn, and the file that lists them."""
    folder.mkdir(parents=True)
    clips, lines = tones(texts), []
    for row, text in enumerate(texts):
        soundfile.write(folder / f"{row}.wav", clips.sound[row, : clips.lengths[row]], 16_000)
        line = {"audio": f"{row}.wav", "text": text, "speaker": ("anna", "bert")[row % 2]}
        lines.append(json.dumps(line) + "\n")
    (folder / "speech.jsonl").write_text("".join(lines))
    return folder / "speech.jsonl"


def losses_of(loss, model):
    """The loss, its report and its gradient; one program for each config and shape."""

    @partial(jit, static_argnames="config")
    def run(params, batch, key, config):
        of_params = partial(loss, model, batch=batch, key=key, config=config)
        return jax.value_and_grad(of_params, has_aux=True)(params)

    return run


def assert_padding_is_not_heard(losses, params, config, batch, padded, rtol: float = 1e-5):
    """Padding and empty rows change nothing; gives the loss, its report and its gradient."""
    (loss, report), gradient = losses(params, batch, None, config)
    (wide, also), same = losses(params, padded, None, config)
    np.testing.assert_allclose(wide, loss, rtol=1e-5)
    assert also.keys() == report.keys()
    for name, value in report.items():
        np.testing.assert_allclose(also[name], value, rtol=rtol, atol=1e-12, err_msg=name)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-3), same, gradient)
    return (loss, report), gradient


def learn(loss, model, config, params, batch, **rates: Any):
    """Train on one batch; gives the state, the reports of all steps, and has checked the run.

    A step is traced once, and what was saved after the first one goes on as the run did. The
    optimizer has these `rates`, and no weight decay.
    """
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.0, **rates))
    step, traces = make_loss_step(loss, model, optimizer, config, seed=1), TRACES["step"]
    state = init_state(model, optimizer, None, jax.tree.map(jnp.copy, params))
    step, reports = step.lower(state, batch).compile(), []
    for n in range(rates["steps"]):
        if n == 1:
            saved = jax.tree.map(np.asarray, state)
        state, report = step(state, batch)
        reports.append({name: float(x) for name, x in report.items()})
    assert TRACES["step"] == traces + 1
    again, report = step(jax.device_put(saved, jax.local_devices()[0]), batch)
    assert float(report["loss"]) == reports[1]["loss"]
    assert int(again.step) == 2
    return state, reports

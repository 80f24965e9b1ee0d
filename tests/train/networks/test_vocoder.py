"""The vocoder's loss is what it says, and a tiny vocoder learns a sound and then makes it."""

import json
import textwrap
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import devices
from helpers.small_speech import SMALL
from jax import jit

from sa2jax import audio
from sa2jax.errors import TrainError
from sa2jax.models.vocoder import vocoder
from sa2jax.train.networks.batches import VocoderBatch, abstract_vocoder_batch
from sa2jax.train.networks.step import (
    TRACES,
    make_loss_evaluation,
    make_loss_step,
    place_network_batch,
)
from sa2jax.train.networks.vocoder import (
    FIRST_LAYERS,
    VocoderLossConfig,
    init_vocoder,
    vocoder_loss,
)
from sa2jax.train.optimizer import OptimizerConfig, make_optimizer
from sa2jax.train.state import abstract_state, init_state

# One stage only: nothing is slower than compiling.
CFG = SMALL.vocoder
PLAIN = VocoderLossConfig(resolutions=((256, 64), (1024, 256)), teacher_forcing_prob=1.0)
MODEL = vocoder(CFG)
FRAMES = 10


@pytest.fixture(scope="module")
def params():
    return init_vocoder(CFG)


def rows(frames=(FRAMES,), room: int | None = None) -> VocoderBatch:
    """Hums of several pitches, with silence and no pitch in the last third of each."""
    room = room or max(frames)
    sound = np.zeros((len(frames), 480 * room), np.float32)
    f0 = np.zeros((len(frames), room), np.float32)
    for row, count in enumerate(frames):
        voiced = count - count // 3
        f0[row, :voiced] = 120 + 40 * row
        time = np.arange(480 * voiced) / 24000
        parts = [np.sin(2 * np.pi * k * f0[row, 0] * time) / k for k in range(1, 12)]
        sound[row, : len(time)] = 0.1 * np.sum(parts, 0)
    noise = np.random.default_rng(0).normal(size=sound.shape) * 1e-3
    return VocoderBatch(
        sound=sound + noise.astype(np.float32), f0=f0, frames=np.array(frames, np.int32)
    )


@partial(jit, static_argnames="config")
def run(params, batch, key, config):
    return vocoder_loss(MODEL, params, batch, key, config)


def losses(params, batch, seed=0, config=PLAIN) -> dict[str, float]:
    loss, report = run(params, batch, jax.random.key(seed), config)
    return {name: float(value) for name, value in report.items()} | {"loss": float(loss)}


# --- the loss -----------------------------------------------------------------------------------


class Teacher:
    """A vocoder that already knows the recordings; their pitches, it says, are so much higher."""

    def __init__(self, batch: VocoderBatch, gain=1.0, higher=0.0):
        self.batch, self.gain, self.higher = batch, gain, higher
        self.cfg = SimpleNamespace(samples=480, mels=80, voiced_threshold=10.0)

    def bind(self, params):
        return self

    def f0(self, mel, frames):
        return self.batch.f0 + jnp.where(self.batch.f0 > 0, self.higher, 0)

    def source(self, f0, frames, key):
        return f0

    def decode(self, mel, source, frames):
        assert mel.shape == (*self.batch.f0.shape, 80)
        return self.gain * self.batch.sound


def judge(teacher, batch, config=None):
    return jit(lambda: vocoder_loss(teacher, {}, batch, jax.random.key(0), config))()


def test_the_true_sound_has_no_loss():
    batch = rows((10, 7))
    batch = replace(batch, sound=np.where(np.arange(4800) < [[4800], [3360]], batch.sound, 0))
    loss, report = judge(Teacher(batch), batch)
    assert float(loss) < 2e-5
    assert (float(report["voicing"]), float(report["frames"])) == (1, 17)


def test_each_loss_measures_what_it_says():
    batch = rows()
    teacher = Teacher(batch, gain=2.0, higher=13.0)
    loss, report = judge(teacher, batch)
    assert float(report["convergence"]) == pytest.approx(1, rel=1e-3)
    assert float(report["magnitude"]) == pytest.approx(np.log(2), rel=2e-2)  # floor
    assert float(report["mel"]) == pytest.approx(np.log(2), rel=1e-2)
    assert float(report["pitch"]) == pytest.approx(0.7 * np.log(143 / 130), rel=1e-4)
    parts = ("convergence", "magnitude", "mel", "pitch")
    assert float(loss) == pytest.approx(sum(float(report[name]) for name in parts), rel=1e-5)
    weights = VocoderLossConfig(
        convergence_weight=0, magnitude_weight=0, mel_weight=0, pitch_weight=3
    )
    loss, _ = judge(teacher, batch, weights)
    assert float(loss) == pytest.approx(3 * float(report["pitch"]), rel=1e-5)


def test_padding_and_what_lies_in_it_change_nothing(params):
    batch = rows((10, 6))
    found = losses(params, batch)
    spoilt = replace(batch, sound=batch.sound.copy(), f0=batch.f0.copy())
    spoilt.sound[1, 6 * 480 :], spoilt.f0[1, 6:] = 0.7, 300
    assert losses(params, spoilt) == found

    def pad(x, size):
        return np.pad(x, ((0, 0), (0, size)), constant_values=0.3)

    wide = replace(batch, sound=pad(batch.sound, 3 * 480), f0=pad(batch.f0, 3))
    assert losses(params, wide) == pytest.approx(found, rel=2e-4)
    assert losses(params, rows((10, 7)))["mel"] != pytest.approx(found["mel"], rel=1e-3)


def test_empty_rows_count_for_nothing(params):
    found = losses(params, rows((10, 0)))
    assert found["frames"] == 10
    assert found == pytest.approx(losses(params, rows((10,))), rel=2e-4)
    assert losses(params, rows((0, 0), room=10))["loss"] < 1e-4


def test_other_mel_frames_are_heard_and_the_true_ones_judge(params):
    batch = rows()
    heard = []

    class Listener(Teacher):
        def decode(self, mel, source, frames):
            heard.append(mel)
            return super().decode(mel, source, frames)

    own = np.random.default_rng(0).normal(size=(*batch.f0.shape, 80)).astype(np.float32)
    given = replace(batch, mel=own)
    _, report = vocoder_loss(Listener(given), {}, given, jax.random.key(0))
    np.testing.assert_array_equal(heard[0], own)
    assert float(report["mel"]) < 1e-5  # the sound is the recording's
    true = audio.mel_24k(batch.sound).swapaxes(1, 2)
    assert losses(params, replace(batch, mel=true)) == pytest.approx(
        losses(params, batch), rel=1e-4
    )
    assert losses(params, given)["loss"] > 1.03 * losses(params, batch)["loss"]  # fresh: deaf


def test_the_margin_is_not_judged(params):
    batch, config = rows(), replace(PLAIN, edge_frames=2)
    spoilt = replace(batch, sound=batch.sound.copy())
    spoilt.sound[:, :200] += 0.1 * (-1) ** np.arange(200)  # frame 2 begins with sample 240
    teacher = Teacher(spoilt)
    judged, free = (judge(teacher, batch, how)[1] for how in (PLAIN, config))
    for name in ("magnitude", "mel"):
        assert float(free[name]) < 1e-5
        assert float(judged[name]) > 1e-3


def test_the_source_is_of_the_true_pitch_as_often_as_asked(params):
    batch = rows((10, 10))
    high = replace(batch, f0=np.where(batch.f0 > 0, 1.5 * batch.f0, 0).astype(np.float32))
    for forced, heard in ((1.0, True), (0.0, False)):
        config = replace(PLAIN, teacher_forcing_prob=forced)
        ours, theirs = (losses(params, x, config=config) for x in (batch, high))
        assert (ours["magnitude"] != theirs["magnitude"]) is heard
        assert ours["pitch"] != theirs["pitch"]


def test_a_pitch_that_is_not_known_is_predicted_and_not_judged(params):
    batch = rows((10, 10))
    unknown = replace(batch, f0=np.full_like(batch.f0, -1))
    found = losses(params, unknown)
    assert (found["pitch"], found["voicing"]) == (0, 0)
    predicted = losses(params, batch, config=replace(PLAIN, teacher_forcing_prob=0.0))
    assert found["magnitude"] == pytest.approx(predicted["magnitude"], rel=1e-5)
    half = replace(batch, f0=batch.f0.copy())
    half.f0[:, 5:] = -1
    assert losses(params, half)["pitch"] != pytest.approx(losses(params, batch)["pitch"])


def test_a_key_is_a_loss(params):
    batch = rows((10, 10))
    assert losses(params, batch, 1) == losses(params, batch, 1)
    assert losses(params, batch, 1)["magnitude"] != losses(params, batch, 2)["magnitude"]


def test_gradients_are_finite(params):
    """Of silence, of nothing, of magnitudes beyond the limit of float32."""

    @jit
    def gradient(params, batch):
        def loss(params):
            return vocoder_loss(MODEL, params, batch, jax.random.key(0), PLAIN)[0]

        return jax.grad(loss)(params)

    batch = rows((10, 0, 10, 1))
    batch.sound[2], batch.f0[2] = 0, -1
    loud = jax.tree.map(jnp.copy, params)
    loud["post"]["bias"] = loud["post"]["bias"].at[:9].set(200.0)
    for numbers in (params, loud):
        found = gradient(numbers, batch)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    found = gradient(params, batch)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(found))  # all is learnt


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("teacher_forcing_prob", 1.5),
        ("teacher_forcing_prob", float("nan")),
        ("mel_weight", -1.0),
        ("edge_frames", -1),
        ("pitch_weight", float("inf")),
        ("resolutions", ()),
        ("resolutions", ((300, 128),)),
    ],
)
def test_settings_that_mean_nothing_are_errors(field, value):
    with pytest.raises(TrainError, match=f"{field}=.*expected"):
        VocoderLossConfig(**{field: value})


def test_a_vocoder_of_other_frames_is_an_error():
    cfg = replace(CFG, rates=(20,), kernels=(40,))
    loss = partial(vocoder_loss, vocoder(cfg))
    with pytest.raises(TrainError, match="makes 320 samples of 80 mel bands: expected 480 of 80"):
        jax.eval_shape(loss, vocoder(cfg).abstract, rows(), jax.random.key(0))


# --- learning -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_vocoder_learns_a_sound_and_a_run_that_goes_on_is_the_same_run(params):
    batch = place_network_batch(rows((FRAMES, FRAMES)), None)
    optimizer = make_optimizer(
        OptimizerConfig(
            learning_rate=1e-2,
            learning_rate_overrides=dict.fromkeys(FIRST_LAYERS, 1e-3),
            warmup_steps=5,
            steps=150,
            betas=(0.8, 0.99),
            weight_decay=0.0,
        )
    )
    state = init_state(MODEL, optimizer, None, jax.tree.map(jnp.copy, params))
    traces, found = TRACES["step"], []
    step = make_loss_step(
        vocoder_loss, MODEL, optimizer, replace(PLAIN, teacher_forcing_prob=0.8), seed=5
    )
    step = step.lower(
        abstract_state(MODEL, optimizer), abstract_vocoder_batch(None, 2, FRAMES)
    ).compile()
    for number in range(150):
        if number == 2:
            kept = jax.tree.map(jnp.copy, state)
        state, report = step(state, batch)
        found.append({name: float(value) for name, value in report.items()})
    assert TRACES["step"] == traces + 1
    assert int(state.step) == 150
    _, report = step(kept, batch)
    assert {name: float(value) for name, value in report.items()} == found[2]
    first, last = found[0], found[-1]
    assert set(last) == {
        "loss",
        "grad_norm",
        "learning_rate",
        "frames",
        "convergence",
        "magnitude",
        "mel",
        "pitch",
        "voicing",
    }
    assert last["convergence"] < 0.6, (first, last)
    assert last["magnitude"] < first["magnitude"] / 3, (first, last)
    assert last["mel"] < first["mel"] / 5, (first, last)
    assert last["pitch"] < first["pitch"] / 4, (first, last)
    assert last["voicing"] >= 0.9, (first, last)
    measure = make_loss_evaluation(vocoder_loss, MODEL, PLAIN)
    loss, report = measure(state.params, batch, jax.random.key(0))
    assert float(loss) == pytest.approx(last["loss"], rel=0.2)
    assert float(report["frames"]) == 2 * FRAMES


def test_frozen_parts_stay(params):
    optimizer = make_optimizer(
        OptimizerConfig(
            learning_rate=1e-3, warmup_steps=0, learning_rate_overrides={"f0_predictor": 0.0}
        )
    )
    state = init_state(MODEL, optimizer, None, jax.tree.map(jnp.copy, params))
    batch = place_network_batch(rows(), None)
    step = make_loss_step(vocoder_loss, MODEL, optimizer, PLAIN).lower(state, batch).compile()
    state, _ = step(state, batch)
    jax.tree.map(
        np.testing.assert_array_equal, state.params["f0_predictor"], params["f0_predictor"]
    )
    assert np.any(np.asarray(state.params["pre"]["kernel"] != params["pre"]["kernel"]))


SHARDED = """
    import json, sys
    import jax, numpy as np
    sys.path.insert(0, sys.argv[1])
    from test_vocoder import CFG, MODEL, PLAIN, rows
    from sa2jax.sharding import make_mesh
    from sa2jax.train.optimizer import OptimizerConfig, make_optimizer
    from sa2jax.train.state import init_state
    from sa2jax.train.networks.step import make_loss_step, place_network_batch
    from sa2jax.train.networks.vocoder import init_vocoder, vocoder_loss

    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3, warmup_steps=0, eps=1e-4))
    batch, found = rows((10, 4, 0, 7)), {}
    for spec in ("", "data=2,fsdp=2"):
        mesh = make_mesh(spec) if spec else None
        step = make_loss_step(vocoder_loss, MODEL, optimizer, PLAIN, mesh)
        state, losses = init_state(MODEL, optimizer, mesh, init_vocoder(CFG, mesh=mesh)), []
        places = jax.tree.map(lambda x: x.sharding, state)
        for _ in range(2):
            state, report = step(state, place_network_batch(batch, mesh))
            losses.append(float(report["loss"]))
        same = jax.tree.map(lambda x, was: x.sharding == was, state, places)
        found[spec] = {"losses": losses, "kept": all(jax.tree.leaves(same))}
    print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_sharded_step_is_the_same_step(tmp_path):
    command = ["-c", textwrap.dedent(SHARDED), Path(__file__).parent]
    run = devices.run_on_devices(4, command, tmp_path)
    alone, spread = json.loads(run.stdout).values()
    np.testing.assert_allclose(spread["losses"], alone["losses"], rtol=1e-4)
    assert spread["losses"][0] != spread["losses"][1]
    assert spread["kept"]

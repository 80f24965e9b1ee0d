"""Flow matching: the loss is what it says, and a tiny flow learns a recording and then says it."""

import json
import textwrap
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import devices
from helpers.small_speech import SmallFlow
from jax import jit

from sa2jax.errors import TrainError
from sa2jax.models.flow import FlowOptions, VoicePrompt
from sa2jax.models.flow.flow_matching import flow_model, start_noise, unstack_flow
from sa2jax.models.flow.upsample_conformer import ConformerState, chunk_mask
from sa2jax.train.networks.batches import FlowBatch
from sa2jax.train.networks.flow import FlowLossConfig, _chunks, _random_draws, flow_loss
from sa2jax.train.networks.step import TRACES, make_loss_step, place_network_batch
from sa2jax.train.optimizer import OptimizerConfig, make_optimizer
from sa2jax.train.state import init_state

PLAIN = FlowLossConfig(cfg_dropout=0, prompt_prob=0)
CODES = 12


@pytest.fixture(scope="module")
def flow() -> SmallFlow:
    return SmallFlow()


def compiled(step, state, batch):
    """The step without what makes compilation slow."""
    return step.lower(state, batch).compile()


def rows(flow, lengths=(CODES,), room: int | None = None) -> FlowBatch:
    """Smooth mel frames and steady codes: something that can be learnt."""
    room, mels = room or max(lengths), flow.cfg.mels
    time = np.arange(2 * room)[:, None]
    mel = np.stack(
        [-4 + 2 * np.sin(time / (3 + row) + np.arange(mels) / 9) for row in range(len(lengths))]
    )
    rng = np.random.default_rng(0)
    return FlowBatch(
        codes=np.stack([flow.codes(row, room)[0] for row in range(len(lengths))]),
        mels=mel.astype(np.float32),
        lengths=np.array(lengths, np.int32),
        speaker=rng.normal(size=(len(lengths), flow.cfg.speaker)).astype(np.float32),
    )


@pytest.fixture(scope="module")
def losses(flow):
    """The loss and its report; one program for each config and shape."""

    @partial(jit, static_argnames="config")
    def run(params, batch, key, config):
        return flow_loss(flow.model, params, batch, key, config)

    return lambda batch, seed=0, config=PLAIN, params=flow.params: run(
        params, batch, jax.random.key(seed), config
    )


# --- the loss -----------------------------------------------------------------------------------


def test_the_loss_is_the_error_of_the_velocity_that_sampling_uses(flow, losses):
    """The same number from the pieces that `Flow.__call__` makes a reply of."""
    batch = rows(flow)
    config = replace(PLAIN, sigma_min=0.25)
    loss, report = losses(batch, 3, config)
    uniform, seeds = _random_draws(jax.random.key(3), 1)
    level = 1 - np.cos(np.pi / 2 * np.asarray(uniform[3]))
    noise = np.asarray(start_noise(np.zeros(1, np.int32), 2 * CODES, flow.cfg.mels, seeds))

    @jit
    def velocity(params, x, level):
        net, trace = flow.model.bind(params), {}
        nothing = np.zeros((1, 0), np.int32), np.zeros((1, 0, flow.cfg.mels), np.float32)
        prompt = VoicePrompt(*nothing, batch.speaker)
        net(prompt, batch.codes, options=FlowOptions(steps=1, noise=x), trace=trace)
        voice = jnp.broadcast_to(trace["speaker"][:, None], trace["mu"].shape)
        known = [trace["mu"], voice, jnp.zeros_like(trace["mu"])]
        inputs = jnp.concatenate([x[None], *known], axis=-1)
        parts = jax.tree.map(lambda part: part[0], net.estimator.timestep_modulation(level))
        _, empty = net._empty_states(1, 1)
        two = jnp.concatenate([inputs, inputs])  # as both branches
        mask, counts = np.ones((2, 2 * CODES), bool), np.full(2, 2 * CODES, np.int32)
        return net.estimator(two, parts, mask, counts, empty, 0)[0][0]

    path = (1 - 0.75 * level[0]) * noise[0] + level[0] * batch.mels[0]
    target = batch.mels[0] - 0.75 * noise[0]
    expected = np.mean((np.asarray(velocity(flow.params, path, level)) - target) ** 2)
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    assert float(report["frames"]) == 2 * CODES


def test_a_row_in_chunks_is_a_stream(flow):
    """Encoder and estimator give at once what they give chunk by chunk, with what they remember."""
    sizes, lookahead = (4, 3, 5), flow.cfg.encoder.lookahead
    chunks = np.repeat(np.arange(3), sizes)[None]
    codes, mels = flow.codes(1, CODES)[0], flow.cfg.mels
    inputs = np.random.default_rng(0).normal(size=(2, 2 * CODES, 4 * mels)).astype(np.float32)

    @jit
    def encoded(params):
        net = flow.model.bind(params)
        x = jnp.pad(net.table[...][codes][None], [(0, 0), (0, lookahead), (0, 0)])
        nothing = ConformerState.zeros(flow.cfg.encoder, 1, 0, x.dtype)
        present = np.array([CODES])
        whole, _ = net.encoder(x, present, present, nothing)
        at_once, _ = net.encoder(x, present, present, nothing, chunks=chunks)
        state, pieces, first = nothing.grow(0), [], 0
        for size in sizes:
            piece = x[:, first : first + size + lookahead]
            count = np.array([size])
            heard = np.array([min(size + lookahead, CODES - first)])
            y, state = net.encoder(piece, heard, count, state, capacity=CODES)
            pieces.append(y)
            first += size
        return at_once, jnp.concatenate(pieces, axis=1), whole

    at_once, streamed, whole = encoded(flow.params)
    np.testing.assert_allclose(at_once, streamed, atol=2e-5)
    assert np.abs(at_once - whole).max() > 1e-2

    @jit
    def velocities(params):
        net = flow.model.bind(params)
        parts = jax.tree.map(
            lambda part: part[0], net.estimator.timestep_modulation(np.array([0.3], np.float32))
        )
        _, empty = net._empty_states(1, 1)
        counts = np.full(2, 2 * CODES)
        mask = jnp.repeat(chunk_mask(jnp.repeat(chunks, 2, axis=1)), 2, axis=0)
        at_once, _ = net.estimator(inputs, parts, mask, counts, empty, 0)
        state, pieces, first = empty.grow(2 * CODES), [], 0
        for size in sizes:
            piece, count = inputs[:, first : first + 2 * size], np.full(2, 2 * size)
            there = jnp.concatenate([state.slot_order >= 0, jnp.ones((1, 2 * size), bool)], axis=1)
            y, new = net.estimator(piece, parts, jnp.repeat(there, 2, axis=0), count, state, 0)
            new = jax.tree.map(lambda leaf: leaf[None], new)
            seen = np.array([first])
            state = state.evict_and_insert(
                new, count[:1], counts[:1], seen, keep_frames=100, parity=False
            )
            pieces.append(y)
            first += 2 * size
        return at_once, jnp.concatenate(pieces, axis=1)

    np.testing.assert_allclose(*velocities(flow.params), atol=2e-5)


def test_chunks_follow_what_is_given():
    first, size = jnp.array([0.0, 0.999, 0.5]), jnp.array([0.999, 0.999, 0.0])
    found = np.asarray(_chunks(jnp.array([0, 4, 2]), first, size, 60))
    np.testing.assert_array_equal(found[0], [1] + 25 * [2] + 25 * [3] + 9 * [4])
    np.testing.assert_array_equal(found[1], 4 * [0] + 25 * [1] + 25 * [2] + 6 * [3])
    np.testing.assert_array_equal(found[2, :16], 2 * [0] + 3 * [1] + 5 * [2] + 5 * [3] + [4])


@pytest.mark.slow
def test_rows_that_are_heard_in_chunks(flow, losses):
    batch = rows(flow, (60,))
    whole, part = (float(losses(batch, 1, replace(PLAIN, streaming_prob=s))[0]) for s in (0.0, 1.0))
    assert part != pytest.approx(whole, rel=1e-4)
    seen_at_once = float(losses(batch, 1, replace(PLAIN, streaming_prob=1e-9))[0])
    assert seen_at_once == pytest.approx(whole, rel=1e-5)


def test_padding_and_what_lies_in_it_change_nothing(flow, losses):
    batch = rows(flow, (12, 7))
    loss, _ = losses(batch)
    spoilt = replace(batch, codes=batch.codes.copy(), mels=batch.mels.copy())
    spoilt.codes[1, 7:], spoilt.mels[1, 14:] = 5, 1e3
    assert float(losses(spoilt)[0]) == float(loss)
    wide = rows(flow, (12, 7), room=16)
    wide.codes[:, :12] = batch.codes
    assert float(losses(wide)[0]) == pytest.approx(float(loss), rel=1e-5)
    assert float(losses(rows(flow, (12, 8)))[0]) != pytest.approx(float(loss), rel=1e-4)


def test_empty_rows_count_for_nothing(flow, losses):
    loss, report = losses(rows(flow, (12, 0)))
    assert (float(report["frames"]), float(report["rows"])) == (24, 1)
    assert float(loss) == pytest.approx(float(losses(rows(flow, (12,)))[0]), rel=1e-5)
    nothing, report = losses(rows(flow, (0, 0), room=12))
    assert (float(nothing), float(report["frames"])) == (0, 0)


def test_a_key_is_a_loss(flow, losses):
    batch = rows(flow)
    assert float(losses(batch, 1)[0]) == float(losses(batch, 1)[0])
    assert float(losses(batch, 1)[0]) != float(losses(batch, 2)[0])


def test_rows_are_dropped_and_prompted_as_often_as_asked(flow, losses):
    count = 400
    batch = FlowBatch(
        codes=np.zeros((count, 1), np.int32),
        mels=np.zeros((count, 2, flow.cfg.mels)),
        lengths=np.ones(count, np.int32),
        speaker=np.ones((count, flow.cfg.speaker)),
    )
    _, report = losses(batch, 0, FlowLossConfig())
    three = 3 * (0.2 * 0.8 / count) ** 0.5
    assert float(report["dropped"]) / count == pytest.approx(0.2, abs=three)
    # Of those that are not dropped.
    assert float(report["prompted"]) / count == pytest.approx(0.8 * 0.5, abs=3 * 0.025)
    _, report = losses(batch, 0, FlowLossConfig(cfg_dropout=1.0))
    assert (float(report["dropped"]), float(report["prompted"])) == (count, 0)


def test_a_dropped_row_knows_neither_codes_nor_voice_nor_prompt(flow, losses):
    batch = rows(flow)
    other = replace(batch, codes=batch.codes[:, ::-1].copy(), speaker=-batch.speaker)
    for config, same in ((FlowLossConfig(cfg_dropout=1.0, prompt_prob=1.0), True), (PLAIN, False)):
        assert (float(losses(batch, 0, config)[0]) == float(losses(other, 0, config)[0])) is same


def test_a_prompt_is_heard(flow, losses):
    batch = rows(flow)

    def loss(share):
        return float(
            losses(
                batch, 0, FlowLossConfig(cfg_dropout=0, prompt_prob=1.0, max_prompt_fraction=share)
            )[0]
        )

    plain = float(losses(batch)[0])
    assert loss(0.0) == pytest.approx(plain, rel=1e-6)
    assert abs(loss(1.0) / plain - 1) > 1e-4


@pytest.mark.parametrize(
    "field", ["cfg_dropout", "prompt_prob", "max_prompt_fraction", "sigma_min"]
)
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_shares_are_between_0_and_1(field, value):
    with pytest.raises(TrainError, match=f"{field}=.*expected a number from 0 to 1"):
        FlowLossConfig(**{field: value})


# --- learning -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_flow_learns_a_recording_and_says_it(flow):
    """The loss falls, and a reply to the recording's codes comes nearer to the recording."""
    model, params = flow_model(flow.cfg, stacked=False), unstack_flow(flow.params)
    one = rows(flow)
    batch = jax.tree.map(lambda x: np.repeat(x, 8, 0), one)  # eight levels of it at once
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=5e-3, warmup_steps=5, steps=150, weight_decay=0.0)
    )
    step = make_loss_step(flow_loss, model, optimizer, FlowLossConfig(), seed=1)
    no_voice = VoicePrompt(
        np.zeros((1, 0), np.int32), np.zeros((1, 0, flow.cfg.mels), np.float32), one.speaker
    )
    say = jit(lambda params: model.bind(params)(no_voice, one.codes))

    def distance(params):
        return float(np.abs(np.asarray(say(params)) - one.mels).mean())

    before = distance(params)
    state = init_state(model, optimizer, None, jax.tree.map(jnp.copy, params))
    traces, losses = TRACES["step"], []
    step = compiled(step, state, place_network_batch(batch, None))
    for _ in range(150):
        state, report = step(state, place_network_batch(batch, None))
        losses.append(float(report["loss"]))
    assert TRACES["step"] == traces + 1
    assert int(state.step) == 150
    first, last = np.mean(losses[:10]), np.mean(losses[-10:])
    after = distance(state.params)
    assert set(report) == {
        "loss",
        "grad_norm",
        "learning_rate",
        "flow",
        "prior",
        "frames",
        "rows",
        "dropped",
        "prompted",
    }
    assert last < first / 4, (first, last)
    assert after < before / 3, (before, after)


@pytest.mark.slow
def test_a_run_that_goes_on_draws_what_it_would_have_drawn(flow):
    batch = rows(flow)
    optimizer = make_optimizer(
        OptimizerConfig(
            learning_rate=1e-3, warmup_steps=0, learning_rate_overrides={"estimator": 0.0}
        )
    )
    step = make_loss_step(flow_loss, flow.model, optimizer, seed=5)

    def fresh():
        return jax.tree.map(jnp.copy, flow.params)

    state, found = init_state(flow.model, optimizer, None, fresh()), []
    step = compiled(step, state, place_network_batch(batch, None))
    for number in range(3):
        if number == 2:
            kept = jax.tree.map(jnp.copy, state)
        state, report = step(state, place_network_batch(batch, None))
        found.append(float(report["loss"]))
    assert len(set(found)) == 3
    again, report = step(kept, place_network_batch(batch, None))
    assert float(report["loss"]) == found[2]
    jax.tree.map(np.testing.assert_array_equal, again.params, state.params)
    frozen, trained = state.params["estimator"], state.params["to_mel"]
    jax.tree.map(np.testing.assert_array_equal, frozen, flow.params["estimator"])
    assert np.any(np.asarray(trained["kernel"]) != np.asarray(flow.params["to_mel"]["kernel"]))


SHARDED = """
    import json
    import jax, numpy as np
    from pathlib import Path
    from helpers.small_speech import SmallFlow
    from sa2jax.sharding import make_mesh
    from sa2jax.train.networks.batches import FlowBatch
    from sa2jax.train.networks.flow import flow_loss
    from sa2jax.train.networks.step import make_loss_step, place_network_batch
    from sa2jax.train.optimizer import OptimizerConfig, make_optimizer
    from sa2jax.train.state import init_state

    flow = SmallFlow()
    cfg, rng = flow.cfg, np.random.default_rng(0)
    batch = FlowBatch(
        codes=rng.integers(0, cfg.codes, (8, 6)), mels=rng.normal(size=(8, 12, cfg.mels)),
        lengths=np.arange(8) % 7, speaker=rng.normal(size=(8, cfg.speaker)),
    )
    batch = jax.tree.map(lambda x: x.astype(np.float32 if x.ndim == 3 else x.dtype), batch)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0, eps=1e-4))
    found = {}
    for spec in ("", "data=2,fsdp=2"):
        mesh = make_mesh(spec) if spec else None
        step = make_loss_step(flow_loss, flow.model, optimizer, mesh=mesh)
        params = jax.tree.map(jax.numpy.copy, flow.params)
        state, losses = init_state(flow.model, optimizer, mesh, params), []
        places = jax.tree.map(lambda x: x.sharding, state)
        for _ in range(2):
            state, report = step(state, place_network_batch(batch, mesh))
            losses.append(float(report["loss"]))
        same = jax.tree.map(lambda x, was: x.sharding == was, state, places)
        leaf = state.params["estimator"]["blocks"]["up"]["kernel"]
        shape = leaf.sharding.shard_shape(leaf.shape)
        found[spec] = {
            "losses": losses, "kept": all(jax.tree.leaves(same)),
            "ways": np.divide(leaf.shape, shape).tolist(),
        }
    print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_sharded_step_is_the_same_step(tmp_path):
    script = textwrap.dedent(SHARDED)
    run = devices.run_on_devices(4, ["-c", script], tmp_path)
    alone, spread = json.loads(run.stdout).values()
    np.testing.assert_allclose(spread["losses"], alone["losses"], rtol=1e-4)
    assert spread["losses"][0] != spread["losses"][1]
    assert spread["kept"]
    assert spread["ways"] == [1, 1, 2]

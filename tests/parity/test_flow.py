"""The flow on whole replies: every recorded stage, and rows that do not feel each other.

Errors in the comments: largest difference measured on the recorded arrays.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.recorded import first_difference
from helpers.recorded_flow import stack_rows
from jax import jit

from sa2jax.models.flow import VoicePrompt, flow_model
from sa2jax.models.flow.flow_matching import schedule, start_noise
from sa2jax.models.flow.upsample_conformer import relative_positions, relative_shift
from sa2jax.nn import Policy

ATOL = 1e-4  # measured: 2e-5; the official code itself is 1.2e-5 from its float64 run


@pytest.fixture(scope="module")
def recording(flow):
    return flow.arrays("flow_offline")


@pytest.fixture(scope="module")
def case(recording):
    """The recorded reply: voice, codes, and both lengths."""
    names = ("prompt_tokens", "prompt_mel", "spk_emb", "gen_tokens")
    arrays = [recording[name] for name in names]
    return [*arrays, np.array([arrays[0].shape[1]]), np.array([arrays[3].shape[1]])]


def test_every_stage(flow, recording, case):
    mel, trace = flow.offline(*case)
    at = recording["euler_steps"]
    ours = {
        "enc_spk_affine": trace["speaker"],
        "enc_embed": trace["embed"],
        "enc_pre_lookahead": trace["look_ahead"],
        **{f"enc_conf{i}": x for i, x in enumerate(trace["layers"])},
        "enc_up_layer": trace["up"].swapaxes(1, 2),
        "enc_up_embed": trace["up_embed"],
        **{f"enc_upconf{i}": x for i, x in enumerate(trace["up_layers"])},
        "enc_encoder_out": trace["encoder_out"],
        "enc_mu": trace["mu"],
        "euler_v_cond": trace["euler_v_cond"][at, 0].swapaxes(1, 2),
        "euler_v_uncond": trace["euler_v_uncond"][at, 0].swapaxes(1, 2),
        "euler_x": trace["euler_x"][at, 0].swapaxes(1, 2),
        "feat": mel.swapaxes(1, 2),
    }
    reference = {name: recording[name] for name in ours}
    assert {n for n in recording.files if n.startswith("enc_")} <= set(reference)
    assert first_difference(ours, reference, ATOL) is None


def test_fewer_steps(flow, recording, case):
    mel, _ = flow.offline(*case, steps=4)
    error = np.abs(mel.swapaxes(1, 2) - recording["feat_4steps"]).max()
    assert error <= ATOL  # measured: 8e-6


def test_every_stage_of_the_estimator(flow, recording):
    """The first call of the estimator, fed with the recorded inputs."""
    give = {n: recording[f"dit0_{n}"] for n in ("x", "mu", "spks", "cond", "mask", "t")}
    frames = give["x"].shape[2]
    give["spks"] = np.repeat(give["spks"][..., None], frames, 2)
    inputs = np.concatenate([give[n] for n in ("x", "mu", "spks", "cond")], 1).swapaxes(1, 2)
    counts = give["mask"][:, 0].sum(1).astype(int)
    assert len(set(give["t"])) == 1  # both branches are at one noise level

    @jit
    def run(params):
        net, trace = flow.model.bind(params), {}
        blocks, final = net.estimator.timestep_modulation(give["t"], trace=trace)
        _, state = net._empty_states(1, 1)
        out, _ = net.estimator(
            inputs, (blocks[0], final[0]), give["mask"][:, 0] > 0, counts, state, 0, trace=trace
        )
        return trace | {"out": out}

    trace = run(flow.params)
    ours = {
        "dit_step0_t_emb": trace["t_emb"],
        "dit_step0_in_proj": trace["inputs"],
        "dit_step0_b0_attn": trace["attn"][0],
        **{f"dit_step0_block{i}": x for i, x in enumerate(trace["blocks"])},
        "dit0_out": trace["out"].swapaxes(1, 2),
    }
    reference = {name: recording[name] for name in ours}
    assert {n for n in recording.files if n.startswith("dit_step0")} <= set(reference)
    assert first_difference(ours, reference, ATOL) is None  # measured: 3.3e-6


def test_times_accumulate_as_the_official_ones(recording):
    t, dt = schedule(len(recording["euler_t"]))
    np.testing.assert_array_equal(t, recording["euler_t"].reshape(-1))
    assert t.dtype == dt.dtype == np.float32
    assert abs(t[-1] + dt[-1] - 1) < 1e-6


def test_rows_of_different_lengths_and_voices(flow, recording, case):
    """Each row of a batch is what it is alone; row 0 is the recorded reply."""
    prompt, room = case[0].shape[1], case[3].shape[1]
    shorter = flow.other_voice(1, 1 + prompt // 2), flow.codes(2, 1 + room // 2)
    longer = flow.other_voice(3, prompt), flow.codes(4, room)
    rows = [(case[:3], case[3]), shorter, longer]
    codes, lengths = stack_rows([codes for _, codes in rows], room + 9)
    prompts, prompt_lengths = stack_rows([voice[0] for voice, _ in rows], prompt + 5)
    mels, _ = stack_rows([voice[1] for voice, _ in rows], flow.ratio * (prompt + 5))
    mels[1, flow.ratio * prompt_lengths[1] :] = 7.0  # what lies beyond a prompt is not looked at
    codes[1, lengths[1] :] = -1
    speakers = np.concatenate([voice[2] for voice, _ in rows])
    batch = flow.offline_batch(prompts, mels, 3 * speakers, codes, prompt_lengths, lengths)
    batch = np.asarray(batch)
    assert batch.shape == (3, flow.ratio * (room + 9), flow.cfg.mels)
    for row, (voice, codes) in enumerate(rows):
        frames = flow.ratio * lengths[row]
        if row == 0:
            alone = recording["feat"].swapaxes(1, 2)
        elif row == 1:  # alone, but padded: the recorded case's program
            given, _ = stack_rows([voice[0]], prompt)
            mel, _ = stack_rows([voice[1]], flow.ratio * prompt)
            own, _ = stack_rows([codes], room)
            sizes = prompt_lengths[1:2], lengths[1:2]
            alone, _ = flow.offline(given, mel, voice[2], own, *sizes)
        else:
            alone, _ = flow.offline(*voice, codes, *case[4:])
        np.testing.assert_allclose(batch[row, :frames], alone[0, :frames], atol=ATOL)
        assert not np.any(batch[row, frames:])
    assert np.abs(batch[0, : 2 * room] - batch[2, : 2 * room]).max() > 0.1  # rows do differ


def test_noise_depends_on_the_frame_alone():
    draw = jit(lambda first, seed=0: start_noise(first, 12, 80, seed))
    noise = draw(np.array([0, 7]))
    np.testing.assert_array_equal(noise[0, 7:], noise[1, :5])
    assert abs(float(jnp.mean(noise))) < 0.1
    assert abs(float(jnp.std(noise)) - 1) < 0.05
    assert np.abs(noise - draw(np.array([0, 7]), 1)).max() > 1
    far = draw(np.array([10**8, 0]))  # 23 days: there is no buffer to run out of
    assert np.abs(far[0, 0] - far[0, 1]).max() > 0.1


@pytest.mark.parametrize(("new", "cached"), [(1, 0), (4, 5)])
def test_shift_of_distances(new, cached):
    """Query i sits at place `cached + i`; what it sees at key j is their distance."""
    columns = cached + 2 * new - 1
    table = (cached + new - 1) - jnp.arange(columns)
    seen = relative_shift(jnp.broadcast_to(table, (1, 1, new, columns)), cached + new)[0, 0]
    i, j = np.indices((new, cached + new))
    np.testing.assert_array_equal(seen, cached + i - j)
    sinusoids = np.asarray(relative_positions(new, cached, 6))
    np.testing.assert_allclose(sinusoids[:, 0], np.sin(table), atol=1e-6)
    np.testing.assert_allclose(sinusoids[:, 3], np.cos(table * 10000 ** (-2 / 6)), atol=1e-6)


def test_bfloat16_traces(flow, case):
    policy = Policy(param=jnp.bfloat16, compute=jnp.bfloat16)
    model = flow_model(flow.cfg, policy)

    def run(params):
        net = model.bind(params)
        prompt = VoicePrompt(*case[:3])
        state = net.start(prompt)
        return net(prompt, case[3]), net.step(state, case[3])

    mel, (state, streamed) = jax.eval_shape(run, model.abstract)
    assert mel.dtype == streamed.dtype == jnp.float32
    assert state.estimator.kv.dtype == state.encoder.kv.dtype == jnp.bfloat16


def test_sizes_of_the_recorded_checkpoint(flow, golden):
    sizes = json.loads((golden / "token2wav" / "tiny_dims.json").read_text())["flow"]
    encoder, estimator = flow.cfg.encoder, flow.cfg.estimator
    ours = (encoder.embed, encoder.heads, encoder.layers, encoder.up_layers, encoder.mlp)
    assert ours == tuple(sizes[k] for k in ("enc", "heads", "nb", "nu", "lin"))
    ours = (estimator.layers, estimator.heads, estimator.head_dim, estimator.embed)
    assert ours == tuple(sizes[k] for k in ("depth", "dh", "hd", "hid"))

"""The rows of a model runner, by its own programs: what is cached, heard and shared."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa2jax import testing
from sa2jax.inference.engine import BLOCK, Engine
from sa2jax.inference.requests import GenerationConfig, Request
from sa2jax.inference.runner import Chunk, ModelRunner, Start
from sa2jax.models.step_audio import step_audio2
from sa2jax.nn import Policy

CFG = testing.tiny_config(max_positions=256)
CONTEXT = CFG.decoder.max_positions


def text(seed: int, length: int) -> Request:
    return Request(np.random.default_rng(seed).integers(0, 256, length).astype(np.int32))


@pytest.fixture(scope="module")
def params():
    return testing.tiny_params(CFG)


@pytest.fixture(scope="module")
def engine(params) -> Engine:
    return Engine(step_audio2(CFG), params, CFG, rows=4)


def begin(runner: ModelRunner, row: int, request: Request, limit: int) -> int:
    """Read a prompt into a row; its first token."""
    count = len(request.ids)
    hidden = runner.prefill_chunk([Chunk(row, request, 0, count, {})])
    start = Start(row, request, GenerationConfig(max_new_tokens=limit), limit, 0, 0)
    ids, _, _ = runner.start_rows([start], hidden).read()
    return int(ids[0, 0])


def test_rows_that_have_ended_or_wait_are_not_cached(engine):
    """They keep what they hold while others go on."""
    runner = engine.replica().runner
    runner.reserve(4, CONTEXT)
    lengths, limits = (200, 7, 60), (3, 100, 100)
    for row, (length, limit) in enumerate(zip(lengths, limits, strict=True)):
        begin(runner, row, text(row, length), limit)
    ids, made, done = runner.decode([0, 1], BLOCK, 200 + BLOCK).read()
    # The newest token of a row is not in its cache yet.
    assert made.tolist() == [3, 1 + BLOCK, 1, 0]
    assert done.tolist() == [True, False, False, True]
    assert np.asarray(runner.state.cache.length).tolist() == [202, 7 + BLOCK, 60, 0]
    again, _, _ = runner.decode([2], BLOCK, 60 + BLOCK).read()
    expected = engine.generate([text(2, 60)], GenerationConfig(max_new_tokens=1 + BLOCK))
    assert again[2].tolist() == list(expected[0][0].ids)[1:]
    assert ids.shape == (4, BLOCK)


def test_generated_audio_start_is_a_token_like_any_other(engine):
    """No clip is looked for: the cache goes on as without a cache."""
    runner, request = engine.replica().runner, text(3, 40)
    runner.reserve(1, CONTEXT)
    begin(runner, 0, request, 100)
    forced = jnp.full_like(runner.state.last_token, testing.AUDIO_START)
    runner._state = replace(runner.state, last_token=forced)
    ids, _, _ = runner.decode([0], BLOCK, 40 + BLOCK).read()
    whole = np.concatenate([request.ids, [testing.AUDIO_START], ids[0, :-1]]).astype(np.int32)
    assert engine.logits(Request(whole)).argmax(-1)[-BLOCK:].tolist() == ids[0].tolist()


def test_text_and_audio_share_a_program_in_bfloat16(params):
    half = Policy(param=jnp.bfloat16, compute=jnp.bfloat16)
    numbers = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    runner = ModelRunner(step_audio2(CFG, half), numbers, CFG)
    mel = np.random.default_rng(0).standard_normal((CFG.audio_encoder.mels, 100), np.float32)
    request = replace(text(4, 40), mels=(mel,), starts=(2,), counts=(12,))
    clips = dict(enumerate(runner.encode_audio(request.mels)))
    silent, heard = (runner._pad({0: (request, 0, 40, c)}, 1, 64) for c in ({}, clips))
    kinds = [jax.tree.map(jax.typeof, batch) for batch in (silent, heard)]
    assert kinds[0] == kinds[1]
    assert heard.features.dtype == jnp.bfloat16
    assert np.abs(np.asarray(heard.features, np.float32)).max() > 0


def test_samples_share_the_reading_of_their_prompt(engine, monkeypatch):
    read, chunk = [], ModelRunner.prefill_chunk

    def spy(self, chunks):
        read.extend(own.count for own in chunks)
        return chunk(self, chunks)

    monkeypatch.setattr(ModelRunner, "prefill_chunk", spy)
    engine.generate([text(5, 100)], GenerationConfig(max_new_tokens=4, samples=3))
    assert read == [100]


@pytest.mark.parametrize("block", [1, 3, 32])
def test_a_reply_does_not_depend_on_the_size_of_blocks(engine, block):
    other = engine.replica()
    other.scheduler.block = block
    options = GenerationConfig(max_new_tokens=14)
    request = text(6, 60)
    assert other.generate([request], options) == engine.generate([request], options)

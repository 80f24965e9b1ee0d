"""Continuous batching: requests join and leave at any time, and none feels another."""

import time
from dataclasses import replace

import numpy as np
import pytest

from sa2jax import testing
from sa2jax.inference import engine as inference_engine
from sa2jax.inference.engine import Engine
from sa2jax.inference.generation import Generation
from sa2jax.inference.requests import GenerationConfig, Request
from sa2jax.inference.sampling import SamplingParams
from sa2jax.models.step_audio import step_audio2

CFG = testing.tiny_config(max_positions=256)
NEW, ROWS = 18, 4
GREEDY = GenerationConfig(max_new_tokens=NEW)
SAMPLED = replace(GREEDY, sampling=SamplingParams(temperature=0.8, top_k=20, top_p=0.9))


def text_request(rng, length: int) -> Request:
    return Request(rng.integers(0, 256, length).astype(np.int32))


@pytest.fixture(scope="module")
def engine() -> Engine:
    engine = Engine(step_audio2(CFG), testing.tiny_params(CFG), CFG, rows=ROWS)
    engine.reserve(ROWS, CFG.decoder.max_positions)
    return engine


@pytest.fixture(scope="module")
def prompts() -> list[Request]:
    rng = np.random.default_rng(1)
    return [text_request(rng, length) for length in (7, 40, 1, 60)]


@pytest.fixture(scope="module")
def greedy(engine, prompts) -> list[list[int]]:
    """What each prompt's greedy reply is, alone."""
    return [list(engine.submit(request, GREEDY).result().ids) for request in prompts]


def ids_of(replies) -> list[list[int]]:
    return [list(reply.ids) for (reply,) in replies]


def test_a_row_does_not_feel_the_settings_of_others(engine, prompts):
    """Neighbours that draw, that sort all logits, and that end and are cancelled meanwhile."""
    wholly = SamplingParams(top_k=0, top_p=0.4, temperature=1.5)
    for options in (GREEDY, SAMPLED, replace(SAMPLED, sampling=wholly)):
        expected = list(engine.submit(prompts[0], options).result().ids)
        rng = np.random.default_rng(7)
        for _ in range(3):
            others = [
                engine.submit(
                    text_request(rng, int(rng.integers(5, 150))),
                    replace(
                        (SAMPLED, GREEDY, replace(SAMPLED, sampling=wholly))[n],
                        max_new_tokens=int(rng.integers(1, 40)),
                        seed=n,
                    ),
                )
                for n in range(3)
            ]
            one = engine.submit(prompts[0], options)
            next(others[0])
            others[0].close()
            assert list(one.result().ids) == expected
            for other in others:
                other.close()


def test_requests_join_and_leave_at_any_time(engine, prompts, greedy):
    """Twelve of them, of random lengths, through four rows; some are cancelled at some block."""
    rng = np.random.default_rng(8)
    running: list[tuple[int, int, Generation]] = []
    for turn in range(40):
        row = int(rng.integers(4))
        limit = int(rng.integers(1, NEW + 1))
        running.append(
            (row, limit, engine.submit(prompts[row], replace(GREEDY, max_new_tokens=limit)))
        )
        if turn % 5 == 4:
            _, _, reply = running.pop(int(rng.integers(len(running))))
            for _ in range(int(rng.integers(0, 3))):
                next(reply, None)
            reply.close()
        while len(running) > 6:
            row, limit, reply = running.pop(0)
            assert list(reply.result().ids) == greedy[row][:limit]
    for row, limit, reply in running:
        assert list(reply.result().ids) == greedy[row][:limit]


def test_more_requests_than_rows_wait_for_their_turn(engine, prompts, greedy):
    done = []
    replies = engine.generate(prompts * 5, GREEDY, progress=lambda *count: done.append(count))
    assert ids_of(replies) == greedy * 5
    assert done == [(n, 20) for n in range(1, 21)]


def test_a_cancelled_request_that_waits_never_begins(engine, prompts, greedy):
    first = [engine.submit(prompts[0], GREEDY) for _ in range(ROWS)]
    waiting = engine.submit(prompts[1], GREEDY)
    waiting.close()
    last = engine.submit(prompts[2], GREEDY)
    assert list(last.result().ids) == greedy[2]
    assert [list(reply.result().ids) for reply in first] == [greedy[0]] * ROWS
    assert (list(waiting), waiting.finish_reason, waiting.ids) == ([], "abandoned", [])


def test_a_reply_that_nobody_takes_pauses(engine, prompts, monkeypatch):
    """Its row waits, others go on, and it ends as if it had never paused."""
    options = replace(GREEDY, max_new_tokens=120, max_repeat=0)
    expected = list(engine.submit(prompts[0], options).result().ids)
    monkeypatch.setattr(inference_engine, "MAX_PENDING", 20)
    slow = engine.submit(prompts[0], options)
    for other in [engine.submit(prompts[n % 4], GREEDY) for n in range(2 * ROWS)]:
        other.result()
    for _ in range(200):
        if not engine.scheduler.has_work():
            break
        time.sleep(0.01)
    assert 20 <= len(slow.ids) <= 35  # with what was in flight
    assert list(slow.result().ids) == expected


def test_a_paused_reply_can_be_cancelled(engine, prompts, greedy, monkeypatch):
    monkeypatch.setattr(inference_engine, "MAX_PENDING", 5)
    held = [engine.submit(prompts[0], GREEDY) for _ in range(ROWS)]
    waiting = engine.submit(prompts[1], GREEDY)
    for reply in held:
        reply.close()
    assert list(waiting.result().ids) == greedy[1]

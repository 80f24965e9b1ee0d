"""Slots and the queue before them."""

import asyncio
import time

import pytest

pytest.importorskip("fastapi", reason="needs the extra [serve]")
httpx = pytest.importorskip("httpx", reason="needs the package httpx")

from sa2jax.serve.admission import Admission
from sa2jax.serve.errors import ApiError


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 10))


def test_those_who_wait_get_their_turn_in_order():
    async def go():
        admission, order = Admission(2, 10, 5), []

        async def one(name: int):
            with await admission.acquire():
                order.append(name)
                await asyncio.sleep(0.001)

        await asyncio.gather(*map(one, range(10)))
        return order, admission.running, admission.waiting

    assert run(go()) == (list(range(10)), 0, 0)


def test_a_full_queue_sends_away_and_says_when_to_come_back():
    async def go():
        admission = Admission(1, 1, 5)
        slot = await admission.acquire()
        second = asyncio.create_task(admission.acquire())
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as full:
            await admission.acquire()
        slot.release()
        slot.release()  # a second time does nothing
        (await second).release()
        return full.value, admission.running

    error, running = run(go())
    assert (error.status, error.type) == (503, "server_error")
    assert 1 <= int(error.headers["retry-after"]) <= 60
    assert running == 0


def test_a_wait_that_is_too_long_or_given_up_leaves_no_gap():
    async def go():
        admission = Admission(1, 5, 0.02)
        slot = await admission.acquire()
        given_up = asyncio.create_task(admission.acquire())
        await asyncio.sleep(0)
        given_up.cancel()
        with pytest.raises(ApiError, match="no turn within"):
            await admission.acquire()
        waiting = admission.waiting
        late = asyncio.create_task(admission.acquire())
        await asyncio.sleep(0)
        slot.release()  # the turn comes together with the cancel
        late.cancel()
        await asyncio.gather(given_up, late, return_exceptions=True)
        (await admission.acquire()).release()
        return waiting, admission.running, admission.waiting

    assert run(go()) == (0, 0, 0)


def test_more_answers_than_fit_are_refused_at_once():
    admission = Admission(2, 1, 5)
    admission.require_room(3)
    with pytest.raises(ApiError):
        admission.require_room(4)
    admission.close()
    with pytest.raises(ApiError, match="shutting down"):
        admission.require_room()


@pytest.mark.parametrize("scripted_server", [{"rows": 1, "queue": 1}], indirect=True)
def test_a_busy_server(scripted_server, script):
    """One answer runs, one waits and says how long, a third is sent away."""
    script.pace = 0.05
    script.will_say("a" * 40, "b")
    url = f"{scripted_server.url}/v1/chat/completions"
    body = {"messages": [{"role": "user", "content": "hi"}]}
    admission = scripted_server.state.admission

    async def until(ready):
        end = time.monotonic() + 5
        while not ready():
            assert time.monotonic() < end
            await asyncio.sleep(0.005)

    async def go():
        async with httpx.AsyncClient(timeout=20) as client:
            first = asyncio.create_task(client.post(url, json=body))
            await until(lambda: admission.running)
            second = asyncio.create_task(client.post(url, json=body))
            await until(lambda: admission.waiting)
            third = await client.post(url, json=body)
            ready = await client.get(f"{scripted_server.url}/health")
            return await first, await second, third, ready

    first, second, third, ready = run(go())
    assert (first.status_code, second.status_code, third.status_code) == (200, 200, 503)
    assert third.json()["error"]["code"] == "server_overloaded"
    assert int(third.headers["retry-after"]) >= 1
    assert float(first.headers["x-queue-ms"]) == 0
    assert float(second.headers["x-queue-ms"]) > 50
    assert ready.status_code == 200

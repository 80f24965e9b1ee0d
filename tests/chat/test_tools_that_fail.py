"""Tools that fail, are late, or run at the same time."""

import os
import re
import signal
import threading
import time

import pytest
from helpers.example_tools import run, schema

from sa2jax.chat.tool_schema import Tool
from sa2jax.chat.toolbox import (
    MAX_RESULT,
    Toolbox,
)
from sa2jax.chat.tools import ToolCall
from sa2jax.errors import PromptError


class Silent(Exception):
    def __str__(self):
        raise RuntimeError


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("no network"), "ValueError: no network"),
        (KeyError("x"), "KeyError: 'x'"),
        (RuntimeError(), "RuntimeError"),
        (Silent(), "Silent"),
        (ValueError("\ud800"), "ValueError: ?"),
        (SystemExit(2), "SystemExit: 2"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (PromptError("mine"), "PromptError: mine"),
    ],
)
def test_a_tool_that_fails(error, text):
    def f():
        raise error

    result = run(Toolbox([f]), "f")
    assert (result.text, result.ok) == (f"error: the tool f failed: {text}", False)


def test_a_long_failure_is_cut():
    def f():
        raise ValueError("x" * 2 * MAX_RESULT)

    assert re.search(
        r"x\n\[cut: the first 20000 of 400\d\d characters\]$", run(Toolbox([f]), "f").text
    )


def test_a_tool_that_is_late():
    release = threading.Event()

    def slow():
        release.wait(10)
        return "too late"

    start = time.monotonic()
    result = run(Toolbox([slow], timeout=0.1), "slow")
    assert 0.1 <= time.monotonic() - start < 2
    release.set()
    assert result.text == "error: the tool slow did not answer within 0.1 s"
    assert not result.ok
    assert 0.1 <= result.seconds < 2


def test_a_tools_own_timeout_counts():
    def slow():
        time.sleep(0.2)
        return "there"

    schema = {"name": "slow"}
    assert run(Toolbox([Tool(schema, slow, timeout=5)], timeout=0.05), "slow").ok
    assert not run(Toolbox([Tool(schema, slow, timeout=0.05)], timeout=5), "slow").ok
    assert not run(Toolbox([schema], {"slow": slow}, timeout=0.05), "slow").ok


def test_calls_run_at_the_same_time_and_answer_in_order():
    def slow(n: int):
        time.sleep(0.3)
        return n

    def quick():
        return "quick"

    box = Toolbox([slow, quick])
    calls = [ToolCall("slow", {"n": 1}), ToolCall("quick", {}), ToolCall("slow", {"n": 2})]
    start = time.monotonic()
    results = box.run(calls)
    assert time.monotonic() - start < 0.55
    assert [result.text for result in results] == ["1", "quick", "2"]
    assert results[1].seconds < 0.2
    assert 0.3 <= results[0].seconds < 0.55


def test_tools_run_in_daemon_threads():
    seen = []
    run(Toolbox([schema("f")], {"f": lambda: seen.append(threading.current_thread())}), "f")
    assert seen[0] is not threading.current_thread()
    assert seen[0].daemon


def test_an_interrupt_of_the_caller_passes():
    release = threading.Event()

    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        release.wait(10)

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(Toolbox([interrupt]), "interrupt")
    assert time.monotonic() - start < 5
    release.set()

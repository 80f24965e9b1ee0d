"""Pytest plugin: the processor time of every test, and a limit for those not marked `slow`.

`--cpu-limit SECONDS` prints the ten dearest tests and the total at the end, and fails the run if a
test that is not `slow` took longer. Processor time of the process and of its children counts, not
the clock, so that a busy machine fails nothing.
"""

import os
from collections import Counter

import pytest

DEAREST = 10


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cpu-limit",
        type=float,
        metavar="SECONDS",
        help="print the dearest tests; fail if one not marked slow took more processor time",
    )


class Meter:
    """Adds up what each test cost; lives in every worker and in the process that reports."""

    def __init__(self, limit: float | None):
        self.limit = limit
        self.seconds: Counter[str] = Counter()
        self.slow: set[str] = set()
        self.last = processor_seconds()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        outcome = yield
        now = processor_seconds()
        outcome.get_result().processor_seconds = now - self.last
        self.last = now

    def pytest_runtest_logstart(self, nodeid, location):
        self.last = processor_seconds()

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.processor_seconds
        if "slow" in report.keywords:
            self.slow.add(report.nodeid)

    def too_dear(self) -> list[str]:
        """Tests that are not slow and took longer than they may."""
        assert self.limit is not None
        return [
            name
            for name, seconds in self.seconds.items()
            if seconds > self.limit and name not in self.slow
        ]

    def pytest_sessionfinish(self, session):
        reports = not hasattr(session.config, "workerinput")
        if self.limit is not None and reports and self.too_dear():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self.limit is None:
            return
        write = terminalreporter.write_line
        total = sum(self.seconds.values())
        terminalreporter.section("processor time")
        for name, seconds in self.seconds.most_common(DEAREST):
            write(f"{seconds:7.1f} s  {name}{' (slow)' if name in self.slow else ''}")
        write(f"{total:7.1f} s  in all, {len(self.seconds)} tests")
        for name in self.too_dear():
            write(
                f"{name} took {self.seconds[name]:.1f} s of processor time, more than "
                f"{self.limit:g} s: make it cheaper or mark it slow",
                red=True,
            )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Meter(config.getoption("--cpu-limit")), "processor-time")

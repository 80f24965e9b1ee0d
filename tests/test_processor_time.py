"""The guard over the tests' own processor time."""

from pathlib import Path

import pytest

TESTS = """
    import time
    import pytest

    def burn(seconds):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    def test_cheap():
        time.sleep(0.4)  # the clock does not count

    @pytest.fixture
    def dear():
        burn(0.3)

    {mark}
    def test_dear(dear):
        pass
"""
COMPLAINT = "*test_dear took * s of processor time, more than 0.25 s:*"


@pytest.mark.parametrize(("mark", "code", "workers"), [("", 1, 1), ("@pytest.mark.slow", 0, 0)])
def test_a_test_that_is_not_slow_may_not_be_dear(pytester, monkeypatch, mark, code, workers):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    pytester.makepyfile(TESTS.format(mark=mark))
    pytester.makeini("[pytest]\nmarkers = slow: dear")
    options = ["-p", "helpers.processor_time", "-n", str(workers), "-q", "--cpu-limit", "0.25"]
    result = pytester.runpytest_subprocess(*options)
    assert result.ret == code
    result.stdout.fnmatch_lines(["*=== processor time ===*", "*test_dear*", "*in all, 2 tests"])
    if code:
        result.stdout.fnmatch_lines([COMPLAINT])
    else:
        result.stdout.no_fnmatch_line(COMPLAINT)

"""The table of evaluation suites: `sa2jax eval NAME`.

find_suite("nano").metrics
register_suite(Suite(name="toy", ...))  # from a module of one's own, before the command runs
"""

from sa2jax.errors import DataError
from sa2jax.evaluate.base import Suite
from sa2jax.evaluate.nano_suite import NANO

SUITES: dict[str, Suite] = {suite.name: suite for suite in (NANO,)}


def register_suite(suite: Suite) -> Suite:
    """Add a suite to the table.

    Raises:
        DataError: if there is another of its name.
    """
    if SUITES.setdefault(suite.name, suite) is not suite:
        raise DataError(f"there is a suite {suite.name!r} already: expected another name")
    return suite


def find_suite(name: str) -> Suite:
    """The suite of a name.

    Raises:
        DataError: if there is none; it lists those that there are.
    """
    if name not in SUITES:
        raise DataError(f"there is no suite {name!r}: expected one of {', '.join(SUITES)}")
    return SUITES[name]

import pytest
from helpers.recorded import Recorded
from helpers.recorded_flow import RecordedFlow

from sa2jax.nn import Functional, Params


@pytest.fixture(scope="session")
def recorded(recorded_checkpoint) -> Recorded:
    return Recorded(recorded_checkpoint)


@pytest.fixture(scope="session")
def float32(recorded) -> tuple[Functional, Params]:
    return recorded.model("float32")


@pytest.fixture(scope="session")
def bfloat16(recorded) -> tuple[Functional, Params]:
    return recorded.model("bfloat16")


@pytest.fixture(scope="module")
def flow(golden) -> RecordedFlow:
    return RecordedFlow(golden)

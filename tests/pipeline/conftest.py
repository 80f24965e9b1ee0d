import pytest
from helpers.scripted import Script, Speech

from sa2jax import testing
from sa2jax.chat import tokenizer_files
from sa2jax.pipeline import StepAudio2


@pytest.fixture(scope="module")
def params():
    return testing.tiny_params(testing.tiny_config())


@pytest.fixture
def model(params) -> StepAudio2:
    """A tiny model with voices that nobody has."""
    from sa2jax.chat.tokenizer import Tokenizer

    tokenizer = Tokenizer(tokenizer_files.byte_tokenizer(testing.AUDIO_START, 512))
    return StepAudio2(testing.tiny_config(), params, tokenizer, speech=lambda: Speech())


@pytest.fixture
def script(monkeypatch) -> Script:
    return Script().stand_in(monkeypatch)


@pytest.fixture
def slow(script) -> Script:
    """A decoder that a voice can follow."""
    script.pace = 0.005
    return script

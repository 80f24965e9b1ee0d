"""A real, if senseless, model with a real voice, small."""

from helpers.recorded_speech import other_voice
from helpers.scripted import Speech
from helpers.small_speech import SPEAKER, small_networks
from sa2jax import testing
from sa2jax.chat import tokenizer_files
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.pipeline import StepAudio2
from sa2jax.speech.token2wav import Token2Wav


def small_speech() -> Speech:
    """A small detokenizer with one voice."""
    voice = other_voice(0, 31, SPEAKER)
    found = Speech()
    found.token2wav = Token2Wav(SPEAKER, small_networks(), steps=2)
    found.voice = lambda wanted="default": voice
    return found


def small_model(speech: Speech) -> StepAudio2:
    """A small model that speaks by it."""
    cfg = testing.tiny_config(max_positions=2048)
    tokenizer = Tokenizer(tokenizer_files.byte_tokenizer(testing.AUDIO_START, 512))
    return StepAudio2(cfg, testing.tiny_params(cfg), tokenizer, speech=lambda: speech)

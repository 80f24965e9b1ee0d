"""Sound on the wire: formats and resampling as it comes."""

import numpy as np
import pytest
from helpers.realtime import tone

from sa2jax.audio import resample
from sa2jax.serve.realtime.audio_formats import FORMATS, StreamResampler
from sa2jax.serve.realtime.checks import EventError


@pytest.mark.parametrize("rates", [(24_000, 16_000), (8_000, 16_000), (24_000, 8_000), (16, 16)])
def test_a_stream_is_resampled_to_the_same_numbers(rng, rates):
    sound = rng.standard_normal(5000).astype(np.float32)
    stream = StreamResampler(*rates)
    pieces = np.split(sound, np.sort(rng.integers(0, len(sound), 40)))
    made = np.concatenate([*(stream.push(piece) for piece in pieces), stream.flush()])
    np.testing.assert_allclose(made, resample(sound, *rates), atol=1e-6)
    assert len(stream.push(sound[:0])) == len(stream.flush()) == 0


@pytest.mark.parametrize("name", FORMATS)
def test_there_and_back(name):
    form, sound = FORMATS[name], tone(0.1, 8000)
    data = form.encode(sound)
    assert form.seconds(data) == pytest.approx(len(sound) / form.rate)
    # G.711 has steps of some percent of the level.
    loudest = 1e-4 if form.width == 2 else 0.02
    np.testing.assert_allclose(form.decode(data), sound, atol=loudest)


def test_known_bytes():
    assert FORMATS["audio/pcmu"].encode(np.float32([0, 1, -1])) == b"\xff\x80\x00"
    assert FORMATS["audio/pcma"].encode(np.float32([0, 1, -1])) == b"\xd5\xaa\x2a"
    assert FORMATS["audio/pcm"].encode(np.float32([0, 0.5, -1])) == b"\0\0\0\x40\0\x80"


def test_half_a_sample():
    with pytest.raises(EventError, match="whole samples of 2 bytes, got 3"):
        FORMATS["audio/pcm"].decode(b"abc")

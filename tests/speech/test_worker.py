"""Speech in the background: one thread that lasts, for any number of replies."""

import gc
import threading

import numpy as np
import pytest
from helpers.scripted import CODES, LOOK, SAMPLES, Token2Wav, sound, voice_called

from sa2jax.errors import CodeError
from sa2jax.speech.reply_stream import ReplyStream
from sa2jax.speech.worker import BackgroundReply

VOICE = voice_called("anna")


@pytest.fixture
def token2wav() -> Token2Wav:
    return Token2Wav()


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "sa2jax-synthesis"]


def wave_of(reply: BackgroundReply) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.float32), *reply.finish()])


def test_many_replies_need_one_thread(token2wav):
    gc.collect()
    before, seen = set(threads()), set()
    token2wav.delay = 0.001
    for number in range(200):
        reply = BackgroundReply(ReplyStream(token2wav, VOICE, first=5))
        reply.put(range(60))
        if number % 3:
            np.testing.assert_array_equal(wave_of(reply), sound(range(60)))
        else:
            reply.stop()
        seen |= set(threads())
    assert len(seen - before) == 1


def test_replies_are_spoken_in_turn(token2wav):
    """None waits for the end of another one, and none hears another's codes."""
    said, wave = [], token2wav._wave
    token2wav._wave = lambda codes: (said.append(codes), wave(codes))[1]
    one, two = (BackgroundReply(ReplyStream(token2wav, VOICE, chunk=10)) for _ in range(2))
    one.put(range(100))
    two.put(range(100, 200))
    first, second = wave_of(one), wave_of(two)
    np.testing.assert_array_equal(first, sound(range(100)))
    np.testing.assert_array_equal(second, sound(range(100, 200)))
    speakers = "".join("ab"[codes[0] >= 100] for codes in said)
    assert "ab" * 6 in speakers or "ba" * 6 in speakers


def test_pieces_come_as_soon_as_a_chunk_is_there(token2wav):
    reply = BackgroundReply(ReplyStream(token2wav, VOICE, chunk=10, first=4))
    reply.put(range(4 + LOOK - 1))
    assert list(reply.poll()) == []
    reply.put([CODES, 6])  # a pad is no code
    lengths = [len(piece) // SAMPLES for piece in reply.finish()]
    assert lengths == [4, LOOK]


def test_a_reply_without_codes_is_no_sound_and_no_error(token2wav):
    assert list(BackgroundReply(ReplyStream(token2wav, VOICE)).finish()) == []
    pads = BackgroundReply(ReplyStream(token2wav, VOICE))
    pads.put([CODES] * 3)
    np.testing.assert_array_equal(wave_of(pads), np.zeros(3 * SAMPLES))


def test_a_reply_that_fails_leaves_the_thread_to_others(token2wav):
    broken, wave = BackgroundReply(ReplyStream(token2wav, VOICE)), token2wav._wave
    token2wav._wave = lambda codes: 1 / 0
    broken.put(range(60))
    with pytest.raises(ZeroDivisionError):
        list(broken.finish())
    assert list(broken.finish()) == []  # told once
    token2wav._wave = wave
    fine = BackgroundReply(ReplyStream(token2wav, VOICE))
    fine.put(range(9))
    np.testing.assert_array_equal(wave_of(fine), sound(range(9)))


def test_a_stopped_reply_says_no_more(token2wav):
    token2wav.delay = 0.05
    reply = BackgroundReply(ReplyStream(token2wav, VOICE, chunk=5))
    reply.put(range(100))
    reply.stop()
    list(reply.finish())  # once this returns, the thread has dropped it
    assert len(token2wav.spoken) <= 5


def test_the_thread_ends_with_its_networks():
    gc.collect()
    before = set(threads())
    token2wav = Token2Wav()
    reply = BackgroundReply(ReplyStream(token2wav, VOICE))
    reply.put(range(9))
    wave_of(reply)
    (thread,) = set(threads()) - before
    del token2wav, reply
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("sizes", [{"chunk": 0}, {"first": 0}, {"chunk": -1}])
def test_bad_chunks(token2wav, sizes):
    with pytest.raises(CodeError, match="chunks of at least 1 code"):
        BackgroundReply(ReplyStream(token2wav, VOICE, **sizes))

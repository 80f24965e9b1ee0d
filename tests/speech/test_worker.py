"""Speech in the background: in the device loop, together where that is right."""

import gc
import threading
import weakref

import numpy as np
import pytest
from helpers.scripted import CODES, LOOK, SAMPLES, Token2Wav, sound, voice_called

from sa2jax.device_loop import DeviceLoop
from sa2jax.errors import CodeError
from sa2jax.speech.reply_stream import ReplyStream
from sa2jax.speech.worker import BackgroundReply

VOICE = voice_called("anna")


@pytest.fixture
def token2wav() -> Token2Wav:
    return Token2Wav()


@pytest.fixture
def speak(token2wav, loop):
    """Begins a reply."""

    def begin(**sizes) -> BackgroundReply:
        return BackgroundReply(ReplyStream(token2wav, VOICE, **sizes), loop)

    return begin


class Gate:
    """Holds the loop up until the test has said all."""

    def __init__(self, loop: DeviceLoop):
        self.open, self.left = threading.Event(), 1
        loop.wake(self)

    def urgency(self) -> float:
        return -1.0

    def has_work(self) -> bool:
        return self.left > 0

    def turn(self) -> bool:
        self.open.wait(10)
        self.left = 0
        return False


def wave_of(reply: BackgroundReply) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.float32), *reply.finish()])


def test_many_replies_need_one_thread(token2wav, speak):
    before = threading.active_count()
    token2wav.delay = 0.001
    for number in range(100):
        reply = speak(first=5)
        reply.put(range(60))
        if number % 3:
            np.testing.assert_array_equal(wave_of(reply), sound(range(60)))
        else:
            reply.stop()
        assert threading.active_count() <= before + 1


def test_replies_are_spoken_together(token2wav, speak, loop):
    """All that have a chunk and are as urgent; none hears another's codes."""
    gate = Gate(loop)
    one, two, three = (speak(chunk=10) for _ in range(3))
    one.put(range(100))
    two.put(range(100, 200))
    three.put(range(50, 75))
    gate.open.set()
    np.testing.assert_array_equal(wave_of(one), sound(range(100)))
    np.testing.assert_array_equal(wave_of(two), sound(range(100, 200)))
    np.testing.assert_array_equal(wave_of(three), sound(range(50, 75)))
    assert token2wav.together[0] == 3


def test_a_first_chunk_goes_before_those_that_are_ahead(token2wav, speak, loop):
    """A reply with seconds of sound to play waits for one that has said nothing."""
    ahead = speak(chunk=50)
    ahead.put(range(53))
    while not list(ahead.poll()):
        pass
    gate = Gate(loop)
    ahead.put(range(100, 150))
    late = speak(chunk=5)
    late.put(range(8))
    gate.open.set()
    list(late.finish())
    list(ahead.finish())
    order = token2wav.spoken
    assert order.index(4) < order.index(140)
    assert token2wav.together == []


def test_chunks_grow_to_twice_the_last(speak):
    reply = speak(chunk=25, first=5)
    reply.put(range(103))
    lengths = [len(piece) // SAMPLES for piece in reply.finish()]
    assert lengths == [5, 10, 20, 25, 25, 15 + LOOK]


def test_officially_all_chunks_but_the_first_are_alike(token2wav, loop):
    stream = ReplyStream(token2wav, VOICE, chunk=25, first=5, parity=True)
    reply = BackgroundReply(stream, loop)
    reply.put(range(103))
    assert [len(piece) // SAMPLES for piece in reply.finish()] == [5, 25, 25, 25, 20 + LOOK]


def test_pieces_come_as_soon_as_a_chunk_is_there(token2wav, speak):
    reply = speak(chunk=10, first=4)
    reply.put(range(4 + LOOK - 1))
    assert list(reply.poll()) == []
    reply.put([CODES, 6])  # a pad is no code
    lengths = [len(piece) // SAMPLES for piece in reply.finish()]
    assert lengths == [4, LOOK]


def test_a_reply_without_codes_is_no_sound_and_no_error(token2wav, speak):
    assert list(speak().finish()) == []
    pads = speak()
    pads.put([CODES] * 3)
    np.testing.assert_array_equal(wave_of(pads), np.zeros(3 * SAMPLES))


def test_a_reply_that_fails_leaves_the_thread_to_others(token2wav, speak):
    broken, wave = speak(), token2wav._wave
    token2wav._wave = lambda codes: 1 / 0
    broken.put(range(60))
    with pytest.raises(ZeroDivisionError):
        list(broken.finish())
    assert list(broken.finish()) == []  # told once
    token2wav._wave = wave
    fine = speak()
    fine.put(range(9))
    np.testing.assert_array_equal(wave_of(fine), sound(range(9)))


def test_a_stopped_reply_says_no_more(token2wav, speak):
    token2wav.delay = 0.05
    reply = speak(chunk=5)
    reply.put(range(100))
    reply.stop()
    list(reply.finish())  # once this returns, the thread has dropped it
    assert len(token2wav.spoken) <= 5


def test_of_many_the_one_that_fails_is_told(token2wav, speak, loop):
    """The others, spoken in the same call, go on."""
    wave = token2wav._wave
    token2wav._wave = lambda codes: 1 / 0 if 7 in codes else wave(codes)
    gate = Gate(loop)
    bad, good = speak(chunk=10), speak(chunk=10)
    bad.put(range(60))
    good.put(range(100, 160))
    gate.open.set()
    with pytest.raises(ZeroDivisionError):
        list(bad.finish())
    assert [len(piece) // SAMPLES for piece in good.finish()] == [10] * 5 + [10]


def test_networks_are_not_kept_alive():
    loop, token2wav = DeviceLoop(), Token2Wav()
    reply = BackgroundReply(ReplyStream(token2wav, VOICE), loop)
    reply.put(range(9))
    wave_of(reply)
    seen = weakref.ref(token2wav)
    del token2wav, reply
    loop.close()
    loop.join()
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("sizes", [{"chunk": 0}, {"first": 0}, {"chunk": -1}])
def test_bad_chunks(speak, sizes):
    with pytest.raises(CodeError, match="chunks of at least 1 code"):
        speak(**sizes)

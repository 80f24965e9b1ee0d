"""The joined detokenizer with small random weights: batches, streams, bad input."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.recorded_speech import other_voice
from helpers.small_speech import SPEAKER, small_networks

from sa2jax.errors import CodeError, ConfigError, VoiceError
from sa2jax.runtime import round_up
from sa2jax.speech import token2wav
from sa2jax.speech.programs import TRACES
from sa2jax.speech.state import concat_streams, select_streams
from sa2jax.speech.token2wav import Token2Wav

CLOSE = 1e-4
PAD = 6561


@pytest.fixture(scope="module")
def speak():
    return Token2Wav(SPEAKER, small_networks())


@pytest.fixture(scope="module")
def voices():
    return [other_voice(i, n, SPEAKER) for i, n in ((0, 31), (1, 30), (2, 44))]


def reply(seed: int, count: int) -> np.ndarray:
    """Codes, each for 80 ms, as in speech."""
    return np.repeat(np.random.default_rng(seed).integers(0, PAD, -(-count // 2)), 2)[:count]


def run(speak, state, codes, parts):
    """One reply in parts of these sizes; the last one ends it."""
    pieces, place = [], 0
    for i, size in enumerate(parts):
        last = i == len(parts) - 1
        state, (piece,) = speak.step(state, [codes[place : place + size]], last)
        place += size
        pieces.append(piece)
    assert place == len(codes)
    return np.concatenate(pieces)


# --- whole replies ---


def test_batch_of_eight_equals_eight_alone(speak, voices):
    lengths = [25, 3, 17, 21, 1, 25, 12, 23]
    replies = [reply(i, n) for i, n in enumerate(lengths)]
    chosen = [voices[i % 3] for i in range(8)]
    batch = speak(replies, chosen)
    for codes, voice, wave in zip(replies, chosen, batch, strict=True):
        alone = speak(codes, voice)
        assert wave.shape == alone.shape == (960 * len(codes),)
        # Measured: 4.8e-5.
        np.testing.assert_allclose(wave, alone, atol=CLOSE)
    assert np.abs(batch[0]).max() > 0.05


def test_one_voice_for_all(speak, voices):
    replies = [reply(0, 10), reply(1, 20)]
    for one, other in zip(speak(replies, voices[0]), speak(replies, [voices[0]] * 2), strict=True):
        np.testing.assert_array_equal(one, other)


def test_voice_and_seed_matter(speak, voices):
    codes = reply(0, 20)
    first, again = speak(codes, voices[0]), speak(codes, voices[0])
    np.testing.assert_array_equal(first, again)
    for other in (speak(codes, voices[1]), speak(codes, voices[0], seed=1)):
        assert np.abs(first - other).max() > 1e-3


def test_lengths_share_programs(speak, voices):
    speak(reply(0, 30), voices[0])
    before = TRACES.copy()
    for count in (26, 31, 50):
        speak(reply(0, count), voices[0])
    assert before == TRACES


def test_guidance_and_steps(speak, voices):
    codes = reply(0, 20)
    plain, params = speak(codes, voices[0]), small_networks()
    for options in ({"guidance": 0.0}, {"steps": 3}, {"dtype": jnp.bfloat16}):
        wave = Token2Wav(SPEAKER, params, **options)(codes, voices[0])
        assert wave.shape == plain.shape
        assert np.isfinite(wave).all()
        assert np.abs(wave - plain).max() > 1e-4, options


# --- streams ---


@pytest.mark.slow
@pytest.mark.parametrize("parity", [True, False])
def test_interleaved_streams_equal_separate_ones(speak, voices, parity):
    """Three streams that begin and end at different times, with idle steps between."""
    replies = [reply(i, n) for i, n in enumerate((72, 46, 69))]
    plan = [  # codes of each stream in each joint step; -1 ends it with all that is left
        (25, 0, 0),
        (24, 25, 0),
        (0, -1, 25),
        (0, 0, 22),
        (-1, 0, -1),
    ]
    state = speak.start(voices, parity=parity)
    joint, places, own = [[] for _ in voices], [0] * 3, [[] for _ in voices]
    for sizes in plan:
        parts, ends = [], []
        for i, size in enumerate(sizes):
            count = len(replies[i]) - places[i] if size < 0 else size
            parts.append(replies[i][places[i] : places[i] + count])
            ends.append(size < 0)
            places[i] += count
            if size:
                own[i].append(count)
        state, pieces = speak.step(state, parts, ends)
        for line, piece in zip(joint, pieces, strict=True):
            line.append(piece)
    for i, voice in enumerate(voices):
        alone = run(speak, speak.start([voice], parity=parity), replies[i], own[i])
        together = np.concatenate(joint[i])
        assert together.shape == alone.shape == (960 * len(replies[i]),)
        # Measured: 2.8e-5.
        np.testing.assert_allclose(together, alone, atol=CLOSE)


@pytest.mark.parametrize(
    "parts",
    [(28, 25, 7), (1, 2, 3, 40, 14), (57, 0, 0, 3), (60, 0)],
)
@pytest.mark.slow
def test_any_partition_gives_all_samples(speak, voices, parts):
    codes = reply(0, 60)
    wave = run(speak, speak.start(voices[:1]), codes, parts)
    assert wave.shape == (960 * len(codes),)
    assert np.isfinite(wave).all()
    # No chunk is silent: all of it was spoken.
    assert np.abs(wave.reshape(-1, 960)).max(1).min() > 1e-3


def test_codes_alone_decide_the_partition(speak, voices):
    """Look-ahead given later, or with pads between, changes nothing."""
    codes = reply(0, 60)
    expected = run(speak, speak.start(voices[:1]), codes, (28, 32))
    state, pieces = speak.start(voices[:1]), []
    for part, last in (
        ([*codes[:2], PAD], False),
        ([PAD], False),
        ([*codes[2:28]], False),
        (codes[28:], True),
    ):
        state, (piece,) = speak.step(state, [part], last)
        pieces.append(piece)
    assert [len(p) for p in pieces[:2]] == [0, 0]
    np.testing.assert_allclose(np.concatenate(pieces), expected, atol=CLOSE)


@pytest.mark.both_pairs
def test_stream_of_codes_as_they_come(speak, voices):
    codes = reply(0, 60)
    expected = run(speak, speak.start(voices[:1]), codes, (28, 25, 7))
    pieces = list(speak.stream(iter(codes.tolist()), voices[0]))
    assert len(pieces) == 3
    np.testing.assert_allclose(np.concatenate(pieces), expected, atol=CLOSE)
    early = list(speak.stream(codes, voices[0], chunk=20, first=10))
    assert [len(p) // 960 for p in early] == [6, 20, 20, 14]  # 8 mel frames are held back
    assert sum(map(len, early)) == len(expected)


def test_a_started_voice_is_kept(speak, voices):
    codes = reply(0, 20)
    first = run(speak, speak.start(voices[:1]), codes, (20,))
    before = TRACES.copy()
    np.testing.assert_array_equal(run(speak, speak.start(voices[:1]), codes, (20,)), first)
    assert before == TRACES
    assert np.abs(run(speak, speak.start(voices[:1], seed=1), codes, (20,)) - first).max() > 1e-3
    for seed in range(2 * token2wav.MAX_STARTS):
        speak.start(voices[1:2], seed=seed)
    assert len(speak._starts) <= token2wav.MAX_STARTS


@pytest.mark.slow
def test_join_and_pick(speak, voices):
    """A stream may leave a group and come into another at any time."""
    codes = [reply(i, 50) for i in range(3)]
    expected = [
        run(speak, speak.start([v]), c, (28, 22)) for v, c in zip(voices, codes, strict=True)
    ]
    pair, heads = speak.step(speak.start(voices[:2]), [c[:28] for c in codes[:2]])
    late, late_head = speak.step(speak.start(voices[2:]), [codes[2][:28]])
    state = concat_streams([select_streams(pair, [1]), late, select_streams(pair, [0])])
    order = [1, 2, 0]
    state, tails = speak.step(state, [codes[i][28:] for i in order], last=True)
    heads = [*heads, *late_head]
    for i, tail in zip(order, tails, strict=True):
        np.testing.assert_allclose(
            np.concatenate([heads[i], tail]), expected[i], atol=CLOSE, err_msg=str(i)
        )


def test_streams_that_are_apart_are_spoken_together(speak, voices):
    """Each as alone, wherever it is; those of one shape in one call, padded to a power of two."""
    codes = [reply(seed, 61) for seed in range(4)]
    own = [voices[1], voices[0], voices[1], voices[0]]
    starts = [speak.start([voice], seed=n) for n, voice in enumerate(own)]
    parts = [(28, 33), (18, 43), (28, 33), (28, 33)]
    alone = [
        run(speak, speak.start([voice], seed=n), c, p)
        for n, (voice, c, p) in enumerate(zip(own, codes, parts, strict=True))
    ]
    TRACES.clear()
    states, heads = speak.step_each(
        starts, [c[: p[0]] for c, p in zip(codes, parts, strict=True)], [False] * 4
    )
    states, tails = speak.step_each(
        states, [c[p[0] :] for c, p in zip(codes, parts, strict=True)], [True] * 4
    )
    for n, expected in enumerate(alone):
        wave = np.concatenate([heads[n], tails[n]])
        np.testing.assert_allclose(wave, expected, atol=CLOSE, err_msg=str(n))
    assert all(int(state.num_pending[0]) == 0 for state in states)
    assert TRACES["step_each"] <= 4


def test_only_streams_of_one_kind_are_joined(speak, voices):
    plain = speak.start(voices[:1])
    for other in ({"parity": True}, {"keep_frames": 50}):
        with pytest.raises(ConfigError, match="same `parity` and `keep_frames`"):
            concat_streams([plain, speak.start(voices[:1], **other)])


@pytest.mark.slow
def test_long_stream(speak, voices, monkeypatch):
    """Beyond the official limits: 1000 mel frames of cache, 5000 frames of positions."""
    monkeypatch.setattr(token2wav, "INITIAL_CAPACITY", 4096)
    codes = reply(0, 2600)
    pieces = list(speak.stream(codes, voices[1], chunk=200, seed=77))
    wave = np.concatenate(pieces)
    assert wave.shape == (960 * 2600,)
    level = np.sqrt(np.mean(wave.reshape(-1, 24_000) ** 2, axis=1))
    assert level.min() > level.max() / 4


@pytest.mark.slow
def test_room_grows(speak, voices, monkeypatch):
    """A stream that outgrows its cache sounds as one that had room from the start."""
    codes = reply(0, 330)
    expected = np.concatenate(list(speak.stream(codes, voices[2], chunk=150, seed=5)))
    speak._starts.clear()
    monkeypatch.setattr(token2wav, "INITIAL_CAPACITY", 1)
    grown = np.concatenate(list(speak.stream(codes, voices[2], chunk=150, seed=5)))
    speak._starts.clear()
    np.testing.assert_allclose(grown, expected, atol=CLOSE)


# --- codes ---


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([], "no codes"),
        ([5, -1], "code -1 at place 1: expected 0 to 6560"),
        ([6562], "code 6562 at place 0"),
        ([151696], "subtract the id"),
        ([0.5], "whole numbers"),
        (["7"], "whole numbers"),
        ([True], "whole numbers"),
        (7, "whole numbers"),
    ],
)
def test_bad_codes(speak, voices, codes, message):
    with pytest.raises(CodeError, match=message):
        speak(codes, voices[0])


def test_bad_codes_in_a_stream_leave_it_as_it_was(speak, voices):
    codes = reply(0, 30)
    expected = run(speak, speak.start(voices[:1]), codes, (28, 2))
    state, (head,) = speak.step(speak.start(voices[:1]), [codes[:28]])
    with pytest.raises(CodeError, match="9999"):
        speak.step(state, [[9999]])
    with pytest.raises(CodeError, match="for 1 streams, got 2"):
        speak.step(state, [[1], [2]])
    _, (tail,) = speak.step(state, [codes[28:]], last=True)
    np.testing.assert_allclose(np.concatenate([head, tail]), expected, atol=CLOSE)
    for chunk in ({"chunk": 0}, {"first": 0}):
        with pytest.raises(CodeError, match="at least 1 code"):
            list(speak.stream(codes, voices[0], **chunk))
    with pytest.raises(CodeError, match="no codes"):
        list(speak.stream([], voices[0]))
    with pytest.raises(CodeError, match="one voice or 1, got 2"):
        speak([codes], voices[:2])


def test_pads_are_left_out(speak, voices):
    codes = reply(0, 20)
    padded = np.insert(codes, [0, 5, 5, 20], PAD)
    np.testing.assert_array_equal(speak(padded, voices[0]), speak(codes, voices[0]))


def test_a_reply_of_pads_is_silence(speak, voices):
    np.testing.assert_array_equal(speak([PAD] * 5, voices[0]), np.zeros(5 * 960))
    silent, spoken = speak([[PAD], [7]], voices[0])
    assert (silent == 0).all()
    assert len(spoken) == 960
    (piece,) = speak.stream([PAD] * 5, voices[0])
    np.testing.assert_array_equal(piece, np.zeros(5 * 960))


def test_nan_never_becomes_sound(speak, voices):
    mel = voices[0].mel.copy()
    mel[3, 5] = np.nan
    broken = dataclasses.replace(voices[0], mel=mel)
    with pytest.raises(VoiceError, match="samples that are no numbers"):
        speak(reply(0, 20), broken)
    with pytest.raises(VoiceError, match="samples that are no numbers"):
        list(speak.stream(reply(0, 30), broken))
    assert np.isfinite(speak(reply(0, 20), voices[0])).all()


# --- buckets ---


def test_buckets():
    for size in range(1, 3000):
        room = round_up(size, 25)
        assert room % 25 == 0
        assert size <= room < max(size * 9 / 8, size) + 25
        assert round_up(room, 25) == room
    assert len({round_up(n, 25) for n in range(1, 3001)}) < 45

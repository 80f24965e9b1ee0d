"""Rows hold every example once and whole, and go on where they were left."""

import json
from dataclasses import replace

import grain
import jax
import numpy as np
import pytest

from sa2jax import audio, testing
from sa2jax.errors import DataError
from sa2jax.models.step_audio import step_audio2
from sa2jax.train.data.examples import Example
from sa2jax.train.data.samples import Reject
from sa2jax.train.language.packing import OpenRow, Pack, RowShape, misfit_reason, padded_frames

MELS = 3
SHAPE = RowShape(length=64, mel_rows=2, mel_frames=160, clips=3, mels=MELS, pad=9)
ARRAYS = set(SHAPE.empty())


def example(name: int, tokens: int, frames=(), mels=MELS) -> Example:
    """An example of `tokens` positions, every number of which tells whose it is."""
    rng = np.random.default_rng(name)
    ids = rng.integers(10, 30_000, tokens + 1).astype(np.int32)
    ids[0] = 100_000 + name
    starts, at = [], 1
    for count in map(audio.num_tokens, frames):
        starts.append(at)
        at += count + 2
    assert at - 1 <= tokens
    return Example(
        ids,
        rng.uniform(0.1, 1, tokens + 1).astype(np.float32),
        rng.integers(0, 3, tokens + 1).astype(np.uint8),
        tuple(rng.uniform(1, 2, (mels, f)).astype(np.float32) for f in frames),
        tuple(starts),
        f"x:{name}",
    )


def some_examples(count: int, seed: int, shape: RowShape = SHAPE) -> list[Example]:
    """Examples of random sizes, all of which fit."""
    rng = np.random.default_rng(seed)
    found = []
    while len(found) < count:
        most = int(rng.integers(0, 4)) if shape.mel_rows else 0
        frames = tuple(rng.integers(5, shape.mel_frames - 12, most).tolist())
        heard = sum(audio.num_tokens(f) + 2 for f in frames)
        made = example(len(found), heard + int(rng.integers(1, 24)), frames)
        if misfit_reason(made, shape) is None:
            found.append(made)
    return found


def pack(elements, shape=SHAPE, **options) -> grain.DatasetIterator:
    source = grain.MapDataset.source(elements)
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(Pack(source.to_iter_dataset(read), shape, **options))


def names(row) -> list[int]:
    """Which examples a row holds."""
    first = (row["segments"] > 0) & (row["positions"] == 0)
    return (row["ids"][first] - 100_000).tolist()


def check(row, examples, shape=SHAPE) -> list[int]:
    """That a row holds nothing but whole examples; their names."""
    assert set(row) == ARRAYS | {"rejects"}
    for name, empty in shape.empty().items():
        assert row[name].shape == empty.shape, name
        assert row[name].dtype == empty.dtype, name
    used = int((row["segments"] > 0).sum())
    assert (row["segments"][used:] == 0).all()
    assert (row["ids"][used:] == shape.pad).all()
    assert (row["targets"][used:] == shape.pad).all()
    assert not row["weights"][used:].any()
    assert (row["feature_index"][used:] == -1).all()
    held, clips = names(row), {}
    for w in range(shape.mel_rows):
        end = 0
        for start, frames in zip(row["starts"][w], row["frames"][w], strict=True):
            if frames:
                assert start % 8 == 0
                assert start == end  # side by side, with room for zeros
                end = start + padded_frames(frames)
                assert end <= shape.mel_frames
                assert not row["mels"][w, :, start + frames : end].any()
                clips[w * (shape.mel_frames // 8) + start // 8] = (w, start, frames)
        assert not row["mels"][w, :, end:].any()
    for number, name in enumerate(held, 1):
        own, at = examples[name], np.flatnonzero(row["segments"] == number)
        assert at.tolist() == list(range(at[0], at[0] + len(own.ids) - 1))
        np.testing.assert_array_equal(row["ids"][at], own.ids[:-1])
        np.testing.assert_array_equal(row["targets"][at], own.ids[1:])
        np.testing.assert_array_equal(row["weights"][at], own.weights[1:])
        np.testing.assert_array_equal(row["kinds"][at], own.kinds[1:])
        np.testing.assert_array_equal(row["positions"][at], np.arange(len(at)))
        slots = row["feature_index"][at].copy()
        for mel, start in zip(own.mels, own.starts, strict=True):
            tokens = audio.num_tokens(mel.shape[1])
            w, first, frames = clips.pop(slots[start])
            assert slots[start : start + tokens].tolist() == list(
                range(slots[start], slots[start] + tokens)
            )
            np.testing.assert_array_equal(row["mels"][w, :, first : first + frames], mel)
            slots[start : start + tokens] = -1
        assert (slots == -1).all()
    assert not clips  # every clip is somebody's
    return held


# --- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"mel_rows": 1, "mel_frames": 400, "clips": 8}, {"open_rows": 1}),
        ({"mel_rows": 5, "clips": 1}, {"open_rows": 3}),
        ({"mel_rows": 0}, {"open_rows": 4}),
        ({}, {"pack": False}),
    ],
)
def test_every_example_once_and_whole(changes, options, seed):
    shape = replace(SHAPE, **changes)
    examples = some_examples(60, seed, shape)
    rows = list(pack(examples, shape, **options))
    held = [check(row, examples, shape) for row in rows]
    assert sorted(name for row in held for name in row) == list(range(60))
    assert all(row["rejects"] == () for row in rows)
    if not options.get("pack", True):
        assert held == [[n] for n in range(60)]
    else:
        assert len(rows) < 60


@pytest.mark.parametrize(
    ("frames", "size"), [(1, 8), (3, 8), (4, 8), (5, 16), (12, 16), (13, 24), (2502, 2512)]
)
def test_room(frames, size):
    assert padded_frames(frames) == size
    assert 8 * audio.num_tokens(frames) <= size


def test_an_example_goes_into_the_first_row_with_room():
    sizes = {0: 40, 1: 50, 2: 20, 3: 10, 4: 30}
    examples = [example(n, size) for n, size in sizes.items()]
    rows = list(pack(examples, open_rows=2))
    # 2 goes behind 0 (60 of 64), 3 behind 1 (60), for 4 there is no room: 0 was first.
    assert [names(row) for row in rows] == [[0, 2], [1, 3], [4]]
    rows = list(pack([*examples[:4], example(4, 4), example(5, 64)], open_rows=2))
    assert [names(row) for row in rows] == [[0, 2, 4], [1, 3], [5]]


@pytest.mark.parametrize(
    ("frames", "names_of_first"),
    [(0, [0]), (100, [1])],  # by tokens, 0 is the fullest; by its sound, 1 is
)
def test_the_fullest_row_is_given_out(frames, names_of_first):
    shape = replace(SHAPE, mel_rows=1)
    heard = (frames,) * bool(frames)
    rows = list(pack([example(0, 30), example(1, 20, heard), example(2, 60)], shape, open_rows=2))
    if frames:
        assert names(rows[0]) == [0, 1]  # one row has room for both
        rows = list(
            pack([example(0, 40), example(1, 25, (146,)), example(2, 60)], shape, open_rows=2)
        )
    else:
        rows = list(pack([example(0, 40), example(1, 25), example(2, 60)], shape, open_rows=2))
    assert names(rows[0]) == names_of_first


def test_rows_are_well_filled():
    rng = np.random.default_rng(0)
    shape = RowShape(length=512, mel_rows=0, mels=MELS)
    examples = [example(n, int(rng.integers(20, 200))) for n in range(400)]
    rows = list(pack(examples, shape))
    fill = np.mean([(row["segments"] > 0).mean() for row in rows])
    assert fill > 0.93
    loose = list(pack(examples, shape, open_rows=1))
    assert fill > np.mean([(row["segments"] > 0).mean() for row in loose]) + 0.05


def test_clips_of_a_row_are_heard_as_if_alone():
    """The slots point at the very embeddings that a clip has by itself."""
    cfg = testing.tiny_config()
    net = step_audio2(cfg).bind(testing.tiny_params(cfg))
    shape = RowShape(length=64, mel_rows=2, mel_frames=128, clips=3, mels=16)
    examples = [example(n, 20, frames, mels=16) for n, frames in enumerate([(57, 30), (41,), (8,)])]
    (row,) = pack(examples, shape)
    assert names(row) == [0, 1, 2]
    listen = jax.jit(net.encode_audio)
    features = np.asarray(listen(row["mels"], row["frames"], row["starts"]))
    assert features.shape[:2] == (shape.mel_rows, shape.mel_frames // 8)
    alone = iter(listen(*audio.pad_mels([mel for own in examples for mel in own.mels])))
    flat, at = features.reshape(shape.features, -1), 0
    for own in examples:
        for mel, start in zip(own.mels, own.starts, strict=True):
            count = audio.num_tokens(mel.shape[1])
            slots = row["feature_index"][at + start : at + start + count]
            np.testing.assert_allclose(flat[slots], next(alone)[:count], atol=2e-5, rtol=2e-5)
        at += len(own.ids) - 1


# --- what does not fit --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "frames", "reason"),
    [
        (65, (), "^65 tokens, more than the context of 64: cut it into parts or raise `length`$"),
        (50, (150, 100, 80), r"^3 clips of 3.3 s, more than a row of 2 × 1.6 s with 3 clips each"),
        (40, (8,) * 7, r"^7 clips of 0.6 s, more than a row"),
        (40, (157,), r"^1 clip of 1.6 s"),  # without room for zeros
        (40, (156,), None),
        (64, (), None),
        (40, (8,) * 6, None),
    ],
)
def test_misfits(tokens, frames, reason):
    made = example(0, tokens, frames)
    if reason is None:
        assert misfit_reason(made, SHAPE) is None
        (row,) = pack([made])
        assert check(row, [made]) == [0]
        return
    (row,) = pack([made])
    ((where, why),) = [(r.where, r.reason) for r in row["rejects"]]
    assert where == "x:0"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(why)
    assert not row["segments"].any()


def test_rejects_come_with_the_next_row():
    bad = [Reject(f"b:{n}", "bad") for n in range(3)]
    elements = [bad[0], example(0, 60), bad[1], example(1, 60), example(2, 60), bad[2]]
    rows = list(pack(elements, open_rows=1))
    assert [names(row) for row in rows] == [[0], [1], [2]]
    assert [[r.where for r in row["rejects"]] for row in rows] == [["b:0", "b:1"], [], ["b:2"]]


def test_nothing_but_rejects_is_told_before_the_end():
    """An endless source of them would else be drawn from in vain."""
    rows = pack([Reject("b:0", "bad")])
    assert [len(row["rejects"]) for row in rows] == [1]
    endless = grain.MapDataset.source([Reject(f"b:{n}", "bad") for n in range(3)]).repeat()
    rows = iter(Pack(endless.to_iter_dataset(), SHAPE))
    for _ in range(3):
        row = next(rows)
        assert {r.where for r in row["rejects"]} == {"b:0", "b:1", "b:2"}
        assert not row["segments"].any()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mel_frames": 100}, "mel_frames=100: expected a multiple of 8"),
        ({"mel_frames": 0}, "expected a multiple of 8"),
        ({"length": 0}, "length, clips and mels of at least 1"),
        ({"mel_rows": -1}, "of at least 1"),
    ],
)
def test_shapes_that_cannot_be(changes, reason):
    with pytest.raises(DataError, match=reason):
        replace(SHAPE, **changes)


def test_there_is_at_least_one_open_row():
    with pytest.raises(DataError, match="open_rows=0: expected at least 1"):
        pack([], open_rows=0)


# --- going on -----------------------------------------------------------------------------------


def same(one, two) -> None:
    assert set(one) == set(two)
    assert one["rejects"] == two["rejects"]
    for name in ARRAYS:
        np.testing.assert_array_equal(one[name], two[name])


@pytest.mark.parametrize("options", [{}, {"open_rows": 3}, {"pack": False}])
def test_going_on_after_any_row(options):
    examples = some_examples(40, 5)
    elements = [Reject(f"b:{n}", "bad") if n % 7 == 3 else e for n, e in enumerate(examples)]
    states, rows, whole = [], [], pack(elements, **options)
    states.append(json.dumps(whole.get_state()))
    for row in whole:
        rows.append(row)
        states.append(json.dumps(whole.get_state()))
    assert len(rows) > 4
    other = pack(elements, **options)
    for n, state in list(enumerate(states))[::-1]:  # to earlier and earlier places
        for again in (other, pack(elements, **options)):
            again.set_state(json.loads(state))
            assert json.dumps(again.get_state()) == state
            for row in rows[n : n + 2]:
                same(next(again), row)
            if n >= len(rows) - 1:
                assert next(again, None) is None
            else:
                assert len(list(again)) == len(rows) - n - 2


def test_a_state_is_small():
    rows = pack(some_examples(200, 6))
    next(rows)
    assert len(json.dumps(rows.get_state())) < 6000


def test_an_example_that_waits_for_long_is_found_again():
    """Only what is needed is drawn: the elements in between are many."""
    drawn = []

    class Source(list):
        def __getitem__(self, index):
            drawn.append(index)
            return super().__getitem__(index)

    examples = [example(n, 50 if n else 1) for n in range(60)]
    source = Source(examples)
    rows = pack(source, open_rows=2)
    early = [next(rows) for _ in range(50)]
    assert names(early[0]) == [0, 1]
    state = rows.get_state()
    del drawn[:]
    again = pack(source, open_rows=2)
    again.set_state(state)
    assert len(drawn) <= 2
    same(next(again), next(rows))


def test_data_that_changed_is_not_mistaken():
    examples = some_examples(20, 7)
    rows = pack(examples, open_rows=2)
    next(rows)
    state = rows.get_state()
    changed = [replace(e, ids=e.ids + (np.arange(len(e.ids)) == 1)) for e in examples]
    for other in ([Reject("b:0", "gone")] * 20, [example(0, 64)] * 20, changed):
        with pytest.raises(DataError, match=r"the data has changed .*\(at [bx]:"):
            pack(other, open_rows=2).set_state(state)


def test_an_open_row_stays_as_it_is_when_something_does_not_fit():
    row = OpenRow(SHAPE)
    assert row.add(example(0, 30, (80, 80)))
    before = row.arrays()
    assert not row.add(example(1, 40))
    assert not row.add(example(2, 30, (20, 140)))  # the first clip would fit
    assert row.add(example(3, 30, (60,)))
    assert len(row) == 2
    after = row.arrays()
    assert not (before["frames"][before["frames"] > 0] != 80).any()
    assert sorted(after["frames"][after["frames"] > 0].tolist()) == [60, 80, 80]

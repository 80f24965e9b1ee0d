"""From files to batches: all of the data, once, in an order that can be gone back to."""

import hashlib
import itertools
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from sa2jax import audio, testing
from sa2jax.chat import tokenizer_files
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.errors import DataError
from sa2jax.models.step_audio import step_audio2
from sa2jax.train.data.records import parse_record
from sa2jax.train.data.samples import Sample, given_codes, load_features
from sa2jax.train.data.shards import ShardWriter
from sa2jax.train.language.data import LanguageData, make_language_data
from sa2jax.train.language.data_config import DataConfig
from sa2jax.train.language.step import LanguageBatch, abstract_language_batch, language_loss

CFG = testing.tiny_config()
TOKENIZER = Tokenizer(tokenizer_files.byte_tokenizer(testing.AUDIO_START, 512))
MELS, RATE = CFG.audio_encoder.mels, 16_000
COUNT = 23  # samples of `ready`


def line(name: str, *, heard: int = 0, **more) -> dict:
    user = {"role": "user", "content": "<audio>" * heard + "q" * (sum(name.encode()) % 17)}
    reply = {"role": "assistant", "content": f"<{name}>"}
    if sum(name.encode()) % 4 == 0:
        reply["speech"] = list(range(22))
    return {"messages": [user, reply], "audios": [f"{name}-{n}.wav" for n in range(heard)], **more}


def write_jsonl(path, lines):
    path.write_text("".join(json.dumps(item) + "\n" for item in lines), encoding="utf-8")
    return path


def sound_of(name: str, number: int = 0) -> np.ndarray:
    rng = np.random.default_rng([*name.encode(), number])
    return rng.standard_normal(int(rng.integers(1500, 9000))).astype(np.float32) / 10


def prepare(folder, names, n_mels=MELS):
    """A prepared folder; every third sample hears, some twice."""
    folder.mkdir()
    with ShardWriter(folder, n_mels=n_mels, shard_size="9") as writer:
        for n, name in enumerate(names):
            record = parse_record(json.dumps(line(name, heard=n % 3)), f"{name}:1", folder)
            mels = tuple(load_features((sound_of(name, i), RATE), n_mels) for i in range(n % 3))
            writer.add(Sample(record, mels, given_codes(record)))
    return folder


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("data") / "ready", [f"s{n:02}" for n in range(COUNT)])


def config(*paths, **more) -> DataConfig:
    sizes = {"length": 128, "rows": 2, "mel_rows": 2, "mel_frames": 128, "clips": 3}
    return DataConfig(sources={str(path): 1.0 for path in paths}, **{**sizes, **more})


def data_of(*paths, seed=0, host=0, hosts=1, rejects=None, **more) -> LanguageData:
    made = config(*paths, **more)
    return make_language_data(
        made, TOKENIZER, CFG, seed=seed, host=host, hosts=hosts, rejects=rejects
    )


def names_of(batch: LanguageBatch) -> list[str]:
    """The samples of a batch, in order: each names itself in its answer."""
    found, width = [], batch.ids.shape[-1]
    rows = zip(batch.ids.reshape(-1, width), batch.segments.reshape(-1, width), strict=True)
    for ids, segments in rows:
        for number in range(1, segments.max() + 1):
            text = bytes(i for i in ids[segments == number] if i < 245).decode()
            found.append(text[text.index("<") + 1 : text.index(">")])
    return found


def order_of(data: LanguageData, batches: int | None = None) -> list[str]:
    return [name for batch in itertools.islice(data, batches) for name in names_of(batch)]


def digest(batch: LanguageBatch) -> str:
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(batch):
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


ALL = sorted(f"s{n:02}" for n in range(COUNT))

# --- batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"accumulation_steps": 2, "rows": 4}, {"mel_rows": 0}, {"rows": 1}]
)
def test_batches_are_as_a_step_expects_them(ready, changes):
    data = data_of(ready, max_rejects=COUNT, epochs=1, **changes)
    made = config(ready, **changes)
    split, seen = max(1, made.accumulation_steps), set()
    expected = abstract_language_batch(
        CFG,
        None,
        made.rows // split,
        128,
        clips=made.rows // split * made.mel_rows,
        frames=128,
        packed=3,
        accumulation_steps=made.accumulation_steps,
        metric_masks=("audio", "pads", "text"),
    )
    for batch in data:
        assert jax.tree.structure(batch) == jax.tree.structure(expected)
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(batch))
        shapes = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), batch)
        assert shapes == jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), expected)
        kinds = np.array(["text", "pads", "audio"])[np.clip(batch.targets - 302, 0, 2)]
        for name, places in batch.metric_masks.items():
            np.testing.assert_array_equal(places, (kinds == name) & (batch.segments > 0))
            seen |= {name} if places.any() else set()
    assert seen == {"text", "audio", "pads"}


def test_an_epoch_holds_every_sample_once(ready):
    data = data_of(ready, epochs=1)
    batches = list(data)
    assert sorted(name for batch in batches for name in names_of(batch)) == ALL
    assert next(data, None) is None
    assert next(data, None) is None
    assert data.batches == len(batches) > 2
    assert data.tokens == sum(int((b.segments > 0).sum()) for b in batches)
    assert data.audio_seconds == pytest.approx(sum(int(b.frames.sum()) for b in batches) / 100)
    assert 0 < data.data_wait_seconds < 60
    assert all(b.weights[b.segments == 0].sum() == 0 for b in batches)


def test_the_last_batch_may_have_empty_rows(ready):
    data = data_of(ready, epochs=1, rows=64)
    (batch,) = data
    assert sorted(names_of(batch)) == ALL
    used = (batch.segments > 0).any(-1)
    assert 3 < used.sum() < 60
    assert not used[used.sum() :].any()
    empty = data.empty_batch()
    assert jax.tree.map(np.shape, empty) == jax.tree.map(np.shape, batch)
    assert not empty.weights.any()


@pytest.mark.parametrize(("accumulation_steps", "hosts"), [(0, 1), (2, 1), (0, 2), (3, 2)])
def test_slots_point_at_the_clips_of_their_own_row(ready, accumulation_steps, hosts):
    features, each = (
        2 * 128 // 8,
        12 // hosts // max(1, accumulation_steps),
    )  # of a row; rows of a part
    for host in range(hosts):
        for batch in data_of(
            ready, host=host, hosts=hosts, rows=12, accumulation_steps=accumulation_steps, epochs=1
        ):
            slots = batch.feature_index.reshape(-1, each, 128)
            frames = batch.frames.reshape(-1, each, 2, 3)
            for part, row in np.ndindex(slots.shape[:2]):
                own = slots[part, row][slots[part, row] >= 0]
                first = (host * each + row) * features  # hosts stand side by side in each part
                assert ((own >= first) & (own < first + features)).all()
                assert len(own) == sum(audio.num_tokens(f) for f in frames[part, row].ravel())


def test_packed_batches_have_the_loss_of_rows_of_their_own(ready):
    """With the model itself: what is learnt does not depend on how it is packed."""
    cfg, found = testing.tiny_config(layers=1), []
    model, params = step_audio2(cfg), testing.tiny_params(cfg)
    find = jax.jit(lambda batch: language_loss(model, params, batch, loss_chunk=128))
    for pack in (True, False):
        (batch,) = data_of(ready, epochs=1, rows=COUNT, pack=pack, max_rejects=0)
        assert ((batch.segments > 1).any(), (batch.segments[-1] > 0).any()) == (pack, not pack)
        loss, sums = find(batch)
        found.append((float(loss), float(sums["text"].loss), float(sums["all"].weight)))
    np.testing.assert_allclose(*found, rtol=2e-5)
    assert found[0][2] == batch.weights.sum()


def test_shards_and_their_recordings_give_the_same(tmp_path, ready):
    names = [f"s{n:02}" for n in range(5)]
    lines = [line(name, heard=n % 3) for n, name in enumerate(names)]
    path = write_jsonl(tmp_path / "s.jsonl", lines)
    for n, name in enumerate(names):
        for i in range(n % 3):
            audio.write_wav(tmp_path / f"{name}-{i}.wav", sound_of(name, i), RATE)
    one = next(data_of(path, rows=4, shuffle=False, epochs=1))
    assert names_of(one) == names
    two = next(data_of(ready, rows=8, shuffle=False, epochs=1))
    first = one.segments[0].max()
    inside = (two.segments[0] > 0) & (two.segments[0] <= first)
    np.testing.assert_array_equal(one.ids[one.segments > 0][: inside.sum()], two.ids[0][inside])
    frames = one.frames[one.frames > 0]
    np.testing.assert_allclose(one.mels[0, :, : frames[0]], two.mels[0, :, : frames[0]], atol=2e-3)


# --- order --------------------------------------------------------------------------------------


def test_order_is_of_the_files_or_of_the_seed(ready):
    assert order_of(data_of(ready, shuffle=False, epochs=1, pack=False)) == ALL
    one, again, other = (order_of(data_of(ready, seed=seed, epochs=1)) for seed in (3, 3, 4))
    assert one == again
    assert one != other
    assert sorted(other) == ALL


def test_every_epoch_has_an_order_of_its_own(ready):
    order = order_of(data_of(ready, epochs=2, pack=False))
    assert sorted(order[:COUNT]) == sorted(order[COUNT:]) == ALL
    assert order[:COUNT] != order[COUNT:]
    endless = order_of(data_of(ready, pack=False, rows=1), 2 * COUNT)
    assert endless == order


def test_weights_of_a_mixture(tmp_path, ready):
    few = write_jsonl(tmp_path / "few.jsonl", [line(f"f{n}") for n in range(4)])
    made = replace(config("x", rows=1, pack=False), sources={str(ready): 3.0, str(few): 1.0})
    data = make_language_data(made, TOKENIZER, CFG, seed=0)
    names = order_of(data, 48)
    assert Counter(name[0] for name in names) == {"s": 36, "f": 12}
    assert set(Counter(name for name in names if name[0] == "f").values()) == {3}  # evenly
    assert len(set(names) - {f"f{n}" for n in range(4)}) == COUNT  # goes on where it was
    once = order_of(make_language_data(replace(made, epochs=1), TOKENIZER, CFG, seed=0))
    assert Counter(name[0] for name in once) == {"s": 12, "f": 4}  # until the first has been seen


@pytest.mark.parametrize("epochs", [1, 2])
def test_hosts_share_the_samples(ready, epochs):
    shares = [order_of(data_of(ready, host=host, hosts=2, epochs=epochs)) for host in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(ALL * epochs)
    assert abs(len(shares[0]) - len(shares[1])) <= 1
    if epochs == 1:
        assert not set(shares[0]) & set(shares[1])


# --- going on -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"epochs": 2}, {}),
        ({"epochs": 4, "accumulation_steps": 2, "rows": 4}, {"hosts": 2, "host": 1}),
        ({"epochs": 1, "rows": 1, "pack": False}, {}),
    ],
)
def test_going_on_after_any_batch(ready, tmp_path, options, place):
    lines = [line(f"b{n}") if n % 5 else {} for n in range(COUNT)]
    bad = write_jsonl(tmp_path / "bad.jsonl", lines)
    make = partial(data_of, ready, bad, **options, **place)
    data, batches = make(), []
    states = [json.dumps(data.state())]
    for batch in data:
        batches.append(batch)
        states.append(json.dumps(data.state()))
    assert len(batches) > 3
    assert set(data.rejected) <= {f"bad.jsonl:{n + 1}" for n in range(0, COUNT, 5)}
    assert len(data.rejected) > 3
    again = make()
    again.restore(json.loads(states[2]))
    for batch, state in zip(batches[2:], states[3:], strict=True):
        assert digest(next(again)) == digest(batch)
        assert json.dumps(again.state()) == state
    assert next(again, None) is None
    for n in range(len(batches) - 1, -1, -1):  # back, in one that was used
        again.restore(json.loads(states[n]))
        assert digest(next(again)) == digest(batches[n])
    assert (again.batches, again.tokens) == (1, int((batches[0].segments > 0).sum()))


SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
from test_data import data_of, digest, order_of
if __name__ == "__main__":
    state = json.load(open({state!r}))
    data = data_of({path!r}, {bad!r}, epochs=2, workers=2)
    data.restore(state)
    print(digest(next(data)))
    print(*order_of(data))
    data.close()
"""


@pytest.mark.slow
def test_workers_see_all_samples_and_go_on_in_another_process(ready, tmp_path):
    bad = write_jsonl(tmp_path / "bad.jsonl", [{}] * COUNT)
    data = data_of(ready, bad, epochs=2, workers=2, rejects=tmp_path / "out.jsonl")
    names = order_of(data, 2)
    (tmp_path / "state.json").write_text(json.dumps(data.state()))
    batch = next(data)
    rest = order_of(data)
    assert sorted([*names, *names_of(batch), *rest]) == sorted(2 * ALL)
    assert len(data.rejected) == len((tmp_path / "out.jsonl").open().readlines()) == COUNT
    data.close()
    here, state = Path(__file__), str(tmp_path / "state.json")
    script = SCRIPT.format(tests=str(here.parent), state=state, path=str(ready), bad=str(bad))
    (tmp_path / "run.py").write_text(script)
    command = [sys.executable, str(tmp_path / "run.py")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.splitlines() == [digest(batch), " ".join(rest)]


def test_the_state_of_something_else(ready):
    data = data_of(ready)
    for state in (data_of(ready, seed=1).state(), data.state() | {"host": 1}):
        with pytest.raises(DataError, match=r"this state has .* expected the same sources"):
            data.restore(state)


def test_the_fingerprint_is_of_what_the_batches_depend_on(tmp_path, ready):
    one = write_jsonl(tmp_path / "one.jsonl", [line("a"), line("b")])
    two = write_jsonl(tmp_path / "two.jsonl", [line("a"), line("b")])
    same = data_of(one).fingerprint
    assert data_of(two).fingerprint == same
    assert data_of(one, max_rejects=5, rejects=tmp_path / "r").fingerprint == same
    hosts = {data_of(one, host=h, hosts=2).fingerprint for h in range(2)}
    assert len(hosts) == 1
    others = [
        data_of(one, seed=1),
        data_of(one, length=120),
        data_of(one, workers=1),
        data_of(ready),
        data_of(one, loss_weights={"text": 2}),
        data_of(one, pack=False),
        data_of(one, shuffle=False),
        data_of(one, two),
        data_of(one, prompt_style="base"),
        data_of(one, epochs=3),
        data_of(one, rows=4),
    ]
    found = {same, *hosts, *(data.fingerprint for data in others)}
    assert len(found) == 2 + len(others)


# --- what cannot be used ------------------------------------------------------------------------


def test_rejects_are_listed_once(tmp_path, ready):
    lines = [line("a"), {"messages": []}, line("y" * 301), line("b", heard=1)]
    path, listed = write_jsonl(tmp_path / "bad.jsonl", lines), tmp_path / "out" / "rejects.jsonl"
    data = data_of(path, epochs=3, rows=1, pack=False, rejects=listed)
    assert order_of(data) == ["a"] * 3
    found = {item["where"]: item["reason"] for item in map(json.loads, listed.open())}
    assert found == data.rejected
    assert len(listed.read_text().splitlines()) == 3
    assert found["bad.jsonl:2"].startswith("expected a list of messages")
    assert found["bad.jsonl:3"].startswith("329 tokens, more than the context of 128")
    assert "b-0.wav" in found["bad.jsonl:4"]


def test_rejects_of_several_sources_are_told_apart(tmp_path):
    lines = [line("a"), {}, line("x" * 300)]
    for folder in ("one", "two", "three"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "train.jsonl", lines)
    paths = [tmp_path / "one" / "train.jsonl", tmp_path / "two" / "train.jsonl", tmp_path / "three"]
    data = data_of(*paths, epochs=1)
    assert order_of(data) == ["a"] * 3
    files = ("one/train.jsonl", "two/train.jsonl", "three/train.jsonl")
    assert set(data.rejected) == {f"{file}:{n}" for file in files for n in (2, 3)}


def test_rejects_after_going_on(tmp_path):
    lines = [line(f"a{n}") if n % 2 else {} for n in range(40)]
    path, listed = write_jsonl(tmp_path / "bad.jsonl", lines), tmp_path / "rejects.jsonl"
    listed.symlink_to(path)  # nothing is written through it
    data = data_of(path, epochs=1, rows=1, pack=False, rejects=listed)
    order_of(data, 10)
    state, before = data.state(), listed.read_text()
    order_of(data)
    whole = listed.read_text()
    assert len(whole.splitlines()) == 20 > len(before.splitlines())
    again = data_of(path, epochs=1, rows=1, pack=False, rejects=listed)
    again.restore(state)
    order_of(again)
    assert listed.read_text() == whole


def test_hosts_have_lists_of_their_own(tmp_path):
    path = write_jsonl(tmp_path / "bad.jsonl", [{}, line("a")] * 6)
    for host in range(2):
        order_of(data_of(path, epochs=1, host=host, hosts=2, rejects=tmp_path / "r.jsonl"))
    listed = sorted(tmp_path.glob("r*.jsonl"))
    assert [file.name for file in listed] == ["r-0.jsonl", "r-1.jsonl"]
    assert sum(len(file.open().readlines()) for file in listed) == 6


def test_too_many_rejects(tmp_path):
    path = write_jsonl(tmp_path / "bad.jsonl", [line("a"), {}, {}, {}, line("b")])
    listed = tmp_path / "rejects.jsonl"
    data = data_of(path, epochs=1, shuffle=False, max_rejects=2, rejects=listed)
    with pytest.raises(DataError, match=r"^3 samples cannot be used, more than max_rejects=2; the"):
        order_of(data)
    assert len(listed.read_text().splitlines()) == 3
    assert len(order_of(data_of(path, epochs=1, max_rejects=3))) == 2


@pytest.mark.parametrize("epochs", [1, 2, None])
def test_nothing_but_rejects(tmp_path, epochs):
    path = write_jsonl(tmp_path / "bad.jsonl", [{}] * 30)
    with pytest.raises(DataError, match=r"no sample can be used; the last is bad.jsonl:\d+: "):
        next(data_of(path, epochs=epochs))


def test_a_list_that_cannot_be_written(tmp_path):
    path = write_jsonl(tmp_path / "bad.jsonl", [{}, line("a")])
    with pytest.raises(DataError, match="cannot be written: "):
        next(data_of(path, epochs=1, rejects=path / "r.jsonl"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"host": 2, "hosts": 2}, "host 2 of 2"),
        ({"rows": 3, "hosts": 2}, "host 0 of 2 for rows=3: expected .* rows as a multiple"),
        ({"rows": 4, "accumulation_steps": 4, "hosts": 2}, "expected a multiple of 2 × "),
        ({"seed": -1}, "seed=-1: expected 0 or more"),
    ],
)
def test_places_that_cannot_be(ready, changes, reason):
    with pytest.raises(DataError, match=reason):
        data_of(ready, **changes)


def test_sources_that_cannot_be(tmp_path, ready):
    with pytest.raises(DataError, match=r"no such file or folder: .*nowhere"):
        data_of(tmp_path / "nowhere")
    other = prepare(tmp_path / "other", ["a"], n_mels=8)
    with pytest.raises(DataError, match="8 mel bands, the model hears 16"):
        data_of(other)
    with pytest.raises(DataError, match="has 512 tokens, the model a vocabulary of 5"):
        make_language_data(config(ready), TOKENIZER, testing.tiny_config(vocab=500), seed=0)

"""Generation: few programs, independent rows, and ends where it should."""

from collections import Counter
from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest

from sa2jax import audio, testing
from sa2jax.errors import PromptError
from sa2jax.inference.engine import BLOCK, Engine
from sa2jax.inference.generation import Generation
from sa2jax.inference.programs import TRACES
from sa2jax.inference.requests import GenerationConfig, Request
from sa2jax.inference.runner import TOKEN_BUCKETS, ModelRunner, bucket
from sa2jax.inference.sampling import SamplingArrays, SamplingParams, sample
from sa2jax.models.step_audio import step_audio2, unstack_decoder

CFG = testing.tiny_config(max_positions=256)
CONTEXT = CFG.decoder.max_positions
AUDIO_START = testing.AUDIO_START
NEW = 18  # tokens of a reply: it crosses three borders of blocks
ROWS = 4
GREEDY = GenerationConfig(max_new_tokens=NEW)
SAMPLED = GenerationConfig(
    sampling=SamplingParams(temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.3),
    max_new_tokens=NEW,
)


def spoken(ids) -> str:
    """Ids as text in which no id is part of another."""
    return "".join(f"<{i}>" for i in ids)


def text_request(rng, length: int) -> Request:
    return Request(rng.integers(0, 256, length).astype(np.int32))


def audio_request(rng, length: int, frames: tuple[int, ...]) -> Request:
    """A prompt with clips of these mel frames one after the other."""
    request = text_request(rng, length)
    mels = tuple(rng.standard_normal((CFG.audio_encoder.mels, n), np.float32) for n in frames)
    counts = tuple(int(audio.num_tokens(n)) for n in frames)
    starts = tuple(2 + sum(counts[:i]) + 2 * i for i in range(len(counts)))
    return replace(request, mels=mels, starts=starts, counts=counts)


@pytest.fixture(scope="module")
def params():
    return testing.tiny_params(CFG)


@dataclass
class Traffic:
    """An engine after 200 requests, and what they cost."""

    engine: Engine
    requests: list[Request]
    lengths: list[int]  # of the replies
    traced: Counter
    compiled: Counter


@pytest.fixture(scope="module")
def traffic(params) -> Traffic:
    """200 requests after a warm-up, three or four at once, some with one or two clips."""
    rng = np.random.default_rng(0)
    engine = Engine(step_audio2(CFG), params, CFG, rows=ROWS)
    compiled: Counter[str] = Counter()

    def count(event: str, duration: float, **about) -> None:
        if event.endswith("backend_compile_duration"):
            compiled[about.get("fun_name", "").removeprefix("jit(").removesuffix(")")] += 1

    requests: list[Request] = []
    lengths: list[int] = []
    steps: list[tuple[int, int]] = []
    TRACES.clear()
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        engine.reserve(ROWS, CONTEXT)
        engine.warm_up(lambda *count: steps.append(count), clip_frames=256)
        traced = Counter(TRACES)
        while len(requests) < 200:
            longest = rng.choice([60, 120, 250])
            batch = [text_request(rng, n) for n in rng.integers(1, longest, rng.integers(3, 5))]
            if len(requests) % 3 == 0:
                frames = tuple(rng.integers(9, 250, rng.integers(1, 3)).tolist())
                batch[1] = audio_request(rng, int(rng.integers(80, 250)), frames)
            options = SAMPLED if len(requests) % 2 else GREEDY
            replies = engine.generate(batch, options)
            lengths += [len(reply.ids) for (reply,) in replies]
            requests += batch
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert steps[0] == (0, steps[-1][1])
    assert steps[-1][0] == steps[-1][1] == 10
    assert traced == TRACES
    return Traffic(engine, requests, lengths, traced, compiled)


@pytest.fixture(scope="module")
def engine(traffic) -> Engine:
    """Has compiled all its programs; tests share them."""
    return traffic.engine


@pytest.fixture(scope="module")
def prompts() -> list[Request]:
    """Four prompts, one with a clip, that fit the smallest bucket."""
    rng = np.random.default_rng(1)
    return [
        text_request(rng, 7),
        audio_request(rng, 40, (100,)),
        text_request(rng, 1),
        text_request(rng, 60),
    ]


@pytest.fixture(scope="module")
def greedy(engine, prompts) -> list[list[int]]:
    """What each prompt's greedy reply is."""
    return [list(reply.ids) for (reply,) in engine.generate(prompts, GREEDY)]


def ids_of(replies) -> list[list[int]]:
    return [list(reply.ids) for (reply,) in replies]


# --- programs ---


def test_one_program_per_bucket(traffic):
    assert len(traffic.requests) >= 200
    assert traffic.traced == {
        "empty_state": 1,
        "encode_audio": 2,  # of 128 and 256 mel frames
        "scatter_features": 3,  # into chunks of 64, 128 and 256 tokens
        "prefill_chunk": 6,  # of these, at the beginning of a prompt and further on
        "start_rows": 1,
        "decode": 1,
        "copy_rows": 1,
    }


def test_what_was_traced_once_was_compiled_once(traffic):
    """A change of placement would compile again without tracing again."""
    compiled = {name: traffic.compiled[name] for name in traffic.traced}
    assert compiled == dict(traffic.traced)


def test_every_request_was_answered(traffic):
    room = [CONTEXT - len(request.ids) for request in traffic.requests]
    assert traffic.lengths == [min(NEW, left) for left in room]


def test_repeated_and_reordered_requests_trace_nothing(engine, prompts, greedy):
    before = Counter(TRACES)
    assert ids_of(engine.generate(prompts[::-1], GREEDY)) == greedy[::-1]
    assert before == TRACES


def test_no_setting_traces_anything(engine, prompts):
    before = Counter(TRACES)
    for wanted in (
        SamplingParams(temperature=0.5, top_p=0.5, top_k=7, repetition_penalty=1.1),
        SamplingParams(temperature=2.0, top_k=0, top_p=0.3),
        SamplingParams(temperature=0, repetition_penalty=1.2),
        SamplingParams(top_k=200),
    ):
        options = replace(SAMPLED, sampling=wanted, seed=5, max_new_tokens=9, stop_ids=(3, 4))
        engine.generate(prompts, options)
    assert before == TRACES


@pytest.mark.parametrize(
    ("size", "expected"), [(1, 64), (64, 64), (65, 128), (131072, 131072), (131073, 131073)]
)
def test_bucket(size, expected):
    assert bucket(size, TOKEN_BUCKETS) == expected


# --- rows ---


def test_rows_do_not_feel_their_neighbours(engine, prompts, greedy, traffic):
    for other in (0, 40, 80):
        strangers = traffic.requests[other : other + 3]
        for row in (0, 2, 3):
            batch = [prompts[row], *strangers]
            assert ids_of(engine.generate(batch, GREEDY))[0] == greedy[row]


def test_a_row_does_not_feel_the_settings_of_others(engine, prompts):
    """Neighbours that draw, that sort all logits, and that end and are cancelled meanwhile."""
    wholly = SamplingParams(top_k=0, top_p=0.4, temperature=1.5)
    for options in (GREEDY, SAMPLED, replace(SAMPLED, sampling=wholly)):
        expected = list(engine.submit(prompts[0], options).result().ids)
        rng = np.random.default_rng(7)
        for _ in range(3):
            others = [
                engine.submit(
                    text_request(rng, int(rng.integers(5, 150))),
                    replace(
                        (SAMPLED, GREEDY, replace(SAMPLED, sampling=wholly))[n],
                        max_new_tokens=int(rng.integers(1, 40)),
                        seed=n,
                    ),
                )
                for n in range(3)
            ]
            one = engine.submit(prompts[0], options)
            next(others[0])
            others[0].close()
            assert list(one.result().ids) == expected
            for other in others:
                other.close()


def test_requests_join_and_leave_at_any_time(engine, prompts, greedy):
    """Twelve of them, of random lengths, through four rows; some are cancelled at some block."""
    rng = np.random.default_rng(8)
    running: list[tuple[int, int, Generation]] = []
    for turn in range(40):
        row = int(rng.integers(4))
        limit = int(rng.integers(1, NEW + 1))
        running.append(
            (row, limit, engine.submit(prompts[row], replace(GREEDY, max_new_tokens=limit)))
        )
        if turn % 5 == 4:
            _, _, reply = running.pop(int(rng.integers(len(running))))
            for _ in range(int(rng.integers(0, 3))):
                next(reply, None)
            reply.close()
        while len(running) > 6:
            row, limit, reply = running.pop(0)
            assert list(reply.result().ids) == greedy[row][:limit]
    for row, limit, reply in running:
        assert list(reply.result().ids) == greedy[row][:limit]


def test_more_requests_than_rows_wait_for_their_turn(engine, prompts, greedy):
    done = []
    replies = engine.generate(prompts * 5, GREEDY, progress=lambda *count: done.append(count))
    assert ids_of(replies) == greedy * 5
    assert done == [(n, 20) for n in range(1, 21)]


def test_a_cancelled_request_that_waits_never_begins(engine, prompts, greedy):
    first = [engine.submit(prompts[0], GREEDY) for _ in range(ROWS)]
    waiting = engine.submit(prompts[1], GREEDY)
    waiting.close()
    last = engine.submit(prompts[2], GREEDY)
    assert list(last.result().ids) == greedy[2]
    assert [list(reply.result().ids) for reply in first] == [greedy[0]] * ROWS
    assert (list(waiting), waiting.finish_reason, waiting.ids) == ([], "abandoned", [])


def test_replies_depend_on_what_is_heard(engine, prompts, greedy):
    """A model that does not listen would give the same reply to another clip."""
    deaf = replace(prompts[1], mels=(np.zeros_like(prompts[1].mels[0]),))
    other = ids_of(engine.generate([prompts[0], deaf, *prompts[2:]], GREEDY))
    assert other[1] != greedy[1]
    assert other[0] == greedy[0]


def test_drawn_rows_depend_on_their_number_only(engine, prompts):
    whole = ids_of(engine.generate(prompts, SAMPLED))
    turned = ids_of(engine.generate(prompts[::-1], SAMPLED, prompt_indices=[3, 2, 1, 0]))
    assert turned == whole[::-1]
    moved = ids_of(engine.generate(prompts, SAMPLED, prompt_indices=[7, 1, 2, 3]))
    assert moved[0] != whole[0]
    assert moved[1:] == whole[1:]


def test_clips_find_their_places(engine):
    """Nine clips in a prompt, in chunks that cut them."""
    rng = np.random.default_rng(2)
    frames = (20, 100, 9, 60, 33, 47, 128, 12, 90)
    request = audio_request(rng, 250, frames)
    clips = engine.encode_audio(request.mels)
    for first, count in ((0, 250), (0, 64), (64, 64), (128, 122)):
        piece = (request, first, count, dict(enumerate(clips)))
        batch = engine.runner._pad({0: piece}, 1, 256)
        index = np.asarray(batch.feature_index)[0]
        held = np.zeros(256, bool)
        for mel, start, length in zip(request.mels, request.starts, request.counts, strict=True):
            (alone,) = engine.encode_audio([mel])
            for n in range(length):
                if first <= start + n < first + count:
                    at = start + n - first
                    held[at] = True
                    found = batch.features[index[at]]
                    np.testing.assert_allclose(found, alone[n], atol=1e-3)
        np.testing.assert_array_equal(index >= 0, held)


def test_no_requests(engine):
    assert engine.generate([], GREEDY) == []


# --- drawing ---


def plain_loop(engine, request, options, number: int, draw: int) -> list[int]:
    """A reply token by token, without a cache, with the documented derivation of keys."""
    key = jax.random.fold_in(jax.random.key(options.seed), number)
    key = jax.random.fold_in(key, draw)
    ids = request.ids.tolist()
    for step in range(options.max_new_tokens):
        logits = engine.logits(replace(request, ids=np.array(ids, np.int32)))[-1:]
        seen = np.isin(np.arange(logits.shape[-1]), ids)[None]
        sampling = SamplingArrays.of([options.sampling])
        token = sample(jax.random.fold_in(key, step)[None], logits, seen, sampling)
        ids.append(int(token[0]))
    return ids[len(request.ids) :]


def test_samples_are_what_a_plain_loop_draws(engine, prompts):
    options = replace(SAMPLED, samples=2, seed=3, max_new_tokens=4)
    replies = engine.generate(prompts[:2], options)
    for number, (request, made) in enumerate(zip(prompts, replies, strict=False)):
        for draw, reply in enumerate(made):
            assert list(reply.ids) == plain_loop(engine, request, options, number, draw)
    assert len({reply.ids for made in replies for reply in made}) == 4  # all differ


def test_first_of_several_samples_is_the_single_one(engine, prompts):
    several = engine.generate(prompts[:2], replace(SAMPLED, samples=2))
    single = engine.generate(prompts, SAMPLED)
    assert [made[0] for made in several] == [made[0] for made in single[:2]]
    assert all(made[0] != made[1] for made in several)


def test_greedy_samples_are_equal(engine, prompts, greedy):
    replies = engine.generate(prompts[:2], replace(GREEDY, samples=2))
    assert [[list(r.ids) for r in made] for made in replies] == [[g, g] for g in greedy[:2]]


def test_seeds(engine, prompts):
    first, again, other = (
        ids_of(engine.generate(prompts, replace(SAMPLED, seed=seed))) for seed in (1, 1, 2)
    )
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_penalty_covers_prompt_and_reply(engine, prompts):
    """A penalty beyond measure: nothing is said twice, neither of the prompt nor of the reply."""
    options = replace(GREEDY, max_new_tokens=60)
    plain = ids_of(engine.generate(prompts, options))
    assert any(len(set(ids)) < len(ids) for ids in plain)
    penalty = SamplingParams(temperature=0, repetition_penalty=1e6)
    replies = ids_of(engine.generate(prompts, replace(options, sampling=penalty)))
    for request, ids in zip(prompts, replies, strict=True):
        assert len({*ids, *request.ids.tolist()}) == len(ids) + len(set(request.ids.tolist()))


# --- ends ---


def test_limit(engine, prompts, greedy):
    for limit in (1, BLOCK, BLOCK + 1, BLOCK + 2):
        replies = engine.generate(prompts, replace(GREEDY, max_new_tokens=limit))
        assert ids_of(replies) == [ids[:limit] for ids in greedy]
        assert {reply.finish_reason for (reply,) in replies} == {"length"}


@pytest.mark.parametrize("place", [0, 1, 5, 13])
def test_stop_id(engine, prompts, greedy, place):
    stop = greedy[1][place]
    for ids, (reply,) in zip(
        greedy,
        engine.generate(prompts, replace(GREEDY, stop_ids=(stop,))),
        strict=True,
    ):
        end = ids.index(stop) if stop in ids else None
        assert list(reply.ids) == ids[:end]
        assert reply.finish_reason == ("length" if end is None else "stop")


@pytest.mark.parametrize("place", [0, 3, BLOCK - 1, BLOCK, 2 * BLOCK])  # tokens 8 | 9, 16 | 17
@pytest.mark.parametrize("length", [1, 2])
def test_stop_string(engine, prompts, greedy, place, length):
    """The reply ends with the token that completes the string, also across blocks."""
    string = spoken(greedy[3][place : place + length])
    options = replace(GREEDY, stop_strings=("never", string))
    for ids, (reply,) in zip(
        greedy, engine.generate(prompts, options, decode_text=spoken), strict=True
    ):
        ends = [n for n in range(1, NEW + 1) if string in spoken(ids[:n])]
        assert list(reply.ids) == (ids[: ends[0]] if ends else ids)
        assert reply.finish_reason == ("string" if ends else "length")


def test_stop_id_before_and_after_a_stop_string(engine, prompts, greedy):
    ids = greedy[3]
    for stop, finish, end in ((ids[4], "stop", 4), (ids[9], "string", 7)):
        options = replace(GREEDY, stop_ids=(stop,), stop_strings=(spoken([ids[6]]),))
        reply = engine.generate(prompts, options, decode_text=spoken)[3][0]
        assert (list(reply.ids), reply.finish_reason) == (ids[:end], finish)


def test_stop_strings_end_the_work(engine, prompts, monkeypatch):
    """No further block is asked for once every reply has its string, but the one in flight."""
    steps, decode = [], ModelRunner.decode

    def spy(self, active, block, longest):
        steps.append(list(active))
        return decode(self, active, block, longest)

    monkeypatch.setattr(ModelRunner, "decode", spy)
    options = replace(GREEDY, stop_strings=("<",))
    replies = engine.generate(prompts, options, decode_text=spoken)
    assert {len(reply.ids) for (reply,) in replies} == {1}
    assert all(map(Counter(row for active in steps for row in active).get, range(ROWS)))
    assert max(Counter(row for active in steps for row in active).values()) <= 2


def test_end_of_the_context(engine):
    rng = np.random.default_rng(4)
    requests = [text_request(rng, CONTEXT - n) for n in (3, 1, 40, 2)]
    replies = engine.generate(requests, GREEDY)
    assert [len(reply.ids) for (reply,) in replies] == [3, 1, NEW, 2]
    assert {reply.finish_reason for (reply,) in replies} == {"length"}
    for request, (reply,) in zip(requests, replies, strict=True):
        whole = np.concatenate([request.ids, reply.ids])[: CONTEXT - 1].astype(np.int32)
        best = engine.logits(Request(whole)).argmax(-1)[len(request.ids) - 1 :]
        assert best.tolist()[: len(reply.ids)] == list(reply.ids)


# --- refused ---

FRAMES = 100
MEL = np.zeros((CFG.audio_encoder.mels, FRAMES), np.float32)
IDS = np.zeros(30, np.int32)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(IDS[:0]), "prompt 1 has 0 tokens: expected 1 to 255"),
        (
            Request(np.zeros(256, np.int32)),
            "prompt 1 has 256 tokens: expected 1 to 255, since the model's context of 256 must",
        ),
        (Request(np.array([1, 512, 3])), "prompt 1 holds id 512, outside the vocabulary of 512"),
        (Request(np.array([1, -2, 600])), "prompt 1 holds id -2, outside the vocabulary of 512"),
        (Request(IDS, (MEL,), (), ()), "prompt 1 has 1 and 0 and 0 mels, starts and counts"),
        (Request(IDS, (MEL,), (20,), (12,)), "cannot fill 12 positions from 20 on of 30"),
        (Request(IDS, (MEL,), (-1,), (12,)), "cannot fill 12 positions from -1 on of 30"),
        (Request(IDS, (MEL,), (3,), (14,)), "a clip of 100 frames gives 12 embeddings and cannot"),
        (Request(IDS, (MEL[:8],), (3,), (12,)), "expected clips of 16 mels and at most 3000 fram"),
        (
            Request(IDS, (np.zeros((16, 3001), np.float32),), (3,), (12,)),
            "at most 3000 frames, got [16, 3001]",
        ),
    ],
)
def test_refused_requests(engine, prompts, request_, message):
    with pytest.raises(PromptError) as error:
        engine.generate([prompts[0], request_], GREEDY)
    assert message in str(error.value)
    with pytest.raises(PromptError, match="prompt 7"):
        engine.generate([prompts[0], request_], GREEDY, prompt_indices=[3, 7])


def test_refused_options(engine, prompts):
    for wrong in ({"max_new_tokens": 0}, {"samples": 0}):
        with pytest.raises(PromptError, match="expected at least 1"):
            GenerationConfig(**wrong)
    with pytest.raises(PromptError, match="stop strings need decode_text"):
        engine.generate(prompts, replace(GREEDY, stop_strings=("x",)))


# --- cache and layout ---


def test_layers_in_a_loop_equal_layers_in_a_scan(engine, prompts, params):
    loop = Engine(step_audio2(CFG, stacked=False), unstack_decoder(params), CFG)
    for request in prompts:
        np.testing.assert_allclose(loop.logits(request), engine.logits(request), atol=1e-4)
    assert list(params["decoder"]["layers"]) != [0, 1]  # the given parameters stay as they were

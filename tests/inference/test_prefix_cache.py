"""A conversation's cache: what was read stays read, whatever the conversation does."""

from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest

from sa2jax import audio, testing
from sa2jax.errors import PromptError
from sa2jax.inference.engine import PREFILL_CHUNK, Engine
from sa2jax.inference.prefix_cache import MIN_CACHE_SIZE, PrefixCache
from sa2jax.inference.programs import TRACES
from sa2jax.inference.requests import GenerationConfig, Request
from sa2jax.inference.sampling import SamplingParams
from sa2jax.models.step_audio import step_audio2

CFG = testing.tiny_config(max_positions=3000)
NEW = 14
GREEDY = GenerationConfig(max_new_tokens=NEW)
SAMPLED = replace(GREEDY, sampling=SamplingParams(temperature=0.8, top_k=20, top_p=0.9), seed=3)


def text(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, length).astype(np.int32)


def heard(ids: np.ndarray, *clips: tuple[int, int], seed: int = 0) -> Request:
    """A prompt with clips of (start, mel frames)."""
    rng = np.random.default_rng(seed)
    mels = tuple(rng.standard_normal((CFG.audio_encoder.mels, n), np.float32) for _, n in clips)
    counts = tuple(int(audio.num_tokens(n)) for _, n in clips)
    return Request(ids, mels, tuple(start for start, _ in clips), counts)


def longer(request: Request, *ids) -> Request:
    return replace(request, ids=np.concatenate([request.ids, *ids]).astype(np.int32))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(step_audio2(CFG), testing.tiny_params(CFG), CFG, block=8)


@pytest.fixture
def session(engine) -> PrefixCache:
    return PrefixCache(engine)


def said(
    session: PrefixCache, request: Request, options: GenerationConfig = GREEDY, **more
) -> list[int]:
    return [i for ids in session.reply(request, options, **more) for i in ids]


def alone(
    engine, request: Request, options: GenerationConfig = GREEDY, number: int = 0
) -> list[int]:
    ((reply,),) = engine.generate([request], options, prompt_indices=[number])
    return list(reply.ids)


# --- the same reply as in a batch ---


@pytest.mark.parametrize("block", [1, 3, 5, 32])
@pytest.mark.parametrize("options", [GREEDY, SAMPLED])
def test_a_reply_is_that_of_a_batch(engine, session, block, options):
    request = heard(text(0, 60), (5, 120))
    expected = alone(engine, request, options, number=4)
    assert said(session, request, options, prompt_index=4, block=block) == expected
    assert (session.prefilled, session.finish_reason) == (60, "length")


@pytest.mark.parametrize("place", [0, 1, 4, 5, 6])
def test_stop_ids(engine, session, place):
    request = Request(text(0, 30))
    ids = alone(engine, request)
    stop = replace(GREEDY, stop_ids=(ids[place],))
    assert said(session, request, stop) == ids[: ids.index(ids[place])]
    assert session.finish_reason == "stop"


@pytest.mark.parametrize("limit", [1, 5, 6, 7])
def test_limits(engine, session, limit):
    request = Request(text(0, 30))
    ids = alone(engine, request)[:limit]
    assert said(session, request, replace(GREEDY, max_new_tokens=limit)) == ids
    assert said(session, replace(request, max_new_tokens=limit), GREEDY) == ids
    assert session.finish_reason == "length"


def test_the_context_ends_a_reply(session):
    request = Request(text(0, CFG.decoder.max_positions - 4))
    assert len(said(session, request)) == 4
    assert session.finish_reason == "length"


def test_a_prompt_is_read_in_pieces(engine, session):
    """Clips across the borders of pieces, and one that ends the prompt."""
    length = 2 * PREFILL_CHUNK + 100
    request = heard(
        text(1, length), (PREFILL_CHUNK - 20, 900), (2 * PREFILL_CHUNK - 5, 100), (length - 13, 100)
    )
    assert said(session, request) == alone(engine, request)
    assert session.prefilled == length


# --- what is read again ---


def test_a_new_turn_reads_only_what_is_new(engine, session):
    request = heard(text(0, 60), (5, 120))
    for turn in range(3):
        ids = said(session, request)
        assert ids == alone(engine, request)
        new = heard(text(10 + turn, 40), (7, 80), seed=turn)
        request = Request(
            np.concatenate([request.ids, ids, new.ids]).astype(np.int32),
            request.mels + new.mels,
            (*request.starts, len(request.ids) + len(ids) + 7),
            request.counts + new.counts,
        )
        expected = alone(engine, request)
        assert said(session, request) == expected
        # The newest token of a reply was chosen but not read.
        assert session.prefilled == 1 + 40


def test_the_same_prompt_again_reads_its_last_position(engine, session):
    request = heard(text(0, 60), (5, 120))
    first = said(session, request)
    assert said(session, request) == first
    assert session.prefilled == 1


def test_only_clips_that_changed_are_heard(engine, session, monkeypatch):
    """Same ids, another recording: what follows it is read again."""
    heard_frames = []
    listen = Engine.encode_audio

    def spy(self, mels, **more):
        heard_frames.append([mel.shape[1] for mel in mels])
        return listen(self, mels, **more)

    request = heard(text(0, 90), (5, 120), (30, 110))
    said(session, request)
    monkeypatch.setattr(Engine, "encode_audio", spy)
    other = replace(request, mels=(request.mels[0], request.mels[1] + 1))
    ids = said(session, other)
    assert heard_frames == [[110]]
    assert session.prefilled == 60
    assert ids == alone(engine, other)
    assert ids != alone(engine, request)


def test_an_undone_turn_and_another_in_its_place(engine, session):
    request = Request(text(0, 50))
    ids = said(session, request)
    said(session, longer(request, ids, text(1, 30)))
    other = longer(request, ids[:4], text(2, 20))
    assert said(session, other) == alone(engine, other)
    assert session.prefilled == 20


def test_a_reply_may_be_left_at_any_time(engine, session):
    """What was made ahead and not taken is not lost for the cache, and does not show."""
    request = Request(text(0, 50))
    ids = alone(engine, request)
    for taken in (1, 2, 3):
        stream = session.reply(request, GREEDY, block=3)
        got = [i for _ in range(taken) for i in next(stream)]
        stream.close()
        assert session.finish_reason == "abandoned"
        assert got == ids[: len(got)]
        other = longer(request, got, text(5, 10))
        assert said(session, other) == alone(engine, other)
        assert session.prefilled == 10
    assert said(session, request) == ids


def test_a_failure_costs_a_prefill(engine, session, monkeypatch):
    request = Request(text(0, 50))
    said(session, request)

    def fails(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "prefill_chunks", fails)
        with pytest.raises(KeyboardInterrupt):
            said(session, longer(request, [1]))
    assert said(session, request) == alone(engine, request)
    assert session.prefilled == 50


def test_a_fork_goes_its_own_way(engine, session):
    request = Request(text(0, 50))
    ids = said(session, request)
    other = session.fork()
    one, two = longer(request, ids, text(1, 20)), longer(request, ids, text(2, 20))
    assert said(session, one) == alone(engine, one)
    assert said(other, two) == alone(engine, two)
    assert (session.prefilled, other.prefilled) == (21, 21)
    assert said(PrefixCache(engine).fork(), request) == ids  # nothing read yet


def test_the_cache_grows_with_the_conversation(engine, session):
    request = Request(text(0, MIN_CACHE_SIZE - NEW))
    ids = said(session, request)
    longest = longer(request, ids, text(1, 500))
    assert said(session, longest) == alone(engine, longest)
    assert session.prefilled == 501


# --- refused ---


def test_refused(session):
    with pytest.raises(PromptError, match="prompt 0 has 0 tokens"):
        said(session, Request(text(0, 0)))
    with pytest.raises(PromptError, match="samples=1"):
        said(session, Request(text(0, 5)), replace(GREEDY, samples=2))


def test_what_is_refused_leaves_the_cache(engine, session):
    request = Request(text(0, 50))
    said(session, request)
    with pytest.raises(PromptError, match="outside the vocabulary"):
        said(session, longer(request, [9999]))
    said(session, request)
    assert session.prefilled == 1


# --- programs ---


def test_fifty_turns_compile_nothing_new(engine):
    """Text and audio turns of several lengths, across both sizes of the cache."""

    def converse(turns: int, seed: int) -> None:
        session, request = PrefixCache(engine), Request(text(seed, 20))
        for turn in range(turns):
            ids = said(
                session, request, replace(SAMPLED, max_new_tokens=7 + turn % 5), prompt_index=turn
            )
            new = text(turn, 20 + turn % 7)
            clip = heard(new, (3, 90 + turn % 9), seed=turn) if turn % 2 else Request(new)
            start = len(request.ids) + len(ids)
            request = Request(
                np.concatenate([request.ids, ids, new]).astype(np.int32),
                request.mels + clip.mels,
                (*request.starts, *(start + s for s in clip.starts)),
                request.counts + clip.counts,
            )

    converse(50, 0)
    before, compiled = Counter(TRACES), []

    def watch(event, seconds, **about):
        return (
            compiled.append(about.get("fun_name"))
            if event.endswith("backend_compile_duration")
            else None
        )

    jax.monitoring.register_event_duration_secs_listener(watch)
    try:
        converse(50, 1)
    finally:
        jax.monitoring.unregister_event_duration_listener(watch)
    assert before == TRACES
    assert compiled == []

"""The benchmarks at tiny sizes: rows there, figures positive, bad lengths refused."""

import csv
import io
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import jax
import pytest
from helpers.small_speech import SMALL
from rich.console import Console

from sa2jax import bench as package
from sa2jax.bench import bench_speech, print_bench
from sa2jax.bench.common import OURS, REFERENCE, row, stream_parts, take_turns
from sa2jax.config import StepAudio2Config
from sa2jax.convert import voice_analysis
from sa2jax.errors import ConfigError
from sa2jax.models.flow import flow_model
from sa2jax.speech_config import (
    SpeechTokenizerConfig,
    Token2WavConfig,
    VocoderConfig,
)
from sa2jax.testing import tiny_config

STAGES = ["speech tokenizer", "speaker encoder", "flow", "vocoder"]
TINY = Token2WavConfig(
    flow=replace(SMALL.flow, codes=9),
    vocoder=VocoderConfig(
        channels=8,
        f0_channels=8,
        f0_layers=1,
        harmonics=1,
        block_kernels=(3,),
        block_dilations=((1,),),
        source_kernels=(3, 3, 3),
        source_dilations=((1,),) * 3,
    ),
    speech_tokenizer=SpeechTokenizerConfig(mels=128, layers=1, embed=64, mlp=8, memory=3, digits=2),
    speaker_encoder=replace(
        SMALL.speaker_encoder,
        mels=80,
        stages=(1, 1),
        channels=8,
        growth=4,
        bottleneck=4,
        layers=(1,),
    ),
)


@pytest.fixture(scope="module")
def result():
    rounds = []
    made = bench_speech(
        cfg=TINY,
        seconds=1,
        prompt_seconds=1,
        streams=(1,),
        chunk=5,
        repeats=1,
        reference=False,
        progress=lambda done, all_: rounds.append((done, all_)),
    )
    assert rounds == [(1, 2), (2, 2)]
    return made


@pytest.mark.slow
def test_every_stage_has_a_row_and_a_time(result):
    names = [r.name for r in result.rows]
    streaming = ["start", "first sound", "chunk, 1 stream", "stream, 1 stream"]
    assert names == [*STAGES, "reconstruct", *streaming]
    assert all(r.ours > 0 and math.isfinite(r.ours) for r in result.rows)
    assert all(r.reference is None and r.ratio is None for r in result.rows)
    assert all("less is better" in r.unit for r in result.rows)
    assert "torch" not in result.machine


@pytest.mark.slow
def test_figures_add_up(result):
    of = {r.name: r.ours for r in result.rows}
    assert of["reconstruct"] == pytest.approx(sum(of[name] for name in STAGES))
    assert of["first sound"] > of["start"]
    assert of["stream, 1 stream"] == pytest.approx(of["chunk, 1 stream"] * 5)  # codes of 40 ms


def test_many_streams_are_charged_for_the_sound_of_all():
    parts = {"start": 1.0, "first": 2.0, "chunk 1": 2.0, "chunk 8": 8.0}
    times = {(OURS, part): [t] for part, t in parts.items()}
    times |= {(REFERENCE, part): [2 * t] for part, t in parts.items()}
    rows = {r.name: r for r in package.speech.stream_rows(times, (1, 8), chunk=25)}
    assert (rows["first sound"].ours, rows["first sound"].ratio) == (3.0, 0.5)
    assert (rows["chunk, 8 streams"].ours, rows["stream, 8 streams"].ours) == (8.0, 1.0)
    assert "4.0 times that of 1 stream" in rows["chunk, 8 streams"].note


@pytest.mark.slow
def test_it_prints_and_survives_json(result):
    page = io.StringIO()
    print_bench(result, Console(file=page, width=200))
    assert all(r.name in page.getvalue() for r in result.rows)
    assert asdict(result)["rows"][0]["name"] == STAGES[0]


@pytest.mark.parametrize(
    "wrong",
    [{"seconds": 0.5}, {"seconds": 31}, {"streams": (0,)}, {"chunk": 0}, {"repeats": 0}],
)
def test_lengths_that_cannot_be_timed(wrong):
    with pytest.raises(ConfigError, match=r"expected repeats, chunk and streams >= 1, .* 1\.\.30"):
        bench_speech(cfg=TINY, reference=False, **wrong)


def test_sides_take_turns_and_the_first_round_does_not_count():
    calls = []

    def part(name):
        return lambda: calls.append(name)

    sides = {OURS: {"a": part("a"), "b": part("b")}, REFERENCE: {"b": part("B")}}
    times = take_turns(sides, 2)
    assert calls == ["a", "b", "B"] * 3
    assert {key: len(seconds) for key, seconds in times.items()} == {
        (OURS, "a"): 2,
        (OURS, "b"): 2,
        (REFERENCE, "b"): 2,
    }


def test_a_stream_is_timed_from_its_start():
    side = SimpleNamespace(start=lambda: "start", first=lambda: "first", step=lambda n: n)
    parts = stream_parts(side, (1, 8))
    assert list(parts) == ["start", "first", "chunk 1", "chunk 8"]
    assert [run() for run in parts.values()] == ["start", "first", 1, 8]
    assert stream_parts(side, ()) == {}


def test_the_ratio_is_taken_round_by_round():
    times = {(OURS, "x"): [1.0, 2.0, 9.0], (REFERENCE, "x"): [2.0, 4.0, 3.0]}
    made = row("name", "s", "x", times, lambda t: t, "note")
    assert (made.ours, made.reference, made.ratio) == (2.0, 3.0, 0.5)


@pytest.mark.both_pairs
def test_the_language_side(monkeypatch):
    monkeypatch.setattr(package.language, "copy_bandwidth", lambda: 1.0)
    monkeypatch.setattr(StepAudio2Config, "preset", lambda name: tiny_config())
    result = package.bench("tiny", prompt=8, tokens=2, seconds=0.5, repeats=1, reference=False)
    names = ["encode", "prefill", "decode", "next turn", "weights read in decode", "copy bandwidth"]
    assert [r.name for r in result.rows] == names
    assert all(r.ours > 0 and r.reference is None for r in result.rows)


def test_released_sizes_are_those_of_the_released_names(golden):
    def shapes(name):
        with (golden / "names" / f"names_{name}.tsv").open() as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        return {r["name"]: tuple(int(n) for n in r["shape"].split("x") if n) for r in rows}

    cfg = Token2WavConfig.released()
    tokenizer, speaker = shapes("s3tokenizer_v2"), shapes("campplus_torch")
    assert cfg.speech_tokenizer == voice_analysis.speech_tokenizer_config(tokenizer)
    assert cfg.speaker_encoder == voice_analysis.speaker_encoder_config(speaker)
    leaves = jax.tree.leaves(flow_model(cfg.flow).abstract)
    released = sum(math.prod(shape) for shape in shapes("flow_pt").values())
    assert sum(leaf.size for leaf in leaves) == released

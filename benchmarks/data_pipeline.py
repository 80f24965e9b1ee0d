"""How fast training data comes, without a model: prepared shards to batches of mini's size.

    python benchmarks/data_pipeline.py [--minutes 30] [--seconds 15]

Speech-like clips of 2 to 25 s are prepared in a temporary folder in the real format, then batches
are taken for a while: by threads of one process, and by 2 worker processes. A core's share is the
sound given out per second of processor time, of all processes together.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from sa2jax import audio
from sa2jax.chat import tokenizer_files
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.config import StepAudio2Config
from sa2jax.train.data.records import parse_record
from sa2jax.train.data.samples import Sample, load_features
from sa2jax.train.data.shards import ShardWriter
from sa2jax.train.language.data import make_language_data
from sa2jax.train.language.data_config import DataConfig

LENGTH, ROUNDS, GOAL = 4096, 3, 200
WORDS = "the rain will stay until late in the evening and then move on to the sea"
SETTINGS = [(0, 7), (2, 7), (0, 1)]  # workers, mel rows


@dataclass(frozen=True)
class Figures:
    """Of one run.

    Attributes:
        wall: seconds of sound per second.
        core: seconds of sound per second of processor time.
        tokens: share of positions that hold a token.
        frames: share of mel frames that hold sound.
    """

    wall: float
    core: float
    tokens: float
    frames: float


def speech_like(seconds: float, rng: np.random.Generator) -> np.ndarray:
    """A voice's harmonics in syllables, with noise between them: float32 at 16 kHz."""
    t = np.arange(round(seconds * audio.SAMPLE_RATE)) / audio.SAMPLE_RATE
    pitch = 120 * (1 + 0.2 * np.sin(2 * np.pi * 0.3 * t + rng.uniform(0, 6)))
    phase = 2 * np.pi * np.cumsum(pitch) / audio.SAMPLE_RATE
    tilt = rng.uniform(0.5, 1.5, 12) / np.arange(1, 13)
    voice = sum(a * np.sin((n + 1) * phase) for n, a in enumerate(tilt))
    loud = np.clip(np.sin(2 * np.pi * 4 * t) + 0.4, 0, None)
    return (0.1 * loud * voice + 0.003 * rng.standard_normal(len(t))).astype(np.float32)


def prepare(folder: Path, minutes: float) -> tuple[int, float]:
    """Write shards; how many samples they hold, and how many seconds of sound."""
    rng, total, count = np.random.default_rng(0), 0.0, 0
    with ShardWriter(folder, shard_size="256MB") as writer:
        while total < 60 * minutes:
            seconds = rng.uniform(2, 25)
            # One token a byte here: as many bytes as real words of this length have tokens.
            text = (WORDS * 2)[: round(4 * seconds)]
            line = {
                "messages": [
                    {"role": "system", "content": "请记录下你所听到的语音内容。"},
                    {"role": "user", "content": "<audio>"},
                    {"role": "assistant", "content": text},
                ],
                "audios": [f"{count}.wav"],
            }
            record = parse_record(json.dumps(line), f"made:{count}", folder)
            mels = load_features((speech_like(seconds, rng), audio.SAMPLE_RATE))
            writer.add(Sample(record, (mels,)))
            total, count = total + seconds, count + 1
    return count, total


def measure(folder: Path, workers: int, mel_rows: int, seconds: float) -> Figures:
    """Take batches for so many seconds."""
    config = DataConfig(
        sources={str(folder): 1.0},
        length=LENGTH,
        rows=2,
        mel_rows=mel_rows,
        clips=15,
        workers=workers,
    )
    tokenizer, cfg = Tokenizer(tokenizer_files.byte_tokenizer()), StepAudio2Config.preset("mini")
    data = make_language_data(config, tokenizer, cfg, seed=0)
    for _ in range(20):  # processes have started, buffers are filled, open rows are full
        next(data)
    tokens, heard, batches = data.tokens, data.audio_seconds, data.batches
    wall, busy = time.perf_counter(), processor_seconds()
    while time.perf_counter() - wall < seconds:
        next(data)
    wall, busy = time.perf_counter() - wall, processor_seconds() - busy
    heard, tokens = data.audio_seconds - heard, data.tokens - tokens
    rows = config.rows * (data.batches - batches)
    data.close()
    space = rows * mel_rows * config.mel_frames / 100
    return Figures(heard / wall, heard / busy, tokens / (rows * LENGTH), heard / space)


def processor_seconds() -> float:
    """Of this process and its workers so far."""
    found = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        found += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30, help="of sound to make")
    parser.add_argument("--seconds", type=float, default=15, help="of each measurement")
    options = parser.parse_args()
    table = Table(title=f"rows of {LENGTH} tokens, mel rows of 30 s, median of {ROUNDS} (range)")
    heads = ("workers", "mel rows", "× real time", "× real time per core", "tokens", "frames")
    for name in heads:
        table.add_column(name, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        count, total = prepare(Path(folder), options.minutes)
        size = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6
        print(f"{count} samples, {total / 60:.1f} minutes, {size:.0f} MB; load {os.getloadavg()}")
        # In turns, so that what else the machine does falls on all alike.
        runs = [
            [measure(Path(folder), *setting, options.seconds) for setting in SETTINGS]
            for _ in range(ROUNDS)
        ]
    short = []
    for setting, found in zip(SETTINGS, zip(*runs, strict=True), strict=True):
        cells = []
        for name, form in (
            ("wall", "{:.0f}"),
            ("core", "{:.0f}"),
            ("tokens", "{:.1%}"),
            ("frames", "{:.1%}"),
        ):
            values = [getattr(figures, name) for figures in found]
            middle, low, high = (
                form.format(v) for v in (statistics.median(values), min(values), max(values))
            )
            cells.append(middle if low == high else f"{middle} ({low} to {high})")
        table.add_row(*map(str, setting), *cells)
        short += [setting] * (statistics.median(f.core for f in found) < GOAL)
    Console().print(table)
    print(f"goal of {GOAL} × real time per core: {f'missed with {short}' if short else 'reached'}")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()} at the end")


if __name__ == "__main__":
    main()

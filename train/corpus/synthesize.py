"""A corpus of synthetic speech: conversations and recordings, made by speech synthesisers.

    about = synthesize("corpus", read_corpus("nano/corpus"))  # of `corpus_plan`

    OUT/talks/TASK.jsonl    conversations to learn, see `records`; talks/heard (16 kHz), talks/said
    OUT/heldout/TASK.jsonl  others of the same kinds, with open texts that no file above has
    OUT/speech.jsonl        {"audio", "text", "speaker"}: clean 24 kHz speech of many voices; beside
                            less than a second of it "voice", more of the same speaker
    OUT/heard.jsonl         the same of all that is heard in conversations, 16 kHz
    OUT/voices/NAME.wav     a clean recording of each voice that can be asked for
    OUT/corpus.json         what there is

The same recipe and seed give the same bytes, with any number of processes. A run that was stopped
goes on with the recordings that are missing.
"""

import json
import multiprocessing
import os
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from jaxtyping import Float

from sa2jax.atomic_io import disk_errors, new_file, write_text
from sa2jax.audio.rates import CODE_RATE, SAMPLE_RATE, SPEECH_SAMPLE_RATE
from sa2jax.errors import DataError
from sa2jax.files.raw import read_text
from sa2jax.locks import LOCK, exclusive
from sa2jax.speech.voices import MIN_SECONDS
from sa2jax.train.corpus import grammar
from sa2jax.train.corpus.conversations import TOOLS, Dialogue
from sa2jax.train.corpus.plan import CorpusConfig, CorpusPlan, Job, reply_path, utterance_path
from sa2jax.train.corpus.tts_engines import Synthesizer, VoiceStyle, version_of
from sa2jax.train.data.records import AUDIO_MARK

ABOUT, RECIPE, BABBLE = "corpus.json", "recipe.json", "noise/babble.flac"
SPEECH, HEARD, HELD_OUT = "speech.jsonl", "heard.jsonl", "heldout/"
FORMAT = "corpus 1"
CODE = SPEECH_SAMPLE_RATE // CODE_RATE  # samples of a code: replies are whole ones
_AT_ONCE = 32  # recordings that a process is given


def synthesize(
    out: str | os.PathLike[str],
    config: CorpusConfig,
    *,
    scale: float = 1.0,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Make a corpus, or what is missing of one.

    With workers, a script that calls it needs `if __name__ == "__main__":`.

    Args:
        out: the folder.
        config: what there shall be in it.
        scale: times all counts of the recipe.
        workers: processes.
        progress: called with (recordings_done, recordings_total).

    Returns:
        What corpus.json says.

    Raises:
        DataError: if an engine is missing or fails, or `out` holds something else.
        CheckpointError: if `out` cannot be written.
    """
    out = Path(os.path.abspath(out))
    if scale <= 0 or workers < 1:
        raise DataError(f"expected scale above 0 and workers >= 1, got {scale} and {workers}")
    synthesizer = Synthesizer(config.voices)
    with ExitStack() as stack, disk_errors(out):
        _begin(out, {"recipe": asdict(config), "scale": scale})
        stack.enter_context(exclusive(out / LOCK, out))
        plan = CorpusPlan.of(config, scale)
        if not (out / BABBLE).exists():
            _write(out / BABBLE, _make_babble(synthesizer, config), SAMPLE_RATE)
        lengths: dict[str, float] = {}
        total = len(plan.jobs) + sum(job.clean is not None for job in plan.jobs.values())
        for number, (name, seconds) in enumerate(_made(plan, out, config, workers), 1):
            lengths[name] = seconds
            progress(number, total)
        about = _about(config, scale, plan, _write_rows(out, plan, lengths), lengths)
        write_text(out / ABOUT, json.dumps(about, indent=1))
    return about


# --- making it ----------------------------------------------------------------------------------


class _Maker:
    """Makes recordings; one in each process."""

    def __init__(self, out: Path, config: CorpusConfig):
        self.out, self.config = out, config
        self.synthesizer = Synthesizer(config.voices)
        self.babble = soundfile.read(out / BABBLE, dtype="float32")[0]

    def make(self, job: Job) -> list[tuple[str, float]]:
        """Write what is not there; paths and seconds of all."""
        names = [job.path, *([job.clean] if job.clean else [])]
        if not all((self.out / name).exists() for name in names):
            self._make(job)
        found = [soundfile.info(self.out / name) for name in names]
        return [
            (name, info.frames / info.samplerate) for name, info in zip(names, found, strict=True)
        ]

    def _make(self, job: Job) -> None:
        import soxr

        wave = self.synthesizer.say(job.text, job.style)
        clean = _settled(wave, self.config)
        if job.key is None:
            _write(self.out / job.path, clean, SPEECH_SAMPLE_RATE)
            return
        if job.clean:
            _write(self.out / job.clean, clean, SPEECH_SAMPLE_RATE)
        chosen = self.config.held_out_augmentation if job.held_out else self.config.augmentation
        rng = grammar.random(self.config.seed, f"{job.key} sound")
        wave = soxr.resample(wave, SPEECH_SAMPLE_RATE, SAMPLE_RATE)
        heard = chosen.apply(wave, rng, self.babble, job.peak)
        _write(self.out / job.path, heard, SAMPLE_RATE)


def _settled(wave: Float[np.ndarray, " T"], config: CorpusConfig) -> Float[np.ndarray, " T2"]:
    """Clean speech (24 kHz) at its level, with silence around, of whole codes."""
    rms = float(np.sqrt(np.mean(wave.astype(np.float64) ** 2)))
    gain = min(10 ** (config.speech_rms_db / 20) / rms, 0.95 / float(np.abs(wave).max()))
    before, after = (round(seconds * SPEECH_SAMPLE_RATE) for seconds in config.silence_seconds)
    after += -(before + len(wave) + after) % CODE
    return np.pad(wave * np.float32(gain), (before, after))


def _make_babble(synthesizer: Synthesizer, config: CorpusConfig) -> Float[np.ndarray, " T"]:
    """Babble noise: several voices at once (16 kHz), about ten seconds."""
    import soxr

    rng = grammar.random(config.seed, BABBLE)
    names = [name for name, spec in config.voices.items() if spec.weight]
    layers = []
    for _ in range(4):
        said = []
        for _ in range(8):
            name = names[int(rng.integers(len(names)))]
            style = VoiceStyle.draw(rng, name, config.voices[name], warped=True)
            said.append(synthesizer.say(grammar.sentence(rng), style))
        layers.append(np.concatenate(said))
    length = min(map(len, layers))
    mixed = soxr.resample(sum(layer[:length] for layer in layers), SPEECH_SAMPLE_RATE, SAMPLE_RATE)
    return mixed * np.float32(0.5 / np.abs(mixed).max())


def _made(
    plan: CorpusPlan, out: Path, config: CorpusConfig, workers: int
) -> Iterator[tuple[str, float]]:
    """Make all recordings; the first path and seconds of each job, then those of clean ones."""
    jobs = list(plan.jobs.values())
    for folder in {(out / name).parent for job in jobs for name in (job.path, job.clean or BABBLE)}:
        folder.mkdir(parents=True, exist_ok=True)
    if workers == 1:
        maker = _Maker(out, config)
        for job in jobs:
            yield from maker.make(job)
        return
    parts = [jobs[start : start + _AT_ONCE] for start in range(0, len(jobs), _AT_ONCE)]
    context = multiprocessing.get_context("spawn")  # a fork of jax's threads may hang
    with ProcessPoolExecutor(workers, context, _start, (out, config)) as pool:
        try:
            for found in pool.map(_work, parts):
                yield from found
        except BrokenProcessPool:
            raise DataError("a worker was killed, for memory perhaps: try --workers 1") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_MAKER: list[_Maker] = []  # of this process


def _start(out: Path, config: CorpusConfig) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process
    _MAKER[:] = [_Maker(out, config)]


def _work(jobs: list[Job]) -> list[tuple[str, float]]:
    return [item for job in jobs for item in _MAKER[0].make(job)]


# --- files --------------------------------------------------------------------------------------


def _begin(out: Path, recipe: Mapping[str, Any]) -> None:
    """Claim the folder for this recipe, or find that it is this one's already."""
    text = json.dumps(recipe, indent=1, sort_keys=True)
    file = out / RECIPE
    if file.is_file():
        if read_text(file) != text:
            raise DataError(
                f"{out} holds a corpus of another recipe, seed or scale: choose another folder"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out} already holds something else: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    (out / BABBLE).parent.mkdir(exist_ok=True)
    write_text(file, text)


def _write(path: Path, wave: Float[np.ndarray, " T"], rate: int) -> None:
    """Write a recording of 16 bit, whole or not at all."""
    with new_file(path) as temporary:
        soundfile.write(temporary, wave, rate, subtype="PCM_16", format=path.suffix[1:].upper())


def _row(dialogue: Dialogue, jobs: Mapping[str, Job]) -> dict[str, Any]:
    """A conversation as a line of jsonl."""
    messages, audios, speakers = [], [], []
    for number, turn in enumerate(dialogue.turns):
        message = {"role": turn.role, "content": turn.text}
        if turn.utterance is not None:
            path = utterance_path(dialogue, number)
            message["content"] = AUDIO_MARK
            audios.append(path.partition("/")[2])
            speakers.append(jobs[path].style.speaker)
        elif turn.spoken:
            message["speech"] = reply_path(dialogue, turn.text).partition("/")[2]
        messages.append(message)
    row = {"id": dialogue.key.partition("/")[2], "messages": messages, "audios": audios}
    return row | {"speakers": speakers} | ({"tools": TOOLS} if dialogue.tools else {})


def _write_rows(out: Path, plan: CorpusPlan, seconds: Mapping[str, float]) -> dict[str, list[str]]:
    """Write all jsonl files; the recordings that each of them has, as seen from OUT."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    used: dict[str, list[str]] = defaultdict(list)
    for dialogue in plan.dialogues:
        row, file, folder = (
            _row(dialogue, plan.jobs),
            f"{dialogue.file}.jsonl",
            dialogue.file.split("/")[0],
        )
        rows[file].append(row)
        used[file] += [f"{folder}/{name}" for name in row["audios"]]
        used[file] += [f"{folder}/{m['speech']}" for m in row["messages"] if "speech" in m]
    learnt = {job.text for job in plan.jobs.values() if not job.held_out}
    for job in plan.jobs.values():
        clean = job.clean or (None if job.key else job.path)
        heard = job.path if job.key else None
        for name, file in ((clean, SPEECH), (heard, HEARD)):
            known = file == SPEECH and job.held_out and job.text in learnt
            if name is None or name.endswith(".wav") or known:
                continue
            file, start = (f"{HELD_OUT}{file}", len(HELD_OUT)) if job.held_out else (file, 0)
            row = {"audio": name[start:], "text": job.text, "speaker": job.style.speaker}
            rows[file].append(row)
            used[file].append(name)
    for file in (SPEECH, f"{HELD_OUT}{SPEECH}"):
        _name_voices(rows[file], [seconds[name] for name in used[file]])
    for file, found in rows.items():
        write_text(out / file, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in found))
    return used


def _name_voices(rows: list[dict[str, Any]], seconds: list[float]) -> None:
    """Beside recordings that are too short to tell who speaks: the longest of the same speaker."""
    longest: dict[str, tuple[float, str]] = {}
    for row, length in zip(rows, seconds, strict=True):
        who, known = row["speaker"], (length, row["audio"])
        longest[who] = max(longest.get(who, known), known)
    for row, length in zip(rows, seconds, strict=True):
        most, name = longest[row["speaker"]]
        if length < MIN_SECONDS <= most:
            row["voice"] = name


def _about(
    config: CorpusConfig,
    scale: float,
    plan: CorpusPlan,
    used: Mapping[str, list[str]],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """What corpus.json says."""
    jobs = [job for job in plan.jobs.values() if not job.path.endswith(".wav")]
    hours: dict[str, float] = defaultdict(float)
    for job in jobs:
        kind = "heard" if job.key else "said"
        hours[f"{job.style.voice} {kind}"] += seconds[job.path] / 3600
        if job.clean:
            hours[f"{job.style.voice} clean"] += seconds[job.clean] / 3600
    records = Counter(f"{dialogue.file}.jsonl" for dialogue in plan.dialogues)
    records |= {file: len(names) for file, names in used.items() if file not in records}
    engines = sorted({spec.engine for spec in config.voices.values()})
    return {
        "format": FORMAT,
        "seed": config.seed,
        "scale": scale,
        "files": {
            file: {"records": count, "hours": round(sum(seconds[n] for n in used[file]) / 3600, 3)}
            for file, count in records.items()
        },
        "recordings": len(seconds),
        "hours": round(sum(seconds.values()) / 3600, 3),
        "hours_by_voice": {name: round(value, 3) for name, value in sorted(hours.items())},
        "speakers": len({job.style.speaker for job in jobs}),
        "texts": len({job.text for job in jobs}),
        "sentences_in_grammar": grammar.count_sentences(),
        "vocabulary": sorted({word for job in jobs for word in job.text.split()}),
        "engines": {name: version_of(name) for name in engines},
    }

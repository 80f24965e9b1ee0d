"""Training data of the flow: recordings analysed once, cached, and drawn in padded batches.

Data of single networks: prepared folders of clips, in batches of like length. The language model
has another system, samples in shards that are packed into rows: `data.samples`, `language.data`.

    prepare_flow(["speech/", "more.jsonl"], "ready", "step-audio-2-mini")
    data = FlowData(FlowDataConfig(folder="ready", rows=8), seed=0)
    for batch in data:
        state, report = step(state, place_network_batch(batch, mesh))

A recording becomes its audio codes, its mel frames (24 kHz, 50 Hz, two a code) and a speaker
vector, all as `Voice.from_wav` hears them. A line of a .jsonl file is `{"audio": "a.wav"}`, with
`"voice": "b.wav"` if the speaker shall be heard elsewhere; paths are relative to the file. A word
is too short to tell who speaks: recordings below a second need such a voice.

    OUT/samples.array_record   each record one piece of a recording, safetensors
    OUT/lengths.npy            codes of each
    OUT/dataset.json           how many there are, what heard them, their SHA-256
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import save

from sa2jax import audio
from sa2jax.atomic_io import keep_sources
from sa2jax.audio.rates import CODE_RATE, SPEECH_SAMPLE_RATE
from sa2jax.errors import AudioError, DataError, Sa2jaxError
from sa2jax.files.safetensors_files import parse_safetensors
from sa2jax.speech.store import SpeechFolder
from sa2jax.speech.voices import MAX_SECONDS, MIN_SECONDS, VoiceAnalyzer
from sa2jax.train.data.bucketing import BucketConfig, BucketData, Order
from sa2jax.train.data.recordings import (
    RecordingEntry,
    SampleFile,
    WriteOptions,
    list_recordings,
    read_samples_info,
    write_samples,
)
from sa2jax.train.data.samples import Reject
from sa2jax.train.networks.batches import FlowBatch
from sa2jax.train.networks.perturbation import perturb

FORMAT = "flow 1"
MEL_FRAMES_PER_CODE = 2  # mel frames of a code
MIN_PIECE_SECONDS = 0.2  # seconds of a piece
_BATCH_PIECES = 32  # pieces whose codes are found together


@dataclass(frozen=True, eq=False)
class FlowSample:
    """A piece of a recording, of at most 30 s.

    Attributes:
        codes: codes (25 Hz).
        mel: log-mel frames (50 Hz), two for each code.
        speaker: speaker vector, of any length.
        where: file and second.
    """

    codes: Int[np.ndarray, "P"]
    mel: Float[np.ndarray, "Q M"]
    speaker: Float[np.ndarray, "C"]
    where: str


# --- hearing ----------------------------------------------------------------------------------


def prepare_flow(
    sources: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    model: str | Path,
    *,
    perturbations: int = 0,
    channel: audio.Channel | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Unpack[WriteOptions],
) -> dict[str, Any]:
    """Hear recordings with a checkpoint's own networks and keep what was heard.

    Longer recordings are cut every 30 s. What cannot be used is listed in rejects.jsonl.

    Args:
        sources: recordings, folders of them, and .jsonl files.
        out: folder to make, whole or not at all.
        model: folder with the detokenizer to be tuned: codes mean nothing to another.
        perturbations: how many more times each recording is kept, with the codes of another mouth
            (see `perturbation`) beside its own mel frames and speaker.
        channel: which channel is heard, see `audio.AudioSource`.
        progress: called with (recordings_done, recordings_total).
        **options: what may be unusable, and what is replaced, see `WriteOptions`.

    Returns:
        What dataset.json says.

    Raises:
        DataError: if a source cannot be read, too much is unusable, or nothing is usable.
        CheckpointError: if the model has no detokenizer, or `out` cannot be written.
    """
    if perturbations < 0:
        raise DataError(f"perturbations={perturbations}: expected 0 or more")
    keep_sources(out, [*sources, model], inside=True)
    speech = SpeechFolder(model)
    items = list_recordings(sources)

    def describe(lengths: list[int]) -> dict[str, Any]:
        seconds = sum(lengths) / CODE_RATE / (1 + perturbations)  # each piece is as long every time
        about = {"format": FORMAT, "seconds": seconds, "speech_tokenizer": speech.analysis_hash}
        return about | ({"perturbations": perturbations} if perturbations else {})

    heard = _analyze(items, speech, perturbations, channel, progress)
    return write_samples(out, heard, describe, **options)


def _analyze(
    items: Sequence[RecordingEntry],
    speech: SpeechFolder,
    perturbations: int,
    channel: audio.Channel | None,
    progress: Callable[[int, int], None],
) -> Iterator[tuple[bytes, int] | Reject]:
    """Samples in the order of their recordings; codes are found for many pieces together.

    A `Reject` may come before the samples of recordings ahead of it.
    """
    analyzer = speech.analyzer
    identify = lru_cache(64)(lambda path: speaker_vector(analyzer, path, channel))
    waiting: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]] = []

    def finish() -> Iterator[tuple[bytes, int]]:
        heard = [analyzer.mel_of(low) for _, low, _, _ in waiting]
        said = [audio.mel_24k(high).T for _, _, high, _ in waiting]  # [Q, M] each
        for number in range(1 + perturbations):
            codes = analyzer.codes_of_mels(
                [
                    _perturbed(mel, piece[0], number)
                    for piece, mel in zip(waiting, heard, strict=True)
                ]
            )
            for (where, _, _, speaker), mel, found in zip(waiting, said, codes, strict=True):
                count = min(len(found), len(mel) // MEL_FRAMES_PER_CODE)
                yield (
                    encode_flow_sample(
                        FlowSample(
                            found[:count], mel[: MEL_FRAMES_PER_CODE * count], speaker, where
                        )
                    ),
                    count,
                )
        waiting.clear()

    for done, item in enumerate(items, 1):
        try:
            if item.problem:
                raise DataError(item.problem)
            speaker = identify(item.path_of("voice"))
            for where, low, high in _pieces(item, channel):
                waiting.append((where, low, high, speaker))
                if len(waiting) == _BATCH_PIECES:
                    yield from finish()
        except Sa2jaxError as error:
            yield Reject(item.where, str(error))
        if done == len(items):
            yield from finish()
        progress(done, len(items))


def _perturbed(mel: Float[np.ndarray, "M F"], where: str, number: int) -> Float[np.ndarray, "M F"]:
    """A piece as it is heard the n-th time: first as it is, then bent by its own random numbers."""
    return perturb(mel, np.random.default_rng([number, *where.encode()])) if number else mel


def speaker_vector(
    analyzer: VoiceAnalyzer, path: str, channel: audio.Channel | None = None
) -> Float[np.ndarray, "C"]:
    """Who speaks in the first 30 s of a recording.

    Raises:
        AudioError: if it cannot be read, or is too short to tell.
    """
    source = audio.AudioSource(path, channel)
    wave = audio.load_audio(source, audio.SAMPLE_RATE)[: _samples(audio.SAMPLE_RATE)]
    if len(wave) < MIN_SECONDS * audio.SAMPLE_RATE:
        raise AudioError(
            f"{len(wave) / audio.SAMPLE_RATE:.2f} s do not tell who speaks: expected at least "
            f'{MIN_SECONDS:g} s, or "voice" with a longer recording of the same speaker'
        )
    return analyzer.speaker_of(wave)


def _pieces(
    item: RecordingEntry, channel: audio.Channel | None
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, samples at 16 kHz and at 24 kHz of each piece of a recording."""
    source = audio.AudioSource(item.path, channel)
    low = audio.load_audio(source, audio.SAMPLE_RATE)
    high = audio.load_audio(source, SPEECH_SAMPLE_RATE, channel="mean")
    step, high_step = _samples(audio.SAMPLE_RATE), _samples(SPEECH_SAMPLE_RATE)
    least, kept = int(MIN_PIECE_SECONDS * audio.SAMPLE_RATE), 0
    for number, start in enumerate(range(0, len(low), step)):
        piece, other = low[start : start + step], high[number * high_step :][:high_step]
        if len(piece) >= least and np.abs(piece).max() >= audio.SILENCE:
            kept += 1
            yield f"{item.where}@{number * MAX_SECONDS:g}s", piece, other
    if not kept:
        raise AudioError(
            f"expected at least {MIN_PIECE_SECONDS:g} s of sound, got "
            f"{len(low) / audio.SAMPLE_RATE:.2f} s "
            "or silence"
        )


def _samples(rate: int) -> int:
    return int(MAX_SECONDS * rate)


def encode_flow_sample(sample: FlowSample) -> bytes:
    """A sample as one safetensors blob."""
    arrays = {"codes": sample.codes, "mel": sample.mel, "speaker": sample.speaker}
    kinds = {"codes": np.int32, "mel": np.float32, "speaker": np.float32}
    whole = {name: np.ascontiguousarray(a, kinds[name]) for name, a in arrays.items()}
    return save(whole | {"where": np.frombuffer(sample.where.encode(), np.uint8)})


def decode_flow_sample(blob: bytes) -> FlowSample:
    """What `encode_flow_sample` packed."""
    arrays, _ = parse_safetensors(blob)
    where = arrays.pop("where").tobytes().decode()
    return FlowSample(**arrays, where=where)


# --- batches ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FlowDataConfig(BucketConfig):
    """What the flow is taught with, see `BucketConfig`.

    Attributes:
        folder: made by `prepare_flow`.
        buckets: lengths in codes (25 Hz) that batches are padded to; each compiles a step.
    """

    folder: str | Path
    buckets: tuple[int, ...] = (125, 250, 375, 500, 750)


class FlowData(BucketData[FlowBatch[np.ndarray]]):
    """Prepared recordings in batches, see `BucketData`; its unit is a code.

    Args:
        config: what.
        analysis: hash of the speech tokenizer in use (`SpeechFolder.analysis_hash`), to be sure
            that the codes are its own.
        **order: seed and hosts, see `Order`.

    Raises:
        DataError: if the folder is not a prepared one, or does not fit.
    """

    unit = "codes"
    units_per_second = CODE_RATE

    def __init__(
        self, config: FlowDataConfig, *, analysis: str | None = None, **order: Unpack[Order]
    ):
        folder = Path(config.folder)
        self.about, lengths = read_flow_info(folder)
        if analysis is not None and analysis != self.about["speech_tokenizer"]:
            raise DataError(
                f"{folder} was heard by another checkpoint's networks, its codes mean "
                "something else here: prepare it again with this model"
            )
        super().__init__(config, folder, lengths, self.about["fingerprint"], **order)
        self._samples = SampleFile(folder, len(lengths), decode_flow_sample)

    def _batch(self, room: int, chosen: Sequence[int]) -> tuple[FlowBatch, int]:
        samples = [self._samples[index] if index >= 0 else None for index in chosen]
        like = self._samples[0]
        codes = np.zeros((len(samples), room), np.int32)
        mels = np.zeros((len(samples), MEL_FRAMES_PER_CODE * room, like.mel.shape[1]), np.float32)
        speaker = np.zeros((len(samples), len(like.speaker)), np.float32)
        lengths = np.zeros(len(samples), np.int32)
        for row, sample in enumerate(samples):
            if sample is not None:
                lengths[row] = len(sample.codes)
                codes[row, : len(sample.codes)] = sample.codes
                mels[row, : len(sample.mel)] = sample.mel
                speaker[row] = sample.speaker
        batch = FlowBatch(codes=codes, mels=mels, lengths=lengths, speaker=speaker)
        return batch, int(lengths.sum())


def read_flow_info(folder: Path) -> tuple[dict[str, Any], Int[np.ndarray, "N"]]:
    """What a prepared folder says of itself, and the lengths of its samples in codes.

    Raises:
        DataError: if it is none, or is damaged.
    """
    what, command = "recordings for the flow", "sa2jax data prepare-flow"
    return read_samples_info(folder, FORMAT, ["speech_tokenizer"], what, command)

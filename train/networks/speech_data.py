"""Training data of the recognition networks and the vocoder: prepared once, drawn in batches.

Data of single networks: prepared folders of clips, in batches of like length. The language model
has another system, samples in shards that are packed into rows: `data.samples`, `language.data`.

    prepare_speech(["speech.jsonl"], "ready/16k", rate=16_000)
    data = ClipData(ClipConfig(folder="ready/16k", rows=16), seed=0)     # whole clips
    prepare_speech(["speech.jsonl"], "ready/24k", rate=24_000, pitch=True)
    data = CropData(CropConfig(folder="ready/24k", rows=16), seed=0)     # pieces of one length
    prepare_speech([…], "ready/made", rate=24_000, pitch=True, model="runs/flow/model")

With a model, its flow makes the mel frames again from the recordings' codes and speakers: a vocoder
that learns from those hears what it will hear at run time.

A line of a .jsonl file is `{"audio": "a.wav", "text": "what is said", "speaker": "anna"}`; what is
learnt says which of them is needed. Where there is pitch, and how high, pyworld tells (the DIO
algorithm, refined by StoneMask, of https://github.com/mmorise/World).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from jaxtyping import Float, Int16
from safetensors.numpy import save

from sa2jax import audio
from sa2jax.atomic_io import keep_sources
from sa2jax.audio.rates import MEL_RATE, SAMPLE_RATE, SPEECH_MEL_RATE, SPEECH_SAMPLE_RATE
from sa2jax.errors import DataError, Sa2jaxError
from sa2jax.files.safetensors_files import parse_safetensors
from sa2jax.train.data.bucketing import BucketConfig, BucketData, Order
from sa2jax.train.data.recordings import (
    RecordingEntry,
    SampleFile,
    WriteOptions,
    damaged_error,
    list_recordings,
    read_samples_info,
    write_samples,
)
from sa2jax.train.data.samples import Reject
from sa2jax.train.networks.batches import VOCODER_MELS, SoundBatch, VocoderBatch
from sa2jax.train.networks.flow_mels import FlowMelSynthesizer
from sa2jax.train.networks.recognition import letter_ids

FORMAT = "speech 1"
# Samples of a frame: 10 ms for what hears, 20 ms for the vocoder.
HOPS = {
    SAMPLE_RATE: SAMPLE_RATE // MEL_RATE,
    SPEECH_SAMPLE_RATE: SPEECH_SAMPLE_RATE // SPEECH_MEL_RATE,
}
_BATCH_RECORDINGS = 64  # recordings said again together, those of like length in a batch
MAX_LETTERS_PER_SECOND = 40  # that anybody says in a second
MIN_PITCH, MAX_PITCH = 60.0, 600.0  # Hz: pitch is looked for between


@dataclass(frozen=True, eq=False)
class SpeechSample:
    """A recording that can be learnt from.

    Attributes:
        sound: samples.
        text: what is said; may be empty.
        speaker: who says it; may be empty.
        pitch: Hz of each frame of 20 ms, 0 where there is none; empty where nobody looked.
        mel: log-mel frames (50 Hz) that a flow made of its codes; none where no flow was asked.
    """

    sound: Int16[np.ndarray, "N"]
    text: str
    speaker: str
    pitch: Float[np.ndarray, "T"]
    mel: Float[np.ndarray, "T M"] = field(default_factory=lambda: np.zeros((0, 0), np.float32))


# --- hearing ----------------------------------------------------------------------------------


def prepare_speech(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    rate: int = SAMPLE_RATE,
    pitch: bool = False,
    model: str | Path | None = None,
    max_seconds: float = 25.0,
    channel: audio.Channel | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Unpack[WriteOptions],
) -> dict[str, Any]:
    """Read recordings once and keep them as 16-bit samples at the rate that a network hears.

    Args:
        sources: recordings, folders of them, and .jsonl files.
        out: folder to make, whole or not at all.
        rate: Hz: 16000 for networks that hear, 24000 for the vocoder.
        pitch: whether to find the pitch; needs pyworld, and 24000 Hz.
        model: folder with a detokenizer whose flow shall make the mel frames; needs 24000 Hz.
            Recordings below a second need "voice" in their line, see `flow_data`.
        max_seconds: longer recordings are not used.
        channel: which channel is heard, by default the mean of all.
        progress: called with (recordings_done, recordings_total).
        **options: what may be unusable, and what is replaced, see `WriteOptions`.

    Returns:
        What dataset.json says.

    Raises:
        DataError: if a source cannot be read, too much is unusable, nothing is usable, or pyworld
            is not installed.
        CheckpointError: if `out` cannot be written, or the model has no detokenizer.
    """
    if rate not in HOPS:
        raise DataError(f"rate {rate}: expected {' or '.join(map(str, HOPS))} Hz")
    if (pitch or model is not None) and rate != SPEECH_SAMPLE_RATE:
        what = "pitch is" if pitch else "mel frames are"
        raise DataError(f"{what} kept for the vocoder: expected a rate of 24000 Hz beside it")
    keep_sources(out, [*sources, model], inside=True)
    find = _pitch_finder() if pitch else None
    items, speakers = list_recordings(sources), set()

    def heard() -> Iterator[tuple[RecordingEntry, SpeechSample] | Reject]:
        for done, item in enumerate(items, 1):
            try:
                found = _load_sample(item, rate, max_seconds, channel)
                if find is not None:
                    found = replace(found, pitch=find(found.sound))
                yield item, found
            except Sa2jaxError as error:
                yield Reject(item.where, str(error))
            progress(done, len(items))

    def packed() -> Iterator[tuple[bytes, int] | Reject]:
        for found in _with_flow_mels(
            heard(), None if model is None else FlowMelSynthesizer(model, channel)
        ):
            if isinstance(found, Reject):
                yield found
            else:
                speakers.add(found.speaker)
                yield encode_speech_sample(found), -(-len(found.sound) // HOPS[rate])

    def describe(lengths: list[int]) -> dict[str, Any]:
        seconds = sum(lengths) * HOPS[rate] / rate
        return {
            "format": FORMAT,
            "rate": rate,
            "seconds": seconds,
            "pitch": pitch,
            "mel": model is not None,
            "speakers": sorted(speakers),
        }

    return write_samples(out, packed(), describe, **options)


def _with_flow_mels(
    heard: Iterable[tuple[RecordingEntry, SpeechSample] | Reject], maker: FlowMelSynthesizer | None
) -> Iterator[SpeechSample | Reject]:
    """Utterances, with mel frames if somebody makes them; rejects may overtake others."""
    waiting: list[SpeechSample] = []
    speakers: list[np.ndarray] = []

    def finish(maker: FlowMelSynthesizer) -> Iterator[SpeechSample]:
        mels = maker.synthesize([one.sound for one in waiting], speakers) if waiting else []
        for one, mel in zip(waiting, mels, strict=True):
            frames = min(
                len(mel), -(-len(one.sound) // HOPS[SPEECH_SAMPLE_RATE])
            )  # they end where codes end
            sound, pitch = one.sound[: frames * HOPS[SPEECH_SAMPLE_RATE]], one.pitch[:frames]
            yield replace(one, sound=sound, pitch=pitch, mel=mel[:frames])
        waiting.clear()
        speakers.clear()

    for found in heard:
        if isinstance(found, Reject):
            yield found
        elif maker is None:
            yield found[1]
        else:
            try:
                speakers.append(maker.speaker_vector(found[0].path_of("voice")))
                waiting.append(found[1])
            except Sa2jaxError as error:
                yield Reject(found[0].where, str(error))
            if len(waiting) == _BATCH_RECORDINGS:
                yield from finish(maker)
    if maker is not None:
        yield from finish(maker)


def _load_sample(
    item: RecordingEntry, rate: int, most: float, channel: audio.Channel | None
) -> SpeechSample:
    if item.problem:
        raise DataError(item.problem)
    facts = {key: item.values.get(key, "") for key in ("text", "speaker")}
    for key, value in facts.items():
        if not isinstance(value, str):
            raise DataError(f'expected "{key}" to be text, got {value!r}')
    sound = audio.load_audio(audio.AudioSource(item.path, channel), rate, channel="mean")
    if len(sound) > most * rate:
        raise DataError(f"{len(sound) / rate:.1f} s: expected at most {most:g} s")
    if not len(sound) or np.abs(sound).max() < audio.SILENCE:
        raise DataError("silence")
    letters = len(letter_ids(facts["text"]))
    if letters > MAX_LETTERS_PER_SECOND * len(sound) / rate:
        raise DataError(
            f"{letters} letters in {len(sound) / rate:.1f} s: expected at most "
            f"{MAX_LETTERS_PER_SECOND} a second; the text does not belong to the recording, perhaps"
        )
    return SpeechSample(audio.pcm_16(sound), **facts, pitch=np.zeros(0, np.float32))


def _pitch_finder() -> Callable[[np.ndarray], np.ndarray]:
    """Pitch of each frame of 20 ms, at the frame's middle."""
    try:
        import pyworld
    except ImportError:
        raise DataError(
            "pitch is found by pyworld, which is not installed: pip install 'sa2jax[synthesis]'"
        ) from None
    rate, hop = SPEECH_SAMPLE_RATE, HOPS[SPEECH_SAMPLE_RATE]

    def find(sound: np.ndarray) -> np.ndarray:
        wave = np.concatenate([sound / 32768.0, np.zeros(hop)])
        # Every 10 ms from 0 on: each other one is the middle of a frame.
        period = 500.0 * hop / rate
        found, times = pyworld.dio(
            wave, rate, f0_floor=MIN_PITCH, f0_ceil=MAX_PITCH, frame_period=period
        )
        found = pyworld.stonemask(wave, found, times, rate)
        return found[1::2][: -(-len(sound) // hop)].astype(np.float32)

    return find


def encode_speech_sample(found: SpeechSample) -> bytes:
    """An utterance as one safetensors blob."""
    text = {"text": found.text, "speaker": found.speaker}
    arrays = {name: np.frombuffer(value.encode(), np.uint8) for name, value in text.items()}
    more = {"mel": np.ascontiguousarray(found.mel)} if len(found.mel) else {}
    return save(arrays | {"sound": found.sound, "pitch": found.pitch} | more)


def decode_speech_sample(blob: bytes) -> SpeechSample:
    """What `encode_speech_sample` packed."""
    arrays, _ = parse_safetensors(blob)
    text, speaker = (arrays[name].tobytes().decode() for name in ("text", "speaker"))
    mel = {"mel": arrays["mel"]} if "mel" in arrays else {}
    return SpeechSample(arrays["sound"], text, speaker, arrays["pitch"], **mel)


def read_speech_info(folder: Path, rate: int | None = None) -> tuple[dict[str, Any], np.ndarray]:
    """What a prepared folder says of itself, and the lengths of its clips in frames.

    Raises:
        DataError: if it is none, is damaged, or was prepared at another rate.
    """
    keys, command = ["rate", "speakers", "pitch"], "sa2jax data prepare-speech"
    about, lengths = read_samples_info(folder, FORMAT, keys, "recordings", command)
    if rate is not None and about["rate"] != rate:
        raise DataError(
            f"{folder} holds sound at {about['rate']} Hz: expected {rate}; `{command} --rate "
            f"{rate}` makes it"
        )
    return about, lengths


def max_letters(frames: int) -> int:
    """Letters for which a row of so many frames (10 ms) has room."""
    return -(-frames * MAX_LETTERS_PER_SECOND // MEL_RATE)


# --- batches of whole clips ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClipConfig(BucketConfig):
    """What networks that hear are taught with, see `BucketConfig`.

    Attributes:
        folder: made by `prepare_speech` at 16 kHz.
        buckets: lengths in frames (10 ms) that batches are padded to; each compiles a step.
    """

    folder: str | Path
    buckets: tuple[int, ...] = (200, 300, 400, 600)


class ClipData(BucketData[SoundBatch[np.ndarray]]):
    """Whole clips in batches, see `BucketData`; its unit is a frame of 10 ms.

    Args:
        config: what.
        speakers: names that count, by number; by default those of the folder. A clip of another
            speaker has the number −1.
        **order: seed and hosts, see `Order`.

    Raises:
        DataError: if the folder is not a prepared one, or does not fit.
    """

    unit = "frames"
    units_per_second = MEL_RATE

    def __init__(
        self, config: ClipConfig, *, speakers: Sequence[str] | None = None, **order: Unpack[Order]
    ):
        folder = Path(config.folder)
        self.about, lengths = read_speech_info(folder, SAMPLE_RATE)
        self.speakers = tuple(self.about["speakers"] if speakers is None else speakers)
        self._numbers = {name: number for number, name in enumerate(self.speakers)}
        self._clips = SampleFile(folder, len(lengths), decode_speech_sample)
        super().__init__(config, folder, lengths, self.about["fingerprint"], **order)

    def _batch(self, room: int, chosen: Sequence[int]) -> tuple[SoundBatch, int]:
        hop, rows = HOPS[SAMPLE_RATE], len(chosen)
        most = max_letters(room)
        sound = np.zeros((rows, room * hop), np.float32)
        lengths, counts = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        letters, speaker = np.zeros((rows, most), np.int32), np.full(rows, -1, np.int32)
        for row, index in enumerate(chosen):
            if index < 0:
                continue
            clip = self._clips[index]
            found = letter_ids(clip.text)
            if len(found) > most:
                raise damaged_error(self.folder, ValueError(f"clip {index}: {len(found)} letters"))
            lengths[row], counts[row] = len(clip.sound), len(found)
            sound[row, : len(clip.sound)] = clip.sound / np.float32(32768)
            letters[row, : len(found)] = found
            speaker[row] = self._numbers.get(clip.speaker, -1)
        batch = SoundBatch(
            sound=sound, lengths=lengths, letters=letters, letter_counts=counts, speaker=speaker
        )
        return batch, int(lengths.sum()) // hop


# --- batches of pieces --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """What the vocoder is taught with.

    Attributes:
        folder: made by `prepare_speech` at 24 kHz, with its pitch.
        rows: pieces of a batch, of all hosts.
        crop: frames (20 ms) of each piece; a shorter clip is a shorter piece.
        shuffle: another order, and other pieces, every epoch.
        epochs: how often; None for without end. In one, a clip gives as many pieces as it has room
            for.
    """

    folder: str | Path
    rows: int = 16
    crop: int = 32
    shuffle: bool = True
    epochs: int | None = None

    def __post_init__(self):
        if self.crop < 1:
            raise DataError(f"crop {self.crop}: expected at least 1 frame")


class CropData(BucketData[VocoderBatch[np.ndarray]]):
    """Pieces of clips in batches, see `BucketData`; its unit is a frame of 20 ms.

    Args:
        config: what.
        **order: seed, also of where pieces begin, and hosts; see `Order`.

    Raises:
        DataError: if the folder is not a prepared one, or does not fit.
    """

    unit = "frames"
    units_per_second = SPEECH_MEL_RATE

    def __init__(self, config: CropConfig, **order: Unpack[Order]):
        folder = Path(config.folder)
        self.about, lengths = read_speech_info(folder, SPEECH_SAMPLE_RATE)
        self._clips = SampleFile(folder, len(lengths), decode_speech_sample)
        pieces = np.maximum(lengths // config.crop, 1)
        self._owner = np.repeat(np.arange(len(lengths)), pieces)
        self._whole = lengths
        buckets = BucketConfig(
            rows=config.rows, buckets=(config.crop,), shuffle=config.shuffle, epochs=config.epochs
        )
        sizes = np.minimum(lengths[self._owner], config.crop)
        super().__init__(buckets, folder, sizes, self.about["fingerprint"], **order)

    def _batch(self, room: int, chosen: Sequence[int]) -> tuple[VocoderBatch, int]:
        hop, rows = HOPS[SPEECH_SAMPLE_RATE], len(chosen)
        sound = np.zeros((rows, room * hop), np.float32)
        pitch, frames = np.full((rows, room), -1, np.float32), np.zeros(rows, np.int32)
        mel = np.zeros((rows, room, VOCODER_MELS), np.float32) if self.about.get("mel") else None
        for row, piece in enumerate(chosen):
            if piece < 0:
                continue
            owner = self._owner[piece]
            clip, count = self._clips[owner], int(self._lengths[piece])
            first = self._first(piece, int(self._whole[owner]) - count)
            samples = clip.sound[first * hop : (first + count) * hop] / np.float32(32768)
            sound[row, : len(samples)] = samples
            frames[row] = count
            if len(clip.pitch):
                pitch[row, :count] = clip.pitch[first : first + count]
            if mel is not None:
                mel[row, :count] = clip.mel[first : first + count]
        return VocoderBatch(sound=sound, f0=pitch, frames=frames, mel=mel), int(frames.sum())

    def _first(self, piece: int, spare: int) -> int:
        """Where a piece begins: drawn anew every epoch, in order without shuffling."""
        if not self.config.shuffle:
            number = piece - int(np.searchsorted(self._owner, self._owner[piece]))
            return min(number * int(self.config.buckets[0]), spare)
        return int(np.random.default_rng([self._seed, self._epoch, piece]).integers(spare + 1))

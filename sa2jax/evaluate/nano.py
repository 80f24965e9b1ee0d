"""A run of the suite `nano`: does the model hear, answer, call tools and keep its voice?

    run_suite(find_suite("nano"), StepAudio2.from_pretrained("nano"), Path("corpus/heldout"))

Answers come from the model alone: it is asked as a user asks it (`transcribe`, `tts`, `chat`), and
judges hear the sound that came back, not its text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

from sa2jax.evaluate.base import RunContext, SuiteRun
from sa2jax.evaluate.heldout import HeldOut, Sample, evenly_spaced, read_samples
from sa2jax.evaluate.judges import Judge, grammar_judge, open_judge, require, shuffled
from sa2jax.evaluate.nano_metrics import SPOKEN, TOOLS, TRANSCRIBED, NanoOptions
from sa2jax.evaluate.normalizer import SUMS, normalized
from sa2jax.evaluate.scores import NOTHING_RIGHT, Metric, Prediction
from sa2jax.evaluate.voice_judge import VoiceJudge, voice_judge
from sa2jax.evaluate.word_errors import word_errors

if TYPE_CHECKING:
    from sa2jax.pipeline.reply import Reply

_BOTH = ("grammar", "sums", "s"), ("Whisper", "sums_open", "s_open")  # offline, streamed
_FILES = {"seen": "asr_seen", "unseen": "asr_unseen", "digits": "digits"}
_NO_FILE = {
    "digits": "no recordings: examples/fetch_real.sh makes a folder of them, see --real-recordings",
}


@dataclass(frozen=True, kw_only=True)
class Judges:
    """The judges; None for one that no metric needs."""

    grammar: Judge | None = None
    open: Judge | None = None
    voice: VoiceJudge | None = None

    @classmethod
    def load(cls, metrics: Sequence[str]) -> "Judges":
        """Load the judges of some metrics.

        Raises:
            DataError: if one is not installed.
        """
        wants = set(metrics)
        if wants & {"seen", "unseen"}:
            require("jiwer")
        return cls(
            grammar=grammar_judge(SUMS) if wants & {"sums", "streamed"} else None,
            open=open_judge().number if wants & {"sums_open"} else None,
            voice=voice_judge() if "voice" in wants else None,
        )


class NanoRun(SuiteRun):
    """Evaluation of one model by the suite `nano`."""

    judges: Judges
    suite_options: NanoOptions

    def __init__(self, context: RunContext):
        super().__init__(context)
        self.judges, self.suite_options = context.judges, context.suite_options
        self.held_out = HeldOut.find(context.data)
        keys, limit = self.metrics.keys(), self.options.limit
        self.transcribed = {
            key: self._transcribed_samples(key) for key in TRANSCRIBED if key in keys
        }
        self.sums = self.held_out.samples("sums", limit) if keys & set(SPOKEN) else []
        samples = self.held_out.samples("tools") if keys & set(TOOLS) else []
        self.tools = {
            key: evenly_spaced([s for s in samples if (s.tool is not None) == calls], limit)
            for key, calls in zip(TOOLS, (True, False), strict=True)
            if key in keys
        }
        self.voiced = self._voiced_samples() if "voice" in keys else []

    @property
    def total(self) -> int:
        """Recordings and replies in all."""
        modes = 1 + bool({"streamed", "first_sound"} & self.metrics.keys())
        lists = [*self.transcribed.values(), *self.tools.values(), self.voiced]
        return sum(map(len, lists)) + modes * len(self.sums)

    @property
    def metadata(self) -> dict[str, Any]:
        """The held-out set, the sampling, and the length of first chunks."""
        metadata = super().metadata
        folder = metadata.pop("data")
        return {"held-out set": folder} | metadata | {"first chunk": self.suite_options.first}

    def run(self) -> dict[str, Metric]:
        """All metrics, by key."""
        results: dict[str, Metric] = {}
        for key, samples in self.transcribed.items():
            results[key] = self._transcribe(self.metrics[key], samples)
        if self.metrics.keys() & set(SPOKEN):
            results |= self._answer_sums()
        for key, samples in self.tools.items():
            results[key] = self._call_tools(self.metrics[key], samples)
        if "voice" in self.metrics:
            results["voice"] = self._identify_voices(self.metrics["voice"])
        return results

    # --- samples ----------------------------------------------------------------------------

    def _transcribed_samples(self, key: str) -> list[Sample]:
        folder, limit = self.suite_options.real_recordings, self.options.limit
        if key == "digits" and folder is not None:
            return evenly_spaced(read_samples(folder / "digits.jsonl"), limit)
        return self.held_out.samples(_FILES[key], limit)

    def _voiced_samples(self) -> list[tuple[Sample, str]]:
        """Texts and questions in turn, each with its voice: two samples in each voice in turn."""
        voices = self._voices()
        if len(voices) < 2:
            return []
        texts, questions = self.held_out.samples("tts"), self.held_out.samples("chat")
        count = self.options.limit or max(len(texts), len(questions))
        pairs = zip(evenly_spaced(texts, count), evenly_spaced(questions, count), strict=False)
        samples = [sample for pair in pairs for sample in pair] or texts or questions
        return [(s, voices[(n // 2) % len(voices)]) for n, s in enumerate(samples[:count])]

    def _voices(self) -> list[str]:
        """Voices that the model has and of which there are recordings."""
        return sorted(set(self.model.speech.folder.voices) & set(self.held_out.voices))

    # --- metrics -------------------------------------------------------------------------------

    def _transcribe(self, metric: Metric, samples: list[Sample]) -> Metric:
        if not samples:
            return metric.not_measured(
                _NO_FILE.get(metric.key, f"the set has no {_FILES[metric.key]}.jsonl")
            )
        texts = self.model.transcribe_batch(
            [str(sample.audio) for sample in samples],
            progress=self.counter.sub_progress(len(samples)),
        )
        for sample, text in zip(samples, texts, strict=True):
            self.record(Prediction(metric.key, sample.name, sample.expected, text))
        expected = [sample.expected for sample in samples]
        if metric.unit == "%" and not metric.lower_is_better:
            pairs = zip(expected, texts, strict=True)
            return metric.accuracy([normalized(a) == normalized(b) for a, b in pairs])
        return metric.word_error_rate(*word_errors(expected, texts))

    def _answer_sums(self) -> dict[str, Metric]:
        """All metrics of spoken sums: each question is asked offline and, if need be, streamed."""
        metrics = {key: self.metrics[key] for key in SPOKEN if key in self.metrics}
        if not self.sums:
            return {
                key: metric.not_measured("the set has no sums.jsonl")
                for key, metric in metrics.items()
            }
        streams = bool({"streamed", "first_sound"} & metrics.keys())
        judges: dict[str, Judge] = {}
        if self.judges.grammar is not None and {"sums", "streamed"} & metrics.keys():
            judges["sums"] = self.judges.grammar
        if self.judges.open is not None and "sums_open" in metrics:
            judges["sums_open"] = self.judges.open
        rights: dict[str, list[bool]] = {name: [] for name in ("sums", "sums_open", "s", "s_open")}
        factors, firsts = [], []
        for streamed in (False, True)[: 1 + streams]:
            if {"first_sound", "real_time"} & metrics.keys():
                self._answer(self.sums[0], 0, streamed)  # compiles
            for number, sample in enumerate(self.sums):
                reply = self._answer(sample, number, streamed)
                times = reply.timings
                if times is not None and times.real_time_factor is not None:
                    (firsts if streamed else factors).append(
                        times.first_audio if streamed else times.real_time_factor
                    )
                for kind, judge in judges.items():
                    name = "s" + kind[4:] if streamed else kind
                    predicted = judge(reply.audio, reply.sample_rate)
                    right = predicted == normalized(sample.expected)
                    rights[name].append(right)
                    metric, expected = f"streamed {kind}" if streamed else kind, sample.expected
                    self.record(Prediction(metric, sample.name, expected, predicted, right))
                self.counter.add()
        results = {}
        for key, judge in judges.items():
            if key in metrics:
                results[key] = metrics[key].accuracy(rights[key], self._judge_accuracy(judge))
        if "streamed" in metrics:
            results["streamed"] = _streamed_change(metrics["streamed"], rights)
        if "first_sound" in metrics:
            results["first_sound"] = metrics["first_sound"].median(firsts)
        if "real_time" in metrics:
            results["real_time"] = metrics["real_time"].median(factors)
        return results

    def _call_tools(self, metric: Metric, samples: list[Sample]) -> Metric:
        rights = []
        for number, sample in enumerate(samples):
            chat = self.model.chat(
                sample.system,
                tools=sample.tools,
                options=self.generation_config(),
                max_tool_rounds=0,
            )
            reply = chat.say(sample.content, speak=True, seed=self.options.seed + number)
            names = [getattr(call, "name", "(malformed)") for call in reply.tool_calls]
            right = sample.tool in names if sample.tool else not names
            rights.append(right)
            expected, predicted = sample.tool or "(none)", ", ".join(names)
            predicted = predicted or f"(none) {reply.text}"
            self.record(Prediction(metric.key, sample.name, expected, predicted, right))
            self.counter.add()
        return metric.accuracy(rights)

    def _identify_voices(self, metric: Metric) -> Metric:
        judge, names = self.judges.voice, self._voices()
        if judge is None or len(names) < 2:
            return metric.not_measured(
                f"expected two voices of the model with recordings, got {names}"
            )
        known = {
            name: judge.embed(*soundfile.read(path, dtype="float32"))
            for name, path in self.held_out.voices.items()
        }
        rights: dict[str, list[bool]] = {name: [] for name in names}
        for number, (sample, voice) in enumerate(self.voiced):
            seed = self.options.seed + number
            if sample.audio is None:
                reply = self.model.tts(
                    sample.text, voice, max_new_tokens=self.options.max_new_tokens, seed=seed
                )
            else:
                chat = self.model.chat(sample.system, voice=voice, options=self.generation_config())
                reply = chat.say(sample.content, seed=seed)
            closest = "(silence)"
            if reply.audio.any():
                closest, _ = judge.closest(reply.audio, reply.sample_rate, known)
            rights[voice].append(closest == voice)
            self.record(Prediction("voice", sample.name, voice, closest, rights[voice][-1]))
            self.counter.add()
        shares = [f"{name} {sum(r)} of {len(r)}" for name, r in rights.items()]
        note = f"{', '.join(shares)}; by chance {100 / len(known):.0f} %"
        return metric.accuracy([right for each in rights.values() for right in each], note)

    # --- parts ------------------------------------------------------------------------------

    def _answer(self, sample: Sample, number: int, streamed: bool) -> "Reply":
        """The spoken answer to a question; streamed, the same codes as offline."""
        chat = self.model.chat(sample.system, options=self.generation_config())
        seed, suite_options = self.options.seed + number, self.suite_options
        if not streamed:
            return chat.say(sample.content, speak=True, seed=seed)
        stream = chat.stream(
            sample.content,
            speak=True,
            seed=seed,
            first=suite_options.first,
            chunk=suite_options.chunk,
        )
        pieces = [piece.audio for piece in stream]
        return replace(stream.reply, audio=np.concatenate([np.zeros(0, np.float32), *pieces]))

    def _judge_accuracy(self, judge: Judge) -> str:
        """On how many recordings of the right answers the judge is right, whole and in pieces."""
        clips = {
            sample.expected: sample.reference
            for sample in self.sums
            if sample.reference is not None and sample.reference.is_file()
        }
        if not clips or self.context.name:
            return ""
        intact = broken = 0
        for expected, path in clips.items():
            wave, rate = soundfile.read(path, dtype="float32")
            intact += judge(wave, rate) == normalized(expected)
            broken += judge(shuffled(wave, rate), rate) == normalized(expected)
        return (
            f"the judge is right on {intact} of {len(clips)} recordings of the answers, and on "
            f"{broken} of them shuffled"
        )


def _streamed_change(metric: Metric, rights: dict[str, list[bool]]) -> Metric:
    """The difference in points, of the judge that finds the larger one."""
    judged = [names for names in _BOTH if rights[names[2]]]
    if not judged:
        return metric.not_measured("no judge has heard them")
    points = {
        judge: 100 * (sum(rights[streamed]) - sum(rights[offline])) / len(rights[offline])
        for judge, offline, streamed in judged
        if any(rights[offline])  # otherwise a stream can lose nothing
    }
    if not points:
        return metric.not_measured(f"{NOTHING_RIGHT} offline")
    note = ", ".join(f"{judge} {value:+.1f}" for judge, value in points.items())
    return metric.measured(min(points.values()), len(rights["s"] or rights["s_open"]), note)

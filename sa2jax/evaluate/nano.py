"""The table of the nano model: does it hear, answer, call tools and keep its voice?

    scores = evaluate_nano(StepAudio2.from_pretrained("nano"), "corpus", NanoOptions(limit=20))

Answers come from the model alone: it is asked as a user asks it (`transcribe`, `tts`, `chat`), and
judges hear the sound that came back, not its text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

from sa2jax.chat.template import TASKS
from sa2jax.evaluate.heldout import HeldOut, Item, evenly_spaced, read_items
from sa2jax.evaluate.judges import Judge, grammar_judge, open_judge, require, shuffled
from sa2jax.evaluate.nano_metrics import (
    HEARD,
    KEYS,
    METRICS,
    NOT_COMPARED,
    SPOKEN,
    TOOLS,
    NanoOptions,
)  # fmt: skip
from sa2jax.evaluate.scores import Metric, Prediction, Scores
from sa2jax.evaluate.voice_judge import VoiceJudge, voice_judge
from sa2jax.evaluate.words import SUMS, normalized, word_errors
from sa2jax.pipeline.task_runner import task_options

if TYPE_CHECKING:
    from sa2jax.pipeline import StepAudio2
    from sa2jax.pipeline.reply import Reply

NOTHING_RIGHT = "there is nothing to lose: no answer was right"
_BOTH = ("grammar", "sums", "s"), ("Whisper", "sums_open", "s_open")  # offline, streamed
_FILES = {"seen": "asr_seen", "unseen": "asr_unseen", "digits": "digits"}
_NO_FILE = {
    "digits": "no recordings: examples/fetch_real.sh makes a folder of them, see --real-recordings",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Judges:
    """The judges; None for one that no metric needs."""

    grammar: Judge | None = None
    open: Judge | None = None
    voice: VoiceJudge | None = None

    @classmethod
    def load(cls, metrics: Sequence[str]) -> "Judges":
        """Those that some metrics need.

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


def evaluate_nano(
    model: "StepAudio2",
    corpus: str | Path,
    options: NanoOptions | None = None,
    *,
    other: "StepAudio2 | None" = None,
    is_int8: bool = False,
    judges: Judges | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """Score a model on held-out recordings.

    Args:
        model: the model to score.
        corpus: folder of the held-out set, see `heldout`.
        options: which metrics, and how.
        other: the same model with int8 weights; without it that metric is not measured.
        is_int8: whether `model` itself has int8 weights, and `other` float ones.
        judges: who judges; by default those of the extra `judges`.
        progress: called with (recordings and replies done, in all).

    Raises:
        DataError: if a judge or the held-out set is missing.
    """
    options = options or NanoOptions()
    held_out = HeldOut.find(corpus)
    judges = judges or Judges.load(options.measured)
    steps = _Progress(progress)
    one = _Run(model, held_out, options, judges, steps)
    runs = [one]
    comparable = tuple(key for key in options.measured if key not in NOT_COMPARED)
    if other is not None and options.compares and comparable:
        again = replace(options, metrics=comparable)
        runs.append(_Run(other, held_out, again, judges, steps, name="other"))
    steps.total = sum(run.steps for run in runs)
    found = [run.run() for run in runs]
    metrics, predictions = found[0], [p for run in runs for p in run.predictions]
    if options.compares:
        metric = next(metric for metric in METRICS if metric.key == "int8")
        metrics["int8"] = (
            _compared(metric, *(reversed(found) if is_int8 else found))
            if len(found) == 2
            else metric.not_measured("there is nothing to compare with, see --compare-with")
        )
    metadata = {"held-out set": str(held_out.folder), "sampling": "greedy" if options.greedy else
             "as in conversations", "seed": options.seed, "first chunk": options.first}  # fmt: skip
    wanted = [metrics[key] for key in KEYS if key in metrics and key in (options.metrics or KEYS)]
    return Scores(
        title="nano", metrics=tuple(wanted), metadata=metadata, predictions=tuple(predictions)
    )


def _compared(metric: Metric, full: dict[str, Metric], int8: dict[str, Metric]) -> Metric:
    """How many points int8 weights are better than float ones, in the metric where they are worst.

    Args:
        metric: the one to fill.
        full: metrics of float weights, by key.
        int8: those of int8 weights.
    """
    points, is_measured = {}, False
    for key, found in full.items():
        before, after = found.value, int8[key].value if key in int8 else None
        if before is None or after is None:
            continue
        is_measured = True
        # Where float weights have nothing right, int8 ones can lose nothing.
        if found.lower_is_better and before < 100:
            points[key] = before - after
        elif not found.lower_is_better and before > 0:
            points[key] = after - before
    if not is_measured:
        return metric.not_measured("no metric to compare was measured")
    if not points:
        return metric.not_measured(f"{NOTHING_RIGHT} with float weights")
    note = ", ".join(f"{key} {value:+.1f}" for key, value in points.items())
    return metric.measured(min(points.values()), sum(full[key].n for key in points), note)


class _Progress:
    """Counts recordings and replies done."""

    def __init__(self, progress: Callable[[int, int], None]):
        self.progress, self.done, self.total = progress, 0, 0

    def add(self) -> None:
        self.done += 1
        self.progress(self.done, self.total)


class _Run:
    """Evaluation of one model."""

    def __init__(
        self, model: "StepAudio2", held_out: HeldOut, options: NanoOptions, judges: Judges,
        steps: _Progress, *, name: str = "",
    ):  # fmt: skip
        self.model, self.held_out, self.options, self.judges = model, held_out, options, judges
        self.count, self.name = steps, name
        self.predictions: list[Prediction] = []
        self.wants = options.measured
        self.files = {key: self._items(key) for key in HEARD if key in self.wants}
        self.sums = self._file("sums") if set(SPOKEN) & set(self.wants) else []
        asked = held_out.items("tools") if set(TOOLS) & set(self.wants) else []
        self.tools = {
            key: evenly_spaced([i for i in asked if (i.tool is not None) == want], options.limit)
            for key, want in zip(TOOLS, (True, False), strict=True) if key in self.wants
        }  # fmt: skip
        self.said = self._said() if "voice" in self.wants else []

    @property
    def steps(self) -> int:
        """Recordings and replies in all."""
        modes = 1 + bool({"streamed", "first_sound"} & set(self.wants))
        lists = [*self.files.values(), *self.tools.values(), self.said]
        return sum(map(len, lists)) + modes * len(self.sums)

    def run(self) -> dict[str, Metric]:
        """All metrics that are wanted, by key."""
        metrics = {metric.key: metric for metric in METRICS if metric.key in self.wants}
        found: dict[str, Metric] = {}
        for key, items in self.files.items():
            found[key] = self._transcribed(metrics[key], items)
        if set(SPOKEN) & set(self.wants):
            found |= self._summed(metrics)
        for key, items in self.tools.items():
            found[key] = self._called(metrics[key], items)
        if "voice" in metrics:
            found["voice"] = self._voiced(metrics["voice"])
        return found

    # --- items ------------------------------------------------------------------------------

    def _file(self, name: str) -> list[Item]:
        return self.held_out.items(name, self.options.limit)

    def _items(self, key: str) -> list[Item]:
        if key == "digits" and self.options.real_recordings is not None:
            return evenly_spaced(
                read_items(self.options.real_recordings / "digits.jsonl"), self.options.limit
            )
        return self._file(_FILES[key])

    def _said(self) -> list[tuple[Item, str]]:
        """What is to be said, by texts and questions in turn, in each voice in turn."""
        voices = self._voices()
        texts, questions = self.held_out.items("tts"), self.held_out.items("chat")
        count = self.options.limit or max(len(texts), len(questions))
        pairs = zip(evenly_spaced(texts, count), evenly_spaced(questions, count), strict=False)
        pool = [pick for pair in pairs for pick in pair] or texts or questions
        turns = len(voices) if len(voices) > 1 else 0
        return [(item, voices[(n // 2) % turns]) for n, item in enumerate(pool[:count])] if turns \
            else []  # fmt: skip

    def _voices(self) -> list[str]:
        """Voices that the model has and of which there are recordings."""
        return sorted(set(self.model.speech.folder.voices) & set(self.held_out.voices))

    # --- metrics -------------------------------------------------------------------------------

    def _transcribed(self, metric: Metric, items: list[Item]) -> Metric:
        if not items:
            return metric.not_measured(
                _NO_FILE.get(metric.key, f"the set has no {_FILES[metric.key]}.jsonl")
            )
        before = self.count.done

        def tick(done: int, total: int) -> None:
            while self.count.done < before + min(done, len(items)):
                self.count.add()

        texts = self.model.transcribe_batch([str(item.audio) for item in items], progress=tick)
        for item, text in zip(items, texts, strict=True):
            self._note(metric.key, item, item.expected, text)
        expected = [item.expected for item in items]
        if metric.unit == "%" and not metric.lower_is_better:
            pairs = zip(expected, texts, strict=True)
            return metric.accuracy([normalized(a) == normalized(b) for a, b in pairs])
        return metric.word_error_rate(*word_errors(expected, texts))

    def _summed(self, metrics: dict[str, Metric]) -> dict[str, Metric]:
        """All metrics of spoken sums: each question is asked offline and, if need be, streamed."""
        metrics = {key: metrics[key] for key in SPOKEN if key in metrics}
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
            for number, item in enumerate(self.sums):
                reply = self._answer(item, number, streamed)
                times = reply.timings
                if times is not None and times.real_time_factor is not None:
                    (firsts if streamed else factors).append(
                        times.first_audio if streamed else times.real_time_factor
                    )
                for kind, judge in judges.items():
                    name = "s" + kind[4:] if streamed else kind
                    heard = judge(reply.audio, reply.sample_rate)
                    rights[name].append(heard == normalized(item.expected))
                    metric = f"streamed {kind}" if streamed else kind
                    self._note(metric, item, item.expected, heard, rights[name][-1])
                self.count.add()
        found = {}
        for key, judge in judges.items():
            if key in metrics:
                found[key] = metrics[key].accuracy(rights[key], self._about(judge))
        if "streamed" in metrics:
            found["streamed"] = _streamed(metrics["streamed"], rights)
        if "first_sound" in metrics:
            found["first_sound"] = _median(metrics["first_sound"], firsts)
        if "real_time" in metrics:
            found["real_time"] = _median(metrics["real_time"], factors)
        return found

    def _called(self, metric: Metric, items: list[Item]) -> Metric:
        rights = []
        for number, item in enumerate(items):
            chat = self.model.chat(
                item.system, tools=item.tools, options=self._options(), max_tool_rounds=0
            )
            reply = chat.say(_content(item), speak=True, seed=self.options.seed + number)
            names = [getattr(call, "name", "(malformed)") for call in reply.tool_calls]
            rights.append(item.tool in names if item.tool else not names)
            found = ", ".join(names) or f"(none) {reply.text}"
            self._note(metric.key, item, item.tool or "(none)", found, rights[-1])
            self.count.add()
        return metric.accuracy(rights)

    def _voiced(self, metric: Metric) -> Metric:
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
        for number, (item, voice) in enumerate(self.said):
            seed = self.options.seed + number
            if item.audio is None:
                reply = self.model.tts(
                    item.text, voice, max_new_tokens=self.options.max_new_tokens, seed=seed
                )
            else:
                chat = self.model.chat(item.system, voice=voice, options=self._options())
                reply = chat.say(_content(item), seed=seed)
            closest = "(silence)"
            if reply.audio.any():
                closest, _ = judge.closest(reply.audio, reply.sample_rate, known)
            rights[voice].append(closest == voice)
            self._note("voice", item, voice, closest, rights[voice][-1])
            self.count.add()
        shares = [f"{name} {sum(r)} of {len(r)}" for name, r in rights.items()]
        note = f"{', '.join(shares)}; by chance {100 / len(known):.0f} %"
        return metric.accuracy([right for found in rights.values() for right in found], note)

    # --- parts ------------------------------------------------------------------------------

    def _options(self) -> Any:
        """How replies are sampled."""
        options = replace(task_options(TASKS["chat"]), max_new_tokens=self.options.max_new_tokens)
        if self.options.greedy:
            options = replace(options, sampling=replace(options.sampling, temperature=0.0))
        return options

    def _answer(self, item: Item, number: int, streamed: bool) -> "Reply":
        """The spoken answer to a question; streamed, the same codes as offline."""
        chat = self.model.chat(item.system, options=self._options())
        seed = self.options.seed + number
        if not streamed:
            return chat.say(_content(item), speak=True, seed=seed)
        stream = chat.stream(
            _content(item), speak=True, seed=seed, first=self.options.first,
            chunk=self.options.chunk,
        )  # fmt: skip
        pieces = [piece.audio for piece in stream]
        return replace(stream.reply, audio=np.concatenate([np.zeros(0, np.float32), *pieces]))

    def _about(self, judge: Judge) -> str:
        """How the judge hears recordings of the right answers, whole and in pieces."""
        clips = {item.expected: item.reference for item in self.sums
                 if item.reference is not None and item.reference.is_file()}  # fmt: skip
        if not clips or self.name:
            return ""
        whole = broken = 0
        for expected, path in clips.items():
            wave, rate = soundfile.read(path, dtype="float32")
            whole += judge(wave, rate) == normalized(expected)
            broken += judge(shuffled(wave, rate), rate) == normalized(expected)
        return (
            f"the judge is right on {whole} of {len(clips)} recordings of the answers, and on "
            f"{broken} of them shuffled"
        )

    def _note(
        self, metric: str, item: Item, expected: str, predicted: str, correct: bool | None = None
    ) -> None:
        self.predictions.append(
            Prediction(
                metric=metric,
                item=item.name,
                expected=expected,
                predicted=predicted,
                correct=correct,
                model=self.name,
            )
        )


def _streamed(metric: Metric, rights: dict[str, list[bool]]) -> Metric:
    """The difference in points, of the judge that finds the larger one."""
    heard = [names for names in _BOTH if rights[names[2]]]
    if not heard:
        return metric.not_measured("no judge has heard them")
    points = {
        judge: 100 * (sum(rights[streamed]) - sum(rights[offline])) / len(rights[offline])
        for judge, offline, streamed in heard
        if any(rights[offline])  # otherwise a stream can lose nothing
    }
    if not points:
        return metric.not_measured(f"{NOTHING_RIGHT} offline")
    note = ", ".join(f"{judge} {value:+.1f}" for judge, value in points.items())
    return metric.measured(min(points.values()), len(rights["s"] or rights["s_open"]), note)


def _median(metric: Metric, values: Sequence[float | None]) -> Metric:
    known = [value for value in values if value is not None]
    if not known:
        return metric.not_measured("no reply had a sound")
    return metric.measured(median(known), len(known), f"slowest {max(known):.2f}")


def _content(item: Item) -> Any:
    """A question as a conversation takes it."""
    return item.audio if item.audio is not None else item.text

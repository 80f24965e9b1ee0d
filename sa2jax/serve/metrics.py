"""Metrics for Prometheus, named as vLLM's where the thing is the same; and a watch per request."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

_LATENCY = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0)
_RATIO = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 5.0)
LATE = 0.1  # s: an interruption of the sound that can be heard


class Metrics:
    """What a server counts and measures.

    Args:
        model: name of the model, a label of all.
        running: requests that run now.
        waiting: requests that wait now.
        compiles: programs that were compiled since the server was ready.
    """

    def __init__(
        self,
        model: str,
        *,
        running: Callable[[], float],
        waiting: Callable[[], float],
        compiles: Callable[[], float],
    ):
        self.registry = CollectorRegistry()
        self._model = model

        def gauge(name: str, text: str, value: Callable[[], float] | None = None) -> Gauge:
            made = Gauge(f"sa2jax:{name}", text, ["model_name"], registry=self.registry)
            if value is not None:
                made.labels(model).set_function(value)
            return made

        def counter(name: str, text: str, *labels: str) -> Counter:
            names = ["model_name", *labels]
            return Counter(f"sa2jax:{name}", text, names, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _LATENCY) -> Histogram:
            return Histogram(
                f"sa2jax:{name}", text, ["model_name"], buckets=buckets, registry=self.registry
            )

        gauge("num_requests_running", "Requests that run.", running)
        gauge("num_requests_waiting", "Requests that wait for a slot.", waiting)
        self.sessions = gauge("num_realtime_sessions", "Realtime sessions that are open.")
        self.sessions.labels(model)
        self.requests = counter("http_requests", "Requests over HTTP.", "path", "status")
        self.success = counter("request_success", "Answers by their end.", "finished_reason")
        self.prompt_tokens = counter("prompt_tokens", "Positions of prompts.")
        self.prefix_hits = counter("prefix_cache_hits", "Positions that the prefix cache held.")
        self.generation_tokens = counter("generation_tokens", "Tokens that were generated.")
        self.first_text = histogram("time_to_first_token_seconds", "Time to the first text.")
        self.first_audio = histogram("time_to_first_audio_seconds", "Time to the first sound.")
        self.queue_time = histogram("request_queue_time_seconds", "Time that a request waited.")
        self.latency = histogram("e2e_request_latency_seconds", "Time to the end of an answer.")
        self.real_time_factor = histogram(
            "real_time_factor", "Seconds of work for a second of sound.", _RATIO
        )
        self.audio_seconds = counter("audio_seconds", "Seconds of sound that were spoken.")
        self.underruns = counter("audio_underruns", "Gaps of more than 0.1 s in streamed sound.")
        self.underrun_seconds = counter("audio_underrun_seconds", "Seconds of these gaps.")
        self.registry.register(_Compiles(model, compiles))

    def watch(self, queued: float = 0.0) -> "Watch":
        """Measure a request.

        Args:
            queued: seconds that it has waited for its slot.
        """
        return Watch(self, queued)

    def add(self, counter: Counter, amount: float = 1.0, *labels: str) -> None:
        """Count with the model's label."""
        counter.labels(self._model, *labels).inc(amount)

    def observe(self, histogram: Histogram, value: float) -> None:
        """Measure with the model's label."""
        histogram.labels(self._model).observe(value)

    def text(self) -> bytes:
        """All of them in Prometheus's text format."""
        return generate_latest(self.registry)


class Watch:
    """Measures one answer from its slot to its end.

    Args:
        metrics: where to.
        queued: seconds that it has waited for its slot.
    """

    def __init__(self, metrics: Metrics, queued: float):
        self._metrics, self._queued = metrics, queued
        self._start = time.monotonic() - queued
        self._text = self._audio = False
        self._seconds = 0.0  # of sound that was handed out
        self._plays_until = 0.0
        metrics.observe(metrics.queue_time, queued)

    def piece(self, text: str = "", seconds: float = 0.0) -> None:
        """Note a piece that is handed out.

        Args:
            text: its text.
            seconds: length of its sound.
        """
        now, metrics = time.monotonic(), self._metrics
        if text and not self._text:
            self._text = True
            metrics.observe(metrics.first_text, now - self._start)
        if not seconds:
            return
        if not self._audio:
            self._audio, self._plays_until = True, now
            metrics.observe(metrics.first_audio, now - self._start)
        gap = now - self._plays_until
        if gap > LATE:
            metrics.add(metrics.underruns)
            metrics.add(metrics.underrun_seconds, gap)
        self._plays_until = max(self._plays_until, now) + seconds
        self._seconds += seconds

    def end(
        self,
        reason: str,
        *,
        prompt_tokens: int = 0,
        cached_tokens: int = 0,
        generated_tokens: int = 0,
        seconds: float | None = None,
    ) -> None:
        """The answer is over.

        Args:
            reason: why it ended.
            prompt_tokens: positions of its prompt.
            cached_tokens: how many of them the prefix cache held.
            generated_tokens: tokens that were generated.
            seconds: length of its sound, by default that of its pieces.
        """
        metrics, took = self._metrics, time.monotonic() - self._start
        spoken = self._seconds if seconds is None else seconds
        metrics.add(metrics.success, 1, reason)
        metrics.add(metrics.prompt_tokens, prompt_tokens)
        metrics.add(metrics.prefix_hits, cached_tokens)
        metrics.add(metrics.generation_tokens, generated_tokens)
        metrics.observe(metrics.latency, took)
        if spoken:
            metrics.add(metrics.audio_seconds, spoken)
            metrics.observe(metrics.real_time_factor, (took - self._queued) / spoken)


class _Compiles(Collector):
    """A counter whose value is kept elsewhere."""

    def __init__(self, model: str, compiles: Callable[[], float]):
        self._model, self._compiles = model, compiles

    def collect(self):
        family = CounterMetricFamily(
            "sa2jax:compiles_after_ready",
            "Programs that were compiled since the server was ready.",
            labels=["model_name"],
        )
        family.add_metric([self._model], self._compiles())
        yield family

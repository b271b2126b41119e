"""Prometheus metrics. A process has one object of this class."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Metrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKENS = (64, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._engines: list[Callable[[], bytes]] = []
        self._requests = Counter(
            "densereward_requests", "Requests answered.", ["route", "status"], registry=self._registry
        )
        self._request_seconds = Histogram(
            "densereward_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._samples = Counter("densereward_samples", "Samples scored.", ["model"], registry=self._registry)
        self._tokens = Counter(
            "densereward_forward_tokens", "Tokens run through the model.", ["model"], registry=self._registry
        )
        self._queue_sequences = Gauge("densereward_queue_sequences", "Sequences waiting.", registry=self._registry)
        self._queue_tokens = Gauge("densereward_queue_tokens", "Tokens waiting.", registry=self._registry)
        self._dropped = Counter(
            "densereward_dropped_sequences", "Sequences dropped because their caller left.", registry=self._registry
        )
        self._batch_tokens = Histogram(
            "densereward_batch_tokens",
            "Tokens in a forward pass, a prompt that sequences share counted once.",
            buckets=_TOKENS,
            registry=self._registry,
        )
        self._batch_fill = Histogram(
            "densereward_batch_fill",
            "Work of a forward pass over the batch size; beyond 1 is one long sequence by itself.",
            buckets=(0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1, 2, 4),
            registry=self._registry,
        )
        self._batch_size = Gauge(
            "densereward_batch_budget_tokens",
            "The batch size: tokens in a forward pass, long sequences' attention in tokens' worth.",
            ["model"],
            registry=self._registry,
        )
        self._shared_tokens = Counter(
            "densereward_shared_tokens",
            "Prompt tokens that did not run because another sequence of the same pass had them.",
            registry=self._registry,
        )
        self._batch_sequences = Histogram(
            "densereward_batch_sequences",
            "Sequences in a forward pass.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
            registry=self._registry,
        )
        self._forward_seconds = Histogram(
            "densereward_forward_seconds", "Time of a forward pass.", buckets=_SECONDS, registry=self._registry
        )
        self._ready = Gauge("densereward_ready", "1 when requests are taken.", registry=self._registry)

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def scored(self, model: str, samples: int, tokens: int) -> None:
        """Samples were scored for a request."""
        self._samples.labels(model).inc(samples)
        self._tokens.labels(model).inc(tokens)

    def queue(self, sequences: int, tokens: int) -> None:
        """A queue grew or shrank by so much."""
        self._queue_sequences.inc(sequences)
        self._queue_tokens.inc(tokens)

    def dropped(self, sequences: int) -> None:
        """Callers left before their sequences ran."""
        self._dropped.inc(sequences)

    def batch_size(self, model: str, tokens: int) -> None:
        """A model's batch size was chosen."""
        self._batch_size.labels(model).set(tokens)

    def batch(self, *, sequences: int, tokens: int, shared: int, fill: float, seconds: float) -> None:
        """A forward pass ended: tokens that ran, tokens that sharing saved, work over the batch size."""
        self._batch_sequences.observe(sequences)
        self._batch_tokens.observe(tokens)
        self._shared_tokens.inc(shared)
        self._batch_fill.observe(fill)
        self._forward_seconds.observe(seconds)

    def engine(self, metrics: Callable[[], bytes]) -> None:
        """An engine that counts for itself; what it says of it is added to what is scraped."""
        self._engines.append(metrics)

    def ready(self, ready: bool) -> None:
        """The server takes requests, or no longer does."""
        self._ready.set(ready)

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return b"".join([generate_latest(self._registry), *(metrics() for metrics in self._engines)])

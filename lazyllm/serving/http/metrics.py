"""What Prometheus reads: counts of requests, and what the engine says of itself when it is asked."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lazyllm.serving.engine import Engine
from lazyllm.serving.jobs import Usage

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 600)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

GAUGES = {
    "running": ("lazyllm_running", "Replies that are being made."),
    "waiting": ("lazyllm_waiting", "Jobs that wait for their prefill."),
    "prefix_entries": ("lazyllm_prefix_entries", "Beginnings of earlier prompts that are kept."),
    "prefix_bytes": ("lazyllm_prefix_bytes", "Bytes of what is kept of earlier prompts."),
    "documents": ("lazyllm_documents", "Documents that are loaded."),
    "document_bytes": ("lazyllm_document_bytes", "Bytes of loaded documents."),
    "kv_bytes": ("lazyllm_kv_bytes", "Bytes of keys and values of running replies."),
    "aux_bytes": ("lazyllm_aux_bytes", "Bytes of states that wait in running replies."),
}
"""By field of `EngineStats`, what rises and falls."""
COUNTERS = {
    "prompt_tokens": ("lazyllm_prompt_tokens", "Tokens of prompts."),
    "cached_tokens": ("lazyllm_cached_tokens", "Tokens of prompts that a cache held already."),
    "reply_tokens": ("lazyllm_reply_tokens", "Tokens of replies."),
    "revived_tokens": ("lazyllm_revived_tokens", "Tokens of prompts that a reply took up again."),
    "steps": ("lazyllm_steps", "Decode steps."),
}
"""By field of `EngineStats`, what only rises."""


class EngineCollector(Collector):
    """Reads an engine's counts at the moment they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """The counts."""
        stats = self._engine.stats
        for field, (name, text) in GAUGES.items():
            yield GaugeMetricFamily(name, text, value=getattr(stats, field))
        for field, (name, text) in COUNTERS.items():
            yield CounterMetricFamily(name, text, value=getattr(stats, field))
        jobs = CounterMetricFamily("lazyllm_jobs", "Jobs that have ended, by outcome.", labels=["outcome"])
        for outcome, count in stats.jobs.items():
            jobs.add_metric([outcome], count)
        yield jobs


class Metrics:
    """Counts of one app.

    Attributes:
        registry: all of them.
        requests, seconds: by route (and status), how many and how long.
        ttft, queued, per_token: of jobs, in seconds.
        computed: prompt tokens' worth of work that prefills did.
        disconnects, slow_readers: requests that were given up.
    """

    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "lazyllm_requests", "Requests, by route and status.", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "lazyllm_request_seconds", "Time of requests.", ["route"], registry=registry, buckets=SECONDS
        )
        self.ttft = Histogram("lazyllm_ttft_seconds", "Time to first token.", registry=registry, buckets=SECONDS)
        self.queued = Histogram("lazyllm_queued_seconds", "Time in the queue.", registry=registry, buckets=SECONDS)
        self.per_token = Histogram(
            "lazyllm_token_seconds", "Time per later token of a reply.", registry=registry, buckets=TOKEN_SECONDS
        )
        self.computed = Counter(
            "lazyllm_computed_tokens", "Work of prefills, in prompt tokens through all layers.", registry=registry
        )
        self.disconnects = Counter("lazyllm_disconnects", "Requests whose client went away.", registry=registry)
        self.slow_readers = Counter("lazyllm_slow_readers", "Streams whose reader was cut off.", registry=registry)
        registry.register(EngineCollector(engine))

    def count_job(self, usage: Usage, replies: int) -> None:
        """Counts a job that is done.

        Args:
            usage: what it has cost.
            replies: how many replies were made at once.
        """
        self.ttft.observe(usage.ttft_seconds)
        self.queued.observe(usage.queued_seconds)
        self.computed.inc(usage.computed_fraction * usage.prompt_tokens)
        later = usage.reply_tokens / replies - 1
        if later > 0:
            self.per_token.observe((usage.seconds - usage.ttft_seconds) / later)

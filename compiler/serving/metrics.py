"""What a server tells of itself, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from trivium.compiler.serving.loop import EngineLoop

if TYPE_CHECKING:
    from prometheus_client.core import Metric

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Counters, gauges and histograms in a registry of their own."""

    def __init__(self, loop: EngineLoop) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self.registry = CollectorRegistry()
        self.requests = Counter(
            "trivium_requests", "Requests by endpoint and status", ("endpoint", "status"),
            registry=self.registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "trivium_first_token_seconds", "From a request to its first token",
            buckets=_FIRST, registry=self.registry,
        )  # fmt: skip
        self.each_token = Histogram(
            "trivium_token_seconds", "Between tokens of a text",
            buckets=_EACH, registry=self.registry,
        )  # fmt: skip
        self.registry.register(_EngineCollector(loop))

    def text(self) -> tuple[bytes, str]:
        """The exposition and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class _EngineCollector:
    """Reads an engine's own counts when asked."""

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        counts: Any = self._loop.engine.counts
        for name, what in (
            ("prompt", "Tokens of prompts"),
            ("reused", "Of those, tokens that were known from earlier prompts"),
            ("generated", "Tokens generated"),
            ("guessed", "Tokens guessed ahead"),
            ("accepted", "Guessed tokens that came true"),
        ):
            yield CounterMetricFamily(f"trivium_{name}_tokens", what, value=getattr(counts, name))
        yield CounterMetricFamily("trivium_steps", "Steps of the engine", value=counts.steps)
        failures = self._loop.failures
        yield CounterMetricFamily("trivium_engine_failures", "Steps that failed", value=failures)
        active, waiting = self._loop.engine.active, self._loop.waiting
        yield GaugeMetricFamily("trivium_active_requests", "Being continued", value=active)
        yield GaugeMetricFamily("trivium_waiting_requests", "Waiting", value=waiting)

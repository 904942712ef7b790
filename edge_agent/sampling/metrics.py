"""The samplers' counters as Prometheus metrics, read when they are scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from edge_agent.sampling.status import SamplingStatus, State

_PREFIX = "headwater_agent_sampler_"
_COUNTERS = {
    "reads": "Calls of the driver's read that returned.",
    "rows_read": "Rows handed over by the driver.",
    "rows_refused": "Rows that did not fit the declared fields.",
    "rows_suppressed": "Rows that the sampling mode did not want.",
    "rows_out": "Rows handed on to the batcher.",
    "rows_dropped": "Rows for which the queue had no room in time.",
    "ticks_missed": "Readings that were due while the sampler was busy, and were not taken.",
    "errors": "Failed opens, failed reads and refused readings.",
    "bursts": "Bursts begun.",
    "bursts_cut": "Bursts cut at rows_max.",
}
"""Counters of `SamplingStatus`, and what they count."""


class SamplingCollector(Collector):
    """Exports `headwater_agent_sampler_…{stream}`: each counter of `SamplingStatus`, `rows_held` and `running`.

    Args:
        statuses: stream name to status, asked at each scrape.
        registry: where it registers itself.
    """

    def __init__(self, statuses: Callable[[], Mapping[str, SamplingStatus]], registry: CollectorRegistry) -> None:
        self._statuses = statuses
        registry.register(self)

    def describe(self) -> list[CounterMetricFamily]:
        """Nothing beforehand: the streams are known only at the scrape."""
        return []

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """The metrics of all streams."""
        statuses = self._statuses()
        for name, text in _COUNTERS.items():
            family = CounterMetricFamily(_PREFIX + name, text, labels=["stream"])
            for stream, status in statuses.items():
                family.add_metric([stream], getattr(status, name))
            yield family
        held = GaugeMetricFamily(_PREFIX + "rows_held", "Rows held as history.", labels=["stream"])
        running = GaugeMetricFamily(_PREFIX + "running", "1 while the sensor answers.", labels=["stream"])
        for stream, status in statuses.items():
            held.add_metric([stream], status.rows_held)
            running.add_metric([stream], float(status.state is State.RUNNING))
        yield held
        yield running

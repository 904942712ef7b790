"""The samplers' counters as Prometheus metrics, read when they are scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from edge_agent.sampling.status import SamplingStatus, State

_COUNTERS = {
    "reads": ("reads", "Calls of the driver's read that returned."),
    "rows_read": ("readings", "Rows handed over by the driver."),
    "rows_refused": ("readings_refused", "Rows that did not fit the declared fields."),
    "rows_suppressed": ("readings_suppressed", "Rows that the sampling mode did not want."),
    "rows_out": ("readings_sampled", "Rows handed on to the batcher."),
    "rows_dropped": ("readings_dropped", "Rows for which the queue had no room in time."),
    "ticks_missed": ("ticks_missed", "Readings that were due while the sampler was busy, and were not taken."),
    "errors": ("sensor_errors", "Failed opens, failed reads and refused readings."),
    "bursts": ("bursts", "Bursts begun."),
    "bursts_cut": ("bursts_cut", "Bursts cut at rows_max."),
}


class SamplingCollector(Collector):
    """Exports `headwater_agent_…{stream}`.

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
        for attribute, (name, text) in _COUNTERS.items():
            family = CounterMetricFamily(f"headwater_agent_{name}", text, labels=["stream"])
            for stream, status in statuses.items():
                family.add_metric([stream], getattr(status, attribute))
            yield family
        held = GaugeMetricFamily("headwater_agent_readings_held", "Rows held as history.", labels=["stream"])
        running = GaugeMetricFamily("headwater_agent_sensor_running", "1 while the sensor answers.", labels=["stream"])
        for stream, status in statuses.items():
            held.add_metric([stream], status.rows_held)
            running.add_metric([stream], float(status.state is State.RUNNING))
        yield held
        yield running

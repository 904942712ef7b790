"""The samplers' counters as Prometheus metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from edge_agent.sampling.metrics import SamplingCollector
from edge_agent.sampling.status import SamplingStatus, State


def test_every_counter_is_a_metric_per_stream_read_at_the_scrape() -> None:
    registry = CollectorRegistry()
    statuses = {"a": SamplingStatus(state=State.RUNNING, rows_read=5, rows_out=3, rows_held=2, ticks_missed=7)}
    SamplingCollector(lambda: statuses, registry)

    def value(name: str, stream: str) -> float | None:
        return registry.get_sample_value(name, {"stream": stream})

    assert value("headwater_agent_sampler_rows_read_total", "a") == 5
    assert value("headwater_agent_sampler_rows_out_total", "a") == 3
    assert value("headwater_agent_sampler_rows_held", "a") == 2
    assert value("headwater_agent_sampler_ticks_missed_total", "a") == 7
    assert value("headwater_agent_sampler_running", "a") == 1
    statuses["b"] = SamplingStatus(state=State.RETRYING, rows_dropped=4)
    assert value("headwater_agent_sampler_rows_dropped_total", "b") == 4
    assert value("headwater_agent_sampler_running", "b") == 0
    assert generate_latest(registry).count(b"# HELP headwater_agent_sampler_") == 12

"""The agent's figures for Prometheus: `headwater_agent_…`, in a registry that is handed in."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_ACK_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 120.0, 600.0)


class AgentMetrics:
    """Every metric of an agent process.

    Args:
        registry: where they are registered; one per process, a fresh one in tests.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        prefix = "headwater_agent_"

        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(prefix + name, help_text, labels, registry=registry)

        def gauge(name: str, help_text: str, *labels: str) -> Gauge:
            return Gauge(prefix + name, help_text, labels, registry=registry)

        self.rows = counter("rows_total", "Rows that the buffer accepted", "stream")
        self.batches = counter("batches_total", "Batches that the buffer accepted", "stream")
        self.body_bytes = counter("body_bytes_total", "Bytes of bodies that the buffer accepted", "stream")
        self.evicted_rows = counter("evicted_rows_total", "Rows that the buffer gave up", "stream", "cause")
        self.dropped_rows = counter("dropped_rows_total", "Rows lost before the buffer accepted them", "stream")
        self.readings = gauge("readings", "Rows that the sensor gave since the start", "stream")
        self.overruns = gauge("overruns", "Readings skipped since the start because the device was too slow", "stream")
        self.queued_rows = gauge("queued_rows", "Rows between sampler and buffer", "stream")
        self.append_seconds = Histogram(
            prefix + "append_seconds", "Time of one durable append to the buffer", registry=registry
        )
        self.buffer_unavailable = counter("buffer_unavailable_total", "Appends that the disk refused")
        self.unstored_batches = gauge("unstored_batches", "Closed batches in memory, because the disk refuses them")

        self.connected = gauge("connected", "1 while connected to the broker")
        self.connects = counter("connects_total", "Connection attempts")
        self.losses = counter("losses_total", "Connections that failed or ended", "cause")
        self.sent_batches = counter("sent_batches_total", "Batches handed to the broker, resent ones included")
        self.resent_batches = counter("resent_batches_total", "Batches handed to the broker again")
        self.wire_bytes = counter("wire_bytes_total", "Bytes of payloads handed to the broker")
        self.acked_batches = counter("acked_batches_total", "Batches that the lake acknowledged")
        self.ack_seconds = Histogram(
            prefix + "ack_seconds",
            "From first sending to acknowledgement",
            buckets=_ACK_BUCKETS_S,
            registry=registry,
        )
        self.ack_timeouts = counter("ack_timeouts_total", "Times that no acknowledgement came in time")
        self.rewinds = counter("rewinds_total", "Rewinds followed")
        self.window_batches = gauge("window_batches", "Batches on the way, unacknowledged")
        self.window_bytes = gauge("window_bytes", "Bytes of bodies on the way, unacknowledged")
        self.control_refused = counter("control_refused_total", "Acks, rewinds or desired documents refused", "kind")

        self.buffer_bytes = gauge("buffer_bytes", "Bytes of bodies waiting", "stream")
        self.buffer_batches = gauge("buffer_batches", "Batches waiting", "stream")
        self.buffer_bytes_max = gauge("buffer_bytes_max", "Limit of the whole buffer")
        self.clock_synced = gauge("clock_synced", "1 while the wall clock is synchronised")

    def watch_process(
        self,
        cpu_seconds: Callable[[], float],
        resident_bytes: Callable[[], float],
        written_bytes: Callable[[], float],
    ) -> None:
        """Add the figures of the process itself, read at each exposition."""
        cpu = Gauge("headwater_agent_cpu_seconds", "CPU time of the process, user and system", registry=self.registry)
        cpu.set_function(cpu_seconds)
        resident = Gauge("headwater_agent_resident_bytes", "Memory of the process in RAM", registry=self.registry)
        resident.set_function(resident_bytes)
        written = Gauge(
            "headwater_agent_storage_written_bytes",
            "What the process had written to disks since its start; over body_bytes_total: the wear of an SD card",
            registry=self.registry,
        )
        written.set_function(written_bytes)

    def exposition(self) -> str:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry).decode()


def serve(metrics: AgentMetrics, host: str, port: int) -> Callable[[], None]:
    """Expose the metrics over HTTP.

    Args:
        metrics: what to expose.
        host: address to bind; loopback unless a firewall stands before it.
        port: port to bind; 0 lets the system choose.

    Returns:
        A function that stops the server.

    Raises:
        OSError: the address cannot be bound.
    """
    from prometheus_client import start_http_server

    server, thread = start_http_server(port, host, metrics.registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)

    return stop

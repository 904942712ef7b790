"""The gateway's figures for Prometheus: `headwater_gateway_…`, in a registry that is handed in.

Every bound stands beside what it bounds: `…_max` is the limit, the same name without it the figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_LATENCY_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0, 86_400.0)
_COMMIT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_INFERENCE_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_PREFIX = "headwater_gateway_"


class GatewayMetrics:
    """Every metric of a gateway process.

    Args:
        registry: where they are registered; one per process, a fresh one in tests.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(_PREFIX + name, help_text, labels, registry=registry)

        def gauge(name: str, help_text: str, *labels: str) -> Gauge:
            return Gauge(_PREFIX + name, help_text, labels, registry=registry)

        def histogram(name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(_PREFIX + name, help_text, buckets=buckets, registry=registry)

        # What arrives.
        self.received_messages = counter("received_messages_total", "Messages on batch topics, good or bad")
        self.received_bytes = counter("received_bytes_total", "Bytes of their payloads")
        self.received_batches = counter("received_batches_total", "Batches that could be read, repeated ones included")
        self.received_rows = counter("received_rows_total", "Readings in them")
        self.refused = counter("refused_total", "Payloads that break the contract, on arrival", "reason")
        self.shed = counter("shed_total", "Batches dropped unanswered; their devices keep them", "cause")
        self.duplicates = counter("duplicates_total", "Batches that were in the lake, or on their way, already", "seen")
        self.rewinds = counter("rewinds_total", "Times that a device was asked to send again from a seq")
        self.rewinds_held_back = counter("rewinds_held_back_total", "Rewinds not sent, because one just was")

        # What is committed.
        self.commits = counter("commits_total", "Commits to stream tables")
        self.committed_rows = counter("committed_rows_total", "Readings committed")
        self.committed_batches = counter("committed_batches_total", "Batches committed")
        self.parquet_bytes = counter("parquet_bytes_total", "Bytes of Parquet committed")
        self.skewed_rows = counter("skewed_rows_total", "Readings committed whose ts is too far from their arrival")
        self.stepped_over = counter("stepped_over_total", "Batches in quarantine whose seq a commit stepped over")
        self.conflicts = counter("conflicts_total", "Commits refused because another gateway committed first")
        self.foreign_commits = counter("foreign_commits_total", "Times that a shard had moved without this gateway")
        self.store_errors = counter("store_errors_total", "Times that the lake did not answer, or refused")
        self.faults = counter("faults_total", "Unexpected errors: bugs; the log has them", "where")
        self.commit_seconds = histogram("commit_seconds", "One flush, from its start to its commit", _COMMIT_BUCKETS_S)
        self.arrival_seconds = histogram("arrival_to_commit_seconds", "Batches: arrival to commit", _LATENCY_BUCKETS_S)
        self.sent_seconds = histogram(
            "sent_to_commit_seconds",
            "Batches: last sending by a device with a right clock to commit",
            _LATENCY_BUCKETS_S,
        )

        # What is answered.
        self.acks = counter("acks_total", "Acknowledgement documents handed to the broker")
        self.rewinds_dropped = counter("rewinds_dropped_total", "Rewinds dropped because the queue was full")

        # Quarantine.
        self.quarantined = counter("quarantined_total", "Payloads written to inbox/quarantine", "reason")
        self.quarantine_repeated = counter("quarantine_repeated_total", "Payloads refused again, written once")
        self.quarantine_dropped = counter("quarantine_dropped_total", "Payloads refused and lost: the queue was full")

        # Broker.
        self.broker_connects = counter("broker_connects_total", "Connection attempts", "role")
        self.broker_losses = counter("broker_losses_total", "Connections that failed or ended", "role")
        self.unpublished = counter("unpublished_total", "Messages not taken: no connection, or no room", "role")

        self.publishes_refused = counter("publishes_refused_total", "Messages that the broker refused", "role")

        # Register of devices.
        self.registry_rows = counter("registry_rows_total", "Rows written to control/devices", "event")
        self.registry_dropped = counter("registry_dropped_total", "Changes not written, because the queue was full")
        self.documents_refused = counter("documents_refused_total", "Presence or reported documents refused", "kind")

        # Rollouts.
        self.assignments = counter("assignments_total", "Documents with orders to a device handed to the broker")
        self.rollout_conflicts = counter("rollout_conflicts_total", "Steps decided again because others were first")
        self.rollout_actions = counter("rollout_actions_total", "What people asked of rollouts", "action", "outcome")

        self.http_requests = counter("http_requests_total", "HTTP requests", "route", "status")
        self._labelled: dict[str, Gauge] = {}

        # Releases.
        self.trust_publications = counter("trust_publications_total", "Times that this gateway signed the timestamp")
        self.model_bytes = counter("model_bytes_total", "Bytes of releases served")

        # Prediction over HTTP.
        self.inference_windows = counter("inference_windows_total", "Windows scored over HTTP", "model", "version")
        self.inference_loads = counter("inference_loads_total", "Models loaded to score with")
        self.inference_evictions = counter("inference_evictions_total", "Models given up for others")
        self.inference_seconds = histogram(
            "inference_seconds", "One inference request, from its head to its answer", _INFERENCE_BUCKETS_S
        )

        # Releases at work.
        self.monitoring_looks = counter("monitoring_looks_total", "Looks at releases at work")
        self.monitoring_rows = counter("monitoring_rows_total", "Predictions looked at")
        self.alerts = counter("alerts_total", "Alerts that this gateway opened or closed", "model", "kind", "event")
        self.alerts_open = gauge("alerts_open", "Alerts that are open", "model", "kind")
        self.triggers = counter("triggers_total", "Trainings that this gateway asked for", "model", "kind")
        release = ("model", "release")
        self.model_devices = gauge("model_devices", "Devices of this gateway that run the release", *release)
        self.model_rate = gauge("model_windows_per_second", "Windows that these score, by their clocks", *release)
        self.model_latency_p99 = gauge("model_latency_p99_seconds", "Of the slowest device", *release)
        self.model_nan_share = gauge("model_nan_share", "Windows that lack values; of the worst device", *release)
        self.model_psi = gauge("model_psi", "PSI of the most drifted feature; of the worst device", *release)
        self.model_ks = gauge("model_ks", "KS of the most drifted features; of the worst device", *release)
        self.model_score_psi = gauge("model_score_psi", "PSI of the score; of the worst device", *release)
        self.model_drifted_share = gauge("model_drifted_share", "Features that drifted; of the worst device", *release)
        self.model_change = gauge("model_change", "Sum of the change detector; of the worst device", *release)
        self.model_accuracy = gauge("model_accuracy", "Labelled windows that the release got right", *release)
        self.model_label_coverage = gauge("model_label_coverage", "Windows that are labelled", *release)
        ProcessCollector(namespace=_PREFIX.rstrip("_"), registry=registry)

    def watch(self, name: str, help_text: str, figure: Callable[[], float], limit: float | None = None) -> None:
        """Expose a figure that somebody else keeps, and the limit it has.

        Args:
            name: without prefix; the limit becomes `<name>_max`.
            help_text: for people.
            figure: read at each exposition, from the exposing thread.
            limit: the bound, where there is one.
        """
        Gauge(_PREFIX + name, help_text, registry=self.registry).set_function(figure)
        if limit is not None:
            Gauge(f"{_PREFIX}{name}_max", f"Limit: {help_text[0].lower()}{help_text[1:]}", registry=self.registry).set(
                limit
            )

    def watch_labelled(self, name: str, help_text: str, labels: Mapping[str, str], figure: Callable[[], float]) -> None:
        """Expose one of several figures of a name that labels tell apart, that somebody else keeps.

        Args:
            name: without prefix.
            help_text: for people.
            labels: the same names each time.
            figure: read at each exposition, from the exposing thread.
        """
        if name not in self._labelled:
            self._labelled[name] = Gauge(_PREFIX + name, help_text, list(labels), registry=self.registry)
        self._labelled[name].labels(**labels).set_function(figure)

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)

"""The models' figures for Prometheus: `headwater_agent_model_…`."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge

from contract.models import ReportedModel

_PREFIX = "headwater_agent_model_"
_FIGURES = {
    "active": ("active", "Version that answers; 0 for none that was ordered"),
    "windows": ("windows", "Windows scored since the version was loaded"),
    "skipped": ("skipped_windows", "Windows left out because the worker was busy"),
    "errors": ("errors", "Windows on which the model failed or took too long"),
    "nan_windows": ("nan_windows", "Windows with NaN in them or in their score"),
    "latency_ms_p50": ("latency_ms_p50", "Median time of a window, features included"),
    "latency_ms_p99": ("latency_ms_p99", "99th percentile of the time of a window"),
}


class ModelMetrics:
    """Every metric of an agent's models.

    Args:
        registry: of the agent.
        store_bytes_max: what the store may hold.
    """

    def __init__(self, registry: CollectorRegistry, store_bytes_max: int) -> None:
        self.transitions = Counter(
            _PREFIX + "transitions_total", "States entered by releases", ("model", "state"), registry=registry
        )
        self.orders_refused = Counter(
            _PREFIX + "orders_refused_total", "Orders that were not followed", ("reason",), registry=registry
        )
        self.store_errors = Counter(_PREFIX + "store_errors_total", "Records that the disk refused", registry=registry)
        self._dropped = Counter(
            _PREFIX + "dropped_predictions_total",
            "Predictions that found their queue full and are lost",
            ("model",),
            registry=registry,
        )
        self._dropped_before: dict[str, int] = {}
        self._store_bytes = Gauge(_PREFIX + "store_bytes", "Releases and half downloads on disk", registry=registry)
        Gauge(_PREFIX + "store_bytes_max", "Limit of the store", registry=registry).set(store_bytes_max)
        self._figures = {
            member: Gauge(_PREFIX + name, text, ("model",), registry=registry)
            for member, (name, text) in _FIGURES.items()
        }

    def show(self, models: Mapping[str, ReportedModel], store_bytes: int, dropped: Mapping[str, int]) -> None:
        """Take over the figures of now.

        Args:
            models: as reported.
            store_bytes: releases and half downloads.
            dropped: predictions dropped since the start, by model.
        """
        self._store_bytes.set(store_bytes)
        for name in models:
            count = dropped.get(name, 0)
            self._dropped.labels(name).inc(count - self._dropped_before.get(name, 0))
            self._dropped_before[name] = count
        for name, told in models.items():
            for member, gauge in self._figures.items():
                gauge.labels(name).set(getattr(told, member))

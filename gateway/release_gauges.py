"""Releases at work as metrics: of each release the worst device, and only of releases that are at work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import Gauge

from gateway.metrics import GatewayMetrics
from lake.monitoring.accuracy import Accuracy
from lake.monitoring.alerts import Key
from lake.monitoring.observe import Figures


class ReleaseGauges:
    """Sets them, and takes away what is not so any more: a release that no device runs has no figures.

    Args:
        metrics: of the gateway.
    """

    def __init__(self, metrics: GatewayMetrics) -> None:
        self._metrics = metrics
        self._shown: dict[tuple[Gauge, str], set[str]] = {}
        """Releases with a value, by gauge and model."""

    def show(self, model: str, devices: Iterable[Figures]) -> None:
        """Figures of a model.

        Args:
            model: whose.
            devices: the latest of each device; none where nobody runs it.
        """
        by_release: dict[str, list[Figures]] = {}
        for figures in devices:
            by_release.setdefault(str(figures.release), []).append(figures)
        metrics = self._metrics
        for gauge, figure in (
            (metrics.model_devices, _devices),
            (metrics.model_rate, _rate),
            (metrics.model_latency_p99, _latency_s),
            (metrics.model_nan_share, _nan_share),
            (metrics.model_psi, _psi),
            (metrics.model_ks, _ks),
            (metrics.model_score_psi, _score_psi),
            (metrics.model_drifted_share, _drifted_share),
            (metrics.model_change, _change),
        ):
            self._set(gauge, model, {release: figure(found) for release, found in by_release.items()})

    def show_accuracy(self, model: str, found: Sequence[Accuracy]) -> None:
        """Accuracy of the releases of a model, over all devices; none where it is not known any more."""
        whole = [one for one in found if not one.device and one.accuracy is not None]
        self._set(self._metrics.model_accuracy, model, {str(one.release): one.accuracy for one in whole})
        self._set(self._metrics.model_label_coverage, model, {str(one.release): one.coverage for one in whole})

    def forget(self, model: str) -> None:
        """The model has no releases any more."""
        self.show(model, [])
        self.show_accuracy(model, [])

    def show_alerts(self, keys: Iterable[Key]) -> None:
        """The alerts that are open."""
        gauge = self._metrics.alerts_open
        gauge.clear()
        for labels, count in Counter((key.model, key.kind) for key in keys).items():
            gauge.labels(*labels).set(count)

    def _set(self, gauge: Gauge, model: str, values: dict[str, float | None]) -> None:
        known = {release: value for release, value in values.items() if value is not None}
        for release, value in known.items():
            gauge.labels(model, release).set(value)
        for release in self._shown.pop((gauge, model), set()) - known.keys():
            gauge.remove(model, release)
        if known:
            self._shown[gauge, model] = set(known)


Found = Sequence[Figures]


def _largest(found: Found, value: Callable[[Figures], float | None]) -> float | None:
    """Of the devices of which it is known."""
    return max((one for one in map(value, found) if one is not None), default=None)


def _devices(found: Found) -> float | None:
    return len(found)


def _rate(found: Found) -> float | None:
    return sum(one.rate_per_s for one in found)


def _latency_s(found: Found) -> float | None:
    return max(one.latency_ms_p99 for one in found) / 1000


def _nan_share(found: Found) -> float | None:
    return max(one.nan_share for one in found)


def _psi(found: Found) -> float | None:
    return _largest(found, lambda one: one.features[0].psi if one.features else None)


def _ks(found: Found) -> float | None:
    return _largest(found, lambda one: max((each.ks for each in one.features), default=None))


def _score_psi(found: Found) -> float | None:
    return _largest(found, lambda one: one.score.psi if one.score is not None else None)


def _drifted_share(found: Found) -> float | None:
    return _largest(found, lambda one: one.drifted_share)


def _change(found: Found) -> float | None:
    return _largest(found, lambda one: one.change)

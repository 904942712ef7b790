"""One model as of now, out of the lake alone: what `headwater monitor` shows."""

from __future__ import annotations

import sys
from datetime import datetime

import msgspec
import pyarrow as pa

from lake.errors import UnknownStreamError
from lake.ledger import Ledger
from lake.monitoring.accuracy import Accuracy, accuracy_of
from lake.monitoring.alerts import PATH as ALERTS_PATH
from lake.monitoring.alerts import SCHEMA as ALERTS_SCHEMA
from lake.monitoring.alerts import Alert, fold
from lake.monitoring.feed import parse, with_all_columns
from lake.monitoring.observe import Bounds, Figures, Key, Observer
from lake.monitoring.performance import Performance, latest_query, performance
from lake.monitoring.watch import References, features_of, stored_baseline
from lake.query import Lake
from lake.releases import Releases
from lake.store import Store
from lake.tables import ControlTable

ACCURACY_ROWS_MAX = 2_000_000


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One release on one device."""

    model: str
    performance: Performance
    drift: Figures | None
    """Of its latest windows."""
    accuracy: Accuracy | None
    alerts: tuple[Alert, ...]


class Monitor:
    """Looks again and again. Not thread-safe.

    Args:
        store: where the lake is.
        lake: SQL over it.
        bounds: how many windows drift is measured over.
    """

    def __init__(self, store: Store, lake: Lake, bounds: Bounds) -> None:
        self._store, self._lake, self._bounds = store, lake, bounds
        releases = Releases(store)
        self._references = References(lambda: releases)
        alerts = ControlTable(store, ALERTS_PATH, ALERTS_SCHEMA)
        self._alerts = Ledger(lambda: alerts, ALERTS_SCHEMA)

    def models(self) -> list[str]:
        """Models that have releases.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        return sorted({release.model for release in self._references.refresh().releases.values()})

    def look(self, model: str, since: datetime) -> list[Line]:
        """Every release of a model on every device that predicted since then; none where nobody did.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        self._references.refresh()
        try:
            found = performance(self._lake, model, since)
        except UnknownStreamError:
            return []
        alerts = fold(self._alerts.look())
        accuracy = self._accuracy(model, since)
        drift = self._drift(model, since)
        lines = []
        for each in found:
            key = each.release, each.device
            lines.append(
                Line(
                    model=model,
                    performance=each,
                    drift=drift.get(key),
                    accuracy=accuracy.get(key),
                    alerts=tuple(
                        alert
                        for alert_key, alert in alerts.items()
                        if (alert_key.model, alert_key.release, alert_key.device) == (model, *key)
                    ),
                )
            )
        return lines

    def _drift(self, model: str, since: datetime) -> dict[Key, Figures]:
        """Of as many devices as there are: one after the other is measured and forgotten."""
        observer = Observer(msgspec.structs.replace(self._bounds, devices_max=sys.maxsize, releases_max=sys.maxsize))
        found: dict[Key, Figures] = {}
        for batch in self._lake.read(latest_query(model, since, self._bounds.windows_max)):
            rows = parse(with_all_columns(pa.Table.from_batches([batch])))
            observer.add(rows, width=lambda release: features_of(self._references, model, release))
            for key in observer.held()[:-1]:  # the last one may go on in the next batch
                self._measure(observer, model, key, found)
        for key in observer.held():
            self._measure(observer, model, key, found)
        return found

    def _measure(self, observer: Observer, model: str, key: Key, found: dict[Key, Figures]) -> None:
        watched = self._references.get(model, key[0])
        if watched is not None:
            baseline = stored_baseline(self._store, model, *key)
            if baseline is not None:
                observer.set_baseline(key, baseline)
            window = watched.manifest.window
            psi_max = watched.recipe.policy.retrain.psi_max
            found[key] = observer.measure(key, watched.reference, psi_max, window.rows / window.stride)
        observer.forget(key)

    def _accuracy(self, model: str, since: datetime) -> dict[tuple[int, str], Accuracy]:
        for release in self._references.book.of_model(model):
            watched = self._references.get(model, release.version)
            if watched is None or watched.recipe.labels is None or not watched.manifest.classes:
                continue
            try:
                since_us = round(since.timestamp() * 1e6)
                told = accuracy_of(
                    self._lake, model, watched.recipe.labels, watched.manifest.stream, since_us, ACCURACY_ROWS_MAX
                )
            except UnknownStreamError:
                return {}
            return {(one.release, one.device): one for one in told if one.device}
        return {}

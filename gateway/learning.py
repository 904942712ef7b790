"""Asks for trainings where the policy of the current release says so. What comes of it: `headwater train watch`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import structlog

from contract.models import Manifest
from gateway.access import LakeAccess
from gateway.metrics import GatewayMetrics
from lake.catalog import Catalog
from lake.monitoring.alerts import Alert
from lake.monitoring.due import current, due, rows_at, trained_version
from lake.monitoring.triggers import Ended, TriggerTable
from lake.monitoring.watch import References

_log = structlog.get_logger()


class Learning:
    """Asks. For one thread.

    Args:
        access: the way to the lake.
        references: of all models.
        triggers: where trainings are asked for.
        metrics: counts requests.
        clock_us: wall clock, microseconds.
    """

    def __init__(
        self,
        access: LakeAccess,
        references: References,
        triggers: TriggerTable,
        metrics: GatewayMetrics,
        clock_us: Callable[[], int],
    ) -> None:
        self._access, self._references, self._triggers = access, references, triggers
        self._metrics, self._clock_us = metrics, clock_us
        self._trained_rows: dict[tuple[str, int], int | None] = {}
        self._catalog: tuple[int, Catalog] | None = None

    def ask(self, model: str, open_alerts: Iterable[Alert], ended: Ended) -> None:
        """Ask for a training of a model, if it is time.

        Args:
            model: which.
            open_alerts: of all models.
            ended: how the last training of the model ended.

        Raises:
            CommitConflictError, StoreUnavailableError: as `TriggerTable.request`.
        """
        release = current(self._references.book, model)
        watched = None if release is None else self._references.get(model, release.version)
        if release is None or watched is None:
            return
        manifest, retrain = watched.manifest, watched.recipe.policy.retrain
        rows = None
        if retrain.new_rows is not None:
            rows = rows_at(self._of_the_lake(), manifest.stream)
        reason = due(
            retrain,
            [alert for alert in open_alerts if (alert.key.model, alert.key.release) == (model, release.version)],
            rows=rows,
            trained_rows=None if rows is None else self._rows_of_training(manifest, ended),
            created_us=manifest.created_at_us,
            now_us=self._clock_us(),
            ended_us=ended.at_us,
        )
        if reason is None:
            return
        name = self._triggers.request(model, release.version, reason.kind, reason.why, retrain.pause_s, rows)
        if name is not None:
            self._metrics.triggers.labels(model, reason.kind.value).inc()
            _log.info("training_requested", trigger=name, model=model, kind=reason.kind.value, why=reason.why)

    def _rows_of_training(self, manifest: Manifest, ended: Ended) -> int | None:
        """Rows of the stream that the latest training saw, whatever came of it."""
        key = manifest.model, manifest.version
        if key not in self._trained_rows:
            version = trained_version(manifest)
            self._trained_rows[key] = (
                None if version is None else rows_at(self._of_the_lake(), manifest.stream, version)
            )
        known = [rows for rows in (self._trained_rows[key], ended.rows) if rows is not None]
        return max(known, default=None)

    def _of_the_lake(self) -> Catalog:
        generation = self._access.generation
        if self._catalog is None or self._catalog[0] != generation:
            self._catalog = generation, Catalog(self._access.store)
        return self._catalog[1]

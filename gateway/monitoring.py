"""Watches releases at work: drift and performance, alerts, and requests to learn again. A thread.

Each gateway watches the devices of its own shards, and finds after a restart in the lake what it needs: baselines,
alerts that are open, the latest predictions. Alerts and triggers are committed by check-and-set, so any number of
gateways may run this.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import structlog

from contract.errors import HeadwaterError, TemporaryError
from contract.names import shard_of
from gateway.access import Kept, LakeAccess
from gateway.ingress import wall_us
from gateway.metrics import GatewayMetrics
from gateway.settings import MonitoringSettings
from gateway.watch import LakeHealth, WatchedThread
from lake.catalog import Catalog
from lake.errors import UnknownStreamError
from lake.monitoring.accuracy import Accuracy, measure, read_labels, read_predictions
from lake.monitoring.alerts import (
    CLOSED,
    SILENT_H,
    Alert,
    AlertKind,
    AlertTable,
    Finding,
    Hysteresis,
    Key,
    judge_accuracy,
    over,
)
from lake.monitoring.due import current, due, rows_at, trained_version
from lake.monitoring.observe import Bounds, Figures
from lake.monitoring.triggers import TriggerTable
from lake.monitoring.watch import ModelWatch, References, Watched
from lake.releases import ReleaseBook, ReleaseState

_log = structlog.get_logger()

MODELS_MAX = 64
RETRY_MAX_S = 60.0
BUSY_SHARE_MAX = 0.25
"""Part of the interval that measuring may take; who is left over comes first at the next look."""


class Monitoring:
    """A thread that watches.

    Args:
        settings: how often, how much.
        shards: whose devices this gateway watches.
        gateway: its name, for the rows.
        access: the way to the lake.
        metrics: figures.
        health: told how the lake answers.
        clock_us: wall clock, microseconds.
        clock_s: monotonic seconds.
    """

    def __init__(
        self,
        settings: MonitoringSettings,
        *,
        shards: Iterable[int],
        gateway: str,
        access: LakeAccess,
        metrics: GatewayMetrics,
        health: LakeHealth,
        clock_us: Callable[[], int] = wall_us,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._access, self._metrics, self._health = settings, access, metrics, health
        self._clock_us, self._clock_s = clock_us, clock_s
        self._owned = frozenset(shards)
        self._bounds = Bounds(
            windows_min=settings.windows_min,
            windows_max=settings.windows_max,
            baseline_windows=settings.baseline_windows,
            devices_max=settings.devices_max,
        )
        self._references = References(Kept(access, access.open_releases))
        self._alerts = AlertTable(Kept(access, access.open_alerts), gateway, clock_us)
        self._triggers = TriggerTable(Kept(access, access.open_triggers), gateway, clock_us)
        self._lake = Kept(access, access.open_lake)
        self._watches: dict[str, ModelWatch] = {}
        self._generation = -1
        self._hysteresis = Hysteresis()
        self._open: dict[Key, Alert] = {}
        self._latest: dict[str, dict[str, Figures]] = {}
        self._trained_rows: dict[tuple[str, int], int | None] = {}
        self._judged_s: float | None = None
        self._heard_us: dict[Key, int] = {}
        """When windows came of what has an alert open; the start of this process, where none came since."""
        self._started_us = clock_us()
        self._catalog: tuple[int, Catalog] | None = None
        self._told: dict[str, str] = {}
        self._failures = 0
        self._stopping = threading.Event()
        self.thread = WatchedThread("monitoring", self._run)
        metrics.watch(
            "monitored",
            "Releases on devices that are watched",
            lambda: sum(len(watch.observer) for watch in list(self._watches.values())),
            settings.devices_max,
        )
        metrics.watch(
            "monitoring_forgotten",
            "Releases on devices that were forgotten for others",
            lambda: sum(watch.observer.forgotten for watch in list(self._watches.values())),
        )
        metrics.watch(
            "monitoring_skipped_commits",
            "Commits of predictions that were too many to read",
            lambda: sum(watch.skipped_commits for watch in list(self._watches.values())),
        )
        metrics.watch(
            "monitoring_skipped_files",
            "Files of predictions, or entries of their log, that could not be read",
            lambda: sum(watch.skipped_files for watch in list(self._watches.values())),
        )
        metrics.watch(
            "monitoring_failures", "Models that could not be watched, each at each look", lambda: self._failures
        )

    def start(self) -> None:
        """Begin, unless it is off."""
        if self._settings.interval_s > 0:
            self.thread.start()

    def close(self, timeout_s: float) -> bool:
        """End; False when that took too long. Nothing is left to be done."""
        self._stopping.set()
        return self.thread.join(timeout_s)

    def look(self) -> bool:
        """Look at everything once; False where the lake did not answer."""
        try:
            book = self._references.refresh()
            self._open = self._alerts.open()
            self._follow(book)
            ended_us = self._triggers.ended()
            judging = self._is_time_to_judge()
            for model, watch in self._watches.items():
                self._guarded(model, functools.partial(self._watch_one, book, watch, judging, ended_us.get(model, 0)))
            self._expose_alerts()
        except TemporaryError as error:
            self._metrics.store_errors.inc()
            self._health.failed(error)
            return False
        except HeadwaterError as error:
            self._tell("", str(error))
        except Exception as error:  # noqa: BLE001 - a bug must not end the gateway; it is counted and told
            self._metrics.faults.labels("monitoring").inc()
            _log.error("monitoring_fault", exc_info=error)
        else:
            self._tell("", "")
            self._health.answered()
        self._metrics.monitoring_looks.inc()
        return True

    def _guarded(self, model: str, work: Callable[[], None]) -> None:
        """What is wrong with one model must not keep the others from being watched."""
        try:
            work()
        except TemporaryError:
            raise  # the lake is away, for all of them
        except HeadwaterError as error:
            self._failures += 1
            self._tell(model, str(error))
        except Exception as error:  # noqa: BLE001 - counted and told, as a bug in the look is
            self._failures += 1
            self._metrics.faults.labels("monitoring").inc()
            _log.error("monitoring_fault", model=model, exc_info=error)
        else:
            self._tell(model, "")

    def _watch_one(self, book: ReleaseBook, watch: ModelWatch, judging: bool, ended_us: int) -> None:
        self._measure(watch)
        if judging:
            self._judge(watch.model)
        self._request(book, watch.model, ended_us)

    def _follow(self, book: ReleaseBook) -> None:
        """Watch the models that have releases, and no others."""
        generation = self._access.generation
        if generation != self._generation:
            # New credentials: the old store is of no use.
            self._watches, self._latest, self._generation = {}, {}, generation
        alive = {release.model for release in book.releases.values() if release.state is not ReleaseState.RETIRED}
        for model in sorted(alive - self._watches.keys()):
            if len(self._watches) < MODELS_MAX:
                self._watches[model] = ModelWatch(
                    self._access.store, model, self._references, self._bounds, self._is_mine
                )
        for model in self._watches.keys() - alive:
            del self._watches[model]

    def _is_mine(self, device: str) -> bool:
        return shard_of(device) in self._owned

    def _measure(self, watch: ModelWatch) -> None:
        """New predictions of one model: figures, alerts."""
        self.thread.beat()
        self._metrics.monitoring_rows.inc(watch.read(self._settings.rows_max))
        changes: list[tuple[str, Finding]] = []
        newest = watch.observer.newest()
        latest = self._latest.setdefault(watch.model, {})
        silent = self._silent(watch)
        for seen in watch.look(BUSY_SHARE_MAX * self._settings.interval_s / max(1, len(self._watches)), self._clock_s):
            self.thread.beat()
            # What an old release did on a device that runs a newer one is nobody's concern any more.
            if newest.get(seen.figures.device) == seen.figures.release:
                latest[seen.figures.device] = seen.figures
                changes += self._changes(seen.findings, seen.checks)
        for device in (latest.keys() - newest.keys()) | (latest.keys() & {alert.key.device for alert in silent}):
            del latest[device]
        self._expose(watch.model)
        changes += [
            (CLOSED, over(alert, f"the device runs release {newest[alert.key.device]} now"))
            for alert in self._open.values()
            if alert.key.model == watch.model and newest.get(alert.key.device, alert.key.release) != alert.key.release
        ]
        changes += [(CLOSED, over(alert, f"no windows of the device for {SILENT_H:g} h")) for alert in silent]
        self._record(changes)

    def _silent(self, watch: ModelWatch) -> list[Alert]:
        """Open alerts about devices of this gateway that are not heard of any more.

        Those of accuracy end when the windows are too old to be joined with labels (`_judge`).
        """
        now_us, fresh = self._clock_us(), set(watch.observer.fresh())
        mine = [
            alert
            for alert in self._open.values()
            if alert.key.model == watch.model
            and alert.key.kind != AlertKind.ACCURACY
            and self._is_mine(alert.key.device)
        ]
        for alert in mine:
            if (alert.key.release, alert.key.device) in fresh:
                self._heard_us[alert.key] = now_us
        for key in [key for key in self._heard_us if key not in self._open]:
            del self._heard_us[key]
        return [
            alert
            for alert in mine
            if now_us - max(alert.at_us, self._heard_us.get(alert.key, self._started_us)) >= SILENT_H * 3600e6
        ]

    def _changes(self, findings: Sequence[Finding], checks: int) -> list[tuple[str, Finding]]:
        steps = ((self._hysteresis.step(finding, finding.key in self._open, checks), finding) for finding in findings)
        return [(event, finding) for event, finding in steps if event is not None]

    def _record(self, changes: list[tuple[str, Finding]]) -> None:
        if not changes:
            return
        for row in self._alerts.record(changes):
            self._metrics.alerts.labels(row["model"], row["kind"], row["event"]).inc()
            _log.warning(
                f"alert_{row['event']}",
                model=row["model"],
                release=row["release"],
                device=row["device"],
                kind=row["kind"],
                text=row["text"],
            )
        self._open = self._alerts.open()

    def _is_time_to_judge(self) -> bool:
        now_s = self._clock_s()
        if self._judged_s is not None and now_s - self._judged_s < self._settings.accuracy_interval_s:
            return False
        self._judged_s = now_s
        return True

    def _judge(self, model: str) -> None:
        """Late labels: how right the releases of a model were. The first gateway of several does it for all devices."""
        release = current(self._references.book, model)
        watched = None if release is None else self._references.get(model, release.version)
        if watched is None or watched.recipe.labels is None or not watched.manifest.classes or 0 not in self._owned:
            return
        self.thread.beat()
        try:
            lake = self._lake()
            labels = read_labels(lake, watched.recipe.labels, watched.manifest.stream)
            since_us = self._clock_us() - round(self._settings.accuracy_hours * 3600e6)
            rows = read_predictions(lake, model, since_us, self._settings.accuracy_rows_max)
        except UnknownStreamError:
            return  # no labels, or no predictions, yet
        changes: list[tuple[str, Finding]] = []
        joined: set[tuple[int, str]] = set()
        for found in measure(rows, labels):
            self._expose_accuracy(model, found)
            promised = self._promised(model, found.release)
            if promised is not None and found.device:
                finding = judge_accuracy(model, found, promised, self._settings.windows_min)
                changes += self._changes([finding], 1) if finding is not None else []
            joined.add((found.release, found.device))
        changes += [
            (CLOSED, over(alert, f"no windows of the device in the last {self._settings.accuracy_hours:g} h"))
            for alert in self._open.values()
            if (alert.key.model, alert.key.kind) == (model, AlertKind.ACCURACY)
            and (alert.key.release, alert.key.device) not in joined
        ]
        self._record(changes)

    def _promised(self, model: str, version: int) -> float | None:
        watched = self._references.get(model, version)
        metrics = () if watched is None else watched.manifest.metrics
        return next((metric.value for metric in metrics if metric.name == "accuracy"), None)

    def _request(self, book: ReleaseBook, model: str, ended_us: int) -> None:
        """Ask for a training where the policy of the current release says so."""
        release = current(book, model)
        watched = None if release is None else self._references.get(model, release.version)
        if release is None or watched is None:
            return
        retrain = watched.recipe.policy.retrain
        alerts = [alert for key, alert in self._open.items() if (key.model, key.release) == (model, release.version)]
        reason = due(
            retrain,
            alerts,
            new_rows=self._new_rows(watched) if retrain.new_rows is not None else None,
            created_us=watched.manifest.created_at_us,
            now_us=self._clock_us(),
            ended_us=ended_us,
        )
        if reason is None:
            return
        name = self._triggers.request(model, release.version, reason.kind, reason.why, retrain.pause_s)
        if name is not None:
            self._metrics.triggers.labels(model, reason.kind.value).inc()
            _log.info("training_requested", trigger=name, model=model, kind=reason.kind.value, why=reason.why)

    def _new_rows(self, watched: Watched) -> int | None:
        manifest = watched.manifest
        key = manifest.model, manifest.version
        generation = self._access.generation
        if self._catalog is None or self._catalog[0] != generation:
            self._catalog = generation, Catalog(self._access.store)
        catalog = self._catalog[1]
        if key not in self._trained_rows:
            version = trained_version(manifest)
            self._trained_rows[key] = None if version is None else rows_at(catalog, manifest.stream, version)
        before, now = self._trained_rows[key], rows_at(catalog, manifest.stream)
        return None if before is None or now is None else now - before

    # What is shown.

    def _expose(self, model: str) -> None:
        """The worst device of each release."""
        by_release: dict[int, list[Figures]] = {}
        for figures in self._latest.get(model, {}).values():
            by_release.setdefault(figures.release, []).append(figures)
        metrics = self._metrics
        for release, found in by_release.items():
            labels = model, str(release)
            metrics.model_devices.labels(*labels).set(len(found))
            metrics.model_rate.labels(*labels).set(sum(one.rate_per_s for one in found))
            metrics.model_latency_p99.labels(*labels).set(max(one.latency_ms_p99 for one in found) / 1000)
            metrics.model_nan_share.labels(*labels).set(max(one.nan_share for one in found))
            for gauge, values in (
                (metrics.model_psi, [one.features[0].psi for one in found if one.features]),
                (metrics.model_ks, [max(each.ks for each in one.features) for one in found if one.features]),
                (metrics.model_score_psi, [one.score.psi for one in found if one.score is not None]),
                (metrics.model_drifted_share, [one.drifted_share for one in found if one.drifted_share is not None]),
                (metrics.model_change, [one.change for one in found if one.change is not None]),
            ):
                if values:
                    gauge.labels(*labels).set(max(values))

    def _expose_accuracy(self, model: str, found: Accuracy) -> None:
        if found.accuracy is not None and not found.device:
            self._metrics.model_accuracy.labels(model, str(found.release)).set(found.accuracy)
            self._metrics.model_label_coverage.labels(model, str(found.release)).set(found.coverage)

    def _expose_alerts(self) -> None:
        self._metrics.alerts_open.clear()
        for labels, count in Counter((key.model, key.kind) for key in self._open).items():
            self._metrics.alerts_open.labels(*labels).set(count)

    def _tell(self, model: str, trouble: str) -> None:
        """Log what is new only: the same trouble comes back at every look. Without a model: of all of them."""
        if trouble and trouble != self._told.get(model, ""):
            _log.warning("models_not_watched", model=model or None, error=trouble)
        self._told[model] = trouble

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            interval_s = self._settings.interval_s
            self._stopping.wait(min(RETRY_MAX_S, interval_s * 2.0 ** min(failures, 10)) if failures else interval_s)
            if self._stopping.is_set():
                return
            self.thread.beat()
            failures = 0 if self.look() else failures + 1

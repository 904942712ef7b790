"""Watches releases at work: drift and performance, alerts, and requests to learn again. A thread.

Each gateway watches the devices of its own shards, and finds after a restart in the lake what it needs: baselines,
alerts that are open, the latest predictions. Alerts and triggers are committed by check-and-set, so any number of
gateways may run this.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable, Sequence

import structlog

from contract.errors import HeadwaterError, TemporaryError
from contract.names import shard_of
from gateway.access import Kept, LakeAccess
from gateway.ingress import wall_us
from gateway.judging import Question, ask
from gateway.learning import Learning
from gateway.metrics import GatewayMetrics
from gateway.release_gauges import ReleaseGauges
from gateway.settings import MonitoringSettings
from gateway.watch import LakeHealth, WatchedThread
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
from lake.monitoring.due import approved
from lake.monitoring.observe import Bounds, Figures
from lake.monitoring.triggers import NEVER, Ended, TriggerTable
from lake.monitoring.watch import ModelWatch, References
from lake.releases import ReleaseBook, ReleaseState

_log = structlog.get_logger()

MODELS_MAX = 64
RETRY_MAX_S = 60.0
JUDGING_S_MIN = 60.0
"""Working out accuracy may take this long, or `accuracy_interval_s` where that is longer."""
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
        self._learning = Learning(access, self._references, self._triggers, metrics, clock_us)
        self._gauges = ReleaseGauges(metrics)
        self._watches: dict[str, ModelWatch] = {}
        self._generation = -1
        self._hysteresis = Hysteresis()
        self._open: dict[Key, Alert] = {}
        self._latest: dict[str, dict[str, Figures]] = {}
        self._judged_s: float | None = None
        self._heard_us: dict[tuple[str, int, str], int] = {}
        """When windows came last, by model, release and device; the start of this process, where none came since."""
        self._started_us = clock_us()
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
            self._close_of_retired(book)
            ended = self._triggers.ended()
            judging = self._is_time_to_judge()
            for model, watch in self._watches.items():
                self._guarded(model, functools.partial(self._watch_one, watch, judging, ended.get(model, NEVER)))
            self._gauges.show_alerts(self._open)
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

    def _watch_one(self, watch: ModelWatch, judging: bool, ended: Ended) -> None:
        self._measure(watch)
        if judging:
            self._judge(watch.model)
        self._learning.ask(watch.model, self._open.values(), ended)

    def _follow(self, book: ReleaseBook) -> None:
        """Watch the models that have releases, and no others."""
        generation = self._access.generation
        if generation != self._generation:
            # New credentials: the old store is of no use.
            self._watches, self._latest, self._generation = {}, {}, generation
        alive = _alive(book)
        for model in sorted(alive - self._watches.keys()):
            if len(self._watches) < MODELS_MAX:
                self._watches[model] = ModelWatch(
                    self._access.store, model, self._references, self._bounds, self._is_mine
                )
        for model in self._watches.keys() - alive:
            del self._watches[model]
            self._latest.pop(model, None)
            self._told.pop(model, None)
            self._gauges.forget(model)

    def _close_of_retired(self, book: ReleaseBook) -> None:
        """Nobody would look at these again."""
        alive = _alive(book)
        self._record(
            [
                (CLOSED, over(alert, "every release of the model is retired"))
                for alert in self._open.values()
                if alert.key.model not in alive and self._is_mine(alert.key.device)
            ]
        )

    def _is_mine(self, device: str) -> bool:
        return shard_of(device) in self._owned

    def _measure(self, watch: ModelWatch) -> None:
        """New predictions of one model: figures, alerts."""
        self.thread.beat()
        self._metrics.monitoring_rows.inc(watch.read(self._settings.rows_max))
        changes: list[tuple[str, Finding]] = []
        latest = self._latest.setdefault(watch.model, {})
        silent = self._silent(watch)
        self._bound()
        newest = watch.observer.newest()
        for seen in watch.look(BUSY_SHARE_MAX * self._settings.interval_s / max(1, len(self._watches)), self._clock_s):
            self.thread.beat()
            # What an old release did on a device that runs a newer one is nobody's concern any more.
            if newest.get(seen.figures.device) == seen.figures.release:
                latest[seen.figures.device] = seen.figures
                changes += self._changes(seen.findings, seen.checks)
        for device in [name for name, figures in latest.items() if newest.get(name) != figures.release]:
            del latest[device]
        self._gauges.show(watch.model, latest.values())
        changes += [
            (CLOSED, over(alert, f"the device runs release {newest[alert.key.device]} now"))
            for alert in self._open.values()
            if alert.key.model == watch.model and newest.get(alert.key.device, alert.key.release) != alert.key.release
        ]
        changes += [(CLOSED, over(alert, f"no windows of the device for {SILENT_H:g} h")) for alert in silent]
        self._record(changes)

    def _bound(self) -> None:
        """All models share one bound: who has most devices gives up the one heard of longest ago."""
        observers = [watch.observer for watch in self._watches.values()]
        excess = sum(map(len, observers)) - self._settings.devices_max
        for _ in range(excess):
            max(observers, key=len).forget_oldest()

    def _silent(self, watch: ModelWatch) -> list[Alert]:
        """Forget the devices of a model that are not heard of any more.

        Returns:
            Open alerts about such devices of this gateway. Those of accuracy end when the windows are too old to be
            joined with labels (`_judge`).
        """
        now_us, model, observer = self._clock_us(), watch.model, watch.observer
        for release, device in observer.fresh():
            self._heard_us[model, release, device] = now_us

        def is_gone(release: int, device: str, since_us: int = 0) -> bool:
            heard_us = self._heard_us.get((model, release, device), self._started_us)
            return now_us - max(since_us, heard_us) >= SILENT_H * 3600e6

        silent = [
            alert
            for alert in self._open.values()
            if alert.key.model == model
            and alert.key.kind != AlertKind.ACCURACY
            and self._is_mine(alert.key.device)
            and is_gone(alert.key.release, alert.key.device, alert.at_us)
        ]
        for key in observer.held():
            if is_gone(*key):
                observer.forget(key)
        alerted = {(alert.key.model, alert.key.release, alert.key.device) for alert in self._open.values()}
        for heard in [heard for heard in self._heard_us if heard[0] == model and heard[1:] not in observer]:
            if heard not in alerted:
                del self._heard_us[heard]
        return silent

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
        release = approved(self._references.book, model)
        watched = None if release is None else self._references.get(model, release.version)
        if watched is None or watched.recipe.labels is None or not watched.manifest.classes or 0 not in self._owned:
            self._gauges.show_accuracy(model, [])
            return
        self.thread.beat()
        since_us = self._clock_us() - round(self._settings.accuracy_hours * 3600e6)
        question = Question(
            store=self._access.store.settings,
            model=model,
            labels=watched.recipe.labels,
            stream=watched.manifest.stream,
            since_us=since_us,
            rows_max=self._settings.accuracy_rows_max,
        )
        answer = ask(
            question,
            self.thread.beat,
            self._stopping.is_set,
            max(JUDGING_S_MIN, self._settings.accuracy_interval_s),
        )
        if answer is None or answer.told is None:
            return  # the gateway stops; or there are no labels, or no predictions, yet
        told = answer.told
        self._gauges.show_accuracy(model, told)
        changes: list[tuple[str, Finding]] = []
        for found in told:
            promised = self._promised(model, found.release)
            if promised is not None and found.device:
                finding = judge_accuracy(model, found, promised, self._settings.windows_min)
                changes += self._changes([finding], 1) if finding is not None else []
        joined = {(found.release, found.device) for found in told}
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


def _alive(book: ReleaseBook) -> set[str]:
    """Models with a release that is not retired."""
    return {release.model for release in book.releases.values() if release.state is not ReleaseState.RETIRED}

"""Releases on this device, tied together: orders in, lives followed, models loaded, condition told.

One thread decides (`run`); what takes time happens on two lanes beside it (orders, releases) and on the engine's
worker. Every event goes through `lifecycle.step`, its record through the store, and only then is anything done.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import msgspec
import structlog

from contract.backoff import Backoff
from contract.errors import Rejected
from contract.messages import decode
from contract.models import FINAL_STATES, MODELS_MAX, Assignments, DeviceState, ReportedModel
from contract.names import is_name
from edge_agent.events import Event as AgentEvent
from edge_agent.events import Kind, Scalar
from edge_agent.lean import give_back_memory
from edge_agent.models import lifecycle
from edge_agent.models.child import Opened
from edge_agent.models.download import Cancel
from edge_agent.models.inference import Engine, Loaded
from edge_agent.models.lane import Lane
from edge_agent.models.lifecycle import (
    ACTIVE_PROVEN_WINDOWS,
    ActiveBroken,
    ActiveLoading,
    ActiveProven,
    Change,
    Ended,
    Event,
    Job,
    Later,
    Loading,
    NotOpened,
    Ordered,
    Repeated,
    Scored,
    Stopping,
    Tick,
    Work,
)
from edge_agent.models.metrics import ModelMetrics
from edge_agent.models.orders import Seen, TrustReason
from edge_agent.models.parent import CancelledError
from edge_agent.models.record import ModelRecord, Release
from edge_agent.models.runtime import ModelError
from edge_agent.models.settings import ModelsSettings
from edge_agent.models.store import ReleaseStore, StoreUnavailableError, decode_manifest
from edge_agent.models.tasks import Tasks

_log = structlog.get_logger()

IDLE_S = 1.0
TRYING_S = 0.2
"""How often a candidate that is loaded is looked at."""
STORE_RETRY_S = 5.0
EVENTS_MAX = 256
LANES_STOP_S = 2.0


class ServiceClock(Protocol):
    """What the service needs of the device's clocks."""

    def wall_us(self) -> int:
        """Microseconds since 1970-01-01 UTC."""

    def monotonic_s(self) -> float:
        """Seconds that never go back."""


class _InMemory(NamedTuple):
    """A release of a model that is loaded."""

    release: Release | None
    """None: the factory's."""
    loaded: Loaded


class ModelService:
    """Follows orders. `run` is the thread; the rest may be called from any.

    Args:
        settings: the table `[models]`.
        store: releases on disk.
        engine: runs them.
        tasks: what takes time.
        clock: the device's clocks.
        synced: whether the wall clock is known to be right.
        metrics: counters.
        report: takes events for `headwater.events`.
        changed: called when there is something new to report.
        rng: jitter of retries.
    """

    def __init__(
        self,
        *,
        settings: ModelsSettings,
        store: ReleaseStore,
        engine: Engine,
        tasks: Tasks,
        clock: ServiceClock,
        synced: Callable[[], bool],
        metrics: ModelMetrics,
        report: Callable[[AgentEvent], None],
        changed: Callable[[], None],
        rng: random.Random,
    ) -> None:
        self._settings, self._store, self._engine, self._tasks = settings, store, engine, tasks
        self._clock, self._synced, self._metrics = clock, synced, metrics
        self._report, self._changed, self._rng = report, changed, rng
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._orders, self._releases = Lane("model-orders", self._wake.set), Lane("model-releases", self._wake.set)
        self._arrived_lock = threading.Lock()
        self._arrived: bytes | None = None
        self._payload: bytes | None = None
        """The orders at hand, as long as one of them has to be opened again later."""
        self._open_at_s = 0.0
        self._open_backoff = self._backoff()
        self._events: deque[tuple[str, Event]] = deque(maxlen=EVENTS_MAX)
        self._store_retry_s = 0.0
        self._records: dict[str, ModelRecord] = {name: ModelRecord(model=name) for name in store.factory}
        self._records |= store.records()
        self._entered_s = dict.fromkeys(self._records, clock.monotonic_s())
        self._busy_with: tuple[str, int, Job] | None = None
        self._backoffs: dict[str, Backoff] = {}
        self._retry_s: dict[str, float] = {}
        self._active: dict[str, _InMemory] = {}
        self._candidate: dict[str, _InMemory] = {}
        self._broken_factory: set[str] = set()
        self._loads = 0
        self._told: Mapping[str, ReportedModel] = {}
        self._news = False
        """Whether something is to be reported at the end of this round."""
        self.progress_s = clock.monotonic_s()
        """Monotonic time of the last round of the thread."""

    # From other threads.

    def assignments(self, payload: bytes) -> None:
        """Take the orders as they arrived; only the newest wait. Returns at once."""
        with self._arrived_lock:
            self._arrived = payload
        self._wake.set()

    def reported(self) -> Mapping[str, ReportedModel]:
        """What the fleet is told, as of the last round."""
        return self._told

    def status(self) -> dict[str, Any]:
        """The same for the status socket, with the candidate and denied hashes."""
        answer: dict[str, Any] = {}
        for name, told in self._told.items():
            record = self._records.get(name, ModelRecord(model=name))
            candidate = None if record.candidate is None else record.candidate.version
            denied = {each.sha256: each.reason for each in record.denied}
            dropped = self._engine.dropped.get(name, 0)
            answer[name] = {
                **msgspec.to_builtins(told),
                "candidate": candidate,
                "denied": denied,
                "dropped_predictions": dropped,
            }
        return answer

    def stop(self) -> None:
        """End, after what is at hand."""
        self._stopping.set()
        self._orders.cancel()
        self._releases.cancel()
        self._wake.set()

    # The thread.

    def run(self) -> None:
        """Work until stopped."""
        while not self._stopping.is_set():
            self.progress_s = self._clock.monotonic_s()
            self._round()
            self._wake.wait(TRYING_S if self._candidate else IDLE_S)
            self._wake.clear()
        self._orders.end(LANES_STOP_S)
        self._releases.end(LANES_STOP_S)
        for model in list(self._records):
            active = self._active.get(model)
            is_loaded = active is not None and active.release is not None
            self._take(model, Stopping(active=is_loaded, candidate=model in self._candidate))

    def _round(self) -> None:
        now_s = self._clock.monotonic_s()
        self._open_orders(now_s)
        if now_s >= self._store_retry_s:
            for _ in range(len(self._events)):
                self._take(*self._events.popleft())
        for model in list(self._records):
            self._look_at(model)
            self._reconcile(model)
            self._work_on(model, now_s)
        self._tell()

    # Orders.

    def _open_orders(self, now_s: float) -> None:
        with self._arrived_lock:
            arrived, self._arrived = self._arrived, None
            if arrived is not None:
                self._payload, self._open_at_s = arrived, now_s
                self._open_backoff.reset()
        if self._payload is None or now_s < self._open_at_s or not self._orders.idle:
            return
        payload, self._payload = self._payload, None
        try:
            envelopes = decode(payload, Assignments).envelopes[:MODELS_MAX] if payload else ()
        except Rejected as error:
            self._refuse("assignments", "bad_order", str(error))
            return
        if not envelopes or not self._settings.url:
            return
        seen = {name: heard for name, record in self._records.items() if (heard := record.heard) is not None}
        self._orders.give(lambda cancel: self._opened(payload, envelopes, seen, cancel))

    def _opened(
        self, payload: bytes, envelopes: tuple[dict[str, Any], ...], seen: dict[str, Seen], cancel: Cancel
    ) -> None:
        """On the lane of orders: hand on what became of them."""
        try:
            answers = self._tasks.open(envelopes, seen, cancel)
        except CancelledError:
            return
        if isinstance(answers, str):
            _log.warning("orders_not_opened", error=answers)
            self._open_again(payload)
            return
        for envelope, answer in zip(envelopes, answers, strict=True):
            self._judge(envelope, answer)
        if not all(answer.final for answer in answers):
            self._open_again(payload)

    def _judge(self, envelope: dict[str, Any], answer: Opened) -> None:
        claimed = answer.assignment
        if not answer.reason and claimed is not None:
            seen = Seen(sequence=claimed.sequence, key=answer.key)
            self._events.append((claimed.model, Ordered(claimed, seen, envelope)))
        elif answer.reason == TrustReason.REPEATED:
            if claimed is not None and claimed.model in self._records:
                self._events.append((claimed.model, Repeated(claimed.sequence)))
        else:
            self._refuse("unknown" if claimed is None else claimed.model, answer.reason, answer.message)
            shown = claimed is not None and is_name(claimed.model) and answer.reason not in _NOT_SHOWN
            if claimed is not None and shown and (claimed.model in self._records or len(self._records) < MODELS_MAX):
                why = f"{answer.reason}: {answer.message}"
                self._events.append((claimed.model, NotOpened(claimed, why, answer.final)))

    def _open_again(self, payload: bytes) -> None:
        with self._arrived_lock:
            if self._arrived is None and self._payload is None:  # else newer ones came meanwhile
                self._payload = payload
                self._open_at_s = self._clock.monotonic_s() + self._open_backoff.next_delay_s()

    def _refuse(self, model: str, reason: str, message: str) -> None:
        self._metrics.orders_refused.labels(reason).inc()
        _log.warning("model_order_refused", model=model, reason=reason, error=message)
        detail = {"cause": f"refused/{model[:63]}/{reason}", "model": model[:63], "state": "refused", "reason": message}
        self._report(AgentEvent(Kind.MODEL_STATE, detail=detail))

    # Records.

    def _take(self, model: str, event: Event) -> None:
        """Let an event happen; where the disk refuses the record, later."""
        record = self._records.get(model, ModelRecord(model=model))
        step = lifecycle.step(record, event, self._clock.wall_us())
        if step.durable:
            try:
                self._store.save(step.record)
            except StoreUnavailableError as error:
                _log.error("model_record_not_kept", model=model, error=str(error))
                self._metrics.store_errors.inc()
                self._store_retry_s = self._clock.monotonic_s() + STORE_RETRY_S
                if not isinstance(event, Tick | Scored | Loading | ActiveLoading | ActiveProven | ActiveBroken):
                    self._events.append((model, event))  # the others come again by themselves
                return
        self._records[model] = step.record
        self._follow_retries(model, record, event)
        for change in step.changes:
            self._changed_state(model, change)
        if isinstance(event, Repeated) and step.record.shown != record.shown:
            self._news = True

    def _follow_retries(self, model: str, before: ModelRecord, event: Event) -> None:
        if isinstance(event, Later):
            backoff = self._backoffs.setdefault(model, self._backoff())
            self._retry_s[model] = self._clock.monotonic_s() + backoff.next_delay_s()
        elif before.order != self._records[model].order and not isinstance(event, Scored):
            self._backoffs.pop(model, None)
            self._retry_s.pop(model, None)

    def _changed_state(self, model: str, change: Change) -> None:
        order = change.order
        self._entered_s[model] = self._clock.monotonic_s()
        self._metrics.transitions.labels(model, order.state.value).inc()
        log = _log.warning if order.state in FINAL_STATES - {DeviceState.COMMITTED} else _log.info
        told: dict[str, Scalar] = {
            "model": model,
            "version": order.version,
            "sequence": order.sequence,
            "rollout": order.rollout,
        }
        log("model_state", **told, state=order.state.value, reason=order.reason)
        detail: dict[str, Scalar] = {
            "cause": f"{model}/{order.sequence}/{order.state.value}",
            **told,
            "sha256": order.sha256,
            "state": order.state.value,
            "was": None if change.was is None else change.was.value,
            "reason": order.reason,
            "windows": order.windows,
            "compared": order.compared,
            "disagreements": order.disagreements,
        }
        self._report(AgentEvent(Kind.MODEL_STATE, detail=detail))
        self._news = True

    def _look_at(self, model: str) -> None:
        """Tell the record what time and windows have brought."""
        in_state_s = self._clock.monotonic_s() - self._entered_s.get(model, 0.0)
        candidate, record = self._candidate.get(model), self._records[model]
        if candidate is not None and record.assignment is not None:
            done = candidate.loaded.counters
            shadow, trial = done.shadow, done.trial
            self._take(
                model,
                Scored(
                    record.assignment.sequence,
                    shadow,
                    trial,
                    done.bad,
                    done.compared,
                    done.disagreements,
                    done.trial_bad,
                ),
            )
        self._take(model, Tick(in_state_s, self._synced()))
        active = self._active.get(model)
        if record.active_starts and active is not None and active.loaded.counters.windows >= ACTIVE_PROVEN_WINDOWS:
            self._take(model, ActiveProven())

    # Models in memory.

    def _reconcile(self, model: str) -> None:
        """Have loaded what the record asks for; each failure changes the record, so it is asked again."""
        for _ in range(4):  # active, previous, factory, candidate
            if self._settled(model, lifecycle.work(self._records[model])):
                break
        work, candidate = lifecycle.work(self._records[model]), self._candidate.get(model)
        active = self._active.get(model)
        if self._loads:
            self._loads = 0
            give_back_memory()  # a session leaves some MB behind when it is made
        self._engine.configure(
            model,
            None if active is None else active.loaded,
            None if candidate is None else candidate.loaded,
            front=work.front and candidate is not None,
        )

    def _settled(self, model: str, work: Work) -> bool:
        before = self._records[model]
        candidate = self._candidate.get(model)
        if candidate is not None and candidate.release != work.candidate:
            del self._candidate[model]
            if candidate.release == work.active:
                self._active[model] = candidate
        active = self._active.get(model)
        wants_factory = work.active is None and model in self._store.factory
        if active is not None and (active.release != work.active or (work.active is None and not wants_factory)):
            del self._active[model]
            active = None
        if active is None and work.active is not None:
            self._load_active(model, work.active)
        elif active is None and wants_factory:
            self._load_factory(model)
        elif work.candidate is not None and model not in self._candidate:
            self._load_candidate(model, work.candidate)
        return self._records[model] is before

    def _load_active(self, model: str, release: Release) -> None:
        self._take(model, ActiveLoading())
        if lifecycle.work(self._records[model]).active != release:
            return
        try:
            self._active[model] = _InMemory(release, self._load(release))
        except ModelError as error:
            self._take(model, ActiveBroken(str(error)))

    def _load_factory(self, model: str) -> None:
        if model in self._broken_factory:
            return
        release = self._store.factory[model]
        data = self._store.read_factory(release)
        try:
            if data is not None:
                self._loads += 1
                self._active[model] = _InMemory(None, Loaded(data, release.manifest))
                return
        except ModelError as error:
            _log.error("factory_model_not_loaded", model=model, error=str(error))
        self._broken_factory.add(model)

    def _load_candidate(self, model: str, release: Release) -> None:
        assignment, starts = self._records[model].assignment, self._records[model].starts
        assert assignment is not None
        if self._clock.monotonic_s() < self._store_retry_s:
            return  # the count of starts would not be kept
        self._take(model, Loading(assignment.sequence, beside=model in self._active))
        record = self._records[model]
        if lifecycle.work(record).candidate != release or record.starts <= starts:
            return  # denied, or the disk did not take the count: then it must not be loaded
        try:
            self._candidate[model] = _InMemory(release, self._load(release))
        except ModelError as error:
            self._take(model, Ended(assignment.sequence, DeviceState.FAILED, str(error)))

    def _load(self, release: Release) -> Loaded:
        data, manifest = self._store.read(release.sha256), self._store.read(release.manifest)
        if data is None or manifest is None:
            raise ModelError(f"the files of version {release.version} are not in the store any more; order it again")
        self._loads += 1
        return Loaded(data, decode_manifest(manifest))

    # Jobs.

    def _work_on(self, model: str, now_s: float) -> None:
        record = self._records[model]
        job = lifecycle.work(record).job
        busy = self._busy_with
        if busy is not None and busy[0] == model:
            current = None if record.assignment is None else record.assignment.sequence
            if (current, job) != busy[1:]:
                self._releases.cancel()  # nobody wants it any more
        if job is None or record.assignment is None or not self._releases.idle:
            return
        if self._events:
            return  # what a job has just brought is not in the records yet, and no file of it is in a slot
        if now_s < self._retry_s.get(model, 0.0):
            return
        self._busy_with = (model, record.assignment.sequence, job)
        self._releases.give(lambda cancel: self._do(job, record, cancel))

    def _do(self, job: Job, record: ModelRecord, cancel: Cancel) -> None:
        """On the lane of releases: hand on what came of it."""
        try:
            event = self._tasks.do(job, record, cancel)
        except CancelledError:
            event = None
        finally:
            self._busy_with = None
        if event is not None and not (cancel.is_set() and isinstance(event, Later)):
            self._events.append((record.model, event))

    # Telling.

    def _tell(self) -> None:
        answering = self._engine.answering()
        told = {model: _reported(answering.get(model), record) for model, record in self._records.items()}
        self._told = told
        self._metrics.show(told, self._store.used_bytes(), self._engine.dropped)
        if self._news:
            # Not before: whoever is rung for comes at once, and would report what was.
            self._news = False
            self._changed()

    def _backoff(self) -> Backoff:
        return Backoff(self._settings.retry_base_s, self._settings.retry_max_s, self._rng)


_NOT_SHOWN = frozenset({TrustReason.REPLAYED.value, TrustReason.WRONG_DEVICE.value})
"""Orders that were never for this device at this time; nothing is missing when they are not followed."""


def _reported(loaded: Loaded | None, record: ModelRecord) -> ReportedModel:
    tried = record.candidate
    if loaded is None or tried is None or tried.sha256 != loaded.manifest.artifact.sha256:
        active, previous = record.active, record.previous
    else:
        active, previous = tried, record.active  # on trial it answers, and the active one stands by
    slots = ReportedModel(
        active=0 if active is None else active.version,
        active_sha256="" if active is None else active.sha256,
        previous=0 if previous is None else previous.version,
        previous_sha256="" if previous is None else previous.sha256,
        order=record.shown,
    )
    if loaded is None:
        return slots
    counters = loaded.counters
    return msgspec.structs.replace(
        slots,
        factory=loaded.manifest.version if active is None else 0,
        windows=counters.windows,
        skipped=counters.skipped,
        errors=counters.errors,
        nan_windows=counters.nan_windows,
        latency_ms_p50=counters.latency_ms(0.5),
        latency_ms_p99=counters.latency_ms(0.99),
        score_mean=counters.score_sum / counters.scores if counters.scores else 0.0,
    )

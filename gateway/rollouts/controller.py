"""Drives rollouts: looks at the table and at the devices, lets the machine decide, commits, publishes. A thread.

It keeps nothing. Killed at any moment, it (or another gateway, which need not wait for that) finds everything again in
`control/rollouts` and in what devices report. Any number of gateways may run it: of those that decide the same, one
commit succeeds, and each publishes to the devices of its own shards.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import structlog

from contract.errors import TemporaryError
from contract.names import shard_of
from gateway.devices import Device
from gateway.ingress import wall_us
from gateway.metrics import GatewayMetrics
from gateway.rollouts.evidence import DeviceView, Standing, Tally
from gateway.rollouts.machine import decide, survey
from gateway.rollouts.publisher import Publish, Publisher
from gateway.rollouts.sealing import Sealer
from gateway.rollouts.targets import Targets
from gateway.settings import RolloutSettings
from gateway.watch import LakeHealth, WatchedThread
from lake.rollouts import PATH, Rollout, RolloutBook, RolloutEvent, RolloutState, RolloutTable

_log = structlog.get_logger()

RETRY_MAX_S = 15.0
STEPS_MAX = 16
"""Steps of one rollout at one look: a stage whose devices have all committed already passes at once."""
REST = 9.0
"""Judging devices takes a tenth of the thread's time at most: other threads of the process have batches to commit."""
HEARD_MAX = 10_000
"""Devices with news; where there are more, all are looked at."""
_PAUSE_S = 0.05
"""Between two slices of devices."""
_BLOCKED_S = 0.25
"""After the broker took no more."""


class Fleet(Protocol):
    """What is known of the devices (see `gateway.registry.Registry`). Safe to use from any thread."""

    @property
    def loaded(self) -> bool:
        """Whether the devices of old are known."""

    def device(self, name: str) -> Device | None:
        """A device."""

    def everyone(self) -> list[Device]:
        """All of them."""


class RolloutController:
    """All methods may be called from any thread; `act` and `look` wait for the lake.

    Args:
        settings: intervals.
        shards: whose devices this gateway hands orders to.
        gateway: its name, for the rows.
        fleet: the devices.
        table: the rollouts.
        sealer: signs orders; None: this gateway shows rollouts and takes actions, and leaves driving them to others.
        may_sign: whether devices follow what the key of an id signs; None: not known yet. Asked at every look, because
            devices refuse for good what a key has signed that was rotated away.
        publish: the way to the broker.
        connected: whether there is one now.
        metrics: counters.
        health: told how the lake answers.
        clock_us: wall clock, microseconds.
        clock_s: monotonic seconds.
    """

    def __init__(
        self,
        settings: RolloutSettings,
        *,
        shards: Iterable[int],
        gateway: str,
        fleet: Fleet,
        table: RolloutTable,
        sealer: Sealer | None,
        may_sign: Callable[[str], bool | None],
        publish: Publish,
        connected: Callable[[], bool],
        metrics: GatewayMetrics,
        health: LakeHealth,
        clock_us: Callable[[], int] = wall_us,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._gateway, self._fleet, self._table = settings, gateway, fleet, table
        self._sealer, self._may_sign, self._connected = sealer, may_sign, connected
        self._refused_key = ""
        self._metrics, self._health, self._clock_us, self._clock_s = metrics, health, clock_us, clock_s
        owned = frozenset(shards)
        self._publisher = Publisher(
            publish,
            fleet.device,
            lambda name: shard_of(name) in owned,
            republish_s=settings.republish_s,
            clock_us=clock_us,
            clock_s=clock_s,
            on_published=metrics.assignments.inc,
        )
        self._lake_lock = threading.Lock()
        """Guards the table; held while the lake is asked."""
        self._lock = threading.Lock()
        """Guards what is heard from other threads; never held while anything is asked."""
        self._heard: OrderedDict[str, None] = OrderedDict()
        self._connected_s: float | None = None
        self._reconnected = self._everybody = False
        self._book = RolloutBook()
        self._aimed: RolloutBook | None = None
        self._standings: Counter[Standing] = Counter()
        self._bell = threading.Event()
        self._stopping = threading.Event()
        self.thread = WatchedThread("rollouts", self._run)
        self._watch()

    def start(self) -> None:
        """Begin."""
        self.thread.start()

    def close(self, timeout_s: float) -> bool:
        """End; False when that took too long. Nothing is left to be done."""
        self._stopping.set()
        self._bell.set()
        return self.thread.join(timeout_s)

    # What is heard.

    def heard(self, name: str) -> None:
        """A device said something. Never waits."""
        with self._lock:
            if len(self._heard) < HEARD_MAX:
                self._heard[name] = None
            else:
                self._everybody = True

    def is_connected(self) -> None:
        """There is a new connection to the broker. Never waits."""
        with self._lock:
            self._connected_s, self._reconnected = self._clock_s(), True

    # What is asked.

    @property
    def book(self) -> RolloutBook:
        """The rollouts as of the last look."""
        return self._book

    def look(self) -> RolloutBook:
        """The rollouts as of now.

        Raises:
            TemporaryError: the lake did not answer.
        """
        with self._lake_lock:
            return self._table.look()

    def history(self) -> list[RolloutEvent]:
        """Every row, the oldest first.

        Raises:
            TemporaryError: the lake did not answer.
        """
        with self._lake_lock:
            return self._table.history()

    def act(self, decide: Callable[[RolloutBook], Sequence[RolloutEvent]]) -> RolloutBook:
        """Add to the rollouts what somebody decided (see `gateway.rollouts.actions`).

        Raises:
            RolloutRefused: it does not fit.
            TemporaryError: the lake did not answer, and it is not known whether it was added.
        """
        with self._lake_lock:
            book = self._table.act(decide)
        self._bell.set()
        return book

    def tally(self, rollout: Rollout) -> Tally:
        """How the devices are with a rollout, as this gateway knows them."""
        return survey(rollout, views(self._fleet.everyone(), rollout.spec.model), self._clock_us())

    # Below here everything runs in the controller's thread.

    def _run(self) -> None:
        look_s = sweep_s = self._clock_s()
        failures = 0
        while not self._stopping.is_set():
            self.thread.beat()
            now_s = self._clock_s()
            if now_s >= look_s:
                failures = 0 if self.drive() else failures + 1
                took_s = self._clock_s() - now_s
                pause_s = max(self._settings.interval_s, REST * took_s)
                if failures:
                    pause_s = min(RETRY_MAX_S, 0.25 * 2.0 ** min(failures, 10))
                look_s = self._clock_s() + pause_s
            everybody = now_s >= sweep_s
            if everybody:
                sweep_s = now_s + self._settings.sweep_s
            pause_s = self.hand_out(everybody=everybody)
            if self._bell.wait(max(0.0, min(look_s - self._clock_s(), pause_s))):
                self._bell.clear()
                look_s = self._clock_s()

    def drive(self) -> bool:
        """Look at the table, and take the steps whose time has come; False when the lake did not answer."""
        try:
            self._book = self.look()
            self._standings.clear()
            if self._may_decide():
                self._book = self._step(self._book)
        except TemporaryError as error:
            self._metrics.store_errors.inc()
            self._health.failed(error)
            return False
        except Exception as error:  # noqa: BLE001 - devices are served without their rollouts, too
            self._metrics.faults.labels("rollouts").inc()
            _log.error("rollouts_fault", table=PATH, exc_info=error)
            return False
        self._health.answered()
        return True

    def hand_out(self, *, everybody: bool) -> float:
        """Look at devices that have news, or at all; answers how many seconds nothing is to be done."""
        try:
            return self._hand_out(everybody)
        except Exception as error:  # noqa: BLE001 - batches are acknowledged without rollouts, too; the sweep tries again
            self._metrics.faults.labels("rollouts").inc()
            _log.error("rollouts_fault", table=PATH, exc_info=error)
            return self._settings.interval_s

    def _hand_out(self, everybody: bool) -> float:
        sealer = self._trusted_sealer()
        if sealer is None or not self._fleet.loaded:
            return self._settings.interval_s
        with self._lock:
            heard, self._heard = self._heard, OrderedDict()
            everybody |= self._everybody or self._reconnected
            if self._reconnected:
                self._publisher.reconnected()
            self._everybody = self._reconnected = False
        if self._aimed is not self._book:
            self._publisher.aim(Targets(self._book))
            self._aimed = self._book
            everybody = True
        if everybody:
            self._publisher.look_at(device.name for device in self._fleet.everyone())
        self._publisher.look_at(heard)
        if not self._publisher.publish_slice(sealer):
            return _BLOCKED_S
        return _PAUSE_S if self._publisher.waiting else self._settings.interval_s

    def _may_decide(self) -> bool:
        """Devices are judged by what they say: not while nobody can be heard, or has just begun to be."""
        connected_s = self._connected_s
        return (
            self._trusted_sealer() is not None
            and self._fleet.loaded
            and self._connected()
            and connected_s is not None
            and self._clock_s() - connected_s >= self._settings.settle_s
        )

    def _trusted_sealer(self) -> Sealer | None:
        """Who signs what devices follow; None where this gateway cannot."""
        if self._sealer is None:
            return None
        key = self._sealer.key_id
        allowed = self._may_sign(key)
        if allowed is False and key != self._refused_key:
            _log.warning(
                "rollouts_not_driven",
                error=f"the online key {key[:12]} is not one that the root names for orders, and devices would refuse "
                "them; bring the new online.pem, or put this one into force with: headwater keys rotate",
            )
        self._refused_key = key if allowed is False else ""
        return self._sealer if allowed else None

    def _step(self, book: RolloutBook) -> RolloutBook:
        running = [rollout for rollout in book.rollouts.values() if rollout.state is RolloutState.RUNNING]
        fleet = self._fleet.everyone() if running else []
        for rollout in running:
            devices = views(fleet, rollout.spec.model)
            for _ in range(STEPS_MAX):
                book, moved = self._step_one(book, rollout.name, devices)
                if not moved:
                    break
        return book

    def _step_one(self, book: RolloutBook, name: str, devices: Sequence[DeviceView]) -> tuple[RolloutBook, bool]:
        now_us = self._clock_us()

        def step(book: RolloutBook) -> list[RolloutEvent]:
            rollout = book.rollouts[name]
            return decide(rollout, survey(rollout, devices, now_us), now_us, self._gateway)

        rollout = book.rollouts[name]
        found = survey(rollout, devices, now_us)
        if not decide(rollout, found, now_us, self._gateway):
            self._standings.update(found.standings)
            return book, False
        with self._lake_lock:
            after = self._table.act(step)
        self._report(name, book, after)
        return after, True

    def _report(self, name: str, before: RolloutBook, after: RolloutBook) -> None:
        was, now = before.rollouts[name], after.rollouts[name]
        if was.state is not now.state or was.stage != now.stage:
            _log.info("rollout", rollout=name, state=now.state, stage=now.stage + 1, reason=now.reason[:500])

    def _watch(self) -> None:
        metrics = self._metrics
        for state in RolloutState:
            metrics.watch_labelled(
                "rollouts", "Rollouts of each state", {"state": state.value}, functools.partial(self._in_state, state)
            )
        for standing in Standing:
            metrics.watch_labelled(
                "rollout_devices",
                "Devices in the stages that running rollouts have reached",
                {"standing": standing.value},
                functools.partial(self._standing, standing),
            )
        metrics.watch("rollout_devices_waiting", "Devices to be looked at for orders", lambda: self._publisher.waiting)
        metrics.watch(
            "rollout_devices_told",
            "Devices that have not read their order, or may be told again",
            lambda: self._publisher.told,
        )
        metrics.watch(
            "rollout_key_refused",
            "1 while devices would refuse what this gateway signs",
            lambda: bool(self._refused_key),
        )

    def _standing(self, standing: Standing) -> float:
        return self._standings[standing]

    def _in_state(self, state: RolloutState) -> float:
        return sum(rollout.state is state for rollout in self._book.rollouts.values())


def views(fleet: Iterable[Device], model: str) -> list[DeviceView]:
    """Devices as rollouts of a model see them."""
    return [
        DeviceView(device.name, device.tags, device.online, device.presence_us, device.models.get(model))
        for device in fleet
    ]

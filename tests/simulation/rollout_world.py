"""A fleet, a broker that loses, a table, and several controllers that see different things at different times."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec
import pyarrow as pa

from contract.messages import Assignments, decode
from contract.models import FINAL_STATES, Assignment, DeviceState, ReportedOrder
from gateway.devices import Device
from gateway.rollouts import evidence, machine, selection
from gateway.rollouts.actions import Action, Person, act, create
from gateway.rollouts.controller import views
from gateway.rollouts.publisher import Publisher
from gateway.rollouts.targets import Targets
from lake.errors import CommitConflictError
from lake.ledger import rows_of
from lake.rollout_spec import Guard, Selection, Spec, Stage
from lake.rollouts import (
    ACTIVE,
    ENDED,
    SCHEMA,
    EventKind,
    Rollout,
    RolloutBook,
    RolloutEvent,
    RolloutRefused,
    RolloutState,
    RolloutTable,
    events_of,
    fold,
)
from tests.rollout_devices import MODEL, SimulatedDevice, sha_of

S = 1_000_000
WINDOWS = 100
PEACE = "peace"
"""The last rollout of each history."""
REFUSALS_MAX = 2
"""Of one order by one device, for reasons that pass."""


class BrokenPromiseError(AssertionError):
    """An invariant does not hold."""


class MemoryTable:
    """`lake.tables.ControlTable` in memory: check-and-set, handles that may be stale. Nobody restores it."""

    life = 1

    def __init__(self, commits: list[pa.Table]) -> None:
        self._commits = commits
        self._at = 0

    @property
    def version(self) -> int:
        return self._at

    def refresh(self) -> None:
        self._at = len(self._commits)

    def read(self) -> pa.Table:
        return pa.concat_tables([SCHEMA.empty_table(), *self._commits[: self._at]])

    def append(self, rows: pa.Table, *, expected: int | None = None) -> None:
        if expected != len(self._commits) or expected != self._at:
            raise CommitConflictError("somebody else was first")
        self._commits.append(rows)


class PlainSealer:
    """Signs nothing."""

    key_id = "none"

    def seal(self, assignment: Assignment) -> dict[str, object]:
        return msgspec.to_builtins(assignment)


class Controller:
    """One gateway: what it last heard of each device, and a handle of the table."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.heard: dict[str, Device] = {}
        self.table = RolloutTable(lambda: self._handle)
        self._handle = MemoryTable(world.commits)
        self.publisher = Publisher(
            self._publish,
            self.heard.get,
            lambda name: True,
            republish_s=30.0,
            clock_us=lambda: world.now_us,
            clock_s=lambda: world.now_us / S,
        )
        self.aimed = -1

    def hear(self, device: SimulatedDevice, *, online: bool, since_us: int) -> None:
        said = device.reported(self.world.now_us)
        self.heard[device.name] = Device(
            name=device.name, online=online, presence_us=since_us, tags=said.tags, models=said.models
        )

    def drive(self) -> None:
        """As `RolloutController.drive`; the others may act between its look and its commit."""
        book = self.table.look()
        for rollout in book.rollouts.values():
            devices = views(self.heard.values(), rollout.spec.model)

            def step(book: RolloutBook, name: str = rollout.name, devices: list = devices) -> list[RolloutEvent]:
                self.world.interleave(self)
                found = machine.survey(book.rollouts[name], devices, self.world.now_us)
                decided = machine.decide(book.rollouts[name], found, self.world.now_us, self.name)
                self.world.decided(book, name, devices, decided)
                return decided

            self.table.act(step)
        self.world.check_table()

    def hand_out(self) -> None:
        book = self.table.look()
        if book.version != self.aimed:
            self.publisher.aim(Targets(book))
            self.aimed = book.version
        self.publisher.look_at(self.heard)
        self.publisher.publish_slice(PlainSealer())

    def _publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> bool:
        if self.world.chance(0.1):
            return False
        self.world.published(topic.rpartition("/")[2], payload)
        return True


class World:
    """Everything, driven by one seed.

    Args:
        seed: of all choices.
        devices: how many there are.
    """

    def __init__(self, seed: int, devices: int = 12) -> None:
        self.rng = random.Random(seed)
        self.now_us = 1_000 * S
        self.commits: list[pa.Table] = []
        self.bad = {version: self.chance(0.2) for version in (2, 3)}
        """Versions that most devices cannot run."""
        self.noisy = {version: self.chance(0.2) for version in (2, 3)}
        """Versions that break the guard."""
        self.devices = {f"pi-{number}": self._device(f"pi-{number}") for number in range(devices)}
        self.online = {name: self.chance(0.8) for name in self.devices}
        self.since_us = dict.fromkeys(self.devices, 1)
        self.retained: dict[str, bytes] = {}
        self.unheard: set[str] = set()
        """Devices to which the broker has yet to hand what it retained."""
        self.controllers = [Controller(self, f"gateway-{number}") for number in range(2)]
        self.checked = 0
        self._nested = False
        self._book = RolloutBook()

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def _device(self, name: str) -> SimulatedDevice:
        lemon = self.chance(0.02)

        def fate(order: Assignment) -> DeviceState | None:
            if lemon:
                return None
            bad = self.bad.get(order.version, False) and self.chance(0.8)
            return DeviceState.FAILED if bad else DeviceState.COMMITTED

        figures = {version: {"windows": WINDOWS, "errors": 60 if noisy else 1} for version, noisy in self.noisy.items()}
        tags = ("canary",) if self.chance(0.3) else ()
        refused: Counter[int] = Counter()

        def refuses(order: Assignment) -> bool:
            refused[order.sequence] += 1
            return refused[order.sequence] <= REFUSALS_MAX and self.chance(0.05 if order.trial.shadow_windows else 0.3)

        return SimulatedDevice(name, tags=tags, fate=fate, figures=figures, refuses=refuses)

    # What happens.

    def spec(self, version: int) -> Spec:
        def stage(**chosen: object) -> Stage:
            return Stage(
                committed_share_min=self.rng.choice((0.5, 0.8, 1.0)),
                bake_s=self.rng.choice((0, 20)),
                max_wait_s=self.rng.choice((60.0, 240.0)),
                failures_min_executed=self.rng.choice((1, 3)),
                failure_share_max=0.3,
                guard=Guard(error_share_max=0.25),
                approval=self.chance(0.1),
                **chosen,
            )

        stages = [stage(percent=30), stage(percent=60), stage(percent=100)]
        if self.chance(0.3):
            stages.insert(0, stage(tags=("canary",)))
        target = Selection(tags=("canary",)) if self.chance(0.1) else Selection()
        return Spec(
            model=MODEL,
            version=version,
            sha256=sha_of(version),
            stages=tuple(stages),
            target=target,
            approval=self.chance(0.1),
            rollback_on_abort=self.chance(0.7),
        )

    def person(self, decide: Callable[[RolloutBook], Sequence[RolloutEvent]]) -> bool:
        handle = MemoryTable(self.commits)
        try:
            RolloutTable(lambda: handle).act(decide)
        except RolloutRefused:
            return False
        self.check_table()
        return True

    def start(self, version: int, *, supersede: bool = False) -> bool:
        name = f"r{version}-{len(self.commits)}"
        return self.person(create(name, self.spec(version), self.somebody(), supersede=supersede))

    def somebody(self) -> Person:
        return Person("ada", "the test wants it", self.now_us)

    def step(self) -> None:
        """Anything."""
        name = self.rng.choice(list(self.devices))
        match self.rng.randrange(12):
            case 0:
                self.now_us += self.rng.choice((1, 5, 20)) * S
            case 1 | 2:
                self.rng.choice(self.controllers).drive()
            case 3 | 4:
                self.rng.choice(self.controllers).hand_out()
            case 5 | 6 | 7:
                for each in self.devices:
                    if self.chance(0.7):
                        self.device_acts(each)
            case 8:
                for each in self.devices:
                    if self.chance(0.8):
                        self.report(each)
            case 9:
                if self.chance(0.3):
                    self.switch(name, not self.online[name])
            case 10:
                if self.chance(0.08):
                    self.meddle()
            case 11:
                if self.chance(0.05):
                    self.forget(told=self.chance(0.5))
                if self.chance(0.05):
                    # A gateway is killed; another takes its place with nothing but what the broker retained.
                    self.controllers[self.rng.randrange(2)] = fresh = Controller(self, f"gateway-{self.now_us}")
                    for device in self.devices.values():
                        fresh.hear(device, online=self.online[device.name], since_us=self.since_us[device.name])

    def device_acts(self, name: str) -> None:
        device = self.devices[name]
        if not self.online[name]:
            return
        if name in self.retained and name in self.unheard:
            for envelope in decode(self.retained[name], Assignments).envelopes:
                device.receive(msgspec.convert(envelope, Assignment))
        self.unheard.discard(name)
        device.step()

    def report(self, name: str) -> None:
        for controller in self.controllers:
            if self.chance(0.8):
                controller.hear(self.devices[name], online=self.online[name], since_us=self.since_us[name])

    def forget(self, *, told: bool) -> None:
        """The broker loses what it had retained; whether the gateways notice."""
        self.retained.clear()
        for controller in self.controllers:
            if told:
                controller.publisher.reconnected()

    def switch(self, name: str, online: bool) -> None:
        self.online[name], self.since_us[name] = online, self.now_us
        self.unheard.add(name)

    def meddle(self) -> None:
        """A person does something, sensible or not."""
        book = self.book
        if not book.rollouts:
            return
        rollout = self.rng.choice(list(book.rollouts.values()))
        action = self.rng.choice(
            [Action.APPROVE, Action.PAUSE, Action.RESUME, Action.RESUME, Action.ABORT, Action.ROLLBACK]
        )
        self.person(act(action, rollout.name, self.somebody(), rollback=self.chance(0.5)))

    def interleave(self, controller: Controller) -> None:
        """Somebody else is quicker."""
        if not self._nested and self.chance(0.3):
            self._nested = True
            try:
                other = self.controllers[0] if controller is self.controllers[1] else self.controllers[1]
                other.drive()
            finally:
                self._nested = False

    def settle(self) -> None:
        """Everybody is online, hears and is heard, until every rollout has ended and nothing moves any more."""
        for round_number in range(400):
            for name in self.devices:
                if not self.online[name]:
                    self.switch(name, True)
            book = self.book
            for rollout in book.rollouts.values():
                if rollout.state is RolloutState.PAUSED:
                    self.person(act(Action.RESUME, rollout.name, self.somebody()))
                if rollout.state is RolloutState.APPROVAL:
                    self.person(act(Action.APPROVE, rollout.name, self.somebody()))
            for name in self.devices:
                self.report(name)
            for controller in self.controllers:
                controller.drive()
                controller.hand_out()
            for name in self.devices:
                self.device_acts(name)
            self.now_us += 5 * S
            if round_number > 30 and all(rollout.state in ENDED for rollout in book.rollouts.values()):
                break
        else:
            raise BrokenPromiseError(
                f"never ends: {[(r.name, r.state, r.reason) for r in self.book.rollouts.values()]}"
            )
        for _ in range(40):  # past every republish
            for name in self.devices:
                self.report(name)
            for controller in self.controllers:
                controller.hand_out()
            for name in self.devices:
                self.device_acts(name)
            self.now_us += 5 * S

    # What must hold.

    @property
    def events(self) -> list[RolloutEvent]:
        return events_of(rows_of(pa.concat_tables([SCHEMA.empty_table(), *self.commits])))

    @property
    def book(self) -> RolloutBook:
        if self._book.version != len(self.commits):
            self._book = fold(self.events, len(self.commits))
        return self._book

    def check_table(self) -> None:
        """One rollout of a model at a time, and every commit has a sequence of its own."""
        if self.checked == len(self.commits):
            return
        self.checked = len(self.commits)
        for number, rows in enumerate(self.commits, 1):
            if set(rows.column("sequence").to_pylist()) != {number}:
                raise BrokenPromiseError(f"commit {number} has sequences {rows.column('sequence').to_pylist()}")
        active = [rollout.name for rollout in self.book.rollouts.values() if rollout.state in ACTIVE]
        if len(active) > 1:
            raise BrokenPromiseError(f"two at a time: {active}")

    def decided(
        self, book: RolloutBook, name: str, devices: Sequence[evidence.DeviceView], events: Sequence[RolloutEvent]
    ) -> None:
        """A stage advances only with enough commits and a guard that holds, counted here by hand."""
        rollout = book.rollouts[name]
        for event in events:
            if event.event is EventKind.STAGE_STARTED:
                self.check_line(rollout, devices, event)
        if not {event.event for event in events} & {EventKind.STAGE_PASSED, EventKind.SUCCEEDED}:
            return
        stage = rollout.spec.stages[rollout.stage]
        reached = rollout.spec.stages[: len(rollout.stages)]
        members = []
        for device in devices:
            order = device.order
            mine = order is not None and order.rollout == name and order.version == rollout.spec.version
            if self.belongs(rollout, reached, device.name, device.tags) or mine:
                members.append((device, order if mine else None))
        if not members:
            return
        committed = sum(order is not None and order.state is DeviceState.COMMITTED for _, order in members)
        waited_us = rollout.stage_us + stage.max_wait_s * S
        waited = self.now_us >= waited_us

        def is_excused(device: evidence.DeviceView, order: ReportedOrder | None) -> bool:
            if waited and (device.presence_us or 0) >= waited_us:
                return order is None or (bool(device.online) and order.state not in FINAL_STATES)
            return order is None and not device.online and (waited or not self.joined_now(rollout, device))

        excused = sum(is_excused(device, order) for device, order in members)
        if committed < max(1, stage.committed_share_min * (len(members) - excused) - 1e-9):
            raise BrokenPromiseError(f"{name} advanced with {committed} of {len(members)} - {excused} at most")
        joined = [
            (device, order)
            for device, order in members
            if self.joined_now(rollout, device) and not is_excused(device, order)
        ]
        if any(order is not None or device.online for device, order in joined) and not any(
            order is not None and order.state is DeviceState.COMMITTED for _, order in joined
        ):
            raise BrokenPromiseError(f"{name} advanced though none of those who joined committed: {joined}")
        running = [d.model for d, _ in members if d.model is not None and d.model.active == rollout.spec.version]
        errors, windows = sum(m.errors for m in running), sum(m.windows for m in running)
        if errors > 0.25 * windows + 1e-9:
            raise BrokenPromiseError(f"{name} advanced with {errors} errors of {windows} windows")
        if stage.bake_s and (rollout.baking_us is None or self.now_us < rollout.baking_us + stage.bake_s * S):
            raise BrokenPromiseError(f"{name} advanced before its bake time was over")

    def joined_now(self, rollout: Rollout, device: evidence.DeviceView) -> bool:
        earlier = rollout.spec.stages[: rollout.stage]
        return not self.belongs(rollout, earlier, device.name, device.tags)

    @staticmethod
    def belongs(rollout: Rollout, stages: Sequence[Stage], device: str, tags: Sequence[str]) -> bool:
        target = rollout.spec.target
        if target.tags and not set(target.tags) & set(tags):
            return False
        highest = max(rollout.lines[: len(stages)], default=0)
        named = {tag for stage in stages for tag in stage.tags}
        return selection.point(rollout.name, device) < highest or bool(named & set(tags))

    def check_line(self, rollout: Rollout, devices: Sequence[evidence.DeviceView], event: RolloutEvent) -> None:
        """A percentage holds as many of the devices there are as it says, rounded up."""
        percent = rollout.spec.stages[len(rollout.stages)].percent
        target = set(rollout.spec.target.tags)
        points = [selection.point(rollout.name, d.name) for d in devices if not target or target & set(d.tags)]
        if percent is None or not points:
            return
        below = json.loads(event.detail)["below"]
        inside = sum(point < below for point in points)
        ties = max(points.count(point) for point in points)
        if not 0 <= inside - percent / 100 * len(points) < ties:
            raise BrokenPromiseError(f"{rollout.name}: {inside} of {len(points)} devices are {percent} %")

    def published(self, name: str, payload: bytes) -> None:
        """No device outside the reached stages gets an order, and nobody gets a version nobody rolled out."""
        book, device = self.book, self.devices[name]
        for envelope in decode(payload, Assignments).envelopes:
            order = msgspec.convert(envelope, Assignment)
            rollout = book.rollouts[order.rollout]
            reached = rollout.spec.stages[: len(rollout.stages)]
            if not self.belongs(rollout, reached, name, device.tags):
                raise BrokenPromiseError(f"{name} is ordered by {rollout.name} to {order.version} outside its stages")
            if order.version == rollout.spec.version and order.sequence not in rollout.stages:
                raise BrokenPromiseError(f"{name} is ordered {order.version} with sequence {order.sequence}")
            if order.version != rollout.spec.version and order.sequence != rollout.rollback:
                raise BrokenPromiseError(f"{name} is ordered back to {order.version} without a rollback")
            if order.sequence == rollout.rollback and order.version != device.before.get(rollout.name):
                before = device.before.get(rollout.name, "never read an order of it")
                raise BrokenPromiseError(f"{name} is ordered back to {order.version}, but before: {before}")
        self.retained[name] = payload
        self.unheard.add(name)

    def check_end(self) -> None:
        """What every device runs at the end follows from the rows."""
        book = self.book
        for device in self.devices.values():
            sequences = [order.sequence for order in device.read]
            if sequences != sorted(set(sequences)):
                raise BrokenPromiseError(f"{device.name} read {sequences}")
        newest = max(book.rollouts.values(), key=lambda rollout: rollout.latest, default=None)
        if newest is None or not newest.began:
            return
        members = [
            device
            for device in self.devices.values()
            if self.belongs(newest, newest.spec.stages[: len(newest.stages)], device.name, device.tags)
        ]
        for device in members:
            latest = device.read[-1] if device.read else None
            if newest.state is RolloutState.SUCCEEDED:
                mine = latest is not None and latest.rollout == newest.name
                if latest is None or not mine or latest.version != newest.spec.version:
                    raise BrokenPromiseError(f"{newest.name} succeeded, but {device.name} last read {latest}")
                if device.state() is DeviceState.REJECTED:
                    raise BrokenPromiseError(f"{newest.name} succeeded, but {device.name} was not asked again")
            if newest.state is RolloutState.ROLLED_BACK and newest.name in device.before:
                self.check_back(newest, device)

    def check_back(self, rollout: Rollout, device: SimulatedDevice) -> None:
        """Who read an order of a rollout that was taken back runs what it ran before."""
        latest, state, runs = device.read[-1], device.state(), device.active.get(MODEL, 0)
        if latest.rollout == rollout.name and latest.sequence != rollout.rollback:
            raise BrokenPromiseError(f"{rollout.name} went back, but {device.name} last read {latest}")
        if state is DeviceState.REJECTED:
            raise BrokenPromiseError(f"{rollout.name} went back, but {device.name} was not asked again")
        if state is DeviceState.COMMITTED and runs != device.before[rollout.name]:
            raise BrokenPromiseError(
                f"{rollout.name} went back, but {device.name} runs {runs}, before: {device.before[rollout.name]}"
            )


def run(seed: int, steps: int = 250) -> World:
    """A history: two releases, one after the other, in trouble; perhaps both are taken back; a third one in peace.

    Raises:
        BrokenPromiseError: naming what did not hold.
    """
    world = World(seed)
    for controller in world.controllers:
        for name, device in world.devices.items():
            controller.hear(device, online=world.online[name], since_us=1)
    world.start(2)
    for _ in range(steps):
        world.step()
    world.start(3, supersede=world.chance(0.3))
    for _ in range(steps):
        world.step()
    world.settle()
    world.check_end()
    if world.chance(0.3):
        for rollout in sorted(world.book.rollouts.values(), key=lambda rollout: -rollout.began):
            if world.person(act(Action.ROLLBACK, rollout.name, world.somebody())):
                world.settle()
                world.check_end()
    patient = Stage(percent=100, committed_share_min=0.5, bake_s=0, max_wait_s=1_000.0, failure_share_max=1.0)
    world.person(create(PEACE, Spec(model=MODEL, version=4, sha256=sha_of(4), stages=(patient,)), world.somebody()))
    world.settle()
    world.check_end()
    if world.book.rollouts[PEACE].state is not RolloutState.SUCCEEDED:
        raise BrokenPromiseError(f"a good release did not succeed: {world.book.rollouts[PEACE].reason}")
    return world

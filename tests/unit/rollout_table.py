"""Rollouts that are decided commit by commit, and devices as they report."""

from __future__ import annotations

import msgspec

from contract.models import DeviceState, ReportedModel, ReportedOrder
from gateway.rollouts.actions import Person, act, create
from gateway.rollouts.evidence import DeviceView
from gateway.rollouts.machine import decide, survey
from lake.rollout_spec import Stage
from lake.rollouts import EventKind, RolloutBook, RolloutEvent, fold
from tests.rollout_devices import MODEL, numbered, sha_of, spec

S = 1_000_000
ADA = Person("ada", "a test", 1 * S)


class Table:
    """Rollouts that are added to, commit by commit."""

    def __init__(self) -> None:
        self.events: list[RolloutEvent] = []
        self.version = 0
        self.now_us = 10 * S

    @property
    def book(self) -> RolloutBook:
        return fold(reversed(self.events), self.version)

    def commit(self, events) -> list[EventKind]:
        if events:
            self.events += numbered(events, self.version)
            self.version += 1
        return [event.event for event in events]

    def create(self, order, name="r", **options) -> str:
        self.commit(create(name, order, Person("ada", "a test", self.now_us), **options)(self.book))
        return name

    def act(self, action, name="r", **options) -> list[EventKind]:
        return self.commit(act(action, name, Person("ada", "a test", self.now_us), **options)(self.book))

    def decide(self, devices=(), name="r") -> list[EventKind]:
        rollout = self.book.rollouts[name]
        return self.commit(decide(rollout, survey(rollout, devices, self.now_us), self.now_us, "gateway"))

    def rollout(self, name="r"):
        return self.book.rollouts[name]


def has(name, rollout, state, *, sequence=None, active=None, online=True, tags=(), **figures):
    """A device that has read the rollout's order."""
    order = ReportedOrder(
        version=rollout.spec.version,
        sha256=rollout.spec.sha256,
        sequence=sequence or rollout.stages[-1],
        rollout=rollout.name,
        state=state,
        since_us=0,
        reason="it burns" if state is DeviceState.FAILED else "",
        compared=figures.pop("compared", 0),
        disagreements=figures.pop("disagreements", 0),
    )
    if active is None:
        active = rollout.spec.version if state is DeviceState.COMMITTED else 0
    previous = figures.pop("previous", 0)
    shas = {"active_sha256": sha_of(active), "previous_sha256": sha_of(previous)}
    model = ReportedModel(active=active, previous=previous, order=order, **shas, **figures)
    return DeviceView(name, tags, online, 1, model)


def idle(name, *, online=True, presence_us=1, tags=(), active=0):
    return DeviceView(name, tags, online, presence_us, ReportedModel(active=active))


def one_stage(**changes):
    """A rollout to everybody at once, whose stage has begun."""
    table = Table()
    options = {"bake_s": 0, "max_wait_s": 60.0, "committed_share_min": 1.0} | changes
    table.create(spec(stages=(Stage(percent=100, **options),)))
    assert table.decide() == [EventKind.STAGE_STARTED]
    return table


def reaching(order, reached, lines=None, name="r"):
    """A rollout whose first stages have begun, with the lines that its rows name; else with none named."""
    table = Table()
    table.create(order, name)
    rows = [{} if lines is None or lines[number] is None else {"below": lines[number]} for number in range(reached)]
    for row in rows:
        content = msgspec.json.encode(row).decode()
        table.commit([RolloutEvent(1, name, MODEL, "g", EventKind.STAGE_STARTED, "", content)])
    return table.rollout(name)

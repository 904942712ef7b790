"""The thread that follows orders, round by round, with a store on disk and an engine; only what takes time is made up.

Mutants tried: the payload at hand overwritten by an older one that is to be opened again; a job begun while an event
waits; a candidate loaded again and again while the disk takes no records; a repeated order not handed on.
"""

from __future__ import annotations

import base64
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from contract.messages import encode
from contract.models import Assignment, Assignments, DeviceState, ReportedOrder
from edge_agent.models.child import Opened
from edge_agent.models.inference import Engine
from edge_agent.models.lifecycle import Done, Event, Job
from edge_agent.models.metrics import ModelMetrics
from edge_agent.models.orders import Seen
from edge_agent.models.predictions import PredictionWriter
from edge_agent.models.record import ModelRecord, Release
from edge_agent.models.service import ModelService
from edge_agent.models.settings import ModelsSettings
from edge_agent.models.store import ReleaseStore, StoreUnavailableError
from tests.integration.servers import wait_until

SOON_S = 10.0


class Tasks:
    """What takes time: answers as a test says, and keeps what was asked."""

    def __init__(self) -> None:
        self.opened: list[tuple[tuple[int, ...], dict[str, Seen]]] = []
        self.jobs: list[Job] = []
        self.gate = threading.Event()
        self.answer: Callable[[tuple[Assignment, ...]], Any] = lambda orders: "not now"
        self.event: Callable[[Job, ModelRecord], Event] = lambda job, record: Done(record.assignment.sequence, job)

    def open(self, envelopes: tuple[dict[str, Any], ...], seen: dict[str, Seen], cancel: threading.Event) -> Any:
        orders = tuple(msgspec.json.decode(base64.b64decode(each["payload"]), type=Assignment) for each in envelopes)
        self.opened.append((tuple(order.sequence for order in orders), seen))
        assert self.gate.wait(SOON_S)
        return self.answer(orders)

    def do(self, job: Job, record: ModelRecord, cancel: threading.Event) -> Event:
        self.jobs.append(job)
        return self.event(job, record)


class Bench:
    """A service that is driven round by round."""

    def __init__(self, folder: Path, *records: ModelRecord) -> None:
        self.tasks, self.changes = Tasks(), 0
        self.store = ReleaseStore(folder, factory=None, bytes_max=1 << 30, trouble=lambda text: None)
        for record in records:
            self.store.save(record)
        (folder / "root.json").write_text("{}")
        settings = ModelsSettings(url="http://host/", root=str(folder / "root.json"), retry_base_s=0.01)
        self.service = ModelService(
            settings=settings,
            store=self.store,
            engine=Engine(PredictionWriter(lambda stream: None, 0), time.monotonic),
            tasks=self.tasks,
            clock=Clock(),
            synced=lambda: False,
            metrics=ModelMetrics(CollectorRegistry(), 1),
            report=lambda event: None,
            changed=self._changed,
            rng=random.Random(1),
        )

    def _changed(self) -> None:
        self.changes += 1

    def tell(self, *orders: Assignment) -> None:
        envelopes = tuple({"payload": base64.b64encode(msgspec.json.encode(order)).decode()} for order in orders)
        self.service.assignments(encode(Assignments(envelopes=envelopes)))

    def until(self, done: Callable[[], Any], what: str) -> None:
        def turned() -> Any:
            self.service._round()
            return done()

        wait_until(turned, SOON_S, what)

    def shown(self) -> ReportedOrder:
        order = self.service.reported()["m"].order
        assert order is not None
        return order


class Clock:
    def wall_us(self) -> int:
        return 1

    def monotonic_s(self) -> float:
        return time.monotonic()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(*records: ModelRecord) -> Bench:
        made.append(Bench(tmp_path, *records))
        return made[-1]

    yield make
    for each in made:
        each.tasks.gate.set()
        each.service._orders.end(SOON_S)
        each.service._releases.end(SOON_S)
        each.store.close()


def assignment(sequence: int, version: int = 1) -> Assignment:
    return Assignment(
        device="d", model="m", version=version, sha256="a" * 64, sequence=sequence, not_after_us=10**15, rollout="r"
    )


def committed(sequence: int) -> ModelRecord:
    order = ReportedOrder(version=0, sha256="", sequence=sequence, rollout="r", state=DeviceState.COMMITTED, since_us=1)
    seen = Seen(sequence=sequence, key="k")
    return ModelRecord(model="m", seen=seen, assignment=assignment(sequence, 0), order=order)


def opened_as(*, reason: str = "", final: bool = True) -> Callable[[tuple[Assignment, ...]], Any]:
    return lambda orders: tuple(
        Opened(assignment=order, key="k", reason=reason, message="why", final=final) for order in orders
    )


def test_orders_that_arrive_while_older_ones_are_opened_are_not_overwritten_by_them(bench) -> None:
    one = bench()
    one.tell(assignment(1))
    one.until(lambda: one.tasks.opened, "the first is being opened")
    one.tell(assignment(2))
    one.service._round()  # takes the new ones; the lane is still busy with the old
    one.tasks.gate.set()  # … and now these cannot be opened yet
    one.until(lambda: len(one.tasks.opened) > 3, "they are opened again")
    assert [sequences for sequences, _ in one.tasks.opened[1:]] == [(2,)] * (len(one.tasks.opened) - 1)


def test_a_forged_order_is_forgotten_when_the_proven_one_comes_again(bench) -> None:
    one = bench(committed(5))
    one.tasks.gate.set()
    one.tasks.answer = opened_as(reason="bad_signature")
    one.tell(assignment(1_000))
    one.until(lambda: one.shown().sequence == 1_000, "the forged one is shown")
    assert one.shown().state is DeviceState.REJECTED
    one.tasks.answer = opened_as(reason="repeated")
    before = one.changes
    one.tell(assignment(5))
    one.until(lambda: one.shown().sequence == 5, "the proven one is shown")
    assert (one.shown().state, one.changes) == (DeviceState.COMMITTED, before + 1)


def test_whoever_is_told_of_a_change_finds_it_in_the_report(bench, monkeypatch) -> None:
    """Else the fleet hears of it with the next report only, a minute later."""
    one = bench(committed(5))
    one.tasks.gate.set()
    one.tasks.answer = opened_as(reason="bad_signature")
    found = []
    monkeypatch.setattr(one.service, "_changed", lambda: found.append(one.shown().sequence))
    one.tell(assignment(1_000))
    one.until(lambda: one.shown().sequence == 1_000, "the forged one is shown")
    assert found == [1_000]


def test_an_order_rejected_for_what_passes_is_asked_for_as_if_it_were_new(bench) -> None:
    record = msgspec.structs.replace(committed(5), passing=True)
    one = bench(record)
    one.tasks.gate.set()
    one.tell(assignment(5))
    one.until(lambda: one.tasks.opened, "it is opened")
    assert one.tasks.opened[0][1] == {"m": Seen(sequence=4, key="k")}


def test_no_job_begins_and_no_model_is_loaded_while_the_disk_takes_no_record(bench, monkeypatch) -> None:
    candidate = Release(version=1, sha256="a" * 64, manifest="b" * 64)
    order = ReportedOrder(version=1, sha256="a" * 64, sequence=1, rollout="r", state=DeviceState.VERIFIED, since_us=1)
    one = bench(
        ModelRecord(
            model="m", candidate=candidate, seen=Seen(sequence=1, key="k"), assignment=assignment(1), order=order
        )
    )
    saves = []

    def refuses(record: ModelRecord) -> None:
        saves.append(record.order.state)
        raise StoreUnavailableError("read-only")

    monkeypatch.setattr(one.store, "save", refuses)
    one.until(lambda: saves, "the probe's result is to be kept")
    for _ in range(20):
        one.service._round()
    assert one.tasks.jobs == [Job.PROBE]
    assert saves == [DeviceState.PROBED]
    # A candidate that is to be loaded waits, too: its count of starts could not be kept.
    probed = msgspec.structs.replace(order, state=DeviceState.PROBED)
    one.service._records["m"] = msgspec.structs.replace(one.service._records["m"], order=probed)
    one.service._round()
    assert saves == [DeviceState.PROBED]

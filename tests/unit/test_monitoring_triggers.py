"""Triggers: asked for once, claimed by one, taken over when a trainer is not heard of, ended by who holds them.

Mutants tried, each made a test here fail: a request though one is open for longer than the pause; the pause counted
from the request; a claim that never runs out; finishing what another has taken.
"""

from __future__ import annotations

import threading

import pytest

from lake.monitoring.triggers import PATH, SCHEMA, ClaimLost, TriggerEvent, TriggerKind, TriggerTable
from lake.tables import ControlTable
from tests.monitoring_parts import store_in


class Clock:
    def __init__(self) -> None:
        self.now_us = 1_000_000_000

    def __call__(self) -> int:
        return self.now_us

    def wait(self, seconds: float) -> None:
        self.now_us += round(seconds * 1e6)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def opened(tmp_path, clock):
    store = store_in(tmp_path / "lake")

    def table(who: str) -> TriggerTable:
        handle = ControlTable(store, PATH, SCHEMA)
        return TriggerTable(lambda: handle, who, clock)

    return table


def ask(table: TriggerTable, model="gait", pause_s=100.0) -> str | None:
    return table.request(model, 1, TriggerKind.DRIFT, "drift", pause_s)


def test_of_many_who_ask_at_once_one_is_heard(opened):
    tables = [opened(f"gateway-{number}") for number in range(5)]
    names: list[str | None] = []
    threads = [threading.Thread(target=lambda table=table: names.append(ask(table))) for table in tables]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(name is not None for name in names) == 1
    assert len(tables[0].look()) == 1
    assert ask(tables[0], "other") is not None


def test_while_one_is_open_no_other_is_asked_for_however_long_that_takes(opened, clock):
    gateway = opened("gateway")
    ask(gateway)
    clock.wait(100_000)
    assert ask(gateway) is None
    opened("trainer").claim("gait", 1_000_000)
    clock.wait(100_000)
    assert ask(gateway) is None


def test_the_pause_counts_from_the_end_of_the_last_training(opened, clock):
    gateway, trainer = opened("gateway"), opened("trainer")
    name = ask(gateway)
    trainer.claim("gait", 50)
    clock.wait(40)
    trainer.finish(name, TriggerEvent.FAILED, "no data", {})
    clock.wait(99)
    assert ask(gateway) is None
    clock.wait(2)
    assert ask(gateway) is not None


def test_one_trainer_claims_and_the_other_finds_nothing(opened):
    ask(opened("gateway"))
    first, second = opened("a"), opened("b")
    assert first.claim("gait", 50).who == "a"
    assert second.claim("gait", 50) is None
    assert second.claim("other", 50) is None


def test_the_work_of_a_trainer_that_was_killed_is_taken_over_and_it_may_not_end_it(opened, clock):
    ask(opened("gateway"))
    dead, heir = opened("dead"), opened("heir")
    name = dead.claim("gait", 50).name
    clock.wait(49)
    assert heir.claim("gait", 50) is None
    clock.wait(2)
    assert heir.claim("gait", 50).claims == 2
    with pytest.raises(ClaimLost):
        dead.renew(name, 50)
    with pytest.raises(ClaimLost):
        dead.finish(name, TriggerEvent.DONE, "", {})
    heir.finish(name, TriggerEvent.DONE, "", {"version": 2})
    found = heir.look()[name]
    assert (found.event, found.who, found.detail) == (TriggerEvent.DONE, "heir", {"version": 2})


def test_a_claim_that_is_renewed_holds(opened, clock):
    ask(opened("gateway"))
    trainer, other = opened("a"), opened("b")
    name = trainer.claim("gait", 50).name
    for _ in range(4):
        clock.wait(40)
        trainer.renew(name, 50)
        assert other.claim("gait", 50) is None
    trainer.finish(name, TriggerEvent.DONE, "", {})
    assert other.claim("gait", 50) is None

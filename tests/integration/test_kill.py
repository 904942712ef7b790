"""Exactly once, with real processes that are really killed: agents, broker, gateways and object store, in any order.

The default run is short; `make chaos` is the whole: at least 90 s, at least 30 SIGKILLs. `--seed N` replays a schedule.

Mutant tried: a gateway that acknowledges what it has admitted, before the commit: some thousand rows were lost.
"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from simulators.faults.processes import Killed, ProcessFaults, kill_schedule
from tests.integration.fleet import Fleet
from tests.integration.servers import wait_until


def _kill_all_over(fleet: Fleet, seed: int, kills: int, duration_s: float) -> list[Killed]:
    faults = ProcessFaults(fleet.pid_of)
    targets = [*fleet.devices, *fleet.gateways * 3, *[fleet.broker.name, fleet.store.name] * 3]
    schedule = kill_schedule(seed, targets, kills, duration_s, pairs_min=max(1, kills // 10))
    half = len(schedule) // 2
    killed = faults.run(schedule[:half], threading.Event())
    fleet.kill_in_commit(faults)
    rest = [type(kill)(at_s=kill.at_s - schedule[half].at_s, targets=kill.targets) for kill in schedule[half:]]
    return killed + faults.run(rest, threading.Event())


def _check_books(fleet: Fleet, killed: list[Killed], kills: int) -> None:
    # A stop right after a kill would find nobody to send what the killed one held.
    gone = {(kill.target, kill.pid) for kill in killed}
    wait_until(
        lambda: all(fleet.pid_of(name) not in (None, pid) for name, pid in gone), 30.0, "all that were killed are back"
    )
    fleet.servers.supervisor.wait_ready([*fleet.devices, *fleet.gateways], 30.0)
    fleet.drain()
    held = {device: [lane for lane in fleet.lanes(device) if lane.batches] for device in fleet.devices}
    assert not any(held.values()), f"not acknowledged after the drain: {held}"
    books = fleet.books()
    assert (books.lost, books.duplicated, books.wrong) == (0, 0, 0), books
    assert len(killed) >= kills
    # More process lives than devices: agents were killed, and yet each life's rows are whole.
    assert books.runs > len(fleet.devices)
    assert books.rows > 1_000


@pytest.mark.timeout(400)
@pytest.mark.parametrize("broker", ["mosquitto", "iotcore"])
def test_every_accepted_reading_arrives_once_though_anything_is_killed(tmp_path: Path, seed: int, broker: str) -> None:
    with Fleet(tmp_path, broker=broker, devices=3) as fleet:
        killed = _kill_all_over(fleet, seed, kills=10, duration_s=25.0)
        _check_books(fleet, killed, kills=10)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("broker", ["mosquitto", "iotcore"])
def test_eight_devices_lose_nothing_in_ninety_seconds_of_kills(tmp_path: Path, seed: int, broker: str) -> None:
    with Fleet(tmp_path, broker=broker, devices=8) as fleet:
        killed = _kill_all_over(fleet, seed, kills=36, duration_s=100.0)
        _check_books(fleet, killed, kills=36)

"""Rollouts as a model: random fleets, losses, failures, kills, meddling people and two controllers that race.

A failing history replays by its seed: `pytest tests/simulation/test_rollouts.py --seed N` begins there.

Mutants tried, all found (`test_breaking_one_rule_is_noticed` breaks each again in every run): see `MUTANTS`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from gateway.rollouts import actions, evidence, machine, publisher, selection, targets
from gateway.rollouts.actions import create
from lake import rollouts
from lake.rollout_spec import Stage
from lake.rollouts import EventKind, RolloutState
from tests.rollout_devices import MODEL, SimulatedDevice, spec
from tests.simulation import rollout_world as worlds
from tests.simulation.rollout_world import BrokenPromiseError, S, World, run

HISTORIES = 120
HUNT_MAX = 150
"""Histories in which a broken rule must show."""


def test_every_history_keeps_the_promises_and_ends(seed):
    kinds: Counter[EventKind] = Counter()
    ends: Counter[RolloutState] = Counter()
    for number in range(seed, seed + HISTORIES):
        try:
            world = run(number)
        except BrokenPromiseError as broken:
            raise AssertionError(f"seed {number}: {broken}") from broken
        kinds.update(event.event for event in world.events)
        ends.update(rollout.state for name, rollout in world.book.rollouts.items() if name != worlds.PEACE)
    assert set(kinds) == set(EventKind), "the histories must meet everything that can happen"
    assert min(ends[state] for state in (RolloutState.SUCCEEDED, RolloutState.ABORTED, RolloutState.ROLLED_BACK)) >= 5


def test_the_same_seed_is_the_same_history(seed):
    assert run(seed).events == run(seed).events


def test_a_device_that_was_away_for_three_rollouts_reads_one_order_the_one_of_today(monkeypatch):
    world = World(3)
    monkeypatch.setattr(world, "chance", lambda probability: False)  # no loss and nobody meddles
    world.devices = {name: SimulatedDevice(name) for name in world.devices}
    for name in world.devices:
        world.online[name] = name != "pi-0"
    stage = Stage(percent=100, committed_share_min=1.0, bake_s=0, max_wait_s=60)
    versions = (2, 3, 4)
    for version in versions:
        assert world.person(create(f"r{version}", spec(version, stages=(stage,)), world.somebody()))
        for _ in range(120):
            for name, device in world.devices.items():
                for controller in world.controllers:
                    controller.hear(device, online=world.online[name], since_us=1)
            for controller in world.controllers:
                controller.drive()
                controller.hand_out()
            for name in world.devices:
                world.device_acts(name)
            world.now_us += 5 * S
    states = {rollout.spec.version: rollout.state for rollout in world.book.rollouts.values()}
    assert states == dict.fromkeys(versions, RolloutState.SUCCEEDED)
    assert [order.version for order in world.devices["pi-1"].read] == [2, 3, 4]
    assert world.devices["pi-0"].read == []
    world.settle()
    assert [order.version for order in world.devices["pi-0"].read] == [4]
    assert world.devices["pi-0"].active == {MODEL: 4}


def patched(module: Any, name: str, replacement: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(module, name, replacement)


def replaced(function: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    """A function whose answer is changed."""
    return lambda *args, **options: change(function(*args, **options))


_apply, _COMMITTED = rollouts._apply, evidence.Standing.COMMITTED


def _any_writer(table: worlds.MemoryTable, rows: Any, *, expected: int | None = None) -> None:
    table._commits.append(rows)


def _no_memory_of_the_past(rollout: Any, sequence: int, rollouts: Any, device: Any) -> Any:
    return targets._order(rollout, rollout.spec.version, rollout.spec.sha256, sequence)


def _stale_sequence(rollout: Any, event: Any) -> Any:
    after = _apply(rollout, event)
    if event.event is EventKind.ROLLED_BACK and after is not None and after.stages:
        return msgspec.structs.replace(after, rollback=after.stages[0])
    return after


MUTANTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a stale writer is heard": patched(worlds.MemoryTable, "append", _any_writer),
    "the guard is not looked at": patched(machine, "broken", lambda *_: None),
    "half of the commits are enough": patched(
        machine, "_needed", lambda stage, found: math.ceil(stage.committed_share_min * found.counted / 2)
    ),
    "nobody of the latest stage need commit": patched(evidence.Tally, "joined_counted", 0),
    "bake time is not waited for": patched(machine, "_baked_us", lambda rollout: 0),
    "everybody is excused at once": patched(
        machine,
        "tally",
        lambda rollout, devices, waited_us: evidence.tally(
            rollout, devices, waited_us=rollout.stage_us if rollout.stages else None
        ),
    ),
    "a stage is waited for without end": patched(machine, "deadline_us", lambda rollout: 1 << 62),
    "all stages are reached at once": patched(
        selection.Membership, "stage_of", lambda self, device, tags: 0 if self._stages else None
    ),
    "the target is not looked at": patched(selection.Membership, "is_target", lambda self, device, tags: True),
    "a percentage is rounded down": patched(
        machine,
        "line_of",
        lambda percent, points: sorted(points)[int(percent / 100 * len(points)) - 1] + 1 if points else 10_000,
    ),
    "who fell silent with the order is excused": patched(
        evidence,
        "standing_of",
        replaced(
            evidence.standing_of,
            lambda found: evidence.Standing.EXCUSED if found is evidence.Standing.UNDER_WAY else found,
        ),
    ),
    "going back names the same release": patched(targets, "_back", _no_memory_of_the_past),
    "going back leads to nothing": patched(targets, "_before", lambda rollout, rollouts, device: (0, "")),
    "going back twice leads to what was taken back": patched(
        targets,
        "_before",
        lambda rollout, rollouts, device, before=targets._before: before(rollout, (), device),
    ),
    "who never read an order is ordered back": patched(
        targets, "_still_runs", lambda rollout, stage, device: stage is not None
    ),
    "an order back that was refused is not given again": patched(targets, "_INSISTING", frozenset()),
    "going back has an old sequence": patched(rollouts, "_apply", _stale_sequence),
    "two rollouts of a model at a time": patched(actions, "_make_room", lambda *_, **__: []),
    "a lost publish is not repeated": patched(publisher.Publisher, "_again", lambda *_: False),
    "who lacks an order is never looked at": patched(
        targets.Targets, "of", replaced(targets.Targets.of, lambda wanted: wanted._replace(lacking=False))
    ),
    "failures count as commits": patched(
        evidence,
        "standing_of",
        replaced(evidence.standing_of, lambda found: _COMMITTED if found is evidence.Standing.FAILED else found),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_breaking_one_rule_is_noticed(mutant, monkeypatch, seed):
    MUTANTS[mutant](monkeypatch)
    for number in range(seed, seed + HUNT_MAX):
        try:
            run(number)
        except BrokenPromiseError:
            return
    pytest.fail(f"{HUNT_MAX} histories did not show that {mutant}")

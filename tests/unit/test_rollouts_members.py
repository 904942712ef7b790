"""Who is in which stage of a rollout.

Mutants tried, each found here: a percentage that is not cumulative, is rounded down, or is of all points instead of the
devices there are; a line that moves after its stage began; lists that are gone through for every device.
"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.models import DeviceState
from gateway.rollouts.selection import Membership, line_of, point
from lake.rollout_spec import POINTS, Selection, Stage
from lake.rollouts import EventKind, RolloutState
from tests.rollout_devices import spec
from tests.unit.rollout_table import Table, has, idle, reaching

names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True)


@given(names, names, st.lists(st.floats(0.01, 99.99), min_size=1, max_size=6, unique=True).map(sorted))
def test_who_is_in_a_stage_stays_in_all_later_ones_and_100_percent_is_everybody(rollout, device, percents):
    stages = (*(Stage(percent=percent) for percent in percents), Stage(percent=100))
    order = spec(stages=stages)
    found = [
        Membership(reaching(order, reached, name=rollout)).stage_of(device, ()) for reached in range(len(stages) + 1)
    ]
    first = next(number for number, stage in enumerate(found) if stage is not None)
    assert found == [None] * first + [first - 1] * (len(found) - first)


def test_stages_hold_as_many_devices_as_they_say_drawn_anew_by_each_rollout():
    for rollout in ("one", "two"):
        share = sum(point(rollout, f"pi-{number}") < 0.1 * POINTS for number in range(20_000)) / 20_000
        assert 0.093 < share < 0.107
    both = sum(max(point(r, f"pi-{n}") for r in ("one", "two")) < 0.1 * POINTS for n in range(20_000)) / 20_000
    assert 0.006 < both < 0.014
    assert point("wear-2-abc", "pi-1") == 1868, "another hash would move devices between the stages of running rollouts"


def test_targets_are_all_or_those_with_a_tag_or_listed():
    chosen = Selection(tags=("north",), devices=("pi-9",))
    assert Membership(reaching(spec(), 0)).is_target("pi-1", ())
    of_chosen = Membership(reaching(spec(target=chosen), 0))
    assert [of_chosen.is_target(*who) for who in (("pi-1", ("north", "x")), ("pi-9", ()), ("pi-1", ("south",)))] == [
        True,
        True,
        False,
    ]
    order = spec(target=chosen, stages=(Stage(tags=("canary",)), Stage(devices=("pi-9",)), Stage(percent=100)))
    three, two = (Membership(reaching(order, reached)) for reached in (3, 2))
    assert three.stage_of("pi-1", ("north", "canary")) == 0
    assert three.stage_of("pi-9", ()) == 1
    assert three.stage_of("pi-1", ("canary",)) is None
    assert two.stage_of("pi-1", ("north",)) is None


@pytest.mark.parametrize("fleet", [1, 2, 3, 8, 10, 33, 400])
def test_percentages_are_of_the_devices_there_are_rounded_up_and_never_none(fleet):
    """10 % of eight was often none, passed at once, and the release went to half of them untried."""
    table = Table()
    percents = (10, 50, 99.99, 100)
    table.create(spec(stages=tuple(Stage(percent=percent, bake_s=0) for percent in percents)))
    names = [f"pi-{number}" for number in range(fleet)]
    devices, before = [idle(name) for name in names], set()
    table.decide(devices)
    for percent in percents:
        who = Membership(table.rollout())
        members = {name for name in names if who.stage_of(name, ()) is not None}
        assert len(members) == math.ceil(percent / 100 * fleet - 1e-9)
        assert before <= members
        before = members
        devices = [
            has(name, table.rollout(), DeviceState.COMMITTED) if name in members else idle(name) for name in names
        ]
        table.decide(devices)
    assert table.rollout().state is RolloutState.SUCCEEDED
    shares = [event.why for event in table.events if event.event is EventKind.STAGE_STARTED]
    assert shares[0] == f"stage 1 of 4: 10 %, {math.ceil(fleet / 10)} of {fleet} devices"


def test_looking_for_a_device_costs_the_same_however_many_are_listed():
    """Mutant tried: lists that are gone through, once for each device of the fleet."""
    compared = []

    class Name(str):
        def __eq__(self, other):
            compared.append(other)
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    listed = tuple(f"pi-{number}" for number in range(1_000))
    order = spec(target=Selection(devices=listed), stages=(Stage(devices=listed[500:]), Stage(percent=100)))
    who = Membership(reaching(order, 2))
    found = [who.stage_of(Name(f"pi-{number}"), ()) for number in range(2_000)]
    assert found == [1] * 500 + [0] * 500 + [None] * 1_000
    assert len(compared) < 5_000


def test_who_is_in_a_percentage_is_frozen_when_its_stage_begins():
    """A device that is new to the fleet joins where its name falls; nobody else moves."""
    table = Table()
    table.create(spec(stages=(Stage(percent=10), Stage(percent=100)), target=Selection(tags=("north",))))
    north, south = ([idle(f"{tag}-{n}", tags=(tag,)) for n in range(20)] for tag in ("north", "south"))
    table.decide([*north, *south])
    rollout = table.rollout()
    first = sorted(north, key=lambda device: point("r", device.name))[:2]
    who = Membership(rollout)
    members = {device.name for device in north if who.stage_of(device.name, device.tags) is not None}
    assert members == {device.name for device in first}, "of those that the rollout is about"
    line = point("r", first[1].name) + 1
    assert rollout.lines == (line,)
    later = [f"late-{n}" for n in range(500)]
    joined = [name for name in later if who.stage_of(name, ("north",)) is not None]
    assert joined == [name for name in later if point("r", name) < line]
    assert [who.stage_of(device.name, device.tags) for device in south] == [None] * 20


def test_a_line_is_where_the_row_says_and_rows_of_old_mean_the_share_of_all_points():
    order = spec(stages=(Stage(percent=10), Stage(tags=("x",)), Stage(percent=50), Stage(percent=100)))
    assert reaching(order, 4).lines == (1_000, 0, 5_000, 10_000)
    assert reaching(order, 3, [77, None, 5_001]).lines == (77, 0, 5_001)
    assert line_of(10, [5]) == 6
    assert line_of(50, [9, 1, 5, 7]) == 6
    assert line_of(75, [9, 1, 5, 7]) == 8
    assert line_of(1e-9, [9, 1, 5, 7]) == 2, "one, and not all"
    assert line_of(55, list(range(100))) == 55, "0.55 * 100 is a little more than 55"
    assert (line_of(100, [3]), line_of(0.01, []), line_of(30, [])) == (POINTS, 1, 3_000)

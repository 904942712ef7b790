"""The rollout machine step by step: who is in a stage, when it advances, when it is aborted, who gets which order.

Mutants tried, each found here: `<` for `<=` at the deadline; a percentage that is not cumulative; failures judged
before enough have executed; a bake time that starts with the stage; a pause that counts, as bake time or as waiting; a
silent device excused that had read its order; a canary of nobody that passes; orders handed out while paused; going
back to what was taken back before; a shadow beside the release that is taken back; a percentage rounded down; a line
that moves after its stage began; who comes back after `max_wait_s` waited for. Whole histories: `tests/simulation`.
"""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.errors import ConfigurationError
from contract.models import DeviceState, ReportedModel, ReportedOrder, Trial
from gateway.rollouts.actions import Action, Person, act, create, name_of
from gateway.rollouts.evidence import DeviceView, Standing
from gateway.rollouts.guard import broken
from gateway.rollouts.machine import decide, hindrance, survey
from gateway.rollouts.selection import Membership, line_of, point
from gateway.rollouts.targets import Targets
from gateway.rollouts.telling import tally_json
from lake.rollout_spec import POINTS, STAGES_MAX, Guard, Selection, Stage, check_spec
from lake.rollouts import EventKind, RolloutBook, RolloutEvent, RolloutRefused, RolloutState, fold
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


def test_a_stage_advances_when_enough_of_those_that_can_have_committed():
    table = one_stage(committed_share_min=0.9)
    rollout = table.rollout()
    fleet = [has(f"pi-{n}", rollout, DeviceState.COMMITTED) for n in range(8)]
    busy = [has("pi-8", rollout, DeviceState.PROBED), idle("pi-9")]
    assert table.decide(fleet + busy) == []
    busy[0] = has("pi-8", rollout, DeviceState.COMMITTED)
    assert table.decide(fleet + busy) == [EventKind.SUCCEEDED]
    assert "of 10 devices 9 committed, 1 waiting" in table.rollout().reason


def test_who_was_not_seen_is_excused_after_max_wait_but_not_who_read_the_order_and_fell_silent():
    table = one_stage()
    rollout = table.rollout()
    fleet = [has("pi-1", rollout, DeviceState.COMMITTED), idle("pi-2", online=False)]
    table.now_us += 60 * S - 1
    assert table.decide(fleet) == []
    silent = [*fleet, has("pi-3", rollout, DeviceState.TRIAL, online=False)]
    left = [*fleet, idle("pi-4", online=False, presence_us=rollout.stage_us + 1)]
    table.now_us += 1
    for unexcused in (silent, left):
        found = survey(rollout, unexcused, table.now_us)
        assert found[Standing.EXCUSED] == 1
        [aborted, _] = decide(rollout, found, table.now_us, "gateway")
        assert (aborted.event, "1 of 2 devices committed" in aborted.why) == (EventKind.ABORTED, True)
    assert table.decide(fleet) == [EventKind.SUCCEEDED]


def test_nobody_seen_is_no_success():
    table = one_stage()
    table.now_us += 60 * S
    assert table.decide([idle("pi-1", online=False)]) == [EventKind.ABORTED, EventKind.ROLLED_BACK]
    empty = one_stage()
    empty.now_us += 60 * S
    assert empty.decide([]) == [EventKind.ABORTED, EventKind.ROLLED_BACK]


def test_a_stage_of_nobody_is_waited_for_and_does_not_pass():
    for stage in (Stage(tags=("canary",), max_wait_s=60), Stage(percent=0.01, max_wait_s=60)):
        table = Table()
        table.create(spec(stages=(stage, Stage(percent=100))))
        table.decide()  # no device is known
        found = survey(table.rollout(), [], table.now_us)
        assert (found.members, table.decide([])) == (0, [])
        assert hindrance(table.rollout(), found) == "no device is in it"
        table.now_us += 60 * S
        assert table.decide([]) == [EventKind.ABORTED, EventKind.ROLLED_BACK]


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


def test_who_comes_back_while_a_stage_is_watched_does_not_end_it():
    """A bake time of a day is longer than `max_wait_s`: somebody always comes back shortly before its end."""
    table = one_stage(bake_s=1_000.0, max_wait_s=60.0, committed_share_min=0.9)
    rollout = table.rollout()
    good = [has(f"pi-{n}", rollout, DeviceState.COMMITTED) for n in range(7)]
    away = [idle(f"away-{n}", online=False) for n in range(3)]
    table.now_us += 60 * S
    assert table.decide([*good, *away]) == [EventKind.BAKING]
    table.now_us += 1_000 * S
    back_us = table.now_us - 1 * S
    returned = [
        idle("away-0", presence_us=back_us),
        has("away-1", rollout, DeviceState.DOWNLOADING)._replace(presence_us=back_us),
        idle("away-2", online=False, presence_us=back_us),
    ]
    found = survey(table.rollout(), [*good, *returned], table.now_us)
    assert (found[Standing.COMMITTED], found[Standing.EXCUSED]) == (7, 3)
    # But what they come to counts, and so does who read the order and fell silent, or was there all the time.
    for device, standing in (
        (has("away-1", rollout, DeviceState.FAILED)._replace(presence_us=back_us), Standing.FAILED),
        (has("away-1", rollout, DeviceState.COMMITTED)._replace(presence_us=back_us), Standing.COMMITTED),
        (has("away-1", rollout, DeviceState.TRIAL, online=False)._replace(presence_us=back_us), Standing.UNDER_WAY),
        (has("away-1", rollout, DeviceState.TRIAL), Standing.UNDER_WAY),
        (idle("away-1"), Standing.WAITING),
    ):
        assert survey(table.rollout(), [device], table.now_us)[standing] == 1, standing
    assert table.decide([*good, *returned]) == [EventKind.SUCCEEDED]


def test_failures_abort_after_enough_have_executed_or_when_success_is_out_of_reach():
    table = one_stage(committed_share_min=0.2, failure_share_max=0.25, failures_min_executed=4)
    rollout = table.rollout()
    good = [has(f"pi-{n}", rollout, DeviceState.COMMITTED) for n in range(1)]
    bad = [has(f"bad-{n}", rollout, state) for n, state in enumerate((DeviceState.FAILED, DeviceState.REJECTED))]
    idle_ones = [idle(f"idle-{n}") for n in range(10)]
    assert table.decide([*good, *bad, *idle_ones]) == []
    bad.append(has("bad-9", rollout, DeviceState.TIMED_OUT))
    assert table.decide([*good, *bad, *idle_ones]) == [EventKind.ABORTED, EventKind.ROLLED_BACK]
    assert (
        "3 of 4 devices failed, more than 25%: bad-0 failed: it burns"
        in table.rollout().changed_by + table.events[-2].why
    )
    hopeless = one_stage(committed_share_min=0.9, failures_min_executed=100)
    rollout = hopeless.rollout()
    failed = has("bad", rollout, DeviceState.FAILED)
    assert hopeless.decide([failed, *(idle(f"pi-{n}") for n in range(9))]) == []
    assert hopeless.decide([failed, *(idle(f"pi-{n}") for n in range(8))]) == [EventKind.ABORTED, EventKind.ROLLED_BACK]


def test_a_stage_whose_own_devices_did_not_commit_does_not_pass_however_many_of_the_earlier_ones_did():
    """Mutants tried: shares alone decide; the excused are waited for; failures are waited for."""
    table = Table()
    options = {"bake_s": 0, "max_wait_s": 60.0, "committed_share_min": 0.8, "failure_share_max": 1.0}
    table.create(spec(stages=(Stage(tags=("canary",), **options), Stage(tags=("hall",), **options))))
    table.decide()
    first = table.rollout()
    canaries = [has(f"pi-{n}", first, DeviceState.COMMITTED, tags=("canary",)) for n in range(9)]
    assert table.decide(canaries) == [EventKind.STAGE_PASSED, EventKind.STAGE_STARTED]
    second = table.rollout()

    def judged(device) -> list[EventKind]:
        found = survey(second, [*canaries, device], table.now_us)
        return [event.event for event in decide(second, found, table.now_us, "gateway")]

    assert judged(has("hall-1", second, DeviceState.COMMITTED, tags=("hall",))) == [EventKind.SUCCEEDED]
    assert judged(has("hall-1", second, DeviceState.TRIAL, tags=("hall",))) == []
    assert judged(idle("hall-1", tags=("hall",))) == []
    aborted = [EventKind.ABORTED, EventKind.ROLLED_BACK]
    assert judged(has("hall-1", second, DeviceState.FAILED, tags=("hall",))) == aborted
    table.now_us += 60 * S
    assert judged(idle("hall-1", tags=("hall",))) == aborted
    assert judged(idle("hall-1", online=False, tags=("hall",))) == [EventKind.SUCCEEDED], "it is excused"


def test_bake_time_begins_with_enough_commits_and_the_guard_must_hold_at_its_end():
    table = one_stage(bake_s=30.0, guard=Guard(error_share_max=0.1))
    rollout = table.rollout()
    well = [has("pi-1", rollout, DeviceState.COMMITTED, windows=100, errors=10)]
    ill = [has("pi-1", rollout, DeviceState.COMMITTED, windows=100, errors=11)]
    table.now_us += 40 * S
    assert table.decide(ill) == []
    assert table.decide(well) == [EventKind.BAKING]
    table.now_us += 30 * S - 1
    assert table.decide(well) == []
    table.now_us += 1
    baked = table.rollout()
    assert [event.event for event in decide(baked, survey(baked, ill, table.now_us), table.now_us, "g")] == [
        EventKind.ABORTED,
        EventKind.ROLLED_BACK,
    ], "the deadline is over, and the end of the bake time with it"
    assert table.decide(well) == [EventKind.SUCCEEDED]


def test_time_spent_paused_counts_for_nothing():
    table = one_stage(bake_s=30.0)
    well = [has("pi-1", table.rollout(), DeviceState.COMMITTED)]
    table.decide(well)
    table.now_us += 20 * S
    assert table.act(Action.PAUSE) == [EventKind.PAUSED]
    table.now_us += 1_000 * S
    assert table.decide(well) == []
    assert table.act(Action.RESUME) == [EventKind.RESUMED]
    table.now_us += 9 * S
    assert table.decide(well) == []
    table.now_us += 1 * S
    assert table.decide(well) == [EventKind.SUCCEEDED]


def test_a_pause_does_not_bring_the_deadline_nearer():
    table = one_stage()
    table.now_us += 50 * S
    table.act(Action.PAUSE)
    table.now_us += 1_000 * S
    table.act(Action.RESUME)
    table.now_us += 10 * S - 1
    assert table.decide([idle("pi-1")]) == []
    table.now_us += 1
    assert table.decide([idle("pi-1")]) == [EventKind.ABORTED, EventKind.ROLLED_BACK]


@pytest.mark.parametrize(
    ("paused_s", "resumed_s", "counted_s"),
    [(30, 50, 20), (-86_400, 50, 50), (-86_400, -86_380, 20), (50, 30, 0)],
    ids=["right clocks", "a slow clock pauses", "one slow clock does both", "a slow clock resumes"],
)
def test_a_pause_lasts_no_longer_than_the_stage_though_somebodys_clock_is_a_day_slow(paused_s, resumed_s, counted_s):
    table = one_stage()
    began_us = table.now_us
    table.commit(act(Action.PAUSE, "r", Person("ada", "a test", began_us + paused_s * S))(table.book))
    table.commit(act(Action.RESUME, "r", Person("bob", "a test", began_us + resumed_s * S))(table.book))
    assert table.rollout().stage_us == began_us + counted_s * S


def test_approval_is_asked_for_the_rollout_and_for_single_stages():
    table = Table()
    stages = (Stage(percent=50, bake_s=0), Stage(percent=100, bake_s=0, approval=True))
    table.create(spec(stages=stages, approval=True, version=7))
    assert table.rollout().state is RolloutState.APPROVAL
    assert table.decide() == []
    table.act(Action.APPROVE)
    assert table.decide() == [EventKind.STAGE_STARTED]
    inside = next(f"pi-{n}" for n in range(100) if point("r", f"pi-{n}") < POINTS / 2)
    fleet = [has(inside, table.rollout(), DeviceState.COMMITTED)]
    assert table.decide(fleet) == [EventKind.STAGE_PASSED, EventKind.APPROVAL_ASKED]
    assert (table.decide(fleet), table.rollout().awaiting) == ([], 1)
    table.act(Action.APPROVE)
    assert table.decide(fleet) == [EventKind.STAGE_STARTED]


FIGURES = {"windows": 100, "latency_ms_p99": 5.0, "score_mean": 0.5}


@pytest.mark.parametrize(
    ("guard", "figures", "told"),
    [
        (Guard(), {"errors": 100}, None),
        (Guard(error_share_max=0.5), {"errors": 50}, None),
        (Guard(error_share_max=0.5), {"errors": 51}, "error share is 51 of 100"),
        (Guard(error_share_max=0.99), {"errors": 100}, "error share is 100 of 100"),
        (Guard(nan_share_max=0.0), {"nan_windows": 1}, "NaN share is 1 of 100"),
        (Guard(latency_ms_p99_max=5.0), {}, None),
        (Guard(latency_ms_p99_max=4.9), {}, "p99 latency is 5 ms"),
        (Guard(disagreement_share_max=0.1), {"compared": 10, "disagreements": 2}, "disagreement share is 2 of 10"),
        (Guard(score_mean_shift_max=0.2), {"score_mean": 0.3}, "mean score is 0.3 where other releases have 0.6"),
        (Guard(score_mean_shift_max=0.31), {"score_mean": 0.3}, None),
        (Guard(windows_min=101), {}, "100 windows were scored, fewer than 101"),
    ],
)
def test_the_guard_says_what_does_not_hold(guard, figures, told):
    rollout = one_stage().rollout()
    device = has("pi-1", rollout, DeviceState.COMMITTED, **(FIGURES | figures))
    others = [ReportedModel(active=1, windows=10, score_mean=0.6)]
    found = broken(guard, [device.model], others, [device.order])
    assert (found is None) if told is None else told in (found or "")


def test_the_latency_guard_overlooks_the_slowest_of_many():
    models = [ReportedModel(active=2, latency_ms_p99=1.0)] * 19 + [ReportedModel(active=2, latency_ms_p99=99.0)]
    assert broken(Guard(latency_ms_p99_max=2.0), models, [], []) is None
    assert broken(Guard(latency_ms_p99_max=2.0), models[1:], [], []) is not None


def test_a_pause_hands_out_no_order_and_takes_none_away():
    table = one_stage()
    rollout = table.rollout()
    having = has("pi-1", rollout, DeviceState.SHADOW)
    for change in (lambda: None, lambda: table.act(Action.PAUSE), lambda: table.act(Action.ABORT)):
        change()
        targets = Targets(table.book)
        mine = targets.of("pi-1", (), {MODEL: having.model})
        assert [order.sequence for order in mine.orders] == [rollout.stages[0]]
        assert not mine.lacking
        theirs = targets.of("pi-2", (), {})
        running = table.rollout().state is RolloutState.RUNNING
        assert (len(theirs.orders), theirs.lacking, theirs.withheld) == (
            (1, True, False) if running else (0, False, True)
        )


def test_a_forged_order_that_a_device_refused_does_not_keep_the_true_one_from_it():
    """Mutant tried: whatever has a higher number was read."""
    table = one_stage()
    true = has("pi-1", table.rollout(), DeviceState.COMMITTED).model
    forged = msgspec.structs.replace(true.order, sequence=10**6, rollout="forged", state=DeviceState.REJECTED)
    refused = msgspec.structs.replace(true, order=forged)
    assert Targets(table.book).of("pi-1", (), {MODEL: refused}).lacking
    assert not Targets(table.book).of("pi-1", (), {MODEL: true}).lacking


def test_going_back_is_a_new_sequence_of_the_release_before_and_is_trusted_as_it_was():
    table = Table()
    everybody = (Stage(percent=100, bake_s=0),)
    for version in (1, 2):
        name = table.create(spec(version, stages=everybody, trial=Trial(shadow_windows=50)), f"r{version}")
        table.decide(name=name)
        table.decide([has("pi-1", table.rollout(name), DeviceState.COMMITTED)], name)
        assert table.rollout(name).state is RolloutState.SUCCEEDED
    with pytest.raises(RolloutRefused, match="not the latest of wear: 'r2' is"):
        table.act(Action.ROLLBACK, "r1")
    model = has("pi-1", table.rollout("r2"), DeviceState.COMMITTED, previous=1).model
    assert table.act(Action.ROLLBACK, "r2") == [EventKind.ROLLED_BACK]
    wanted = Targets(table.book).of("pi-1", (), {MODEL: model})
    [order] = wanted.orders
    assert wanted.lacking
    assert (order.version, order.sha256, order.sequence) == (1, sha_of(1), table.rollout("r2").rollback)
    assert order.sequence > table.rollout("r2").stages[0]
    assert (order.trial.shadow_windows, order.trial.nan_share_max, order.trial.disagreement_share_max) == (0, 1.0, 1.0)
    assert not Targets(table.book).of("pi-1", (), {MODEL: read_back(model, order)}).lacking
    assert Targets(table.book).of("pi-1", (), {MODEL: went_back(model, order)}).orders[0] == order, "it stays so"
    table.act(Action.ROLLBACK, "r1")
    [order] = Targets(table.book).of("pi-1", (), {MODEL: went_back(model, order)}).orders
    assert (order.version, order.sequence) == (0, table.rollout("r1").rollback), "one after the other, to nothing"


def read_back(model, order, state=DeviceState.ASSIGNED):
    """What a device reports that has read an order."""
    changes = {"version": order.version, "sha256": order.sha256, "sequence": order.sequence, "rollout": order.rollout}
    return msgspec.structs.replace(model, order=msgspec.structs.replace(model.order, state=state, **changes))


def went_back(model, order):
    """What a device reports that has followed an order back."""
    return msgspec.structs.replace(
        read_back(model, order, DeviceState.COMMITTED),
        active=order.version,
        active_sha256=order.sha256,
        previous=model.active,
        previous_sha256=model.active_sha256,
    )


def test_who_never_read_an_order_is_not_ordered_back_until_it_says_that_it_did():
    """Mutants tried: all members go back; who has read nothing keeps what is retained."""
    table = one_stage()
    read = has("pi-1", table.rollout(), DeviceState.COMMITTED, previous=1).model
    table.act(Action.ROLLBACK)
    factory = ReportedModel(active=1, active_sha256=sha_of(1))
    for unread in ({}, {MODEL: factory}):
        wanted = Targets(table.book).of("pi-1", (), unread)
        assert (wanted.orders, wanted.lacking, wanted.withheld) == ((), False, True)
    [order] = Targets(table.book).of("pi-1", (), {MODEL: read}).orders
    assert (order.version, order.sha256, order.sequence) == (1, sha_of(1), table.rollout().rollback)


@pytest.mark.parametrize(
    ("state", "active", "previous", "back"),
    [
        (DeviceState.COMMITTED, 2, 7, 7),
        (DeviceState.COMMITTED, 2, 0, 0),
        (DeviceState.TRIAL, 2, 7, 7),
        (DeviceState.FAILED, 7, 6, 7),
        (DeviceState.DOWNLOADING, 7, 6, 7),
        (DeviceState.ROLLED_BACK, 7, 2, 7),
        (DeviceState.FAILED, 0, 0, 0),
        (DeviceState.COMMITTED, 0, 7, 0),
        (DeviceState.REJECTED, 7, 6, 7),
    ],
)
def test_the_order_back_is_what_the_device_ran_before_whatever_older_rollouts_became(state, active, previous, back):
    """Also with an older rollout of release 7 that was aborted: the device runs it all the same."""
    table = Table()
    everybody = (Stage(percent=100, bake_s=0),)
    table.create(spec(7, stages=everybody), "older")
    table.decide(name="older")
    table.act(Action.ABORT, "older")
    table.create(spec(2, stages=everybody))
    table.decide()
    model = has("pi-1", table.rollout(), state, active=active, previous=previous).model
    table.act(Action.ROLLBACK)
    [order] = Targets(table.book).of("pi-1", (), {MODEL: model}).orders
    assert (order.version, order.sha256) == (back, sha_of(back))
    for said in (read_back(model, order), went_back(model, order)):
        wanted = Targets(table.book).of("pi-1", (), {MODEL: said})
        assert (wanted.orders, wanted.lacking) == ((order,), False), "it does not change while the device goes back"


def test_an_order_that_was_refused_comes_again_once_nobody_judges_the_rollout_by_it():
    """Mutants tried: never again; again while the rollout runs, is paused or aborted."""
    table = one_stage(committed_share_min=0.5, failure_share_max=1.0)
    rollout = table.rollout()
    refused = has("pi-1", rollout, DeviceState.REJECTED)
    others = [has(name, rollout, DeviceState.COMMITTED) for name in ("pi-2", "pi-3")]

    def lacks(said) -> bool:
        return Targets(table.book).of("pi-1", (), {MODEL: said}).lacking

    assert not lacks(refused.model)
    table.act(Action.PAUSE)
    assert not lacks(refused.model)
    table.act(Action.RESUME)
    assert table.decide([refused, *others]) == [EventKind.SUCCEEDED]
    assert lacks(refused.model)
    assert not lacks(has("pi-1", rollout, DeviceState.FAILED).model)
    assert not lacks(has("pi-1", rollout, DeviceState.PRECHECK).model)
    table.act(Action.ROLLBACK)
    [order] = Targets(table.book).of("pi-2", (), {MODEL: others[0].model}).orders
    again = read_back(others[0].model, order, DeviceState.REJECTED)
    assert lacks(again)
    found = survey(table.rollout(), [others[0]._replace(model=again)], table.now_us)
    said = tally_json(table.rollout(), found)
    assert (said["back_refused"], said["waits_for"]) == (
        1,
        "1 of 1 devices refused their order back, and get it again",
    )
    aborted = one_stage()
    refused = has("pi-1", aborted.rollout(), DeviceState.REJECTED)
    aborted.act(Action.ABORT)
    assert not Targets(aborted.book).of("pi-1", (), {MODEL: refused.model}).lacking


def test_going_back_names_the_release_that_was_given_or_none():
    for previous, sha in ((5, sha_of(5)), (0, ""), (None, "")):
        table = one_stage()
        order = spec(3, stages=(Stage(percent=100),), previous=previous, previous_sha256=sha)
        table.act(Action.ABORT)
        table.create(order, "r3")
        table.decide(name="r3")
        model = has("pi-1", table.rollout("r3"), DeviceState.COMMITTED).model
        table.act(Action.ABORT, "r3", rollback=True)
        [back] = Targets(table.book).of("pi-1", (), {MODEL: model}).orders
        assert (back.version, back.sha256) == (previous or 0, sha)


def test_going_back_twice_does_not_end_at_a_release_that_was_taken_back():
    table = Table()
    for version in (2, 3):
        name = table.create(spec(version, stages=(Stage(percent=100, bake_s=0),)), f"r{version}")
        table.decide(name=name)
        table.decide([has("pi-1", table.rollout(name), DeviceState.COMMITTED)], name)
    model = has("pi-1", table.rollout("r3"), DeviceState.COMMITTED, previous=2).model
    for name, version in (("r3", 2), ("r2", 0)):
        table.act(Action.ROLLBACK, name)
        [order] = Targets(table.book).of("pi-1", (), {MODEL: model}).orders
        assert (order.version, order.sequence) == (version, table.rollout(name).rollback)
        model = went_back(model, order)


def test_a_device_that_lost_its_tag_stays_in_the_rollout_whose_order_it_read():
    table = Table()
    table.create(spec(target=Selection(tags=("north",)), stages=(Stage(percent=100, bake_s=0),)))
    table.decide()
    moved = has("pi-1", table.rollout(), DeviceState.COMMITTED, tags=("south",))
    assert survey(table.rollout(), [moved], table.now_us).members == 1
    assert table.act(Action.ROLLBACK) == [EventKind.ABORTED, EventKind.ROLLED_BACK]
    rollout = table.rollout()
    [order] = Targets(table.book).of("pi-1", ("south",), {MODEL: moved.model}).orders
    assert (order.version, order.sequence) == (0, rollout.rollback)
    back = msgspec.structs.replace(
        moved.model, order=msgspec.structs.replace(moved.order, sequence=rollout.rollback, version=0)
    )
    assert not Targets(table.book).of("pi-1", ("south",), {MODEL: back}).lacking


def test_one_rollout_of_a_model_at_a_time():
    table = Table()
    table.create(spec(2))
    with pytest.raises(RolloutRefused, match=r"'r' of wear version 2 is running, started by ada \(a test\)"):
        table.create(spec(3), "other")
    table.create(spec(3, model="another"), "elsewhere")
    table.create(spec(3), "other", supersede=True)
    assert [table.rollout(name).state for name in ("r", "other")] == [RolloutState.ABORTED, RolloutState.RUNNING]
    assert table.rollout().changed_by == "ada"


def test_a_draft_starts_later_and_is_then_the_newest():
    table = Table()
    stages = (Stage(percent=100, bake_s=0),)
    table.create(spec(2, stages=stages), "drafted", draft=True)
    table.create(spec(3, stages=stages), "other")
    table.decide(name="other")
    with pytest.raises(RolloutRefused, match="other"):
        table.act(Action.START, "drafted")
    table.decide([has("pi-1", table.rollout("other"), DeviceState.COMMITTED)], "other")
    assert table.act(Action.START, "drafted") == [EventKind.STARTED]
    table.decide(name="drafted")
    [order] = Targets(table.book).of("pi-1", (), {}).orders
    assert order.version == 2


@pytest.mark.parametrize("action", list(Action))
def test_what_does_not_fit_the_state_is_refused_and_says_in_which_it_is(action):
    table = one_stage()
    table.act(Action.ABORT, rollback=True)
    with pytest.raises(RolloutRefused, match=r"'r' is rolled_back since ada: a test; .* needs it to be"):
        table.act(action)
    with pytest.raises(RolloutRefused, match="there is no rollout 'nobody'"):
        table.act(action, "nobody")


@pytest.mark.parametrize(("who", "why"), [("", "x"), (" ", "x"), ("ada", ""), ("ada", "\n"), ("a" * 201, "x")])
def test_every_action_names_who_and_why(who, why):
    for ask in (lambda p: create("r", spec(), p), lambda p: act(Action.PAUSE, "r", p)):
        with pytest.raises(ConfigurationError, match=r"who = .*names nobody|why = .*is no reason"):
            ask(Person(who, why, 0))


@pytest.mark.parametrize(
    ("order", "told"),
    [
        (spec(stages=(Stage(),)), "stage 1 names 0 kinds"),
        (spec(stages=(Stage(percent=10, tags=("x",)),)), "stage 1 names 2 kinds"),
        (spec(stages=(Stage(percent=50), Stage(percent=50))), "stage 2 is 50 %"),
        (spec(stages=(Stage(devices=("Not A Name",)),)), "'Not A Name' is not a name"),
        (spec(stages=(Stage(percent=1),) * (STAGES_MAX + 1)), "there are 33 stages"),
        (spec(previous=4), "previous = 4 has no previous_sha256"),
        (spec(target=Selection(tags=("/",))), "target: '/' is not a name"),
    ],
)
def test_a_specification_that_cannot_work_is_refused(order, told):
    with pytest.raises(ConfigurationError, match=told):
        check_spec(order)


def test_names_of_rollouts_are_names_however_long_the_model():
    assert name_of(spec(3), "abc") == "wear-3-abc"
    assert len(name_of(spec(3, model="m" * 63), "abcdef")) == 63

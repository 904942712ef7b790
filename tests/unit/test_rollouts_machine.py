"""The rollout machine step by step: when a stage advances, and when it is aborted.

Mutants tried, each found here: `<` for `<=` at the deadline; failures judged before enough have executed; a bake time
that starts with the stage; a pause that counts, as bake time or as waiting; a silent device excused that had read its
order; a stage of nobody that passes; who comes back after `max_wait_s` waited for. Whole histories: `tests/simulation`.
"""

from __future__ import annotations

import pytest

from contract.models import DeviceState, ReportedModel
from gateway.rollouts.actions import Action, Person, act
from gateway.rollouts.evidence import Standing
from gateway.rollouts.guard import broken
from gateway.rollouts.machine import decide, hindrance, survey
from gateway.rollouts.selection import point
from lake.rollout_spec import POINTS, Guard, Stage
from lake.rollouts import EventKind, RolloutState
from tests.rollout_devices import spec
from tests.unit.rollout_table import S, Table, has, idle, one_stage


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

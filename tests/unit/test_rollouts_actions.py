"""What people may do to a rollout in which state, and who answers for it."""

from __future__ import annotations

import pytest

from contract.errors import ConfigurationError
from contract.models import DeviceState
from gateway.rollouts.actions import Action, Person, act, create, name_of
from gateway.rollouts.targets import Targets
from lake.rollout_spec import STAGES_MAX, Selection, Stage, check_spec
from lake.rollouts import EventKind, RolloutRefused, RolloutState
from tests.rollout_devices import spec
from tests.unit.rollout_table import Table, has, one_stage


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


def in_state(state):
    """A rollout in each state, with a stage reached wherever that can be."""
    table = Table()
    first = Stage(percent=100, bake_s=0)
    if state == "draft":
        table.create(spec(stages=(first,)), draft=True)
        return table
    stages = (first, Stage(tags=("more",), approval=True)) if state == "approval of a later stage" else (first,)
    table.create(spec(stages=stages, approval=state == "approval"))
    if state in ("approval", "not begun"):
        return table
    table.decide()
    if state in ("approval of a later stage", "succeeded"):
        table.decide([has("pi-1", table.rollout(), DeviceState.COMMITTED)])
    then = {"paused": Action.PAUSE, "aborted": Action.ABORT, "rolled back": Action.ROLLBACK}
    if state in then:
        table.act(then[state])
    return table


ABORTED_AND_BACK = [EventKind.ABORTED, EventKind.ROLLED_BACK]


@pytest.mark.parametrize(
    ("state", "allowed"),
    [
        ("draft", {Action.START: [EventKind.STARTED], Action.ABORT: [EventKind.ABORTED]}),
        ("approval", {Action.APPROVE: [EventKind.APPROVED], Action.ABORT: [EventKind.ABORTED]}),
        ("not begun", {Action.PAUSE: [EventKind.PAUSED], Action.ABORT: [EventKind.ABORTED]}),
        (
            "running",
            {
                Action.PAUSE: [EventKind.PAUSED],
                Action.ABORT: ABORTED_AND_BACK,
                Action.ROLLBACK: ABORTED_AND_BACK,
            },
        ),
        (
            "paused",
            {
                Action.RESUME: [EventKind.RESUMED],
                Action.ABORT: ABORTED_AND_BACK,
                Action.ROLLBACK: ABORTED_AND_BACK,
            },
        ),
        (
            "approval of a later stage",
            {
                Action.APPROVE: [EventKind.APPROVED],
                Action.ABORT: ABORTED_AND_BACK,
                Action.ROLLBACK: ABORTED_AND_BACK,
            },
        ),
        ("succeeded", {Action.ROLLBACK: [EventKind.ROLLED_BACK]}),
        ("aborted", {Action.ROLLBACK: [EventKind.ROLLED_BACK]}),
        ("rolled back", {}),
    ],
)
def test_what_may_be_done_in_which_state(state, allowed):
    """`abort` is asked with `--rollback`; where no device was reached there is nothing to take back."""
    for action in Action:
        table = in_state(state)
        if action in allowed:
            assert table.act(action, rollback=action is Action.ABORT) == allowed[action], action
            assert table.events[-1].who == "ada"
        else:
            before = table.book
            with pytest.raises(RolloutRefused, match=r"needs it to be|has reached no device"):
                table.act(action, rollback=action is Action.ABORT)
            assert table.book == before


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

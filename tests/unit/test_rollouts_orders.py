"""Which orders devices get of a rollout, forward and back.

Mutants tried, each found here: orders handed out while paused; going back to what was taken back before; a shadow
beside the release that is taken back.
"""

from __future__ import annotations

import msgspec
import pytest

from contract.models import DeviceState, ReportedModel, Trial
from gateway.rollouts.actions import Action
from gateway.rollouts.machine import survey
from gateway.rollouts.targets import Targets
from gateway.rollouts.telling import tally_json
from lake.rollout_spec import Selection, Stage
from lake.rollouts import EventKind, RolloutRefused, RolloutState
from tests.rollout_devices import MODEL, sha_of, spec
from tests.unit.rollout_table import Table, has, one_stage


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

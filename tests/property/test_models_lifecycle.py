"""The life of a release on a device, whatever comes and in whatever order.

Mutants tried: disagreement as a share of all windows instead of the compared ones; a release kept as previous through
an order for version 0; older orders opened again with one that was rejected; news of a proven order hidden behind a
forged one; bad windows of the trial outweighed by good ones of the shadow.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from contract.models import FINAL_STATES, Assignment, DeviceState, Trial
from edge_agent.models.lifecycle import (
    ACTIVE_STARTS_MAX,
    STARTS_MAX,
    ActiveBroken,
    ActiveLoading,
    ActiveProven,
    Done,
    Ended,
    Job,
    Later,
    Loading,
    NotOpened,
    Ordered,
    Repeated,
    Scored,
    Stopping,
    Tick,
    Verified,
    step,
    work,
)
from edge_agent.models.orders import Seen
from edge_agent.models.record import ModelRecord, Release, decode_record, encode_record

HOUR_US = 3_600_000_000
NOW_US = 1_700_000_000_000_000


def release(version: int) -> Release:
    return Release(version=version, sha256=f"{version:064x}", manifest=f"{version + 100:064x}")


def assignment(sequence: int, version: int, **trial: object) -> Assignment:
    return Assignment(
        device="d",
        model="m",
        version=version,
        sha256=f"{version:064x}" if version else "",
        sequence=sequence,
        not_after_us=NOW_US + HOUR_US,
        rollout="r",
        trial=Trial(shadow_windows=3, trial_windows=3, timeout_s=60.0, disagreement_share_max=0.5, nan_share_max=0.4)
        if not trial
        else Trial(**trial),
    )


def ordered(sequence: int, version: int, key: str = "k", **trial: object) -> Ordered:
    return Ordered(assignment(sequence, version, **trial), Seen(sequence=sequence, key=key), {})


sequences, versions, few = st.integers(1, 6), st.integers(0, 4), st.integers(0, 5)
events = st.one_of(
    st.builds(ordered, sequences, versions),
    st.builds(lambda s, v, final: NotOpened(assignment(s, v), "why", final), sequences, versions, st.booleans()),
    st.builds(lambda s, v: Verified(s, release(v) if v else None), sequences, st.integers(0, 4)),
    st.builds(Done, sequences, st.sampled_from(Job)),
    st.builds(Later, sequences, st.just("why")),
    st.builds(Ended, sequences, st.sampled_from([DeviceState.REJECTED, DeviceState.FAILED]), st.just("why")),
    st.builds(Ended, sequences, st.just(DeviceState.REJECTED), st.just("why"), st.just(True)),
    st.builds(Repeated, sequences),
    st.builds(Loading, sequences, st.booleans()),
    st.builds(Scored, sequences, few, few, few, few, few, few),
    st.builds(Tick, st.sampled_from([0.0, 61.0]), st.booleans()),
    st.just(ActiveLoading()),
    st.just(ActiveProven()),
    st.builds(ActiveBroken, st.just("why")),
    st.builds(Stopping, st.booleans(), st.booleans()),
)


@settings(max_examples=200)
@given(st.lists(st.tuples(events, st.sampled_from([NOW_US, NOW_US + 2 * HOUR_US])), max_size=60))
def test_whatever_happens_the_record_stays_legal(history) -> None:
    record = ModelRecord(model="m", active=release(4))
    for event, now_us in history:
        before = record
        made = step(record, event, now_us)
        record = made.record
        assert decode_record(encode_record(record)) == record
        # Only a commit, and a break of the active one itself touch it.
        if record.active != before.active:
            committed = record.order is not None and record.order.state is DeviceState.COMMITTED
            assert committed or isinstance(event, ActiveBroken | ActiveLoading)
            assert made.durable
        if record.active is not None:
            assert record.denial(record.active.sha256) is None or record.active == before.active
        # What was ordered does not go back, and an order that ended does not begin again.
        if record.seen is not None and before.seen is not None:
            assert record.seen.sequence >= before.seen.sequence
        states = [change.order.state for change in made.changes]
        if before.order is not None and before.order.state in FINAL_STATES and record.order is not None:
            same = record.order.sequence == before.order.sequence and record.assignment == before.assignment
            if same and before.passing:
                assert before.order.state is DeviceState.REJECTED
            elif same and record.assignment is not None:
                assert record.order.state in (before.order.state, DeviceState.ROLLED_BACK)
        # Every change of state is told, durable, and says why it ended.
        for change in made.changes:
            if change.order.state in FINAL_STATES - {DeviceState.COMMITTED}:
                assert change.order.reason
        if states and not isinstance(event, NotOpened):
            assert made.durable
        assert record.starts <= STARTS_MAX
        assert record.active_starts <= ACTIVE_STARTS_MAX
        wanted = work(record)
        assert wanted.candidate is None or record.denial(wanted.candidate.sha256) is None
        if wanted.front:
            assert wanted.candidate is not None


def walked(record: ModelRecord, *happened: object) -> ModelRecord:
    for event in happened:
        record = step(record, event, NOW_US).record
    return record


def in_shadow(**trial: object) -> ModelRecord:
    made = walked(
        ModelRecord(model="m", active=release(1)),
        ordered(1, 2, **trial),
        Verified(1, release(2)),
        Done(1, Job.CHECK),
        Done(1, Job.DOWNLOAD),
        Done(1, Job.PROBE),
        Loading(1, beside=True),
    )
    assert made.order.state is DeviceState.SHADOW
    return made


def test_the_whole_way_with_a_shadow_and_then_back() -> None:
    record = walked(in_shadow(), Scored(1, 3, 0, 0, 3, 1))
    assert (record.order.state, work(record).front) == (DeviceState.TRIAL, True)
    record = walked(record, Scored(1, 3, 3, 0, 3, 1))
    assert (record.active, record.previous, record.candidate) == (release(2), release(1), None)
    assert (record.order.windows, record.order.disagreements) == (6, 1)
    record = walked(record, ActiveBroken("the file is gone"))
    assert (record.active, record.order.state) == (release(1), DeviceState.ROLLED_BACK)


def test_without_a_model_to_compare_with_there_is_no_shadow() -> None:
    shadowed = in_shadow()
    assert shadowed.order is not None
    record = replace(shadowed, order=replace(shadowed.order, state=DeviceState.PROBED), active=None)
    assert walked(record, Loading(1, beside=False)).order.state is DeviceState.TRIAL


def test_disagreement_is_a_share_of_the_windows_that_both_scored() -> None:
    assert walked(in_shadow(), Scored(1, 3, 0, 1, 2, 1)).order.state is DeviceState.TRIAL
    failed = walked(in_shadow(), Scored(1, 3, 0, 1, 1, 1))
    assert failed.order.state is DeviceState.FAILED
    assert "1 of 1 windows" in failed.order.reason
    assert failed.active == release(1)


def test_a_shadow_in_which_nothing_could_be_compared_says_so() -> None:
    record = walked(in_shadow(), Scored(1, 3, 0, 0, 0, 0))
    assert (record.order.state, record.order.reason[:25]) == (DeviceState.TRIAL, "no window was compared wi")
    assert walked(in_shadow(), Scored(1, 3, 0, 0, 1, 0)).order.reason == ""
    unlimited = {"shadow_windows": 3, "trial_windows": 3}
    assert walked(in_shadow(**unlimited), Scored(1, 3, 0, 0, 0, 0)).order.reason == ""


def test_nan_and_failures_end_the_trial() -> None:
    record = walked(in_shadow(), Scored(1, 3, 0, 1, 2, 0))
    assert walked(record, Scored(1, 3, 3, 3, 2, 0)).order.state is DeviceState.FAILED
    assert walked(record, Scored(1, 3, 3, 2, 2, 0)).order.state is DeviceState.COMMITTED


def test_a_trial_in_which_every_window_fails_ends_it_however_long_and_good_the_shadow_was() -> None:
    options = {"shadow_windows": 1_000, "trial_windows": 20, "nan_share_max": 0.5}
    record = walked(in_shadow(**options), Scored(1, 1_000, 0, 0, 1_000, 0))
    assert record.order.state is DeviceState.TRIAL
    failed = walked(record, Scored(1, 1_000, 20, 20, 1_000, 0, 20))
    assert (failed.order.state, failed.active) == (DeviceState.FAILED, release(1))
    assert "20 of 20 windows failed" in failed.order.reason
    assert walked(record, Scored(1, 1_000, 20, 10, 1_000, 0, 10)).order.state is DeviceState.COMMITTED


def test_time_ends_a_trial_by_its_own_clock_and_a_wait_by_the_orders_end() -> None:
    assert step(in_shadow(), Tick(61.0, False), NOW_US).record.order.state is DeviceState.TIMED_OUT
    assert step(in_shadow(), Tick(59.0, True), NOW_US + 9 * HOUR_US).record.order.state is DeviceState.SHADOW
    waiting = walked(ModelRecord(model="m"), ordered(1, 2), Later(1, "unreachable"))
    assert step(waiting, Tick(0.0, False), NOW_US + 2 * HOUR_US).record.order.state is DeviceState.ASSIGNED
    late = step(waiting, Tick(0.0, True), NOW_US + 2 * HOUR_US).record.order
    assert (late.state, "unreachable" in late.reason) == (DeviceState.REJECTED, True)
    begun = walked(waiting, Verified(1, release(2)))
    assert step(begun, Tick(0.0, True), NOW_US + 2 * HOUR_US).record.order.state is DeviceState.TIMED_OUT


def test_a_replay_changes_nothing_and_a_newer_order_supersedes() -> None:
    record = in_shadow()
    assert step(record, ordered(1, 3), NOW_US).record == record
    made = step(record, ordered(2, 3), NOW_US)
    assert [change.order.state for change in made.changes] == [DeviceState.SUPERSEDED, DeviceState.ASSIGNED]
    assert made.record.candidate is None
    assert step(made.record, Done(1, Job.CHECK), NOW_US).record == made.record
    # Under a new key the count begins anew: whoever stole the old one may have counted far.
    assert step(made.record, ordered(1, 4, key="new"), NOW_US).record.assignment.version == 4


def test_an_order_that_was_rejected_for_what_passes_is_followed_when_it_comes_again() -> None:
    waiting = walked(ModelRecord(model="m", active=release(1)), ordered(5, 2))
    rejected = walked(waiting, Ended(5, DeviceState.REJECTED, "unapproved", passing=True))
    # What is to be asked for when orders are opened: this one again, and still nothing older.
    assert waiting.heard == Seen(sequence=5, key="k")
    assert rejected.heard == Seen(sequence=4, key="k")
    assert step(rejected, ordered(4, 3), NOW_US).record == rejected
    made = step(rejected, ordered(5, 2), NOW_US)
    assert (made.record.order.state, made.durable) == (DeviceState.ASSIGNED, True)
    assert made.record.heard == Seen(sequence=5, key="k")
    # One that expired before it could be begun may be signed again with more time.
    late = step(waiting, Tick(0.0, True), NOW_US + 2 * HOUR_US).record
    assert (late.order.state, late.passing) == (DeviceState.REJECTED, True)
    for final in (
        Ended(5, DeviceState.REJECTED, "bad_hash"),
        Ended(5, DeviceState.FAILED, "probe"),
    ):
        ended = walked(waiting, final)
        assert step(ended, ordered(5, 2), NOW_US).record == ended
    assert decode_record(encode_record(rejected)).passing


def test_an_unproven_order_hides_what_a_proven_one_reported_only_until_that_is_heard_again() -> None:
    proven = walked(ModelRecord(model="m", active=release(1)), ordered(5, 1))
    assert proven.shown.state is DeviceState.COMMITTED
    forged = walked(proven, NotOpened(assignment(1_000, 2), "bad_signature", final=True))
    assert (forged.shown.sequence, forged.shown.state) == (1_000, DeviceState.REJECTED)
    assert (forged.order, forged.assignment, forged.active) == (proven.order, proven.assignment, proven.active)
    assert walked(forged, Repeated(4)) == forged
    assert walked(forged, Repeated(5)) == proven
    assert walked(forged, ordered(6, 2)).shown.sequence == 6
    # What befalls the proven one is shown, too.
    assert walked(forged, ActiveBroken("gone")).shown.state is DeviceState.ROLLED_BACK


def test_an_order_for_what_is_so_already_needs_no_work() -> None:
    record = ModelRecord(model="m", active=release(1))
    same = walked(record, ordered(1, 1))
    assert (same.order.state, work(same).job) == (DeviceState.COMMITTED, None)
    none = walked(ModelRecord(model="m", previous=release(3)), ordered(1, 0))
    assert (none.order.state, work(none).job, none.previous) == (DeviceState.COMMITTED, None, release(3))


def test_an_order_for_version_0_is_proven_by_the_newest_keys_before_the_active_release_goes() -> None:
    record = walked(ModelRecord(model="m", active=release(1)), ordered(1, 0))
    assert (record.order.state, work(record).job, record.active) == (DeviceState.ASSIGNED, Job.VERIFY, release(1))
    refused = walked(record, Ended(1, DeviceState.REJECTED, "bad_signature: taken back"))
    assert (refused.order.state, refused.active) == (DeviceState.REJECTED, release(1))
    made = step(record, Verified(1, None), NOW_US)
    assert made.durable
    none = made.record
    assert (none.order.state, none.active, none.previous) == (DeviceState.COMMITTED, None, release(1))
    # What was active before the next release is none, too: it must not bring back what was taken away.
    after = walked(
        none, ordered(2, 2), Verified(2, release(2)), *(Done(2, job) for job in list(Job)[1:]), Loading(2, beside=False)
    )
    after = walked(after, Scored(2, 0, 3, 0, 0, 0))
    assert (after.active, after.previous) == (release(2), None)


def test_an_active_model_that_keeps_ending_the_agent_gives_way_to_the_one_before() -> None:
    record = ModelRecord(model="m", active=release(2), previous=release(1))
    record = walked(record, *[ActiveLoading()] * ACTIVE_STARTS_MAX)
    assert record.active == release(2)
    assert walked(record, ActiveProven(), ActiveLoading()).active_starts == 1
    record = walked(record, ActiveLoading())
    assert record.active == release(1)
    assert record.denial(release(2).sha256) is not None

"""Exactly once, as a model: random schedules over the real protocol code, and every rule broken on purpose.

A failing schedule replays: Hypothesis prints it step by step (and takes `--hypothesis-seed`); seeded runs name theirs
(`pytest tests/simulation -k seeded --seed N` begins there).

Mutants tried, all found (`test_breaking_one_rule_is_noticed` breaks each again in every run): see `MUTANTS`, and
`RESTORE_MUTANTS` for lakes that are replaced by an older copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from contract.errors import TemporaryError
from edge_agent import sender
from gateway import admission, committer, flow
from gateway.admission import Offer, Verdict
from gateway.ports import Lane, Pending
from tests.simulation import world as worlds
from tests.simulation.world import BrokenPromiseError, FaultyTable, World, run

SEEDED_RUNS = 200
SEEDED_STEPS = 250
EXAMPLES = 100
EXAMPLE_STEPS = 120
steps_run = 0


class Drawn:
    """Choices drawn by Hypothesis, so that it can shrink a failing schedule."""

    data: st.DataObject | None = None

    def integer(self, low: int, high: int) -> int:
        """An integer of low..high."""
        if self.data is None or low == high:
            return low
        return self.data.draw(st.integers(low, high))

    def chance(self, probability: float) -> bool:
        """True with about this probability, and shrinks to False."""
        return self.integer(0, 99) >= 100 - round(probability * 100)


class Protocol(RuleBasedStateMachine):
    """Every action of the world as a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.choices = Drawn()
        self.world = World(self.choices)

    def act(self, data: st.DataObject, action: Callable[[], None]) -> None:
        global steps_run
        self.choices.data = data
        steps_run += 1
        action()

    @rule(data=st.data())
    def measure(self, data: st.DataObject) -> None:
        self.act(data, self.world.measure)

    @rule(data=st.data())
    def send(self, data: st.DataObject) -> None:
        self.act(data, self.world.send)

    @rule(data=st.data())
    def deliver_up(self, data: st.DataObject) -> None:
        self.act(data, self.world.deliver_up)

    @rule(data=st.data())
    def flush(self, data: st.DataObject) -> None:
        self.act(data, self.world.flush)

    @rule(data=st.data())
    def deliver_down(self, data: st.DataObject) -> None:
        self.act(data, self.world.deliver_down)

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.act(data, self.world.lose)

    @rule(data=st.data())
    def duplicate(self, data: st.DataObject) -> None:
        self.act(data, self.world.duplicate)

    @rule(data=st.data())
    def kill_device(self, data: st.DataObject) -> None:
        self.act(data, self.world.kill_device)

    @rule(data=st.data())
    def kill_gateway(self, data: st.DataObject) -> None:
        self.act(data, self.world.kill_gateway)

    @rule(data=st.data())
    def kill_broker(self, data: st.DataObject) -> None:
        self.act(data, self.world.kill_broker)

    @rule(data=st.data())
    def disconnect(self, data: st.DataObject) -> None:
        self.act(data, self.world.disconnect)

    @rule(data=st.data())
    def wait(self, data: st.DataObject) -> None:
        self.act(data, self.world.wait)

    @rule(data=st.data())
    def split(self, data: st.DataObject) -> None:
        self.act(data, self.world.split)

    @invariant()
    def safe(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.choices.data = None
        self.world.choices = worlds.Seeded(1)
        self.world.drain()


Protocol.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=EXAMPLE_STEPS, deadline=None)
TestEveryReadingArrivesExactlyOnceUnderDrawnSchedules = Protocol.TestCase


def test_every_reading_arrives_exactly_once_under_seeded_schedules(seed: int) -> None:
    global steps_run
    stored = evicted = quarantined = 0
    for number in range(seed, seed + SEEDED_RUNS):
        try:
            world = run(number, SEEDED_STEPS)
        except BrokenPromiseError as broken:
            pytest.fail(f"seed {number}: {broken}")
        steps_run += world.steps
        stored += len(world.lake.batches(worlds.STREAM))
        evicted += len(world.evicted)
        quarantined += len(world.quarantined)
    # A world in which nothing arrives, or in which buffers never overflow, would prove nothing.
    assert stored > SEEDED_RUNS * 10
    assert evicted > SEEDED_RUNS
    assert quarantined > SEEDED_RUNS / 2


def test_a_lake_that_is_restored_costs_what_the_copy_lacks_and_doubles_nothing(seed: int) -> None:
    """Under running gateways, which is not the way to do it."""
    taken_back = 0
    for number in range(seed, seed + SEEDED_RUNS // 2):
        try:
            world = run(number, SEEDED_STEPS, restores=True)
        except BrokenPromiseError as broken:
            pytest.fail(f"seed {number}: {broken}")
        taken_back += len(world.taken_back)
    assert taken_back > SEEDED_RUNS


def test_the_model_was_run_for_ten_thousand_steps() -> None:
    if not steps_run:
        pytest.fail("run this test with its module: it counts the steps of the tests above")
    assert steps_run >= 10_000


Patch = pytest.MonkeyPatch


def _judge(change: Callable[[int, Offer], Verdict]) -> Callable[[Patch], None]:
    def apply(patch: Patch) -> None:
        patch.setattr(admission, "judge", change)
        patch.setattr(flow, "judge", change)

    return apply


def _settle(change: Callable[..., Any]) -> Callable[[Patch], None]:
    true_settle = committer.settle

    def settle(
        stream: str,
        table: Any,
        quarantine: Any,
        pending: Sequence[Pending],
        committed: Mapping[Lane, int],
        counters: Mapping[int, int],
        life: int,
    ) -> Any:
        return change(true_settle, stream, table, quarantine, pending, committed, counters, life)

    return lambda patch: patch.setattr(worlds, "settle", settle)


class _NoLookUp(FaultyTable):
    def __init__(self, inner: FaultyTable, known: Mapping[int, int]) -> None:
        super().__init__(inner._table, inner._world)
        self._known = known

    def shard_counter(self, shard: int) -> int:
        return self._known.get(shard, super().shard_counter(shard))


class _NoCounters(FaultyTable):
    def append(self, batches: Any, watermarks: Any, shard_counters: Any) -> Any:
        return super().append(batches, watermarks, {})


class _NoWatermarks(FaultyTable):
    def append(self, batches: Any, watermarks: Any, shard_counters: Any) -> Any:
        return super().append(batches, {}, shard_counters)


class _NoQuarantine:
    def append(self, records: Any) -> None:
        """Forget them."""


def _floor_is_ignored(expected: int, offer: Offer) -> Verdict:
    if offer.seq < expected:
        return Verdict.DUPLICATE
    return Verdict.ADMIT if offer.seq == expected else Verdict.REWIND


def _holes_are_admitted(expected: int, offer: Offer) -> Verdict:
    return Verdict.DUPLICATE if offer.seq < expected else Verdict.ADMIT


def _repeats_are_admitted(expected: int, offer: Offer) -> Verdict:
    return Verdict.ADMIT if offer.seq <= expected or offer.seq == offer.floor else Verdict.REWIND


def _rewrapped(kind: type[FaultyTable]) -> Callable[[Patch], None]:
    return _settle(lambda true, stream, table, *rest: true(stream, kind(table._table, table._world), *rest))


def _ack_at_admission(patch: Patch) -> None:
    true_offer = flow.Flow.offer

    def offer(self: flow.Flow, batch: Pending) -> flow.Reply:
        reply = true_offer(self, batch)
        if reply.verdict is Verdict.ADMIT:
            return flow.Reply(Verdict.DUPLICATE, batch.seq, reply.expected)
        return reply

    patch.setattr(flow.Flow, "offer", offer)


def _beliefs_survive_foreign_commits(patch: Patch) -> None:
    true_settled = flow.Flow.settled

    def settled(self: flow.Flow, outcome: committer.Outcome) -> Sequence[Pending]:
        return true_settled(self, outcome._replace(foreign_shards=frozenset()))

    patch.setattr(flow.Flow, "settled", settled)


def _deleted_when_sent(patch: Patch) -> None:
    true_sent = sender.Sender.sent

    def sent(self: sender.Sender, batch: Any, now_s: float) -> None:
        true_sent(self, batch, now_s)
        self._buffer.acknowledge(batch.stream, batch.epoch, batch.seq - 1)

    patch.setattr(sender.Sender, "sent", sent)


def _failure_means_not_committed(patch: Patch) -> None:
    true_append = FaultyTable.append

    def append(self: FaultyTable, batches: Any, watermarks: Any, shard_counters: Any) -> Any:
        try:
            return true_append(self, batches, watermarks, shard_counters)
        except TemporaryError:
            self._table.refresh()
            counters = {shard: self._table.shard_counter(shard) + 1 for shard in shard_counters}
            return self._table.append(batches, watermarks, counters)

    patch.setattr(FaultyTable, "append", append)


MUTANTS: dict[str, Callable[[Patch], None]] = {
    "the floor does not let a batch step over what no longer exists": _judge(_floor_is_ignored),
    "a batch beyond a hole is admitted": _judge(_holes_are_admitted),
    "a batch that is pending or committed is admitted again": _judge(_repeats_are_admitted),
    "another gateway's commits are not noticed before a commit": _settle(
        lambda true, stream, table, quarantine, pending, committed, counters, life: true(
            stream, _NoLookUp(table, counters), quarantine, pending, committed, counters, life
        )
    ),
    "a lane never seen is believed to be new": _settle(
        lambda true, stream, table, quarantine, pending, committed, counters, life: true(
            *(stream, table, quarantine, pending, {batch.lane: 0 for batch in pending} | dict(committed), counters),
            table.life,
        )
    ),
    "commits do not raise the shard counters": _rewrapped(_NoCounters),
    "commits do not carry the watermarks": _rewrapped(_NoWatermarks),
    "after another gateway's commit, other lanes of the shard are still believed": _beliefs_survive_foreign_commits,
    "a commit whose outcome is unknown is repeated without looking": _failure_means_not_committed,
    "a batch is acknowledged when it is admitted": _ack_at_admission,
    "a device deletes what it has sent": _deleted_when_sent,
    "a device does not send again when no ack comes": lambda patch: patch.setattr(
        sender.Sender, "_expire", lambda self, now_s, answered: None
    ),
    "a refused batch is stepped over without standing in quarantine": _settle(
        lambda true, stream, table, quarantine, *rest: true(stream, table, _NoQuarantine(), *rest)
    ),
}


def _beliefs_survive_a_restore(patch: Patch) -> None:
    patch.setattr(FaultyTable, "life", 1)


RESTORE_MUTANTS: dict[str, Callable[[Patch], None]] = {
    "a table that was restored is believed to be the one before": _beliefs_survive_a_restore,
}


@pytest.mark.parametrize("rule_broken", RESTORE_MUTANTS)
def test_breaking_a_rule_of_restored_lakes_is_noticed(rule_broken: str, monkeypatch: Patch) -> None:
    RESTORE_MUTANTS[rule_broken](monkeypatch)
    for number in range(400):
        try:
            run(number, SEEDED_STEPS, restores=True)
        except BrokenPromiseError:
            return
    pytest.fail(f"400 seeded runs did not notice that {rule_broken}")


@pytest.mark.parametrize("rule_broken", MUTANTS)
def test_breaking_one_rule_is_noticed(rule_broken: str, monkeypatch: Patch) -> None:
    MUTANTS[rule_broken](monkeypatch)
    for number in range(400):
        try:
            run(number, SEEDED_STEPS)
        except BrokenPromiseError:
            return
    pytest.fail(f"400 seeded runs did not notice that {rule_broken}")

"""The books of a demo: what is lost, doubled or still waiting shows, and a count that may be too low says so."""

from __future__ import annotations

from edge_agent.buffer.port import LaneInfo
from headwater.ledger import Key, LaneKey, quantile_s, read_metrics
from headwater.reconcile import Balance, Batch, StreamBalance, balance

KEY, LANE = Key("d", "s"), LaneKey("d", "s", "e" * 32)


def lane(last_seq: int, floor: int | None = None, rows: int = 0) -> LaneInfo:
    held = last_seq - floor + 1 if floor else 0
    return LaneInfo("s", LANE.epoch, True, last_seq, 0, floor, held, rows, 0, None)


def batches(*seqs: int, rows: int = 10) -> list[Batch]:
    return [Batch(seq, rows, rows) for seq in seqs]


def books(
    lake: list[Batch], *, rows: int, counted: int, after: LaneInfo, before: LaneInfo | None = None
) -> StreamBalance:
    found = balance({LANE: before} if before else {}, {LANE: after}, {KEY: rows}, {KEY: counted}, {LANE: lake})
    (stream,) = found.streams
    return stream


def test_everything_once_is_a_clean_balance() -> None:
    found = books(batches(1, 2, 3), rows=30, counted=3, after=lane(3))
    assert (found.rows_accepted, found.rows_in_lake, found.distinct) == (30, 30, 30)
    assert (found.lost, found.duplicated, found.gaps, found.waiting, found.exact) == (0, 0, 0, 0, True)


def test_a_missing_batch_is_lost_and_a_gap() -> None:
    """Mutants tried: `missing` taken up to the highest in the lake only (the second case shows nothing)."""
    found = books(batches(1, 3), rows=30, counted=3, after=lane(3))
    assert (found.lost, found.gaps) == (10, 1)
    last = books(batches(1, 2), rows=30, counted=3, after=lane(3))
    assert (last.lost, last.gaps) == (10, 0)


def test_a_missing_row_inside_a_batch_is_lost() -> None:
    found = books([*batches(1, 2), Batch(3, 9, 9)], rows=30, counted=3, after=lane(3))
    assert (found.lost, found.duplicated) == (1, 0)


def test_a_doubled_row_is_duplicated_and_hides_no_loss() -> None:
    found = books([*batches(1), Batch(2, 20, 10)], rows=30, counted=3, after=lane(3))
    assert (found.duplicated, found.lost) == (10, 10)


def test_rows_that_no_buffer_accepted_count_as_duplicated() -> None:
    found = books(batches(1, 2, rows=15), rows=20, counted=2, after=lane(2))
    assert found.duplicated == 10


def test_what_still_waits_is_not_lost() -> None:
    found = books(batches(1, 2), rows=40, counted=4, after=lane(4, floor=3, rows=20))
    assert (found.waiting, found.lost) == (20, 0)
    acked_late = books(batches(1, 2, 3), rows=30, counted=3, after=lane(3, floor=2, rows=20))
    assert (acked_late.waiting, acked_late.lost) == (0, 0)


def test_only_this_run_is_counted() -> None:
    found = books(batches(1, 2, 3, 4), rows=20, counted=2, before=lane(2), after=lane(4))
    assert (found.rows_accepted, found.rows_in_lake, found.lost, found.duplicated, found.batches) == (20, 20, 0, 0, 2)


def test_a_killed_agent_makes_the_count_inexact_but_hides_no_lost_batch() -> None:
    found = books(batches(1, 2, 4), rows=10, counted=1, after=lane(4))
    assert not found.exact
    assert found.lost >= 1
    whole = books(batches(1, 2, 3, 4), rows=10, counted=1, after=lane(4))
    assert (whole.lost, whole.duplicated, whole.rows_accepted) == (0, 0, 40)


def test_a_lane_that_was_drained_and_forgotten_is_balanced_by_the_lake() -> None:
    old = LaneKey("d", "s", "0" * 32)
    found = balance({}, {LANE: lane(1)}, {KEY: 30}, {KEY: 3}, {LANE: batches(1), old: batches(1, 2)})
    assert (found.total("lost"), found.total("duplicated"), found.exact) == (0, 0, True)


def test_a_stream_that_never_reached_the_lake_is_lost_whole() -> None:
    found = balance({}, {LANE: lane(3)}, {KEY: 30}, {KEY: 3}, {})
    assert found.total("lost") == 30
    assert Balance(streams=()).total("lost") == 0


def test_metrics_of_an_agent_are_read_as_it_writes_them() -> None:
    from prometheus_client import CollectorRegistry

    from edge_agent.metrics import AgentMetrics

    metrics = AgentMetrics(CollectorRegistry())
    metrics.rows.labels("watch").inc(1500)
    metrics.batches.labels("watch").inc(3)
    metrics.wire_bytes.inc(40_000)
    for seconds in (0.3, 0.4, 0.6, 20.0):
        metrics.ack_seconds.observe(seconds)
    life = read_metrics(metrics.exposition(), 7, 0)
    assert life.rows == {"watch": 1500}
    assert life.batches == {"watch": 3}
    assert life.wire_bytes == 40_000
    assert life.acks[0.5] == 2
    assert life.acks[float("inf")] == 4


def test_quantiles_lie_in_the_bucket_of_their_rank() -> None:
    acks = {0.1: 0, 0.5: 50, 1.0: 99, float("inf"): 100}
    assert quantile_s(acks, 0.25) == 0.1 + 0.4 * 0.5
    assert quantile_s(acks, 0.99) == 1.0
    assert quantile_s(acks, 1.0) == 1.0
    assert quantile_s({}, 0.5) is None
    assert quantile_s({1.0: 0, float("inf"): 0}, 0.5) is None

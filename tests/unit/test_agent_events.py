from __future__ import annotations

import json

import pyarrow as pa

from contract.batches import check_batch
from contract.limits import DEFAULT_LIMITS
from edge_agent.events import HOLD_S, OPEN_KEYS_MAX, SCHEMA, Event, EventLog, Kind, to_batch


def evicted(seq: int, stream: str = "s", cause: str = "bytes_max", epoch: str = "e") -> Event:
    return Event(Kind.EVICTED, stream, epoch, seq, seq, 10, {"cause": cause})


def test_a_storm_of_evictions_is_told_at_once_and_then_summed_up() -> None:
    """Mutants tried: every event told by itself; rows of the sum forgotten."""
    log = EventLog()
    told: list[Event] = []
    for second in range(300):
        for i in range(10):
            log.report(evicted(second * 10 + i), at_us=second, now_s=float(second))
        told += log.take(float(second))
    told += log.take(1e9)
    assert len(told) == 1 + 300 / HOLD_S
    assert sum(event.count for event in told) == 3000
    assert sum(event.rows or 0 for event in told) == 30_000
    assert (told[0].first_seq, told[0].last_seq, told[0].at_us) == (0, 0, 0)
    assert (told[1].first_seq, told[1].last_seq, told[1].at_us) == (1, 609, 0)
    assert [event.last_seq for event in told][-1] == 2999


def test_different_causes_streams_and_epochs_are_told_apart() -> None:
    log = EventLog()
    for event in (evicted(1), evicted(2, stream="t"), evicted(3, cause="age_max"), evicted(4, epoch="f"), evicted(5)):
        log.report(event, 0, 0.0)
    assert [event.first_seq for event in log.take(0.0)] == [1, 2, 3, 4]
    assert [event.first_seq for event in log.take(HOLD_S)] == [5]
    assert log.take(HOLD_S) == []


def test_memory_stays_bounded_whatever_happens_and_every_row_is_still_counted() -> None:
    log = EventLog()
    for number in range(10_000):
        log.report(evicted(number, stream=f"s{number}"), 0, 0.0)
    told = log.take(0.0)
    assert len(told) == OPEN_KEYS_MAX + 1
    rest = log.take(HOLD_S)
    assert len(rest) == 1
    assert (rest[0].stream, rest[0].first_seq) == (None, None)
    assert sum(event.rows or 0 for event in [*told, *rest]) == 100_000
    log.take(3 * HOLD_S)
    log.report(evicted(1, stream="again"), 0, 3 * HOLD_S)
    assert log.take(3 * HOLD_S)[0].stream == "again"


def test_what_waits_is_told_when_the_agent_stops() -> None:
    log = EventLog()
    log.report(evicted(1), 0, 0.0)
    log.report(evicted(2), 0, 0.0)
    assert [event.first_seq for event in log.take(0.0)] == [1]
    assert [event.first_seq for event in log.take(0.0, all_of_them=True)] == [2]


def test_events_are_rows_of_one_explicit_schema_that_the_protocol_carries() -> None:
    events = [
        Event(Kind.AGENT_STARTED, detail={"agent": "x", "synced": True}, at_us=1_700_000_000_000_000),
        Event(Kind.EVICTED, "s", "e", 1, 2, 10, {"cause": "bytes_max"}, 5, count=3),
    ]
    batch = to_batch(events)
    check_batch(batch, DEFAULT_LIMITS)
    assert batch.schema == SCHEMA
    assert batch.schema.field("first_seq").type == pa.int64()
    row = batch.to_pylist()[1]
    assert {name: row[name] for name in ("kind", "stream", "epoch", "first_seq", "last_seq", "rows")} == {
        "kind": "evicted",
        "stream": "s",
        "epoch": "e",
        "first_seq": 1,
        "last_seq": 2,
        "rows": 10,
    }
    assert json.loads(row["detail"]) == {"cause": "bytes_max", "events": 3}
    assert batch.to_pylist()[0]["stream"] is None
    assert batch.to_pylist()[0]["ts"].year == 2023


def test_a_long_detail_is_cut_and_stays_json() -> None:
    batch = to_batch([Event(Kind.CONFIG_REFUSED, detail={"reason": "x" * 100_000, "revision": 3})])
    detail = json.loads(batch.to_pylist()[0]["detail"])
    assert detail == {"reason": "x" * 200, "revision": 3}

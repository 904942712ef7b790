"""The batcher: rows in, batches out, nothing lost in between but what is refused with its reason.

Mutants tried, each made a test here fail: the age counted from the last row; a changed schema that does not close the
batch at hand; metadata ignored when schemas are compared; a bad piece that takes its neighbours along; no split of what
is too large; single readings left behind at the closing.
"""

from __future__ import annotations

import math
import random

import pyarrow as pa
import pytest

from contract.batches import Clock, Envelope, check_batch
from contract.codec import decode_body
from contract.errors import Reason
from contract.limits import DEFAULT_LIMITS, Limits
from edge_agent.batcher import Batcher, BatchSettings, Closed
from edge_agent.sensors.port import Reading

TS = pa.timestamp("us", "UTC")
SCHEMA = pa.schema({"ts": TS, "x": pa.float32(), "name": pa.string()})
CLOCK = Clock(synced=True, wall_us=1_790_000_000_000_000, monotonic_us=77, boot="ab" * 16)


def clock() -> Clock:
    return CLOCK


def block(count: int, start: int = 0) -> pa.RecordBatch:
    ts = pa.array(range(start, start + count), pa.int64()).cast(pa.timestamp("us", "UTC"))
    x = pa.array([i / 3 for i in range(start, start + count)], pa.float32())
    name = pa.array([None if i % 5 == 0 else f"n{i % 7}" for i in range(start, start + count)], pa.string())
    return pa.RecordBatch.from_arrays([ts, x, name], schema=SCHEMA)


def reading(number: int) -> Reading:
    row = block(1, number).to_pylist()[0]
    return Reading(values={"x": row["x"], "name": row["name"]}, ts_us=number)


def opened(closed: Closed) -> pa.RecordBatch:
    """The batch as the other side reads it."""
    new = closed.new("s")
    rows = decode_body(new.body, Envelope("d", "s", "0" * 32, 1, 1, new.rows, 0, CLOCK, 0), DEFAULT_LIMITS)
    check_batch(rows, DEFAULT_LIMITS)
    assert rows.schema.equals(closed.rows.schema, check_metadata=True)
    assert rows.num_rows == closed.rows.num_rows
    assert closed.clock == CLOCK
    return rows


def table(batches: list[pa.RecordBatch]) -> pa.Table:
    return pa.Table.from_batches(batches).combine_chunks()


def test_a_batch_is_closed_when_it_has_its_rows() -> None:
    batcher = Batcher(BatchSettings(max_batch_rows=10), clock)
    assert batcher.add(SCHEMA, block(4), 0.0) == []
    assert batcher.add(SCHEMA, block(5, 4), 1.0) == []
    assert batcher.pending_rows == 9
    (closed,) = batcher.add(SCHEMA, block(1, 9), 2.0)
    assert opened(closed).equals(block(10))
    assert batcher.pending_rows == 0
    assert batcher.due_at_s() is None


def test_a_batch_is_due_at_the_age_of_its_first_row() -> None:
    batcher = Batcher(BatchSettings(max_batch_age_s=5.0), clock)
    assert batcher.due_at_s() is None
    assert batcher.close_due(1e9) == ()
    batcher.add(SCHEMA, block(1), 100.0)
    batcher.add(SCHEMA, block(1, 1), 104.0)
    assert batcher.due_at_s() == 105.0
    assert batcher.close_due(104.9) == ()
    (closed,) = batcher.close_due(105.0)
    assert opened(closed).equals(block(2))
    batcher.add(SCHEMA, block(1), 200.0)
    assert batcher.due_at_s() == 205.0


def test_a_large_block_becomes_several_batches_and_a_rest() -> None:
    batcher = Batcher(BatchSettings(max_batch_rows=10), clock)
    batcher.add(SCHEMA, block(3), 0.0)
    closed = [*batcher.add(SCHEMA, block(42, 3), 1.0)]
    assert [batch.rows.num_rows for batch in closed] == [10, 10, 10, 10]
    assert batcher.pending_rows == 5
    assert batcher.due_at_s() == 6.0, "the rest came with this block"
    closed += batcher.close()
    assert table([opened(batch) for batch in closed]).equals(table([block(45)]))


def test_rows_of_a_large_block_are_not_copied() -> None:
    batcher = Batcher(BatchSettings(max_batch_rows=100), clock)
    rows = block(1_000)
    before = pa.total_allocated_bytes()
    closed = batcher.add(SCHEMA, rows, 0.0)
    address = rows.column("x").buffers()[1].address
    assert [batch.rows.column("x").buffers()[1].address for batch in closed] == [address] * 10
    assert pa.total_allocated_bytes() - before < 4_096


def test_a_batch_is_closed_when_it_has_its_bytes() -> None:
    rows = block(100)
    batcher = Batcher(BatchSettings(max_batch_rows=10_000, max_batch_bytes=rows.nbytes // 4), clock)
    closed = [*batcher.add(SCHEMA, rows, 0.0), *batcher.close()]
    assert 4 <= len(closed) <= 6
    assert table([opened(batch) for batch in closed]).equals(table([rows]))


def test_another_schema_closes_the_batch_at_hand_first() -> None:
    batcher = Batcher(BatchSettings(), clock)
    batcher.add(SCHEMA, block(3), 0.0)
    wider = block(2, 3).append_column("y", pa.array([1, 2], pa.int8()))
    (closed,) = batcher.add(wider.schema, wider, 1.0)
    assert opened(closed).equals(block(3))
    named = block(2, 5).replace_schema_metadata({"unit": "g"})
    (closed,) = batcher.add(SCHEMA, block(2, 5), 2.0)
    assert opened(closed).equals(wider)
    (closed,) = batcher.add(named.schema, named, 3.0)
    assert opened(closed).equals(block(2, 5))
    (closed,) = batcher.close()
    assert opened(closed).schema.metadata == {b"unit": b"g"}


def test_an_equal_schema_of_another_object_closes_nothing() -> None:
    batcher = Batcher(BatchSettings(), clock)
    batcher.add(SCHEMA, block(3), 0.0)
    assert batcher.add(pa.schema(list(SCHEMA)), block(3, 3), 0.0) == []


def test_single_readings_and_blocks_keep_their_order() -> None:
    batcher = Batcher(BatchSettings(max_batch_rows=8), clock)
    closed: list[Closed] = []
    for sample in (reading(0), reading(1), block(3, 2), reading(5), block(1, 6), reading(7), reading(8), reading(9)):
        closed += batcher.add(SCHEMA, sample, 0.0)
    assert [batch.rows.num_rows for batch in closed] == [8]
    closed += batcher.close()
    assert table([opened(batch) for batch in closed]).equals(table([block(10)]))


def test_a_batch_that_breaks_a_rule_is_refused_and_the_stream_goes_on() -> None:
    batcher = Batcher(BatchSettings(), clock)
    timeless = pa.RecordBatch.from_arrays(
        [pa.array([1, None], pa.timestamp("us", "UTC")), *block(2).columns[1:]], schema=SCHEMA
    )
    batcher.add(SCHEMA, block(3), 0.0)
    batcher.add(SCHEMA, timeless, 0.0)
    batcher.add(SCHEMA, block(4, 3), 0.0)
    closed = batcher.close()
    assert table([opened(batch) for batch in closed]).equals(table([block(7)]))
    (refused,) = batcher.take_refused()
    assert refused[:2] == (Reason.BAD_TS, 2)
    assert "'ts'" in refused.message
    assert batcher.take_refused() == ()


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"ts": pa.array([1], pa.timestamp("us")), "x": pa.array([1])}, Reason.BAD_TS),
        ({"x": pa.array([1])}, Reason.BAD_TS),
        ({"ts": pa.array([1], pa.timestamp("us", "UTC"))}, Reason.EMPTY_BATCH),
        ({"ts": pa.array([1], pa.timestamp("us", "UTC")), "": pa.array([1])}, Reason.BAD_FIELD_NAME),
        (
            {"ts": pa.array([1], pa.timestamp("us", "UTC")), "X": pa.array([1]), "x": pa.array([1])},
            Reason.DUPLICATE_FIELD,
        ),
        (
            {"ts": pa.array([0], pa.timestamp("us", "UTC")), "x": pa.array([1]), "_row": pa.array([0], pa.int32())},
            Reason.BAD_ROW_NUMBERS,
        ),
        (
            {"ts": pa.array([1], pa.timestamp("us", "UTC")), "x": pa.array(["a"], pa.string_view())},
            Reason.UNSUPPORTED_TYPE,
        ),
        (
            {
                "ts": pa.array([1], pa.timestamp("us", "UTC")),
                "x": pa.DictionaryArray.from_arrays(pa.array([None], pa.int8()), pa.nulls(0)),
            },
            Reason.UNSUPPORTED_TYPE,
        ),
    ],
)
def test_every_refusal_has_its_reason(columns: dict[str, pa.Array], reason: Reason) -> None:
    batcher = Batcher(BatchSettings(max_batch_rows=2), clock)
    bad = pa.record_batch(list(columns.values()), list(columns))
    for _ in range(4):
        assert batcher.add(bad.schema, bad, 0.0) == []
    assert [(refused.reason, refused.rows) for refused in batcher.take_refused()] == [(reason, 4)]
    closed = batcher.add(SCHEMA, block(2), 0.0)
    assert [opened(batch).num_rows for batch in closed] == [2]


def test_readings_that_do_not_fit_are_refused() -> None:
    batcher = Batcher(BatchSettings(max_batch_rows=3), clock)
    batcher.add(SCHEMA, Reading(values={"x": "no number", "name": "a"}, ts_us=1), 0.0)
    batcher.add(SCHEMA, block(1), 0.0)
    assert batcher.pending_rows == 1
    (closed,) = batcher.close()
    assert opened(closed).equals(block(1))
    assert [(refused.reason, refused.rows) for refused in batcher.take_refused()] == [(Reason.UNSUPPORTED_TYPE, 1)]


def noise(count: int, size: int) -> pa.RecordBatch:
    rng = random.Random(5)
    ts = pa.array(range(count), pa.timestamp("us", "UTC"))
    return pa.record_batch([ts, pa.array([rng.randbytes(size) for _ in range(count)], pa.binary())], ["ts", "blob"])


def test_what_would_exceed_a_payload_is_split() -> None:
    limits = Limits(payload_bytes_max=4_096)
    rows = noise(64, 400)
    batcher = Batcher(BatchSettings(), clock, limits)
    batcher.add(rows.schema, rows, 0.0)
    closed = batcher.close()
    assert len(closed) > 6
    assert all(len(batch.body) + 256 <= 4_096 for batch in closed)
    assert table([opened(batch) for batch in closed]).equals(table([rows]))
    assert batcher.take_refused() == ()


def test_one_row_too_large_for_a_payload_is_refused_alone() -> None:
    limits = Limits(payload_bytes_max=4_096)
    huge, rows = noise(1, 5_000), noise(8, 100)
    batcher = Batcher(BatchSettings(), clock, limits)
    for sample in (rows, huge, rows):
        batcher.add(rows.schema, sample, 0.0)
    closed = batcher.close()
    assert table([opened(batch) for batch in closed]).equals(table([rows, rows]))
    assert [(refused.reason, refused.rows) for refused in batcher.take_refused()] == [(Reason.PAYLOAD_TOO_LARGE, 1)]


def test_a_bomb_of_a_dictionary_is_split_until_it_fits() -> None:
    limits = Limits(body_bytes_max=100_000)
    words = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int8()), pa.array(["w" * 10_000]))
    ts = pa.array(range(64), pa.timestamp("us", "UTC"))
    rows = pa.record_batch([ts, words], ["ts", "word"])
    batcher = Batcher(BatchSettings(), clock, limits)
    batcher.add(rows.schema, rows, 0.0)
    closed = [*batcher.close()]
    assert len(closed) == 8
    assert [value for batch in closed for value in opened(batch).column("word").to_pylist()] == ["w" * 10_000] * 64


def test_pieces_with_different_dictionaries_lose_nothing() -> None:
    def piece(words: list[str], start: int) -> pa.RecordBatch:
        ts = pa.array(range(start, start + len(words)), pa.timestamp("us", "UTC"))
        return pa.record_batch([ts, pa.array(words).dictionary_encode()], ["ts", "word"])

    batcher = Batcher(BatchSettings(), clock)
    first, second = piece(["a", "b", "a"], 0), piece(["c", "a"], 3)
    batcher.add(first.schema, first, 0.0)
    batcher.add(second.schema, second, 0.0)
    closed = batcher.close()
    assert [word for batch in closed for word in opened(batch).column("word").to_pylist()] == ["a", "b", "a", "c", "a"]
    assert batcher.take_refused() == ()


def test_bits_of_numbers_survive_slicing_and_joining() -> None:
    bits = pa.array([0x7F800001, 0xFFC00001, 0x80000000, 0x00000001, 0x7F800000, 0xFF800000], pa.uint32())
    ts = pa.array(range(6), pa.timestamp("us", "UTC"))
    rows = pa.record_batch([ts, bits.view(pa.float32())], ["ts", "x"])
    batcher = Batcher(BatchSettings(max_batch_rows=4), clock)
    closed = [*batcher.add(rows.schema, rows.slice(0, 3), 0.0), *batcher.add(rows.schema, rows.slice(3), 0.0)]
    closed += batcher.close()
    seen = [value for batch in closed for value in opened(batch).column("x").view(pa.uint32()).to_pylist()]
    assert seen == bits.to_pylist()
    assert math.isnan(rows.column("x")[0].as_py())


def test_new_settings_hold_from_the_next_sample_on() -> None:
    batcher = Batcher(BatchSettings(max_batch_rows=100, max_batch_age_s=50.0), clock)
    batcher.add(SCHEMA, block(20), 10.0)
    batcher.settings = BatchSettings(max_batch_rows=10, max_batch_age_s=1.0)
    assert batcher.due_at_s() == 11.0
    (closed,) = batcher.add(SCHEMA, block(1, 20), 10.5)
    assert opened(closed).num_rows == 21


def test_empty_blocks_and_closings_make_no_batches() -> None:
    batcher = Batcher(BatchSettings(), clock)
    assert batcher.add(SCHEMA, block(0), 0.0) == []
    assert batcher.due_at_s() is None
    assert batcher.close() == ()

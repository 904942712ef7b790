"""Rows of every type pass through batcher and thinning with all their bits.

Mutants tried, each made a test here fail: a schema's metadata
dropped when pieces are joined; thinning that numbers rows anew the second time.
"""

from __future__ import annotations

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from contract.batches import Clock, Envelope
from contract.codec import decode_body, encode_body
from contract.limits import DEFAULT_LIMITS
from edge_agent.batcher import Batcher, BatchSettings
from edge_agent.buffer.thinning import thin_rows
from tests.property.arrow_values import assert_same_bits, batches, bits

CLOCK = Clock(synced=True, wall_us=0, monotonic_us=0, boot="ab" * 16)


def over_the_wire(rows: pa.RecordBatch, body: bytes | None = None) -> pa.RecordBatch:
    envelope = Envelope("d", "s", "0" * 32, 1, 1, rows.num_rows, 0, CLOCK, 0)
    return decode_body(body or encode_body(rows), envelope, DEFAULT_LIMITS)


@given(batches(), st.integers(2, 4))
@settings(max_examples=150)
def test_the_kept_rows_of_a_thinned_batch_have_all_their_bits(rows: pa.RecordBatch, keep_every: int) -> None:
    thinned = over_the_wire(thin_rows(over_the_wire(rows), keep_every))
    kept = sorted({*range(0, rows.num_rows, keep_every), rows.num_rows - 1})
    assert thinned.column("_row").to_pylist() == kept
    plain = thinned.drop_columns(["_row"])
    assert plain.schema.equals(rows.schema, check_metadata=True)
    for field, before, after in zip(rows.schema, rows.columns, plain.columns, strict=True):
        every = bits(before)
        assert bits(after) == [every[row] for row in kept], f"field {field}"
    again = thin_rows(thinned, keep_every)
    assert again.column("_row").to_pylist() == [
        kept[at] for at in sorted({*range(0, len(kept), keep_every), len(kept) - 1})
    ]


@given(
    batches(),
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=8),
    st.integers(1, 9),
    st.sampled_from([1, 64, 500, 1 << 20]),
)
@settings(max_examples=150)
def test_what_goes_into_the_batcher_comes_out_of_it(
    rows: pa.RecordBatch, cuts: list[tuple[int, int]], max_batch_rows: int, max_batch_bytes: int
) -> None:
    batcher = Batcher(BatchSettings(max_batch_rows=max_batch_rows, max_batch_bytes=max_batch_bytes), lambda: CLOCK)
    samples = [rows.slice(min(start, rows.num_rows), count) for start, count in cuts]
    closed = [batch for sample in samples for batch in batcher.add(rows.schema, sample, 0.0)]
    closed += batcher.close()
    assert batcher.take_refused() == ()
    assert all(1 <= batch.rows.num_rows <= max_batch_rows for batch in closed)
    received = [over_the_wire(batch.rows, batch.body) for batch in closed]
    for batch in received:
        assert batch.schema.equals(rows.schema, check_metadata=True)
    for number, field in enumerate(rows.schema):
        sent = [value for sample in samples for value in bits(sample.column(number))]
        assert [value for batch in received for value in bits(batch.column(number))] == sent, f"field {field}"
    if len(samples) == 1 and len(closed) == 1:
        assert_same_bits(received[0], samples[0])

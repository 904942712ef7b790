"""Thinning: a stored batch keeps every k-th of its rows, and says which ones."""

from __future__ import annotations

from typing import NamedTuple

import pyarrow as pa

from contract.batches import ROW_TYPE, Clock, Envelope
from contract.codec import decode_body, encode_body
from contract.errors import Rejected
from contract.limits import Limits
from contract.names import ROW

_ROW_FIELD = pa.field(ROW, ROW_TYPE, nullable=False)


class Thinned(NamedTuple):
    """A batch with some of its rows."""

    body: bytes
    rows: int


def thin_body(body: bytes, rows: int, keep_every: int, limits: Limits) -> Thinned | None:
    """Keep rows 0, k, 2k, … of those that a batch has, and its last one.

    Args:
        body: an encoded body, thinned before or not.
        rows: the rows it holds.
        keep_every: k, at least 2.
        limits: what one batch may be.

    Returns:
        The smaller body, the numbers of its rows in the batch as it was measured in `_row` (int32); or None where
        nothing would be gained: two rows or fewer, bytes that do not shrink, or a body that cannot be read.
    """
    if rows <= 2:
        return None
    try:
        batch = decode_body(body, _envelope_of(rows), limits)
    except Rejected:
        # Not for this place to judge: it is sent as it is, and the gateway says what is wrong with it.
        return None
    thinner = thin_rows(batch, keep_every)
    encoded = encode_body(thinner)
    return Thinned(encoded, thinner.num_rows) if len(encoded) < len(body) else None


def thin_rows(batch: pa.RecordBatch, keep_every: int) -> pa.RecordBatch:
    """Rows 0, k, 2k, … and the last one, every bit of them as before, with their first numbers in `_row` (int32)."""
    kept = list(range(0, batch.num_rows, keep_every))
    if kept[-1] != batch.num_rows - 1:
        kept.append(batch.num_rows - 1)
    indices = pa.array(kept, pa.int64())
    thinner = batch.take(indices)
    if batch.schema.get_field_index(ROW) < 0:
        thinner = thinner.append_column(_ROW_FIELD, indices.cast(ROW_TYPE))
    return thinner


def _envelope_of(rows: int) -> Envelope:
    """What `decode_body` compares a body with; of it only the number of rows matters here."""
    nobody = "0" * 32
    return Envelope("-", "-", nobody, 1, 1, rows, 0, Clock(synced=False, wall_us=0, monotonic_us=0, boot=nobody), 0)

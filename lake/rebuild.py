"""Give back a batch as its device sent it: the proof that nothing was changed on the way in."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from contract.names import ROW as WIRE_ROW
from lake import columns
from lake.convert import empty, from_storage
from lake.errors import CorruptLakeError, ObjectMissingError
from lake.raw import table_path
from lake.schemas import SchemaObjects
from lake.store import Store
from lake.types import stored_field


def rebuild_batch(
    store: Store, stream: str, device: str, epoch: str, seq: int, *, schemas: SchemaObjects | None = None
) -> pa.RecordBatch:
    """Read one batch from the lake.

    Args:
        store: where the lake is.
        stream: the stream's name.
        device: who sent it.
        epoch: its epoch, 32 hexadecimal digits.
        seq: its number.
        schemas: the schema objects of the lake, to share their cache between calls.

    Returns:
        The rows in their wire types, fields in their order, equal to what was sent in every bit of every value. What
        is not a value may differ: bytes under nulls, and how a dictionary is ordered.

    Raises:
        ObjectMissingError: the batch is not in the lake.
        StoreUnavailableError: the store did not answer.
        CorruptLakeError: its rows contradict each other.
    """
    path = table_path(stream)
    where = (
        (pc.field(columns.DEVICE) == device)
        & (pc.field(columns.EPOCH) == epoch)
        & (pc.field(columns.SEQ) == pa.scalar(seq, pa.int64()))
    )
    with store.translated(f"read table {path}"):
        handle = DeltaTable(store.table_uri(path), storage_options=store.storage_options)
        rows = handle.to_pyarrow_dataset().to_table(filter=where)
    if not rows.num_rows:
        raise ObjectMissingError(f"batch {seq} of {device}/{epoch} is not in {path} of {store.url}")
    rows = rows.take(pc.sort_indices(rows.column(columns.ROW))).combine_chunks()
    names = rows.column(columns.SCHEMA).unique().to_pylist()
    numbers = rows.column(columns.ROW)
    if len(names) != 1 or len(numbers.unique()) != len(numbers):
        raise CorruptLakeError(f"batch {seq} of {device}/{epoch} in {path} is there twice: schemas {names}")
    schema = (schemas if schemas is not None else SchemaObjects(store)).get(names[0])
    return pa.RecordBatch.from_arrays([_field(rows, field) for field in schema], schema=schema)


def _field(rows: pa.Table, field: pa.Field) -> pa.Array:
    if field.name == WIRE_ROW:
        return rows.column(columns.ROW).chunk(0)
    stored = stored_field(columns.stored_name(field.name), field.type)
    if stored is None or stored.name not in rows.column_names:
        return empty(rows.num_rows, field.type)
    return from_storage(rows.column(stored.name).chunk(0), field.type)

"""Reading tables with deltalake alone, so that tests do not believe the code under test."""

from __future__ import annotations

import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError

from lake.store import Store


def table_in(store: Store, path: str) -> pa.Table:
    """All rows of a table."""
    return DeltaTable(store.table_uri(path), storage_options=store.storage_options).to_pyarrow_table()


def batches_in(store: Store, stream: str) -> list[tuple[str, int, int]]:
    """Device, seq and number of rows of each batch in a raw table, sorted; rows that are there twice count twice."""
    try:
        rows = table_in(store, f"raw/{stream}")
    except TableNotFoundError:
        return []
    counted = rows.group_by(["_device", "_epoch", "_seq"]).aggregate([([], "count_all")])
    return sorted(zip(*(counted.column(name).to_pylist() for name in ("_device", "_seq", "count_all")), strict=True))

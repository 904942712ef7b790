"""Rows of an answer, written to stdout piece by piece in the format that was asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import pyarrow as pa

from headwater import output
from lake.formats import Format, plain, write

TABLE_ROWS_MAX = 1_000
"""A person reads no more; every other format is complete."""


def write_rows(batches: Iterable[pa.RecordBatch], form: str) -> None:
    """Write rows.

    Args:
        batches: at least one, for the schema's sake.
        form: `table` for a person, at most TABLE_ROWS_MAX rows; `json` (an array), `jsonl`, `csv`, `arrow` (stream) or
            `parquet`, complete.
    """
    if form != "table":
        write(batches, Format(form), sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return
    names: list[str] = []
    shown: list[tuple[object, ...]] = []
    total = 0
    for batch in batches:
        names = batch.schema.names
        total += batch.num_rows
        piece = batch.slice(0, TABLE_ROWS_MAX - len(shown))
        shown.extend(zip(*(plain(column) for column in piece.columns), strict=True))
    output.say_table(names, shown, separators=False)
    if total > len(shown):
        output.complain(f"{total:,} rows, of which {len(shown):,} are shown; --format csv has all")


def pieces(table: pa.Table) -> list[pa.RecordBatch]:
    """A table as batches, at least one, for the schema's sake."""
    return table.to_batches() or [pa.RecordBatch.from_pylist([], schema=table.schema)]

"""Rows for a person: the first of them, and how many there are."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from headwater.rows import TABLE_ROWS_MAX, pieces, write_rows


def test_a_table_shows_the_first_rows_and_counts_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    """Mutants tried: the limit per batch instead of over all."""
    batches = pa.table({"n": range(TABLE_ROWS_MAX + 500)}).to_batches(max_chunksize=700)
    write_rows(batches, "table")
    said = capfd.readouterr()
    shown = [line.strip() for line in said.out.splitlines() if line.strip().isdigit()]
    assert shown == [str(n) for n in range(TABLE_ROWS_MAX)]
    assert said.err == "1,500 rows, of which 1,000 are shown; --format csv has all\n"
    write_rows(pieces(pa.table({"n": [1]})), "table")
    assert capfd.readouterr().err == ""


def test_other_formats_are_complete(capfd: pytest.CaptureFixture[str]) -> None:
    write_rows(pieces(pa.table({"n": range(TABLE_ROWS_MAX + 500)})), "jsonl")
    lines = capfd.readouterr().out.splitlines()
    assert [json.loads(line)["n"] for line in lines] == list(range(TABLE_ROWS_MAX + 500))

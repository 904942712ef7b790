"""Read from outside: other readers see the same rows in an uncompacted table, without Headwater.

Mutants tried, each made a test here fail: wrong bounds of `_seq`, and of `ts`, in the statistics of files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from deltalake import DeltaTable, QueryBuilder

from contract.names import shard_of
from lake.duck import extension_path
from lake.raw import RawTable
from lake.store import Store, StoreSettings
from tests.contract.lake_suite import EPOCH, NOW_US, A, B, raw, rows
from tests.integration.test_lake_s3 import s3_settings

DAY_US = 86_400_000_000
FLUSHES = 12
ROWS = 400
COUNTS = "SELECT count(*), count(DISTINCT _seq), count(DISTINCT date), count(y), sum(x)"


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "file":
        return Store(StoreSettings(url=tmp_path.as_uri(), fsync=False))
    return Store(s3_settings(request.getfixturevalue("object_store")))


@pytest.fixture
def expected(store: Store) -> tuple[int, int, int, int, float]:
    """A table of many small files over three dates, whose columns changed on the way; and what all must count."""
    table = RawTable(store, "s")
    total = 0.0
    for number in range(1, FLUSHES + 1):
        table.refresh()
        x = np.arange(ROWS, dtype=np.float32) + number
        fields = {"x": pa.array(x)} | ({"y": pa.array(np.arange(ROWS))} if number % 2 else {})
        content = rows(ROWS, NOW_US + (number % 3) * DAY_US, **fields)
        flush = [raw(name, number, content) for name in (A, B)]
        counters = {shard_of(name): number for name in (A, B)}
        table.append(flush, {(name, EPOCH): number for name in (A, B)}, counters)
        total += 2 * float(x.sum())
    return 2 * FLUSHES * ROWS, FLUSHES, 3, FLUSHES * ROWS, total


@pytest.fixture
def plain_duckdb(store: Store) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB as anybody would open it: the two extensions, and a secret for the bucket."""
    connection = duckdb.connect()
    for name in ("httpfs", "delta"):
        connection.execute(f"LOAD '{extension_path(name)}'")
    settings = store.settings
    if settings.endpoint:
        parts = (
            "TYPE s3",
            f"KEY_ID '{settings.access_key}'",
            f"SECRET '{settings.secret_key}'",
            f"REGION '{settings.region}'",
            f"ENDPOINT '{settings.endpoint.removeprefix('http://')}'",
            "URL_STYLE 'path'",
            "USE_SSL false",
        )
        connection.execute(f"CREATE SECRET ({', '.join(parts)})")
    yield connection
    connection.close()


def test_duckdb_reads_the_delta_table(
    store: Store, expected: tuple[object, ...], plain_duckdb: duckdb.DuckDBPyConnection
) -> None:
    found = plain_duckdb.execute(f"{COUNTS} FROM delta_scan('{store.table_uri('raw/s')}')").fetchone()
    assert found == expected


def test_duckdb_reads_the_bare_parquet_files(
    store: Store, expected: tuple[object, ...], plain_duckdb: duckdb.DuckDBPyConnection
) -> None:
    files = f"{store.table_uri('raw/s')}/date=*/*.parquet"
    query = f"{COUNTS} FROM read_parquet('{files}', hive_partitioning = true, union_by_name = true)"
    assert plain_duckdb.execute(query).fetchone() == expected


def test_deltalake_reads_it_with_arrow_and_with_datafusion(store: Store, expected: tuple[object, ...]) -> None:
    table = DeltaTable(store.table_uri("raw/s"), storage_options=store.storage_options)
    found = table.to_pyarrow_table()
    assert found.num_rows == expected[0]
    assert found.column("y").length() - found.column("y").null_count == expected[3]
    batches = QueryBuilder().register("s", table).execute(f"{COUNTS} FROM s").read_all()
    assert tuple(column[0].as_py() for column in pa.table(batches).columns) == expected


def test_predicates_on_the_statistics_lose_nothing(
    store: Store, expected: tuple[object, ...], plain_duckdb: duckdb.DuckDBPyConnection
) -> None:
    """Files are skipped by the statistics that the gateway wrote; a wrong one would lose rows here."""
    assert expected
    source = f"delta_scan('{store.table_uri('raw/s')}')"
    handle = DeltaTable(store.table_uri("raw/s"), storage_options=store.storage_options)
    last = NOW_US + 1_000 * (ROWS - 1)
    for condition, filter_ in (
        (f"_device = '{A}'", ds.field("_device") == A),
        ("_seq = 5", ds.field("_seq") == 5),
        (f"ts = make_timestamptz({last}::BIGINT)", ds.field("ts") == pa.scalar(last, pa.timestamp("us", "UTC"))),
        (f"ts > make_timestamptz({last}::BIGINT)", ds.field("ts") > pa.scalar(last, pa.timestamp("us", "UTC"))),
    ):
        row = plain_duckdb.execute(f"SELECT count(*) FROM {source} WHERE {condition}").fetchone()
        whole = plain_duckdb.execute(f"SELECT count(*) FILTER ({condition}) FROM {source}").fetchone()
        assert row is not None
        assert row == whole
        assert 0 < row[0] < 2 * FLUSHES * ROWS
        assert handle.to_pyarrow_dataset().count_rows(filter=filter_) == row[0]

"""A lake in a folder keeps the promises of every store and every raw table."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contract.names import shard_of
from lake.delta import DeltaHandle
from lake.errors import CommitConflictError
from lake.plan import BASE_COLUMNS, table_schema
from lake.raw import RawTable
from lake.store import Store, StoreSettings
from tests.contract.lake_reading import batches_in, table_in
from tests.contract.lake_replaced_suite import ReplacedTableSuite
from tests.contract.lake_suite import EPOCH, A, B, RawTableSuite, StoreSuite, Table, commit, raw, rows


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(StoreSettings(url=(tmp_path / "a lake").as_uri()))


class TestFileStore(StoreSuite):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return Store(StoreSettings(url=(tmp_path / "a lake").as_uri()))


class TestFileRawTable(RawTableSuite):
    @pytest.fixture(autouse=True)
    def _store(self, store: Store) -> None:
        self.store = store

    def open(self, stream: str = "vibration") -> Table:
        return RawTable(self.store, stream)

    def committed(self, stream: str = "vibration") -> list[tuple[str, int, int]]:
        return batches_in(self.store, stream)


class TestFileReplacedTable(ReplacedTableSuite):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return Store(StoreSettings(url=(tmp_path / "a lake").as_uri()))


def test_watermarks_survive_the_log_checkpoint(store: Store) -> None:
    """Every 100 commits delta-rs writes a checkpoint, from which a new handle starts."""
    table = RawTable(store, "s")
    for seq in range(1, 104):
        table.refresh()
        commit(table, raw(A, seq, rows(1)), *([raw(B, 1, rows(1))] if seq == 1 else []))
    fresh = RawTable(store, "s")
    fresh.refresh()
    assert fresh.watermarks([(A, EPOCH), (B, EPOCH)]) == {(A, EPOCH): 103, (B, EPOCH): 1}
    assert [fresh.shard_counter(shard_of(name)) for name in (A, B)] == [103, 1]
    commit(fresh, raw(A, 104, rows(1)))
    table.refresh()
    assert table.watermark(A, EPOCH) == 104
    assert batches_in(store, "s") == [*((A, seq, 1) for seq in range(1, 105)), (B, 1, 1)]


def test_a_table_that_somebody_else_made_is_not_taken_as_ones_own(store: Store) -> None:
    """It may have other columns: what is written to columns that a table does not have, nobody finds again."""
    late = RawTable(store, "s")
    late.refresh()
    early = DeltaHandle(store, "raw/s")
    early.create(table_schema(BASE_COLUMNS), {})
    with pytest.raises(CommitConflictError):
        commit(late, raw(A, 1))
    late.refresh()
    commit(late, raw(A, 1))
    assert table_in(store, "raw/s").column("x").null_count == 0


def test_rows_of_a_file_are_ordered_by_device_and_seq(store: Store) -> None:
    table = RawTable(store, "s", part_bytes_max=1)
    table.refresh()
    commit(table, raw(B, 2), raw(A, 3), raw(B, 1), raw(A, 2))
    firsts = []
    for info in store.objects("raw/s"):
        if info.path.endswith(".parquet"):
            file = pq.read_table(pa.BufferReader(store.get(info.path)))
            firsts.append((file.column("_device")[0].as_py(), file.column("_seq")[0].as_py()))
    assert len(firsts) == 4
    whole = RawTable(store, "t")
    whole.refresh()
    commit(whole, raw(B, 2), raw(A, 3), raw(B, 1), raw(A, 2))
    found = table_in(store, "raw/t")
    order = list(zip(found.column("_device").to_pylist(), found.column("_seq").to_pylist(), strict=True))
    assert order == sorted(order)


def test_a_commit_returns_when_the_disk_has_all_of_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is acknowledged must survive a power cut: rows, commit, checkpoint, and the folders that name them."""
    real, synced = os.fsync, set()

    def note(handle: int) -> None:
        synced.add(Path(os.path.realpath(f"/proc/self/fd/{handle}")))
        real(handle)

    monkeypatch.setattr(os, "fsync", note)
    lake = tmp_path / "a lake"
    table = RawTable(store, "s")
    for seq in range(1, 102):
        table.refresh()
        commit(table, raw(A, seq, rows(1)))
        if seq == 1:
            (schema,) = (lake / "control/schemas").iterdir()
            assert {schema, schema.parent, schema.parent.parent, lake} <= synced
    log = lake / "raw/s/_delta_log"
    commits = {path for path in log.iterdir() if path.suffix in (".json", ".parquet")} | {log / "_last_checkpoint"}
    assert len(commits) == 104
    assert commits <= synced
    assert {log, lake / "raw/s", lake / "raw", lake} <= synced
    parts = list((lake / "raw/s").rglob("part-*"))
    assert {path.parent for path in parts} <= synced
    assert len(parts) == 101
    # Rows are synced under their draft names, before they get their own.
    assert sum(path.name.endswith(".part") for path in synced) == len(parts)

"""A lake in a folder keeps the promises of every store and every raw table."""

from __future__ import annotations

from pathlib import Path

import pytest

from contract.names import shard_of
from lake.raw import RawTable
from lake.store import Store, StoreSettings
from tests.contract.lake_reading import batches_in
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

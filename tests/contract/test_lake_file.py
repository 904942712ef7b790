"""A lake in a folder keeps the promises of every store and every raw table."""

from __future__ import annotations

from pathlib import Path

import pytest

from lake.raw import RawTable
from lake.store import Store, StoreSettings
from tests.contract.lake_reading import batches_in
from tests.contract.lake_suite import RawTableSuite, StoreSuite, Table


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

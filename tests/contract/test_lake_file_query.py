"""A lake in a folder keeps the promises of every lake to who asks it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lake.store import Store, StoreSettings
from tests.contract.lake_query_suite import QuerySuite, SmallTableSuite


@pytest.fixture
def folder_store(tmp_path: Path) -> Store:
    return Store(StoreSettings(url=(tmp_path / "a lake").as_uri(), fsync=False))


class TestFileQuery(QuerySuite):
    @pytest.fixture
    def store(self, folder_store: Store) -> Store:
        return folder_store


class TestFileSmallTables(SmallTableSuite):
    @pytest.fixture
    def store(self, folder_store: Store) -> Store:
        return folder_store

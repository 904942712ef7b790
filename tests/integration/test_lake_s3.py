"""A lake on an object store (real SeaweedFS) keeps the promises of every store and every raw table."""

from __future__ import annotations

import itertools

import pytest

from lake.raw import RawTable
from lake.store import Store, StoreSettings
from tests.contract.lake_query_suite import QuerySuite, SmallTableSuite
from tests.contract.lake_reading import batches_in
from tests.contract.lake_replaced_suite import ReplacedTableSuite
from tests.contract.lake_suite import RawTableSuite, StoreSuite, Table
from tests.integration.servers import StoreServer

_PREFIXES = itertools.count()


def s3_settings(server: StoreServer, **options: object) -> StoreSettings:
    """A lake of its own on a server."""
    access = server.access
    given = {
        "url": f"s3://{access.bucket}/test-lake-{next(_PREFIXES)}",
        "endpoint": access.endpoint,
        "access_key": access.key,
        "secret_key": access.secret,
        "region": access.region,
        "allow_http": True,
    }
    return StoreSettings(**(given | options))  # type: ignore[arg-type]


class TestS3Store(StoreSuite):
    @pytest.fixture
    def store(self, object_store: StoreServer) -> Store:
        return Store(s3_settings(object_store))


class TestS3RawTable(RawTableSuite):
    @pytest.fixture(autouse=True)
    def _store(self, object_store: StoreServer) -> None:
        self.store = Store(s3_settings(object_store))

    def open(self, stream: str = "vibration") -> Table:
        return RawTable(self.store, stream)

    def committed(self, stream: str = "vibration") -> list[tuple[str, int, int]]:
        return batches_in(self.store, stream)


class TestS3ReplacedTable(ReplacedTableSuite):
    @pytest.fixture
    def store(self, object_store: StoreServer) -> Store:
        return Store(s3_settings(object_store))


class TestS3Query(QuerySuite):
    @pytest.fixture
    def store(self, object_store: StoreServer) -> Store:
        return Store(s3_settings(object_store))


class TestS3SmallTables(SmallTableSuite):
    @pytest.fixture
    def store(self, object_store: StoreServer) -> Store:
        return Store(s3_settings(object_store))

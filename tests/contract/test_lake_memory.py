"""The table in memory keeps the promises of every raw table."""

from __future__ import annotations

import pytest

from lake.memory import MemoryLake, MemoryRawTable
from tests.contract.lake_suite import RawTableSuite, Table


class TestMemoryRawTable(RawTableSuite):
    @pytest.fixture(autouse=True)
    def _lake(self) -> None:
        self.lake = MemoryLake()

    def open(self, stream: str = "vibration") -> Table:
        return MemoryRawTable(self.lake, stream)

    def committed(self, stream: str = "vibration") -> list[tuple[str, int, int]]:
        return sorted((item.device, item.seq, item.batch.num_rows) for item in self.lake.batches(stream))

"""The buffer on disk keeps the promises of every buffer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from edge_agent.buffer.port import BatchBuffer, StreamCaps
from edge_agent.buffer.sqlite import SqliteBuffer
from tests.contract.buffer_suite import BufferSuite, Hands


class TestSqliteBuffer(BufferSuite):
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path):
        self.path = tmp_path / "buffer.db"
        self.made: list[SqliteBuffer] = []
        yield
        for buffer in self.made:
            buffer.close()

    def make(self, caps: Mapping[str, StreamCaps], bytes_max: int, now: Hands) -> BatchBuffer:
        buffer = SqliteBuffer(self.path, caps, bytes_max, now, "board-1")
        self.made.append(buffer)
        return buffer

"""The buffer on disk keeps the promises of every buffer."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from edge_agent.buffer.port import BatchBuffer, StreamCaps
from edge_agent.buffer.sqlite import SqliteBuffer
from tests.contract.buffer_suite import BufferSuite, Hands
from tests.integration.buffer_disk import memory_folder


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


def test_the_file_stays_within_its_cap_however_long_it_lives() -> None:
    """Mutants tried, each made this fail: deletions that are never written; a log that is never folded."""
    cap, log = 300_000, 50_000
    caps = {"a": StreamCaps(bytes_max=cap, age_max_s=1e9)}
    rng = random.Random(3)
    with memory_folder() as folder:
        buffer = SqliteBuffer(folder / "buffer.db", caps, cap, Hands(), "board", wal_bytes_max=log)
        sizes = []
        for step in range(3_000):
            outcome = buffer.append("a", bytes(rng.randrange(500, 9_000)), 1, Hands()())
            if step % 500 > 400:
                buffer.acknowledge("a", outcome.epoch, outcome.seq - 3)
            sizes.append(buffer.file_bytes())
        buffer.close()
    reserve = log + 256 * 1024
    assert max(sizes) < 1.25 * cap + 2 * log + 50_000 + reserve
    assert max(sizes[1_500:]) <= 1.1 * max(sizes[:1_500]), "it should have stopped growing long ago"

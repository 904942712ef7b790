"""The queue between sampler and batcher: bounded in rows and bytes, first in first out.

Mutants tried, each found: bytes not counted; rows of a block counted as one; an oversized sample refused for ever; a
stop that waits out the whole time; `on_put` called for what was refused.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import pyarrow as pa
import pytest

from edge_agent.sampling.queue import RowQueue
from edge_agent.sensors.columns import Columns
from edge_agent.sensors.port import Block, Reading, Sample

COLUMNS = Columns(pa.schema([("x", pa.int64()), ("s", pa.string())]))
STOP = threading.Event()


def reading(n: int, text: str = "") -> Sample:
    return COLUMNS.reading(Reading({"x": n, "s": text}), 0)


def block(rows: int) -> Sample:
    return COLUMNS.block(Block({"x": list(range(rows))}, interval_ns=1), 0)


def put(queue: RowQueue, sample: Sample, wait_s: float = 0.0) -> bool:
    return queue.put(COLUMNS.schema, sample, wait_s, STOP)


def test_samples_come_out_as_they_went_in_with_their_schema() -> None:
    queue = RowQueue(100, 1_000_000)
    samples = [reading(1), block(3), reading(2)]
    assert all(put(queue, sample) for sample in samples)
    assert queue.rows == 5
    out = [queue.get() for _ in samples]
    assert [item.sample for item in out if item] == samples
    assert all(item is not None and item.schema is COLUMNS.schema for item in out)
    assert (queue.rows, queue.bytes, queue.get()) == (0, 0, None)


def test_rows_are_bounded_and_a_block_counts_all_of_its_rows() -> None:
    puts: list[int] = []
    queue = RowQueue(10, 1_000_000, on_put=lambda: puts.append(1))
    assert put(queue, block(6)) and put(queue, block(4))
    assert not put(queue, reading(1))
    assert queue.rows == 10 and len(puts) == 2
    queue.get()
    assert put(queue, reading(1)) and not put(queue, block(6))


def test_bytes_are_bounded_and_long_texts_count() -> None:
    queue = RowQueue(1_000_000, 10_000)
    taken = 0
    while put(queue, reading(1, "x" * 1000)):
        taken += 1
    assert 6 <= taken <= 10 and queue.bytes <= 10_000


def test_a_sample_beyond_the_bounds_passes_through_an_empty_queue() -> None:
    queue = RowQueue(10, 1_000)
    assert put(queue, block(500))
    assert not put(queue, reading(1))
    item = queue.get()
    assert item is not None and not isinstance(item.sample, Reading) and item.sample.num_rows == 500


class LookedAt(threading.Event):
    """Notes that it was looked at: `put` does so under its lock, right before it waits."""

    def __init__(self) -> None:
        super().__init__()
        self.looked = threading.Event()

    def is_set(self) -> bool:
        self.looked.set()
        return super().is_set()


def test_a_put_waits_for_room_and_is_woken_by_it() -> None:
    queue, stop = RowQueue(1, 1_000_000), LookedAt()
    assert put(queue, reading(1))
    results: list[bool] = []
    thread = threading.Thread(
        target=lambda: results.append(queue.put(COLUMNS.schema, reading(2), 600.0, stop)), daemon=True
    )
    thread.start()
    assert stop.looked.wait(30)
    assert queue.get() is not None
    thread.join(30)
    assert results == [True] and queue.rows == 1


def test_a_get_waits_for_a_sample() -> None:
    queue = RowQueue(1, 1_000_000)
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(queue.get(wait_s=600)), daemon=True)
    thread.start()
    assert put(queue, reading(7))
    thread.join(30)
    assert [item.sample.values["x"] for item in got] == [7]


def test_a_stop_shortens_the_wait_for_room() -> None:
    queue, stop = RowQueue(1, 1_000_000), threading.Event()
    assert put(queue, reading(1))
    results: list[bool] = []
    thread = threading.Thread(
        target=lambda: results.append(queue.put(COLUMNS.schema, reading(2), 600.0, stop)), daemon=True
    )
    thread.start()
    stop.set()
    deadline_s = time.monotonic() + 30
    while thread.is_alive() and time.monotonic() < deadline_s:
        # The wait may not have begun when the first wake comes.
        queue.wake()
        thread.join(0.05)
    assert results == [False]


def test_a_queue_that_holds_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="holds nothing"):
        RowQueue(0, 1)

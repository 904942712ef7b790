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


def test_a_put_waits_for_room_and_a_get_for_a_sample() -> None:
    queue = RowQueue(1, 1_000_000)
    assert put(queue, reading(1))
    got: list[Any] = []

    def consume() -> None:
        got.extend(queue.get(wait_s=30) for _ in range(2))

    thread = threading.Thread(target=consume, daemon=True)
    thread.start()
    assert put(queue, reading(2), wait_s=30)
    thread.join(30)
    assert [item.sample.values["x"] for item in got] == [1, 2]


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

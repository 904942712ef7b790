"""Refused payloads reach quarantine once; a flood of them is bounded, counted, and delays nobody.

Mutants tried, each found here: remembering a payload that found no room; removing records before they are written;
hashing the envelope, which changes with each sending; letting one unwritable record block all others for ever.
"""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from contract.errors import Reason, TemporaryError
from gateway.quarantine import COMMIT_BYTES_MAX, QuarantineQueue, QuarantineWriter
from gateway.watch import LakeHealth
from lake.quarantine import QuarantineRecord
from tests.unit.gateway_parts import MemoryQuarantine, fresh_metrics, payload, rows, value


@pytest.fixture(autouse=True)
def logs():
    """What was logged; with the default settings each traceback would be drawn with all its variables, for seconds."""
    with capture_logs() as found:
        yield found


def record(
    data: bytes, *, topic: str = "t", reason: str = Reason.NOT_A_PAYLOAD, message: str = "m"
) -> QuarantineRecord:
    return QuarantineRecord(0, topic, reason, message, None, None, None, None, data)


class Bench:
    def __init__(self, bytes_max: int = 1 << 20, records_max: int = 100) -> None:
        self.table = MemoryQuarantine()
        self.metrics = fresh_metrics()
        self.queue = QuarantineQueue(bytes_max, records_max)
        self.health = LakeHealth()
        self.writer = QuarantineWriter(self.queue, lambda: self.table, self.metrics, self.health)


def test_a_refused_payload_is_written_once_however_often_it_comes():
    bench = Bench()
    for _ in range(3):
        bench.writer.put(record(b"junk"))
    bench.writer.put(record(b"junk", topic="another"))
    assert bench.writer.write()
    bench.writer.put(record(b"junk"))
    assert bench.writer.write()
    assert [found.topic for found in bench.table.records] == ["t", "another"]
    assert value(bench.metrics, "quarantine_repeated_total") == 3
    assert value(bench.metrics, "quarantined_total", reason="not_a_payload") == 2
    assert bench.queue.waiting_bytes == 0


def test_the_same_batch_sent_again_is_the_same_mistake_though_its_envelope_differs():
    bench = Bench()
    bench.writer.put(record(payload(sent_at_us=1), reason=Reason.TOPIC_MISMATCH))
    bench.writer.put(record(payload(sent_at_us=2), reason=Reason.TOPIC_MISMATCH))
    bench.writer.put(record(payload(rows([9.0])), reason=Reason.TOPIC_MISMATCH))
    assert bench.queue.waiting == 2


def test_a_flood_is_dropped_at_the_limit_and_counted_and_room_comes_back():
    bench = Bench(records_max=3)
    for number in range(5):
        bench.writer.put(record(b"%d" % number))
    assert value(bench.metrics, "quarantine_dropped_total") == 2
    assert value(bench.metrics, "quarantine_waiting") == value(bench.metrics, "quarantine_waiting_max") == 3
    assert bench.writer.write()
    bench.writer.put(record(b"4"))  # what found no room is not taken for a repeat
    assert bench.writer.write()
    assert [found.payload for found in bench.table.records] == [b"0", b"1", b"2", b"4"]
    bench = Bench(bytes_max=3_000)
    bench.writer.put(record(b"x" * 2_000))
    bench.writer.put(record(b"y" * 2_000))
    assert bench.queue.waiting == 1
    assert bench.queue.waiting_bytes <= 3_000


def test_records_stay_until_they_are_written():
    bench = Bench()
    bench.writer.put(record(b"junk"))
    bench.table.trouble = TemporaryError("no answer")
    assert not bench.writer.write()
    assert bench.queue.waiting == 1
    assert value(bench.metrics, "store_errors_total") == 1
    bench.table.trouble = None
    assert bench.writer.write()
    assert bench.queue.waiting == 0


def test_what_trips_over_a_bug_does_not_block_the_others_for_ever():
    bench = Bench()
    bench.writer.put(record(b"junk"))
    bench.table.trouble = ZeroDivisionError("a bug")
    assert [bench.writer.write() for _ in range(3)] == [False, False, True]
    assert value(bench.metrics, "faults_total", where="quarantine") == 3
    assert value(bench.metrics, "quarantine_dropped_total") == 1
    bench.table.trouble = None
    bench.writer.put(record(b"other"))
    assert bench.writer.write()
    assert [found.payload for found in bench.table.records] == [b"other"]


def test_one_commit_is_bounded_and_takes_at_least_one_record():
    queue = QuarantineQueue(1 << 30)
    for number in range(3):
        queue.put(record(bytes([number]) * (COMMIT_BYTES_MAX // 2)))
    queue.put(record(b"x" * (2 * COMMIT_BYTES_MAX)))
    sizes = []
    while queue.waiting:
        taken = queue.front()
        sizes.append(len(taken))
        queue.remove(len(taken))
    assert sizes == [1, 1, 1, 1]


def test_stopping_writes_what_waits():
    bench = Bench()
    bench.writer.start()
    bench.writer.put(record(b"junk"))
    assert bench.writer.close(10)
    assert [found.payload for found in bench.table.records] == [b"junk"]

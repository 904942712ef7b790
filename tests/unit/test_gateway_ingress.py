"""Whatever bytes arrive, on whatever topic: a batch, a quarantine record, or silence; and memory comes back.

Mutants tried, each found here: not giving memory back after a refusal; stepping over what `unseal` refuses; taking
memory after decoding; not comparing topic and envelope; letting an unexpected exception out.
"""

from __future__ import annotations

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from contract import topics
from contract.codec import encode_body
from contract.errors import Reason, Rejected
from contract.limits import Limits
from gateway import ingress as module
from gateway.budget import OVERHEAD_BYTES, MemoryBudget
from gateway.ingress import INTERNAL_FAULT, Ingress
from gateway.ports import Lane
from tests.unit.gateway_parts import EPOCH, STREAM, Clocks, fresh_metrics, payload, rows, value


@pytest.fixture(autouse=True)
def logs():
    """What was logged; with the default settings each traceback would be drawn with all its variables, for seconds."""
    with capture_logs() as found:
        yield found


TOPIC = topics.up("pi-1", STREAM)


class Bench:
    """Ingress with its ends in lists."""

    def __init__(self, bytes_max: int = 1 << 30, limits: Limits | None = None) -> None:
        self.metrics = fresh_metrics()
        self.budget = MemoryBudget(bytes_max)
        self.delivered = []
        self.quarantined = []
        self.clock = Clocks()
        self.ingress = Ingress(
            limits=limits or Limits(),
            budget=self.budget,
            deliver=lambda stream, pending: self.delivered.append((stream, pending)),
            quarantine=self.quarantined.append,
            metrics=self.metrics,
            clock_us=lambda: 42,
            monotonic_s=self.clock,
        )

    def receive(self, data: bytes, topic: str = TOPIC) -> None:
        self.ingress.receive(topic, data)


def test_a_good_batch_goes_on_its_way_and_holds_memory():
    bench = Bench()
    batch = rows([1.5, 2.5])
    data = payload(batch, seq=7, floor=3, sent_at_us=99)
    bench.receive(data)
    [(stream, pending)] = bench.delivered
    assert stream == STREAM
    assert pending.lane == Lane("pi-1", EPOCH)
    assert (pending.seq, pending.floor, pending.received_at_us, pending.sent_at_us) == (7, 3, 42, 99)
    assert pending.shard == topics.parse_up(TOPIC).shard
    assert pending.content.equals(batch)
    assert pending.payload == data
    assert bench.budget.taken_bytes == pending.held_bytes
    assert pending.held_bytes > len(data) + OVERHEAD_BYTES
    assert value(bench.metrics, "received_rows_total") == 2
    assert value(bench.metrics, "received_bytes_total") == len(data)


def damaged() -> bytes:
    data = bytearray(payload())
    data[-1] ^= 1
    return bytes(data)


@pytest.mark.parametrize(
    ("topic", "data", "reason"),
    [
        (TOPIC, b"", Reason.NOT_A_PAYLOAD),
        (TOPIC, b"\x00" * 100, Reason.NOT_A_PAYLOAD),
        (TOPIC, payload()[:-1], Reason.CHECKSUM_MISMATCH),
        (TOPIC, payload()[:40], Reason.NOT_A_PAYLOAD),
        (TOPIC, damaged(), Reason.CHECKSUM_MISMATCH),
        (TOPIC, payload(device="pi-2"), Reason.TOPIC_MISMATCH),
        (TOPIC, payload(stream="other"), Reason.TOPIC_MISMATCH),
        (TOPIC, payload(seq=0, floor=0), Reason.BAD_SEQ),
        (TOPIC, payload(seq=2**53), Reason.BAD_SEQ),
        (TOPIC, payload(seq=2, floor=3), Reason.BAD_SEQ),
        ("hw/v1/up/0/pi-1/vibration", payload(), Reason.BAD_TOPIC),
        ("hw/v1/up/x/pi-1/vibration", payload(), Reason.BAD_TOPIC),
        ("hw/v1/up/7/Pi 1/ü", payload(), Reason.BAD_TOPIC),
        ("something/else", payload(), Reason.BAD_TOPIC),
    ],
)
def test_what_names_no_batch_is_put_aside_whole_and_not_stepped_over(topic, data, reason):
    bench = Bench()
    bench.receive(data, topic)
    assert bench.delivered == []
    [record] = bench.quarantined
    assert record.reason == reason
    assert record.payload == data
    assert record.topic == topic
    assert (record.epoch, record.seq) == (None, None)
    assert bench.budget.taken_bytes == 0
    assert value(bench.metrics, "refused_total", reason=str(reason)) == 1


def no_ts() -> bytes:
    return encode_body(pa.record_batch({"x": pa.array([1.0])}))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (payload(body=b"not zstd"), Reason.BAD_BODY),
        (payload(body=no_ts(), rows_said=1), Reason.BAD_TS),
        (payload(rows_said=3), Reason.ROW_COUNT_MISMATCH),
        (payload(rows([])), Reason.EMPTY_BATCH),
        (payload(body=zstandard.compress(b"\x00" * (65 * 2**20))), Reason.BODY_TOO_LARGE),
    ],
)
def test_a_batch_that_was_made_wrong_goes_on_to_be_stepped_over(data, reason):
    bench = Bench()
    bench.receive(data)
    assert bench.quarantined == []
    [(_, pending)] = bench.delivered
    assert isinstance(pending.content, Rejected)
    assert pending.content.reason == reason
    assert pending.seq == 1
    assert bench.budget.taken_bytes == pending.held_bytes == len(data) + OVERHEAD_BYTES


def test_a_batch_over_the_limit_is_stepped_over_without_being_unpacked():
    """Its device would be stuck for ever otherwise: it can only send the same bytes again."""
    bench = Bench(limits=Limits(payload_bytes_max=100))
    bench.receive(payload())
    assert bench.quarantined == []
    [(_, pending)] = bench.delivered
    assert isinstance(pending.content, Rejected)
    assert pending.content.reason == Reason.PAYLOAD_TOO_LARGE
    assert "send smaller batches" in str(pending.content)


def test_without_memory_a_batch_is_shed_in_silence_and_costs_nothing():
    data = payload()
    bench = Bench(bytes_max=len(data) + OVERHEAD_BYTES - 1)
    bench.receive(data)
    assert (bench.delivered, bench.quarantined) == ([], [])
    assert bench.budget.taken_bytes == 0
    assert value(bench.metrics, "shed_total", cause="memory") == 1
    assert bench.budget.shedding(bench.clock())


def test_memory_for_what_a_body_says_it_unpacks_to_is_taken_before_it_is_unpacked(monkeypatch):
    # Highly compressible: small on the wire, large in memory.
    data = payload(rows([0.0] * 60_000))
    assert len(data) < 100_000
    bench = Bench(bytes_max=500_000)
    monkeypatch.setattr(module, "decode_body", lambda *_: pytest.fail("it was unpacked"))
    bench.receive(data)
    assert (bench.delivered, bench.quarantined) == ([], [])
    assert value(bench.metrics, "shed_total", cause="memory") == 1
    assert bench.budget.taken_bytes == 0


def test_a_bug_that_one_payload_finds_is_counted_and_the_payload_kept(monkeypatch):
    bench = Bench()

    def trip(*_: object) -> None:
        raise ZeroDivisionError("surprise")

    with monkeypatch.context() as patch:
        patch.setattr(module, "decode_body", trip)
        bench.receive(payload())
        bench.receive(payload(seq=2))
    bench.receive(payload(seq=3))
    assert [record.reason for record in bench.quarantined] == [INTERNAL_FAULT] * 2
    assert bench.quarantined[0].payload == payload()
    assert value(bench.metrics, "faults_total", where="ingress") == 2
    assert [pending.seq for _, pending in bench.delivered] == [3]
    assert bench.budget.taken_bytes == bench.delivered[0][1].held_bytes


@given(st.binary(max_size=300), st.text(max_size=40))
def test_any_bytes_on_any_topic_are_taken(data, topic):
    bench = Bench()
    for where in (TOPIC, topic):
        bench.receive(data, where)
    assert len(bench.quarantined) == 2
    assert bench.budget.taken_bytes == 0


@given(st.data())
def test_a_damaged_payload_never_passes(data):
    good = payload()
    at = data.draw(st.integers(0, len(good) - 1))
    bit = data.draw(st.integers(0, 7))
    bad = bytearray(good)
    bad[at] ^= 1 << bit
    bench = Bench()
    bench.receive(bytes(bad))
    passed = [pending for _, pending in bench.delivered if not isinstance(pending.content, Rejected)]
    # A flipped bit in the envelope may name another batch (its seq, its clock): never other rows.
    assert all(pending.content.equals(rows()) for pending in passed)
    assert len(bench.delivered) + len(bench.quarantined) == 1
    assert bench.budget.taken_bytes == sum(pending.held_bytes for _, pending in bench.delivered)

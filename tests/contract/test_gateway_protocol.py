"""What a gateway does, word for word as in `contract`: payloads in, messages out, rows in a table.

The gateway's own parts, over a table in memory; broker, threads and time are the test's.

Mutants tried, each found here: a retained rewind; an ack of what is only pending; an ack after a failed commit;
stepping over a damaged body; a seq beyond a hole taken though it is not the floor.
"""

from __future__ import annotations

import json
import random

import msgspec
import pyarrow as pa
import pytest

from contract import topics
from contract.batches import Envelope
from contract.codec import decode_body, unseal
from contract.errors import Reason, Rejected, TemporaryError
from contract.limits import DEFAULT_LIMITS, SEQ_MAX
from gateway.acknowledger import Acknowledger
from gateway.budget import MemoryBudget
from gateway.engine import Engine, EngineSettings
from gateway.flush import Flusher, Job
from gateway.ingress import Ingress
from gateway.watch import LakeHealth
from lake.memory import MemoryLake, MemoryRawTable
from lake.quarantine import QuarantineRecord
from tests.contract.make_vectors import VECTORS, plain
from tests.unit.gateway_parts import EPOCH, STREAM, Clocks, MemoryQuarantine, fresh_metrics, payload, rows

PAYLOADS = sorted(VECTORS.glob("*.payload"), key=lambda path: path.name)
INVALID = json.loads((VECTORS / "invalid.json").read_text())


class InMemory:
    """A gateway whose flushes happen at once, and fail when told to."""

    def __init__(self) -> None:
        self.clock = Clocks()
        self.lake = MemoryLake()
        self.quarantine = MemoryQuarantine()
        self.put_aside: list[QuarantineRecord] = []
        self.published: list[tuple[str, object, int, bool]] = []
        self.trouble: Exception | None = None
        self.generation = 0
        metrics, budget = fresh_metrics(), MemoryBudget(1 << 30)
        self.acks = Acknowledger(self.publish, metrics, self.clock)
        self.flusher = Flusher(self, metrics, self.clock)
        self.engine = Engine(
            EngineSettings(1.0, 1 << 30, 1, 10, 1_000),
            budget=budget,
            acks=self.acks,
            heard=lambda devices, at_us: None,
            metrics=metrics,
            health=LakeHealth(self.clock),
            forget=self.flusher.forget,
            rng=random.Random(1),
            clock_s=self.clock,
        )
        self.engine._pool = self
        self.ingress = Ingress(
            limits=DEFAULT_LIMITS,
            budget=budget,
            deliver=lambda stream, pending: self.engine.take((stream, pending)),
            quarantine=self.put_aside.append,
            metrics=metrics,
            monotonic_s=self.clock,
        )

    def open_table(self, stream: str) -> MemoryRawTable:
        if self.trouble is not None:
            raise self.trouble
        return MemoryRawTable(self.lake, stream)

    def open_quarantine(self) -> MemoryQuarantine:
        return self.quarantine

    def submit(self, job: Job) -> None:
        self.flusher.forget(job.stream)
        self.engine.take(self.flusher.run(job))

    def publish(self, topic: str, data: bytes, *, qos: int = 1, retain: bool = False) -> bool:
        self.published.append((topic, msgspec.json.decode(data), qos, retain))
        return True

    def receive(self, data: bytes, topic: str = topics.up("pi-1", STREAM)) -> None:
        self.ingress.receive(topic, data)
        self.acks.publish_waiting()

    def flush(self) -> None:
        self.clock.pass_s(20)
        self.engine.commit_due(self.clock())
        self.acks.publish_waiting()

    def told(self) -> list[tuple[str, object, int, bool]]:
        """What was published since the last look."""
        found, self.published = self.published, []
        return found

    def stored(self, stream: str = STREAM) -> list[int]:
        return [batch.seq for batch in self.lake.batches(stream)]


def ack(seq: int, epoch: str = EPOCH) -> tuple[str, object, int, bool]:
    return (topics.ack("pi-1"), {"v": 1, "committed": [{"stream": STREAM, "epoch": epoch, "seq": seq}]}, 1, True)


def rewind(expected: int) -> tuple[str, object, int, bool]:
    return (topics.rewind("pi-1"), {"v": 1, "stream": STREAM, "epoch": EPOCH, "expected": expected}, 0, False)


def lead_up_to(gateway: InMemory, envelope: Envelope) -> None:
    """Let the table have everything before a batch, so that its turn has come."""
    if envelope.seq > 1:
        before = envelope.seq - 1
        names = {"device": envelope.device, "stream": envelope.stream, "epoch": envelope.epoch}
        gateway.receive(payload(seq=before, floor=before, **names), topics.up(envelope.device, envelope.stream))
        gateway.flush()
        gateway.told()


@pytest.mark.parametrize("path", PAYLOADS, ids=lambda path: path.stem)
def test_a_valid_vector_is_committed_to_the_bit_and_acknowledged(path):
    gateway = InMemory()
    envelope, body = unseal(path.read_bytes())
    lead_up_to(gateway, envelope)
    gateway.receive(path.read_bytes(), topics.up(envelope.device, envelope.stream))
    gateway.flush()
    batch = gateway.lake.batches(envelope.stream)[-1]
    assert (batch.device, batch.epoch, batch.seq) == (envelope.device, envelope.epoch, envelope.seq)
    assert batch.clock == envelope.clock
    sent = decode_body(body, envelope, DEFAULT_LIMITS)
    assert batch.batch.schema.equals(sent.schema, check_metadata=True)
    assert [plain(column) for column in batch.batch.columns] == [plain(column) for column in sent.columns]
    [(topic, document, qos, retain)] = gateway.told()
    assert (topic, qos, retain) == (topics.ack(envelope.device), 1, True)
    assert document["committed"] == [{"stream": envelope.stream, "epoch": envelope.epoch, "seq": envelope.seq}]


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_vector_is_kept_whole_with_its_reason_and_never_a_row(name):
    gateway = InMemory()
    data = bytes.fromhex(INVALID[name]["payload"])
    topic = topics.up("pi-1", STREAM)
    envelope = None
    try:
        envelope, _ = unseal(data)
    except Rejected:
        pass  # it names no batch, so it is nobody's turn
    else:
        topic = topics.up(envelope.device, envelope.stream)
        lead_up_to(gateway, envelope)
    before = gateway.stored()
    gateway.receive(data, topic)
    gateway.flush()
    assert gateway.stored() == before
    [record] = gateway.put_aside or gateway.quarantine.records
    assert record.payload == data
    assert record.reason == INVALID[name]["reason"]
    # What names its batch is stepped over; what does not, must not be.
    assert record.seq == (envelope.seq if envelope else None)
    assert len(gateway.told()) == (1 if envelope else 0)


def test_the_expected_seq_is_taken_and_acknowledged_after_its_commit_only():
    gateway = InMemory()
    for seq in (1, 2, 3):
        gateway.receive(payload(seq=seq))
    assert gateway.told() == []
    gateway.flush()
    assert gateway.told() == [ack(3)]
    assert gateway.stored() == [1, 2, 3]


def test_a_lower_seq_is_dropped_and_the_watermark_acknowledged_again():
    gateway = InMemory()
    gateway.receive(payload(seq=1))
    gateway.flush()
    gateway.told()
    gateway.receive(payload(seq=1))
    assert gateway.told() == [ack(1)]
    gateway.flush()
    assert gateway.stored() == [1]


def test_a_higher_seq_is_dropped_and_a_rewind_asked_for_unless_it_is_the_floor():
    gateway = InMemory()
    gateway.receive(payload(seq=1))
    gateway.receive(payload(seq=4, floor=1))
    assert gateway.told() == [rewind(2)]
    gateway.receive(payload(seq=4, floor=4))
    gateway.flush()
    assert gateway.told() == [ack(4)]
    assert gateway.stored() == [1, 4]


def test_a_batch_that_was_made_wrong_is_stepped_over_with_the_next_commit():
    gateway = InMemory()
    gateway.receive(payload(seq=1, rows_said=77))
    gateway.receive(payload(seq=2))
    assert gateway.told() == []
    gateway.flush()
    assert gateway.told() == [ack(2)]
    assert gateway.stored() == [2]
    [record] = gateway.quarantine.records
    assert (record.reason, record.device, record.epoch, record.seq) == ("row_count_mismatch", "pi-1", EPOCH, 1)


def test_a_batch_that_was_damaged_on_the_way_is_not_stepped_over():
    gateway = InMemory()
    damaged = bytearray(payload(seq=1))
    damaged[-3] ^= 4
    gateway.receive(bytes(damaged))
    gateway.flush()
    assert gateway.told() == []
    assert [(record.reason, record.seq) for record in gateway.put_aside] == [("checksum_mismatch", None)]
    gateway.receive(payload(seq=1))
    gateway.flush()
    assert gateway.told() == [ack(1)]
    assert gateway.stored() == [1]


def test_a_type_that_contradicts_the_table_is_stepped_over_and_nothing_else_is_held_up():
    gateway = InMemory()
    gateway.receive(payload(seq=1))
    gateway.flush()
    text = rows().set_column(1, "x", pa.array(["a", "b"]))
    gateway.receive(payload(text, seq=2))
    gateway.receive(payload(seq=3))
    gateway.flush()
    assert gateway.told()[-1] == ack(3)
    assert gateway.stored() == [1, 3]
    [record] = gateway.quarantine.records
    assert record.reason == Reason.TYPE_CONFLICT
    for said in ("device 'pi-1'", "field 'x'", "string", "double"):
        assert said in record.message


def test_a_new_epoch_begins_at_1_beside_the_old_one():
    gateway = InMemory()
    other = "f" * 32
    gateway.receive(payload(seq=1))
    gateway.receive(payload(seq=1, epoch=other))
    gateway.flush()
    [(_, document, _, _)] = gateway.told()
    assert {(mark["epoch"], mark["seq"]) for mark in document["committed"]} == {(EPOCH, 1), (other, 1)}


def test_the_highest_seq_is_taken_at_the_floor():
    gateway = InMemory()
    gateway.receive(payload(seq=SEQ_MAX, floor=SEQ_MAX))
    gateway.flush()
    assert gateway.told() == [ack(SEQ_MAX)]


def test_while_the_lake_does_not_answer_the_gateway_stays_silent_and_then_goes_on():
    gateway = InMemory()
    gateway.trouble = TemporaryError("no answer")
    gateway.receive(payload(seq=1))
    for _ in range(5):
        gateway.flush()
    assert gateway.told() == []
    gateway.trouble = None
    gateway.flush()
    assert gateway.told() == [ack(1)]
    assert gateway.stored() == [1]

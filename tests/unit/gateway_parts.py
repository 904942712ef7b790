"""What the gateway's unit tests are made of: payloads, a clock that stands still, a pool that works when told to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import pyarrow as pa
from prometheus_client import CollectorRegistry

from contract.batches import Clock, Envelope
from contract.codec import checksum, encode_body, seal
from contract.errors import Rejected
from contract.names import shard_of
from gateway.flush import Done, Job
from gateway.metrics import GatewayMetrics
from gateway.ports import Lane, Pending
from lake.quarantine import QuarantineRecord

BOOT = "ab" * 16
CLOCK = Clock(synced=True, wall_us=0, monotonic_us=0, boot=BOOT)
EPOCH = "0123456789abcdef" * 2
STREAM = "vibration"


def rows(values: Sequence[float] = (1.0, 2.0), **columns: pa.Array) -> pa.RecordBatch:
    """A batch of `ts`, `x` and further columns."""
    ts = pa.array([1_700_000_000_000_000 + number for number in range(len(values))], pa.timestamp("us", tz="UTC"))
    return pa.record_batch({"ts": ts, "x": pa.array(values, pa.float64()), **columns})


def payload(
    batch: pa.RecordBatch | None = None,
    *,
    device: str = "pi-1",
    stream: str = STREAM,
    epoch: str = EPOCH,
    seq: int = 1,
    floor: int = 1,
    rows_said: int | None = None,
    sent_at_us: int = 0,
    body: bytes | None = None,
) -> bytes:
    """A payload as a device would send it, unless told otherwise."""
    batch = rows() if batch is None else batch
    body = encode_body(batch) if body is None else body
    count = batch.num_rows if rows_said is None else rows_said
    return seal(Envelope(device, stream, epoch, seq, floor, count, sent_at_us, CLOCK, checksum(body)), body)


def pending(
    seq: int = 1,
    *,
    device: str = "pi-1",
    epoch: str = EPOCH,
    floor: int = 1,
    content: pa.RecordBatch | Rejected | None = None,
    held_bytes: int = 1_000,
) -> Pending:
    """A batch as ingress would hand it over."""
    content = rows([float(seq)]) if content is None else content
    return Pending(
        Lane(device, epoch), seq, floor, shard_of(device), 0, CLOCK, content, "topic", b"payload", 0, held_bytes
    )


class Clocks:
    """Monotonic seconds that pass when told to."""

    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s

    def pass_s(self, seconds: float) -> None:
        self.now_s += seconds


class ManualPool:
    """Keeps jobs until the test says what becomes of them."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def submit(self, job: Job) -> None:
        self.jobs.append(job)


class Told:
    """Remembers what devices are told."""

    def __init__(self) -> None:
        self.acks: list[tuple[str, str, int]] = []
        self.rewinds: list[tuple[str, str, int]] = []

    def acknowledge(self, stream: str, watermarks: Mapping[Lane, int] | Iterable[tuple[Lane, int]]) -> None:
        items = watermarks.items() if isinstance(watermarks, Mapping) else watermarks
        self.acks += [(stream, lane.device, seq) for lane, seq in items]

    def rewind(self, stream: str, lane: Lane, expected: int) -> None:
        self.rewinds.append((stream, lane.device, expected))


class MemoryQuarantine:
    """A quarantine table in memory."""

    def __init__(self) -> None:
        self.records: list[QuarantineRecord] = []
        self.trouble: Exception | None = None

    def append(self, records: Sequence[QuarantineRecord]) -> None:
        if self.trouble is not None:
            raise self.trouble
        self.records += records


def fresh_metrics() -> GatewayMetrics:
    return GatewayMetrics(CollectorRegistry())


def value(metrics: GatewayMetrics, name: str, **labels: str) -> float:
    """A figure as it would be exposed, 0 where it does not exist yet."""
    return metrics.registry.get_sample_value(f"headwater_gateway_{name}", labels) or 0.0


Runner = Callable[[Job], Done]

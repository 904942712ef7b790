"""One attempt to commit one stream's pending batches: re-check, keep what continues, commit, say what holds now.

It may fail at any point and be tried again from the start with the same batches: nothing is remembered between attempts
but what the table says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa

from contract.batches import SchemaNumbers
from contract.errors import Rejected
from gateway.admission import Offer, continuation
from gateway.ports import Lane, Pending, QuarantineTable, StreamTable
from lake.quarantine import QuarantineRecord
from lake.raw import RawBatch


class Outcome(NamedTuple):
    """What is true after an attempt that did not fail."""

    committed: Mapping[Lane, int]
    """Watermark in the lake of every lane that was pending."""
    missing: Mapping[Lane, int]
    """First missing seq of lanes whose pending batches lie beyond a hole."""
    counters: Mapping[int, int]
    """Counter of every shard that was pending."""
    foreign_shards: frozenset[int]
    """Shards in which another gateway committed since this one last looked: other beliefs about them are stale."""
    life: int
    """Which opening of the table this is about (see `gateway.ports.StreamTable`)."""
    batches: int
    rows: int
    duplicates: int
    """Pending batches that turned out to be in the lake already."""
    quarantined: int
    skewed_rows: int
    parquet_bytes: int


def settle(
    stream: str,
    table: StreamTable,
    quarantine: QuarantineTable,
    pending: Sequence[Pending],
    committed: Mapping[Lane, int],
    counters: Mapping[int, int],
    life: int,
) -> Outcome:
    """Commit what of `pending` continues the table.

    Args:
        stream: the stream's name.
        table: the stream's table.
        quarantine: where refused batches go, before the commit that steps over them.
        pending: batches in the order they were admitted.
        committed: watermarks this gateway believes; a lane that is not in it is looked up.
        counters: shard counters this gateway last saw.
        life: which opening of the table watermarks and counters are about.

    Raises:
        contract.errors.TemporaryError: nothing was committed, or it is not known whether; try again.
    """
    table.refresh()
    seen = {shard: table.shard_counter(shard) for shard in {batch.shard for batch in pending}}
    foreign = frozenset(shard for shard, counter in seen.items() if counters.get(shard) != counter)

    lanes: dict[Lane, list[Pending]] = {}
    for batch in pending:
        lanes.setdefault(batch.lane, []).append(batch)
    # A lower application-transaction version would be accepted silently, so this look-up is what prevents duplicates.
    # Counters do not tell everything: in a table that was restored they may have come to the same numbers by other
    # commits.
    renewed = table.life != life
    doubtful = [
        lane for lane, batches in lanes.items() if renewed or lane not in committed or batches[0].shard in foreign
    ]
    marks: dict[Lane, int] = {lane: committed[lane] for lane in lanes if lane in committed}
    marks |= {Lane(*lane): mark for lane, mark in table.watermarks(doubtful).items()}

    kept: list[Pending] = []
    missing: dict[Lane, int] = {}
    duplicates = 0
    advanced: dict[tuple[str, str], int] = {}
    for lane, batches in lanes.items():
        held = continuation(marks[lane], [Offer(batch.seq, batch.floor) for batch in batches])
        kept.extend(batches[index] for index in held.kept)
        duplicates += sum(batch.seq <= marks[lane] for batch in batches)
        if held.watermark > marks[lane]:
            advanced[lane] = held.watermark
        if held.missing is not None:
            missing[lane] = held.missing

    rows = batches_stored = skewed = parquet_bytes = 0
    refused: list[QuarantineRecord] = []
    if advanced:
        fitting, refused = _sort_out(stream, table, kept)
        if refused:
            quarantine.append(refused)
        shards = {batch.shard for batch in kept}
        result = table.append(fitting, advanced, {shard: seen[shard] + 1 for shard in shards})
        seen |= {shard: seen[shard] + 1 for shard in shards}
        rows, batches_stored = result.rows, len(fitting)
        skewed, parquet_bytes = result.skewed_rows, result.bytes
    return Outcome(
        committed=marks | {Lane(*lane): mark for lane, mark in advanced.items()},
        missing=missing,
        counters=seen,
        foreign_shards=foreign,
        life=table.life,
        batches=batches_stored,
        rows=rows,
        duplicates=duplicates,
        quarantined=len(refused),
        skewed_rows=skewed,
        parquet_bytes=parquet_bytes,
    )


def _sort_out(
    stream: str, table: StreamTable, batches: Sequence[Pending]
) -> tuple[list[RawBatch], list[QuarantineRecord]]:
    """Separate what can stand in the table from what must stand in quarantine."""
    numbers = SchemaNumbers()
    numbered = [
        numbers.number(batch.content.schema) if isinstance(batch.content, pa.RecordBatch) else -1 for batch in batches
    ]
    unfit = [table.unfit(schema) for schema in numbers.schemas]
    fitting: list[RawBatch] = []
    refused: list[QuarantineRecord] = []
    for batch, number in zip(batches, numbered, strict=True):
        content = batch.content
        verdict = content if isinstance(content, Rejected) else unfit[number]
        if verdict is not None:
            refused.append(quarantine_record(batch, stream, verdict))
        else:
            device, epoch = batch.lane
            fitting.append(RawBatch(device, epoch, batch.seq, batch.shard, batch.received_at_us, batch.clock, content))
    return fitting, refused


def quarantine_record(batch: Pending, stream: str, why: Rejected) -> QuarantineRecord:
    """The record of a batch that is stepped over."""
    return QuarantineRecord(
        received_at_us=batch.received_at_us,
        topic=batch.topic,
        reason=str(why.reason),
        message=f"device {batch.lane.device!r}: {why}",
        device=batch.lane.device,
        stream=stream,
        epoch=batch.lane.epoch,
        seq=batch.seq,
        payload=batch.payload,
    )

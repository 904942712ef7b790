"""What is missing, read from the rows themselves: there is no second book that could disagree.

A batch has at least one row and its number is never given twice, so a number that is absent within an epoch, between
1 and the highest, is a batch that the device gave up (evicted, or lost with its disk), unless it stands in
quarantine. Where a device gave up the end of an epoch and then closed it, no later number shows that; the device's own
event `epoch_closed` does, a row of the lake like any other. A thinned batch has fewer rows than its last original row
number says.

Both are aggregates over `_device, _epoch, _seq, _row`, which are small in Parquet, and one window over the batches.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from lake.duck import literal
from lake.views import empty_query, union

NAME = "gaps"
SCHEMA = pa.schema(
    [
        ("stream", pa.string()),
        ("device", pa.string()),
        ("epoch", pa.string()),
        ("kind", pa.string()),
        ("first_seq", pa.int64()),
        ("last_seq", pa.int64()),
        ("batches", pa.int64()),
        ("rows", pa.int64()),
    ]
)
"""`kind` is `missing` (the batches `first_seq` to `last_seq` are not there, their `rows` are unknown) or `thinned` (of
one batch `rows` are not there)."""


def tells_closings(schema: pa.Schema) -> bool:
    """Whether a table has what `gaps_query` reads of the agents' events: anybody may send a stream of that name."""
    types = {field.name: field.type for field in schema}
    texts = all(types.get(name) in (pa.string(), pa.large_string()) for name in ("kind", "stream", "epoch"))
    return texts and types.get("last_seq") == pa.int64()


def gaps_query(streams: Mapping[str, str], quarantine: str | None, events: str | None) -> str:
    """The SELECT behind the view `gaps`.

    Args:
        streams: by name, what stands behind FROM to read each stream's table as it is stored.
        quarantine: the same of the quarantine table; None where there is none.
        events: the same of the agents' events; None where there is no table for which `tells_closings`.
    """
    if not streams:
        return empty_query(SCHEMA)
    parts = [_of_stream(name, source, quarantine, events) for name, source in sorted(streams.items())]
    if events is not None:
        parts.append(_never_seen(streams, events))
    return union(parts)


def _closings(events: str) -> str:
    """How far closed epochs went of which the devices say that their end was given up."""
    return f"""
        SELECT _device AS device, stream, epoch, max(last_seq) AS last_seq FROM {events}
        WHERE kind = 'epoch_closed' AND epoch IS NOT NULL AND last_seq IS NOT NULL GROUP BY ALL"""


def _never_seen(streams: Mapping[str, str], events: str) -> str:
    """Epochs that were given up whole, of streams of which nothing else ever arrived."""
    known = ", ".join(literal(name) for name in sorted(streams))
    return f"""
    SELECT stream, device, epoch, 'missing', 1, last_seq, last_seq, NULL::BIGINT
    FROM ({_closings(events)}) WHERE stream NOT IN ({known})"""


def _of_stream(name: str, source: str, quarantine: str | None, events: str | None) -> str:
    set_aside = ""
    if quarantine is not None:
        set_aside = f"""
            UNION
            SELECT device, epoch, seq FROM {quarantine}
            WHERE stream = {literal(name)} AND epoch IS NOT NULL AND seq IS NOT NULL"""
    ends = ""
    if events is not None:
        ends = f"""
        UNION ALL
        SELECT {literal(name)}, device, epoch, 'missing', coalesce(top, 0) + 1, last_seq, last_seq - coalesce(top, 0),
            NULL::BIGINT
        FROM ({_closings(events)}) LEFT JOIN (SELECT device, epoch, max(seq) AS top FROM present GROUP BY ALL)
            USING (device, epoch)
        WHERE stream = {literal(name)} AND last_seq > coalesce(top, 0)"""
    return f"""
    SELECT * FROM (
        WITH batches AS (
            SELECT _device AS device, _epoch AS epoch, _seq AS seq, count(*) AS held, max(_row)::BIGINT + 1 AS made
            FROM {source} GROUP BY ALL
        ), present AS (
            SELECT device, epoch, seq FROM batches{set_aside}
        ), ordered AS (
            SELECT *, lag(seq, 1, 0) OVER (PARTITION BY device, epoch ORDER BY seq) AS before FROM present
        )
        SELECT {literal(name)} AS stream, device, epoch, 'missing' AS kind,
            before + 1 AS first_seq, seq - 1 AS last_seq, seq - 1 - before AS batches, NULL::BIGINT AS rows
        FROM ordered WHERE seq > before + 1
        UNION ALL
        SELECT {literal(name)}, device, epoch, 'thinned', seq, seq, 1, made - held FROM batches WHERE made > held{ends}
    )"""

"""What the lake holds of a run, counted by SQL."""

from __future__ import annotations

from collections.abc import Iterable

from headwater.answers import quoted
from headwater.ledger import LaneKey
from headwater.reconcile import Batch
from headwater.values import Sql


def arrivals(sql: Sql, streams: Iterable[str], since: str) -> dict[LaneKey, list[Batch]]:
    """Every batch that arrived since a moment, by lane.

    Args:
        sql: asks the lake.
        streams: those to count; each has a view.
        since: a moment, as SQL understands it.
    """
    found: dict[LaneKey, list[Batch]] = {}
    for stream in streams:
        rows = sql(
            "SELECT _device, _epoch, _seq, count(*) AS n, count(DISTINCT _row) AS d "
            f"FROM {quoted(stream)} WHERE _received_at >= {since} GROUP BY ALL"
        )
        columns = (rows[name].to_pylist() for name in ("_device", "_epoch", "_seq", "n", "d"))
        for device, epoch, seq, n, d in zip(*columns, strict=True):
            found.setdefault(LaneKey(device, stream, epoch), []).append(Batch(seq, n, d))
    return found


def moment(us: int) -> str:
    """A moment as SQL understands it.

    Args:
        us: microseconds since 1970-01-01 UTC.
    """
    return f"make_timestamptz({us})"

"""What the lake holds of a run, counted by SQL."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import pyarrow as pa

from edge_agent.buffer.port import LaneInfo
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


def stream_names(sql_streams: pa.Table) -> list[str]:
    """Names out of `Lake.streams()`."""
    return [str(name) for name in sql_streams["stream"].to_pylist()]


def count_gaps(sql: Sql, before: Mapping[LaneKey, LaneInfo], devices: Collection[str]) -> int:
    """Batches that the lake's own view `gaps` misses, or that were thinned, of these devices and since these buffers.

    Args:
        sql: asks the lake.
        before: what the buffers had given a number before the run.
        devices: those that ran.
    """
    rows = sql("SELECT stream, device, epoch, first_seq, last_seq, batches FROM gaps").to_pylist()
    found = 0
    for row in rows:
        lane = LaneKey(row["device"], row["stream"], row["epoch"])
        known = before[lane].last_seq if lane in before else 0
        if lane.device in devices and row["last_seq"] > known:
            found += row["batches"]
    return found


def count_quarantined(sql: Sql, since: str) -> int:
    """Payloads that were set aside since a moment."""
    return int(sql(f"SELECT count(*) AS n FROM quarantine WHERE received_at >= {since}")["n"][0].as_py())

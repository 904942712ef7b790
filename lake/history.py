"""Which version a table had at a time, by the clock of who committed it.

delta-rs goes by the modification times of the log's files, which object stores round to seconds and which change when a
lake is copied; here the time that each commit states is read, by bisection.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime

import msgspec

from lake.errors import CorruptLakeError, ObjectMissingError, QueryError
from lake.store import Store

_COMMIT = re.compile(r"(\d{20})\.json")


class _CommitInfo(msgspec.Struct, rename="camel"):
    timestamp: int
    in_commit_timestamp: int | None = None


class _Action(msgspec.Struct, rename="camel"):
    commit_info: _CommitInfo | None = None


_decode = msgspec.json.Decoder(_Action).decode


def version_at(store: Store, table: str, moment: datetime) -> int | None:
    """The last version that was committed at `moment` or before.

    Args:
        store: where the lake is.
        table: path of the table.
        moment: a time with its zone.

    Returns:
        None where the table was made later, or is not there.

    Raises:
        QueryError: the log does not reach back so far.
        StoreUnavailableError: the store did not answer.
    """
    versions = sorted(
        int(match[1])
        for info in store.objects(f"{table}/_delta_log")
        if (match := _COMMIT.fullmatch(info.path.rpartition("/")[2]))
    )
    wanted_ms = moment.timestamp() * 1000
    low, high = 0, len(versions)
    while low < high:
        middle = (low + high) // 2
        if committed_ms(store, table, versions[middle]) <= wanted_ms:
            low = middle + 1
        else:
            high = middle
    if low:
        return versions[low - 1]
    if versions and versions[0] > 0:
        since = datetime.fromtimestamp(committed_ms(store, table, versions[0]) / 1000, UTC)
        raise QueryError(f"the log of {table} reaches back to {since.isoformat()}, not to {moment.isoformat()}")
    return None


def committed_ms(store: Store, table: str, version: int) -> int:
    """When a version was committed, milliseconds since 1970-01-01 UTC."""
    path = f"{table}/_delta_log/{version:020d}.json"
    try:
        lines = store.get(path).splitlines()
    except ObjectMissingError:
        return 0  # cleaned up meanwhile: older than what is asked for
    for line in lines:
        info = _decode(line).commit_info
        if info is not None:
            return info.in_commit_timestamp or info.timestamp
    raise CorruptLakeError(f"{path} in {store.url} does not say when it was committed")

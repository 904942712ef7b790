"""Where whole payloads stand that cannot become rows: the table `inbox/quarantine`."""

from __future__ import annotations

from typing import NamedTuple


class QuarantineRecord(NamedTuple):
    """A payload put aside, with the reason. What is not known of it is None."""

    received_at_us: int
    """Gateway wall clock at arrival, microseconds since 1970-01-01 UTC."""
    topic: str
    reason: str
    """`contract.errors.Reason`."""
    message: str
    device: str | None
    stream: str | None
    epoch: str | None
    seq: int | None
    payload: bytes

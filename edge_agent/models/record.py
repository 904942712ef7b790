"""What a device remembers of one model: its slots, the order it follows, and what it will not run again.

One record is one file, replaced as a whole, so a power cut leaves the record of before or the one of after, and all
slots change in one act.
"""

from __future__ import annotations

import zlib
from typing import Any

import msgspec

from contract.errors import Reason, Rejected
from contract.models import Assignment, ReportedOrder, Sha256
from edge_agent.models.orders import Seen

RECORD_VERSION = 1
RECORD_BYTES_MAX = 256 * 1024
DENIED_MAX = 64
"""Hashes that one model's record remembers; beyond, the oldest is forgotten."""


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """A release whose manifest was verified; its files are in the store by hash."""

    version: int
    sha256: Sha256
    """Of the ONNX file."""
    manifest: Sha256
    """Of the manifest's bytes."""


class Denied(msgspec.Struct, frozen=True, kw_only=True):
    """A model that this device does not load again, whoever orders it."""

    sha256: Sha256
    reason: str


class ModelRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a device must not forget about one model. Members that another agent wrote are ignored."""

    v: int = RECORD_VERSION
    model: str
    active: Release | None = None
    """Runs. None: the factory's release does, where there is one."""
    candidate: Release | None = None
    """Is checked and tried; from its verification on until the order ends."""
    previous: Release | None = None
    """Was active before; goes back into service when the active one breaks."""
    seen: Seen | None = None
    """The latest order that was opened; older ones are replays."""
    envelope: dict[str, Any] | None = None
    """That order as it was signed: a restart verifies it again."""
    assignment: Assignment | None = None
    order: ReportedOrder | None = None
    """How far this device is with it."""
    passing: bool = False
    """It was rejected for a reason that may pass: the same order is followed when it comes again and is right then."""
    claimed: ReportedOrder | None = None
    """A newer order that was not opened. It is only shown, until the proven one is heard again or has news."""
    starts: int = 0
    """Times that the candidate was loaded, and the process neither committed nor stopped in order."""
    active_starts: int = 0
    """The same of the active one, until it has scored for a while."""
    denied: tuple[Denied, ...] = ()

    @property
    def shown(self) -> ReportedOrder | None:
        """What is reported."""
        return self.claimed or self.order

    @property
    def heard(self) -> Seen | None:
        """What an order is compared with to tell whether it is new."""
        seen = self.seen
        return Seen(sequence=seen.sequence - 1, key=seen.key) if seen is not None and self.passing else seen

    def denial(self, sha256: str) -> str | None:
        """Why a model may not be loaded; None when it may."""
        return next((each.reason for each in self.denied if each.sha256 == sha256), None)

    def releases(self) -> tuple[Release, ...]:
        """Those of all slots."""
        return tuple(each for each in (self.active, self.candidate, self.previous) if each is not None)


def encode_record(record: ModelRecord) -> bytes:
    """A line with the CRC-32 of the rest, then JSON."""
    body = msgspec.json.encode(record)
    return b"%08x\n" % zlib.crc32(body) + body


def decode_record(data: bytes) -> ModelRecord:
    """What `encode_record` wrote.

    Raises:
        Rejected: it is damaged, or of another version.
    """
    head, _, body = data.partition(b"\n")
    if head != b"%08x" % zlib.crc32(body):
        raise Rejected(Reason.CHECKSUM_MISMATCH, f"the record of {len(data)} bytes does not match its checksum")
    try:
        record = msgspec.json.decode(body, type=ModelRecord)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Rejected(Reason.BAD_ENVELOPE, f"the record cannot be read: {str(error)[:200]}") from error
    if record.v != RECORD_VERSION:
        raise Rejected(Reason.UNKNOWN_VERSION, f"the record is of version {record.v}, not {RECORD_VERSION}")
    return record

"""What `edge_agent.models.trust` answers: an order that may be followed, or why it may not be.

Nothing heavy is imported here: the agent itself uses these names, while the verification runs in a child process.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, NamedTuple

import msgspec

from contract.errors import HeadwaterError, TemporaryError
from contract.models import Assignment


class TrustReason(StrEnum):
    """Why an order or a release is not trusted. The values are a contract: they stand in reports and events."""

    BAD_SIGNATURE = "bad_signature"
    """Not signed, or by a key that may not."""
    BAD_ORDER = "bad_order"
    """Not an envelope with an assignment that this agent knows."""
    WRONG_DEVICE = "wrong_device"
    REPLAYED = "replayed"
    """An order older than the latest one of its model."""
    REPEATED = "repeated"
    """The latest order of its model once more, as brokers hand it over at each connection: no news, and no mistake."""
    ORDER_EXPIRED = "order_expired"
    """It was not to be begun so late."""
    EXPIRED_METADATA = "expired_metadata"
    """Somebody holds back newer signatures, or nobody makes them any more."""
    ROLLBACK = "rollback"
    """Metadata older than what this device has seen."""
    BAD_METADATA = "bad_metadata"
    """Signed metadata that contradicts itself."""
    UNAPPROVED = "unapproved"
    """The release is a draft, was retired, or never was."""
    BAD_HASH = "bad_hash"
    """Other bytes than the signed ones."""
    BAD_MANIFEST = "bad_manifest"
    CLOCK = "clock"
    """This device's clock is not synchronised and cannot be right."""
    UNAVAILABLE = "unavailable"
    """What has to be read did not come."""


PASSING = frozenset(
    {
        TrustReason.BAD_SIGNATURE,
        TrustReason.ORDER_EXPIRED,
        TrustReason.EXPIRED_METADATA,
        TrustReason.UNAPPROVED,
    }
)
"""Whoever signs and approves may mend these: the same order may be right when it comes again."""


class Distrusted(HeadwaterError):
    """Final: reject the order. The message names the thing, the value and the remedy.

    Attributes:
        reason: the machine-readable reason.
    """

    def __init__(self, reason: TrustReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class NotYetTrusted(TemporaryError):
    """Not to be followed now: keep the order, and ask again later (`CLOCK`, `UNAVAILABLE`).

    Attributes:
        reason: the machine-readable reason.
    """

    def __init__(self, reason: TrustReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class TrustPlace(msgspec.Struct, frozen=True, kw_only=True):
    """Where trust begins on this device, where it is kept, and where news of it come from."""

    root: str
    """File: the trust anchor, a TUF root metadata file that came with the device. Never written."""
    metadata_dir: str
    """Folder: the newest metadata that was trusted. What is in it protects against rollback."""
    url: str
    """`http(s)://host:port/models/` of a gateway, or any static host of the lake's folder `models`."""
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=600)] = 10.0
    """For a connection, and between two pieces of an answer."""
    deadline_s: Annotated[float, msgspec.Meta(gt=0, le=3_600)] = 60.0
    """For one file, from request to last byte."""


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """The latest order of a model that this device opened; to be kept on disk before it is followed."""

    sequence: int
    key: str
    """Id of the key that signed it. A sequence counts only while its key is trusted: whoever stole a key and signed an
    enormous sequence is forgotten with the key."""


class Order(NamedTuple):
    """An assignment whose signature, device, sequence and date are right."""

    assignment: Assignment
    key: str
    """Id of the key that signed it."""

    @property
    def seen(self) -> Seen:
        """What to remember of it."""
        return Seen(sequence=self.assignment.sequence, key=self.key)

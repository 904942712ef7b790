"""The JSON documents beside the batches: acks, rewinds, presence, desired and reported state.

All are UTF-8 JSON objects with a version `v`. Unknown members are ignored, so that either side may be updated first;
only a desired document is refused whole when anything in it is not understood, because half a configuration is worse
than the old one.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from contract.errors import Reason, Rejected
from contract.limits import CONTROL_BYTES_MAX, PROTOCOL_VERSION
from contract.models import Assignments, ReportedModel


class Watermark(msgspec.Struct, frozen=True):
    """All batches of (stream, epoch) up to `seq` are committed in the lake, or stand in quarantine."""

    stream: str
    epoch: str
    seq: int


class Ack(msgspec.Struct, frozen=True, kw_only=True):
    """Published retained on `hw/v1/ack/<device>` after a commit: watermarks the gateway knows of this device."""

    v: int = PROTOCOL_VERSION
    committed: tuple[Watermark, ...]


class Rewind(msgspec.Struct, frozen=True, kw_only=True):
    """Published on `hw/v1/rewind/<device>`: batches from `expected` on did not arrive; send again from there."""

    v: int = PROTOCOL_VERSION
    stream: str
    epoch: str
    expected: int


class Presence(msgspec.Struct, frozen=True, kw_only=True):
    """Published retained on `hw/v1/status/<device>`; the last will carries `online = false, reason = "lost"`."""

    v: int = PROTOCOL_VERSION
    online: bool
    reason: str
    """`started`, `stopped` (asked to) or `lost` (the last will)."""
    at_us: int
    """Device wall clock when the document was made; of a last will, when the connection began."""
    agent: str
    """Name and version of the sending software."""
    boot: str
    """Id of the device's boot."""


class DesiredStream(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What to change of one stream; what is absent stays as the device's own configuration file says."""

    enabled: bool | None = None
    rate_hz: float | None = None
    max_batch_rows: int | None = None
    max_batch_age_s: float | None = None


class Desired(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Published retained on `hw/v1/desired/<device>`: the whole remote configuration, not a difference.

    A device applies a document whose revision is higher than the one it has, and keeps it across restarts.
    """

    v: int = PROTOCOL_VERSION
    revision: int
    streams: dict[str, DesiredStream] = {}


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Why a desired document was not applied."""

    revision: int | None
    """None where the document could not be read that far."""
    reason: str


class ReportedStream(msgspec.Struct, frozen=True, kw_only=True):
    """Condition of one stream on the device. Counters run since the agent started."""

    enabled: bool
    rate_hz: float | None
    max_batch_rows: int
    max_batch_age_s: float
    readings: int
    overruns: int
    waiting_batches: int
    waiting_rows: int
    waiting_bytes: int
    evicted_rows: int


class Reported(msgspec.Struct, frozen=True, kw_only=True):
    """Published retained on `hw/v1/reported/<device>`, on change and at a slow interval."""

    v: int = PROTOCOL_VERSION
    revision: int
    """Revision of the desired document in force; 0 for the device's own configuration."""
    refused: Refusal | None = None
    agent: str
    boot: str
    clock_synced: bool
    started_at_us: int
    streams: dict[str, ReportedStream]
    models: dict[str, ReportedModel] = {}
    """By model name; of agents that run models."""
    tags: tuple[str, ...] = ()
    """What the device's own file says it is, such as `site-a`: rollouts may choose by it."""


Message = TypeVar("Message", Ack, Rewind, Presence, Desired, Reported, Assignments)

encode = msgspec.json.Encoder().encode
"""Encode any of these documents as UTF-8 JSON."""


def decode(payload: bytes, kind: type[Message]) -> Message:
    """Decode a document and check its version.

    Raises:
        Rejected: when it is too large, not JSON, lacks a member, has a member of another type, or another version.
    """
    what = kind.__name__.lower()
    if len(payload) > CONTROL_BYTES_MAX:
        raise Rejected(
            Reason.PAYLOAD_TOO_LARGE,
            f"{what} document of {len(payload)} bytes, more than {CONTROL_BYTES_MAX}; shorten it",
        )
    try:
        version = msgspec.json.decode(payload, type=_Version).v
        if version != PROTOCOL_VERSION:
            raise Rejected(
                Reason.UNKNOWN_VERSION,
                f"{what} document of version {version}, not {PROTOCOL_VERSION}; update one side",
            )
        return msgspec.json.decode(payload, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Rejected(Reason.BAD_ENVELOPE, f"{what} document cannot be read: {str(error)[:200]}") from error


class _Version(msgspec.Struct):
    v: int

"""Names of devices, streams, epochs and fields, and the shard of a device."""

from __future__ import annotations

import re
import secrets
import zlib

from contract.errors import Reason, Rejected
from contract.limits import FIELD_NAME_BYTES_MAX, SHARDS

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)
_EPOCH = re.compile(r"[0-9a-f]{32}", re.ASCII)

TS = "ts"
"""The one field every batch has: `timestamp[us, tz=UTC]`, never null."""
ROW = "_row"
"""The field that only a thinned batch carries: `int32`, the original row numbers, rising."""
EVENTS_STREAM = "headwater.events"
"""The stream in which an agent reports what happened to it. Names that begin with `headwater.` are reserved."""
PREDICTIONS_PREFIX = "predictions."
"""What a model says is the stream `predictions.<model>`. Names that begin so are reserved."""


def is_name(text: str) -> bool:
    """Whether `text` may name a device or a stream: `[a-z0-9][a-z0-9._-]{0,62}`."""
    return _NAME.fullmatch(text) is not None


def is_epoch(text: str) -> bool:
    """Whether `text` is an epoch: 32 lower-case hexadecimal digits (128 random bits)."""
    return _EPOCH.fullmatch(text) is not None


def new_epoch() -> str:
    """A fresh random epoch."""
    return secrets.token_hex(16)


def check_name(kind: str, text: str) -> str:
    """Return `text` if it may name a `kind` ("device" or "stream").

    Raises:
        Rejected: with `Reason.BAD_ENVELOPE`, naming the text and the rule.
    """
    if not is_name(text):
        raise Rejected(
            Reason.BAD_ENVELOPE,
            f"{kind} name {_shown(text)} is not allowed: use 1 to 63 of a-z 0-9 . _ - beginning with a letter or digit",
        )
    return text


def check_field_name(name: str) -> None:
    """Accept a field name of 1 to 128 UTF-8 bytes without control characters.

    Raises:
        Rejected: with `Reason.BAD_FIELD_NAME`, naming the field and the rule.
    """
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        size = 0
    if not 1 <= size <= FIELD_NAME_BYTES_MAX:
        raise Rejected(
            Reason.BAD_FIELD_NAME,
            f"field name {_shown(name)} has {size} bytes; rename it to 1 to {FIELD_NAME_BYTES_MAX} bytes of UTF-8",
        )
    if any(ord(ch) < 0x20 or ord(ch) == 0x7F for ch in name):
        raise Rejected(
            Reason.BAD_FIELD_NAME,
            f"field name {_shown(name)} has control characters; rename the field without them",
        )


def shard_of(device: str) -> int:
    """The shard of a device: `crc32(device) % 64` (CRC-32 of ISO 3309, as in zlib)."""
    return zlib.crc32(device.encode()) % SHARDS


def _shown(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 80 else shown[:77] + "…"

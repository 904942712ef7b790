"""Every limit of the protocol, in one place, each with its unit in its name.

Both sides enforce the same numbers: the agent before it buffers, the gateway before it believes. A gateway may be
configured lower than these, never higher.
"""

from __future__ import annotations

import msgspec

PROTOCOL_VERSION = 1
SHARDS = 64
NAME_LENGTH_MAX = 63
SEQ_MAX = 2**53 - 1
"""The highest sequence number: exact in JSON numbers of every language."""
ENVELOPE_BYTES_MAX = 1024
FIELD_NAME_BYTES_MAX = 128
SCHEMA_DEPTH_MAX = 8
SCHEMA_BYTES_MAX = 256 * 1024
CONTROL_BYTES_MAX = 256 * 1024
"""Largest ack, presence, desired or reported document."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one payload may be. All inclusive."""

    payload_bytes_max: int = 8 * 1024 * 1024
    """One MQTT payload: envelope and body, compressed."""
    body_bytes_max: int = 64 * 1024 * 1024
    """One body after decompression, and after its dictionaries are expanded."""
    rows_max: int = 65_536
    fields_max: int = 1_024
    """Leaf fields of a batch, nested ones counted one by one."""

    def __post_init__(self) -> None:
        """Refuse a configuration above the protocol's own numbers or below one."""
        for name in self.__struct_fields__:
            value, most = getattr(self, name), _CEILING[name]
            if not 1 <= value <= most:
                raise ValueError(f"limit {name} = {value} is outside 1..{most}; choose a value in that range")


_CEILING = {
    "payload_bytes_max": 8 * 1024 * 1024,
    "body_bytes_max": 64 * 1024 * 1024,
    "rows_max": 65_536,
    "fields_max": 1_024,
}

DEFAULT_LIMITS = Limits()

"""The topics of protocol v1. Nothing else builds or parses one."""

from __future__ import annotations

from typing import NamedTuple

from contract.errors import Reason, Rejected
from contract.limits import SHARDS
from contract.names import is_name, shard_of

ROOT = "hw/v1"


class UpTopic(NamedTuple):
    """The parts of `hw/v1/up/<shard>/<device>/<stream>`."""

    shard: int
    device: str
    stream: str


def up(device: str, stream: str) -> str:
    """Where a device publishes batches of a stream: `hw/v1/up/<shard>/<device>/<stream>`, QoS 1, not retained."""
    return f"{ROOT}/up/{shard_of(device)}/{device}/{stream}"


def up_filter(shard: int) -> str:
    """What a gateway subscribes to for one of its shards."""
    return f"{ROOT}/up/{shard}/+/+"


def ack(device: str) -> str:
    """Where a gateway tells a device what is committed: retained."""
    return f"{ROOT}/ack/{device}"


def rewind(device: str) -> str:
    """Where a gateway asks a device to send again from a sequence number: not retained."""
    return f"{ROOT}/rewind/{device}"


def desired(device: str) -> str:
    """The configuration a device shall have: retained."""
    return f"{ROOT}/desired/{device}"


def reported(device: str) -> str:
    """The configuration and condition a device says it has: retained."""
    return f"{ROOT}/reported/{device}"


def assign(device: str) -> str:
    """The releases a device shall run, each order signed: retained."""
    return f"{ROOT}/assign/{device}"


def status(device: str) -> str:
    """Presence of a device: retained, with last will."""
    return f"{ROOT}/status/{device}"


def parse_up(topic: str) -> UpTopic:
    """Read a batch topic.

    Raises:
        Rejected: with `Reason.BAD_TOPIC` when it is not `hw/v1/up/<shard>/<device>/<stream>`, a name is not allowed, or
            the shard is not the device's.
    """
    parts = topic.split("/")
    if len(parts) != 6 or parts[:3] != ["hw", "v1", "up"]:
        raise Rejected(Reason.BAD_TOPIC, f"topic {topic[:200]!r} is not hw/v1/up/<shard>/<device>/<stream>")
    shard_text, device, stream = parts[3:]
    if not is_name(device) or not is_name(stream):
        raise Rejected(
            Reason.BAD_TOPIC,
            f"topic {topic[:200]!r} names a device or stream outside [a-z0-9][a-z0-9._-]{{0,62}}; rename it",
        )
    shard = shard_of(device)
    if shard_text != str(shard):
        raise Rejected(
            Reason.BAD_TOPIC,
            f"topic {topic[:200]!r} has shard {shard_text[:20]!r}, but crc32({device!r}) % {SHARDS} is {shard}",
        )
    return UpTopic(shard, device, stream)


def parse_device(topic: str, kind: str) -> str:
    """The device of `hw/v1/<kind>/<device>`.

    Raises:
        Rejected: with `Reason.BAD_TOPIC` when the topic has another form.
    """
    parts = topic.split("/")
    if len(parts) != 4 or parts[:3] != ["hw", "v1", kind] or not is_name(parts[3]):
        raise Rejected(Reason.BAD_TOPIC, f"topic {topic[:200]!r} is not hw/v1/{kind}/<device>")
    return parts[3]

"""Which board this is: so that a buffer notices that its card was copied to, or put into, another one.

Two boards that continue the same epoch would give one number to two different batches, and the lake would take only one
of them. A wrong alarm costs an epoch, never a row; so whatever tells boards apart is good enough.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

_MEANINGLESS = re.compile(r"|0+|f+|x+|(?:0?1?2?3?4?5?6?7?8?9?)|none|notspecified|defaultstring|tobefilledbyoem")
"""Serial numbers of makers who gave none."""
_FACTORY_UUIDS = {"03000200040005000006000700080009"}
"""The example in a vendor's firmware, found on boards of many makers."""
_PERMANENT = "0"
"""`addr_assign_type` of a network interface whose address is burnt in (Linux: NET_ADDR_PERM)."""


class IdentityPaths(msgspec.Struct, frozen=True, kw_only=True):
    """Where the kernel says what hardware it runs on."""

    device_tree_serial: Path = Path("/proc/device-tree/serial-number")
    """Raspberry Pi and other ARM boards."""
    dmi_product_uuid: Path = Path("/sys/class/dmi/id/product_uuid")
    """PCs and virtual machines; readable by root only."""
    net: Path = Path("/sys/class/net")


def hardware_fingerprint(paths: IdentityPaths | None = None) -> str:
    """The board's fingerprint: 32 hexadecimal digits, the same at every start on the same hardware.

    Taken from the board's serial number in the device tree; else from the DMI product UUID; else from the lowest
    burnt-in address among the network cards; else it is that of "a board that cannot be told apart". Hashed, so that it
    can be stored and reported without giving a serial number away.
    """
    source, value = next(_candidates(paths or IdentityPaths()), ("none", ""))
    return hashlib.sha256(f"headwater board\0{source}\0{value}".encode()).hexdigest()[:32]


def _candidates(paths: IdentityPaths) -> Iterator[tuple[str, str]]:
    for source, path in (("device-tree", paths.device_tree_serial), ("dmi", paths.dmi_product_uuid)):
        serial = _read(path)
        if not _is_meaningless(serial):
            yield source, serial
    addresses = sorted(filter(None, map(_burnt_in_address, _children(paths.net))))
    if addresses:
        yield "net", addresses[0]


def _read(path: Path) -> str:
    """The file's text in lower case without white space and the device tree's closing zero byte; empty without one."""
    try:
        return path.read_bytes()[:256].decode("ascii", "replace").strip("\0 \n\t").lower()
    except OSError:
        return ""


def _is_meaningless(serial: str) -> bool:
    bare = re.sub(r"[^0-9a-z]", "", serial)
    return _MEANINGLESS.fullmatch(bare) is not None or bare in _FACTORY_UUIDS


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _burnt_in_address(interface: Path) -> str | None:
    """The address of a network card; None for bridges, tunnels, containers and cards that make one up."""
    if not (interface / "device").exists() or _read(interface / "addr_assign_type") != _PERMANENT:
        return None
    address = _read(interface / "address")
    return None if _is_meaningless(address) else address

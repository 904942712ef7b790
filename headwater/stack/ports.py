"""Loopback ports: the usual one when it is free, the one of last time before that, remembered in a small file.

A restart over the same data folder finds its servers where they were, so that other programs need no new settings.
New ports are drawn below the kernel's range for outgoing connections (32768 and up on Linux): a port from that range
could be taken by any connection of any program while its server is being restarted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from contract.errors import ConfigurationError
from headwater.stack.errors import NoFreePort

HOST = "127.0.0.1"
PORT_MIN, PORT_MAX = 20_000, 31_999
"""Where ports are drawn from when neither the remembered nor the usual one is free."""
PRIVILEGED_PORTS = 1024
"""Below, a port is for root, unless the system says otherwise."""
_LISTENING = "0A"
"""State of a socket in /proc/net/tcp."""
TRIES_MAX = 200
BOOK_BYTES_MAX = 64 * 1024


class _Book(msgspec.Struct, frozen=True):
    """The file: name of the port → number."""

    ports: dict[str, int]


def is_free(port: int, host: str = HOST) -> bool:
    """Whether a server could listen on `host:port` now.

    Bound the way servers bind (SO_REUSEADDR): connections of the past in TIME_WAIT do not count as taken, a listener
    does, also one on all addresses.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise ConfigurationError(
                f"cannot bind {host}:{port}: {error}; the stack needs the loopback interface"
            ) from error
    return True


def listener(port: int) -> str:
    """Who listens on a port, as ` by NAME (process 123)`; empty where the kernel does not tell this user."""
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for row in map(str.split, Path(table).read_text().splitlines()[1:]):
                if row[1].endswith(f":{port:04X}") and row[3] == _LISTENING:
                    sockets.add(f"socket:[{row[9]}]")
    for link in Path("/proc").glob("[0-9]*/fd/*") if sockets else ():
        # Processes of others, and those that end meanwhile, cannot be read.
        with contextlib.suppress(OSError):
            if str(link.readlink()) in sockets:
                return f" by {(link.parents[1] / 'comm').read_text().strip()} (process {link.parts[2]})"
    return ", or not for this user" if port < PRIVILEGED_PORTS else ""


def choose(
    wanted: Mapping[str, int | None],
    remembered: Mapping[str, int],
    *,
    free: Callable[[int], bool] = is_free,
    rng: random.Random,
) -> dict[str, int]:
    """A free port for each name: the remembered one, else the usual one, else one drawn from PORT_MIN..PORT_MAX.

    Args:
        wanted: name → usual port, or None when there is none.
        remembered: what was chosen last time.
        free: whether a port can be listened on.
        rng: draws the others.

    Raises:
        NoFreePort: when TRIES_MAX draws for one name found none.
    """
    chosen: dict[str, int] = {}
    for name, usual in wanted.items():
        likely = [port for port in (remembered.get(name), usual) if port is not None]
        drawn = (rng.randint(PORT_MIN, PORT_MAX) for _ in range(TRIES_MAX))
        for port in (*likely, *drawn):
            # What others remember is left to them, or two servers would swap ports at every second start.
            reserved = set(chosen.values()) | {other for key, other in remembered.items() if key != name}
            if port not in reserved and free(port):
                chosen[name] = port
                break
        else:
            raise NoFreePort(
                f"no free port for {name!r}: tried {likely} and {TRIES_MAX} between {PORT_MIN} and {PORT_MAX}; "
                "stop what listens there (ss -ltnp shows it)"
            )
    return chosen


class PortBook:
    """The ports of one data folder, kept in a file.

    Args:
        path: the file; its folder must exist. A missing file is an empty book.
        rng: draws ports where the usual ones are taken; hand in a seeded one to replay a choice.
    """

    def __init__(self, path: Path, *, rng: random.Random | None = None) -> None:
        self._path = path
        self._rng = rng or random.Random()

    def read(self) -> dict[str, int]:
        """What is remembered: name → port.

        Raises:
            ConfigurationError: when the file cannot be read, or is not a port book.
        """
        try:
            with self._path.open("rb") as file:
                data = file.read(BOOK_BYTES_MAX)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise ConfigurationError(
                f"port book {self._path} cannot be read: {error}; give it to this user, or choose another --data"
            ) from error
        try:
            ports = msgspec.json.decode(data, type=_Book).ports
        except msgspec.DecodeError as error:
            raise ConfigurationError(
                f"{self._path} is not a port book ({error}); delete it, and ports are chosen anew"
            ) from error
        return {name: port for name, port in ports.items() if 0 < port < 65_536}

    def claim(self, wanted: Mapping[str, int | None]) -> dict[str, int]:
        """Choose a free port for each name and remember the choice beside what is remembered already.

        Raises:
            NoFreePort: see `choose`.
            ConfigurationError: when the book cannot be read or written.
        """
        remembered = self.read()
        chosen = choose(wanted, remembered, rng=self._rng)
        if any(remembered.get(name) != port for name, port in chosen.items()):
            write_whole(self._path, msgspec.json.format(msgspec.json.encode(_Book(remembered | chosen))), 0o644)
        return chosen


def write_whole(path: Path, data: bytes, mode: int) -> None:
    """Put `data` at `path` so that a reader, or a start after power loss, finds the old content or the new, whole.

    Raises:
        ConfigurationError: when the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # The mode is right from the first byte on: a secret is never readable by others, not even for a moment.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error}; make its folder writable") from error

"""What the agent tells systemd: ready, alive, stopping, and one line of status.

Own implementation of the protocol in sd_notify(3): newline-separated assignments in one datagram to the socket named by
NOTIFY_SOCKET. Outside systemd `NullNotifier` takes its place.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Protocol

import structlog

from contract.errors import ConfigurationError

_log = structlog.get_logger()

STATUS_CHARS_MAX = 200
BUSY_S = 60.0


class Notifier(Protocol):
    """The service manager's ear."""

    @property
    def watchdog_s(self) -> float | None:
        """Silence after which the service manager restarts the process, seconds; None when it does not watch."""

    def ready(self) -> None:
        """Everything runs."""

    def alive(self) -> None:
        """Every part made progress since the last call: restart the watchdog's count."""

    def busy(self) -> None:
        """The start takes longer than usual, and goes on: do not give up on it for another `BUSY_S`."""

    def status(self, line: str) -> None:
        """One line for people: what the agent is doing."""

    def stopping(self) -> None:
        """The agent shuts down on purpose."""

    def close(self) -> None:
        """Let go of the socket."""


class NullNotifier:
    """Nobody listens."""

    watchdog_s = None

    def ready(self) -> None:
        """Do nothing."""

    def alive(self) -> None:
        """Do nothing."""

    def busy(self) -> None:
        """Do nothing."""

    def status(self, line: str) -> None:
        """Do nothing."""

    def stopping(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class SystemdNotifier:
    """Sends datagrams to the notify socket of systemd.

    Args:
        address: path of the socket; `@` in front stands for Linux' abstract name space.
        watchdog_s: the unit's WatchdogSec, seconds, or None.
    """

    def __init__(self, address: str, watchdog_s: float | None) -> None:
        self.watchdog_s = watchdog_s
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        # A service manager that does not read must not be able to hold the agent up.
        self._socket.setblocking(False)

    def ready(self) -> None:
        """`READY=1`."""
        self._send("READY=1")

    def alive(self) -> None:
        """`WATCHDOG=1`, where the unit has a watchdog."""
        if self.watchdog_s is not None:
            self._send("WATCHDOG=1")

    def busy(self) -> None:
        """`EXTEND_TIMEOUT_USEC=`, so that TimeoutStartSec does not end it."""
        self._send(f"EXTEND_TIMEOUT_USEC={BUSY_S * 1_000_000:.0f}")

    def status(self, line: str) -> None:
        """`STATUS=`, shortened to one line of 200 characters."""
        self._send("STATUS=" + " ".join(line.split())[:STATUS_CHARS_MAX])

    def stopping(self) -> None:
        """`STOPPING=1`."""
        self._send("STOPPING=1")

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _send(self, assignment: str) -> None:
        try:
            self._socket.sendto(assignment.encode(), self._address)
        except OSError as error:
            # The agent's work does not depend on it; a missed watchdog message is systemd's to judge.
            _log.warning("systemd_not_told", assignment=assignment, error=str(error))


def notifier_from(environment: Mapping[str, str], pid: int) -> Notifier:
    """The notifier that the environment of this process asks for.

    Args:
        environment: the process environment, read once at start (NOTIFY_SOCKET, WATCHDOG_USEC, WATCHDOG_PID).
        pid: this process; a watchdog meant for another one is not ours to feed.

    Raises:
        ConfigurationError: the variables are set to something that systemd never sets.
    """
    address = environment.get("NOTIFY_SOCKET", "")
    if not address:
        return NullNotifier()
    if address[0] not in "/@" or len(address) < 2:
        raise ConfigurationError(
            f"NOTIFY_SOCKET = {address!r} is neither an absolute path nor an abstract socket; "
            "start the agent with systemd, or unset the variable"
        )
    return SystemdNotifier(address, _watchdog_s(environment, pid))


def _watchdog_s(environment: Mapping[str, str], pid: int) -> float | None:
    text = environment.get("WATCHDOG_USEC", "")
    if not text or environment.get("WATCHDOG_PID", str(pid)) != str(pid):
        return None
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise ConfigurationError(
            f"WATCHDOG_USEC = {text!r} is not a number of microseconds above 0; "
            "start the agent with systemd, or unset the variable"
        )
    return int(text) / 1e6

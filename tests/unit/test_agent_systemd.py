from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from contract.errors import ConfigurationError
from edge_agent.systemd import NullNotifier, SystemdNotifier, notifier_from


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A notify socket as systemd has it, and what NOTIFY_SOCKET says."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        if request.param == "path":
            address = str(tmp_path / "notify")
            listener.bind(address)
        else:
            listener.bind(f"\0headwater-test-{tmp_path.name}-{id(listener)}")
            address = "@" + listener.getsockname()[1:].decode()
        listener.setblocking(False)
        yield listener, address


def heard(listener: socket.socket) -> list[bytes]:
    found = []
    while True:
        try:
            found.append(listener.recv(4096))
        except BlockingIOError:
            return found


def test_systemd_hears_what_the_agent_says(manager: tuple[socket.socket, str]) -> None:
    listener, address = manager
    notifier = notifier_from({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "42"}, pid=42)
    assert notifier.watchdog_s == 30
    notifier.busy()
    notifier.ready()
    notifier.status("two\nlines  " + "x" * 300)
    notifier.alive()
    notifier.stopping()
    notifier.close()
    said = heard(listener)
    assert said[:2] == [b"EXTEND_TIMEOUT_USEC=60000000", b"READY=1"]
    said = said[1:]
    assert said[1].startswith(b"STATUS=two lines xxx")
    assert len(said[1]) == len("STATUS=") + 200
    assert said[2:] == [b"WATCHDOG=1", b"STOPPING=1"]


def test_a_watchdog_meant_for_another_process_is_not_fed(manager: tuple[socket.socket, str]) -> None:
    listener, address = manager
    for extra in ({}, {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}):
        notifier = notifier_from({"NOTIFY_SOCKET": address, **extra}, pid=42)
        assert notifier.watchdog_s is None
        notifier.alive()
        notifier.close()
    assert heard(listener) == []


def test_outside_systemd_nobody_is_told_anything() -> None:
    notifier = notifier_from({}, pid=1)
    assert isinstance(notifier, NullNotifier)
    for call in (notifier.ready, notifier.alive, notifier.stopping, notifier.close):
        call()
    notifier.status("nothing")
    assert notifier.watchdog_s is None


def test_a_manager_that_is_gone_or_deaf_does_not_hold_the_agent_up(tmp_path: Path) -> None:
    notifier = SystemdNotifier(str(tmp_path / "nobody"), 1.0)
    notifier.ready()
    notifier.close()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(str(tmp_path / "deaf"))
        notifier = SystemdNotifier(str(tmp_path / "deaf"), 1.0)
        for _ in range(500):
            notifier.alive()
        notifier.close()


@pytest.mark.parametrize(
    "environment",
    [
        {"NOTIFY_SOCKET": "relative"},
        {"NOTIFY_SOCKET": "@"},
        {"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "soon"},
        {"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "0"},
    ],
)
def test_variables_that_systemd_never_sets_are_refused_by_name(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match=list(environment)[-1]):
        notifier_from(environment, pid=1)

from __future__ import annotations

import contextlib
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from contract.errors import ConfigurationError, TemporaryError
from edge_agent import status as status_module
from edge_agent.status import AgentNotRunningError, StatusServer, fetch, fetch_metrics, fetch_status


def failing() -> Any:
    raise TemporaryError("the disk refuses")


def mistaken() -> Any:
    raise KeyError("a mistake")


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "agent.sock"
    server = StatusServer(
        path,
        {
            "status": lambda: {"device": "pi-1"},
            "metrics": lambda: "text",
            "buffer": failing,
            "big": lambda: "x" * 10**6,
            "mistake": mistaken,
            "no json": lambda: object(),
        },
    )
    server.start()
    yield path
    server.stop()
    assert not path.exists()


def test_what_is_asked_is_answered(path: Path) -> None:
    assert fetch_status(path) == {"device": "pi-1"}
    assert fetch_metrics(path) == "text"
    assert fetch(path, "big") == "x" * 10**6
    assert stat.S_IMODE(path.stat().st_mode) == 0o660


def test_what_cannot_be_answered_says_why(path: Path) -> None:
    with pytest.raises(TemporaryError, match="the disk refuses"):
        fetch(path, "buffer")
    with pytest.raises(TemporaryError, match="'weather'; ask one of: status, metrics, buffer, big, mistake, no json"):
        fetch(path, "weather")


@pytest.mark.parametrize("ask", ["mistake", "no json"])
def test_a_mistake_in_one_answer_does_not_end_the_answering(path: Path, ask: str) -> None:
    """Mutants tried: only what is foreseen caught; the answer encoded outside."""
    with pytest.raises(TemporaryError, match=r"the agent made a mistake \((Key|Type)Error"):
        fetch(path, ask)
    assert fetch_status(path) == {"device": "pi-1"}


def test_a_client_that_sends_byte_by_byte_does_not_hold_up_others(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutants tried: the timeout begun anew with every byte."""
    monkeypatch.setattr(status_module, "CLIENT_TIMEOUT_S", 0.3)
    over = threading.Event()

    def trickle() -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            with contextlib.suppress(OSError):
                while not over.wait(0.05):
                    client.sendall(b"x")

    slow = threading.Thread(target=trickle)
    slow.start()
    try:
        assert fetch(path, "status", timeout_s=10.0) == {"device": "pi-1"}
    finally:
        over.set()
        slow.join()


@pytest.mark.parametrize(
    "request_bytes", [b"", b"\n", b"no json\n", b"[]\n", b"x" * 100_000, b'{"ask": 1}\n', b"\xff\n"]
)
def test_foreign_requests_do_no_harm(path: Path, request_bytes: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        try:
            client.sendall(request_bytes)
            client.shutdown(socket.SHUT_WR)
            client.recv(100)
        except OSError:
            pass  # it may hang up on us
    assert fetch_status(path) == {"device": "pi-1"}


def test_the_socket_of_a_killed_agent_is_taken_over_and_that_of_a_living_one_is_not(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="another agent listens"):
        StatusServer(path, {})
    left = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(left))
    server = StatusServer(left, {"status": dict})
    server.start()
    assert fetch_status(left) == {}
    server.stop()


def test_nothing_but_a_socket_is_removed(tmp_path: Path) -> None:
    precious = tmp_path / "buffer.db"
    precious.write_bytes(b"readings")
    with pytest.raises(ConfigurationError, match="is not a socket"):
        StatusServer(precious, {})
    assert precious.read_bytes() == b"readings"
    with pytest.raises(ConfigurationError, match="cannot be made"):
        StatusServer(tmp_path / "no" / "folder" / "agent.sock", {})


def test_long_paths_work_too(tmp_path: Path) -> None:
    """The kernel takes 107 bytes."""
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    server = StatusServer(folder / "agent.sock", {"status": dict})
    server.start()
    assert fetch_status(folder / "agent.sock") == {}
    server.stop()


def test_an_agent_that_does_not_run_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(AgentNotRunningError, match="no agent answers"):
        fetch_status(tmp_path / "agent.sock")

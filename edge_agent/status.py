"""The local status socket: one JSON line asked, one JSON line answered, for `headwater agent status` and scripts.

Request: `{"ask": "status"}`, `"buffer"` or `"metrics"`. Answer: `{"ok": true, "answer": …}` or `{"ok": false, "error":
…}`. Who may ask is decided by the permissions of the socket (0660).
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import structlog

from contract.errors import ConfigurationError, TemporaryError

_log = structlog.get_logger()

REQUEST_BYTES_MAX = 1024
ANSWER_BYTES_MAX = 4 * 1024 * 1024
CLIENT_TIMEOUT_S = 5.0
BACKLOG_MAX = 8
ACCEPT_PAUSE_S = 1.0
_MODE = 0o660
_PATH_BYTES_MAX = 107  # sun_path of unix(7), less its final zero


class AgentNotRunningError(TemporaryError):
    """Nobody answers on the status socket: the agent does not run, or runs with another one."""


class _Request(msgspec.Struct):
    ask: str


class _Answer(msgspec.Struct):
    ok: bool
    answer: Any = None
    error: str = ""


class StatusServer:
    """Answers on a Unix socket from one thread, one client at a time.

    Args:
        path: where the socket is; an old one without a listener is replaced.
        answers: what can be asked; each gives something that JSON can hold, soon, from any thread.

    Raises:
        ConfigurationError: the socket cannot be made there, or another agent listens on it.
    """

    def __init__(self, path: Path, answers: Mapping[str, Callable[[], Any]]) -> None:
        self._path, self._answers = path, answers
        self._listener = _listen(path)
        self._waker, self._wakee = socket.socketpair()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """End, and remove the socket."""
        self._stopping.set()
        self._waker.send(b"x")
        self._thread.join(CLIENT_TIMEOUT_S + 1)
        for sock in (self._listener, self._waker, self._wakee):
            sock.close()
        self._path.unlink(missing_ok=True)

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wakee, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select()}
                if self._wakee in ready:
                    return
                try:
                    client, _ = self._listener.accept()
                except OSError as error:
                    _log.warning("status_accept_failed", error=str(error))
                    # Out of files, for one. The listener stays ready: asking again at once would spin.
                    self._stopping.wait(ACCEPT_PAUSE_S)
                    continue
                with client:
                    self._serve(client)

    def _serve(self, client: socket.socket) -> None:
        client.settimeout(CLIENT_TIMEOUT_S)
        try:
            line = _read_line(client, REQUEST_BYTES_MAX, CLIENT_TIMEOUT_S)
            client.sendall(self._encoded(line) + b"\n")
        except (OSError, ValueError) as error:
            _log.debug("status_client_failed", error=str(error))

    def _encoded(self, line: bytes) -> bytes:
        try:
            return msgspec.json.encode(self._answered(line))
        except Exception as error:  # noqa: BLE001 - a mistake in one answer must not end the answering
            _log.exception("status_answer_failed")
            what = f"the agent made a mistake ({type(error).__name__}: {str(error)[:200]}); its log says where"
            return msgspec.json.encode(_Answer(ok=False, error=what))

    def _answered(self, line: bytes) -> _Answer:
        try:
            ask = msgspec.json.decode(line, type=_Request).ask
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            return _Answer(ok=False, error=f'the request is not {{"ask": …}}: {str(error)[:200]}')
        answer = self._answers.get(ask)
        if answer is None:
            return _Answer(ok=False, error=f"cannot be asked: {ask[:80]!r}; ask one of: {', '.join(self._answers)}")
        try:
            return _Answer(ok=True, answer=answer())
        except TemporaryError as error:
            return _Answer(ok=False, error=str(error))


def fetch(path: Path, ask: str, *, timeout_s: float = CLIENT_TIMEOUT_S) -> Any:
    """Ask a running agent.

    Args:
        path: its status socket.
        ask: `status`, `buffer` or `metrics`.
        timeout_s: longest wait to be let in, and for the answer.

    Returns:
        The answer as JSON decodes it.

    Raises:
        AgentNotRunningError: nobody answers there.
        TemporaryError: the agent cannot answer now.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(timeout_s)
        try:
            with _address(path) as address:
                client.connect(address)
            client.sendall(msgspec.json.encode({"ask": ask}) + b"\n")
            line = _read_line(client, ANSWER_BYTES_MAX, timeout_s)
        except (OSError, ValueError) as error:
            raise AgentNotRunningError(
                f"no agent answers on {path} ({error}); start it, or give the socket of its configuration"
            ) from error
    try:
        answer = msgspec.json.decode(line, type=_Answer)
    except msgspec.MsgspecError as error:
        raise AgentNotRunningError(f"what answers on {path} is not an agent ({error})") from error
    if not answer.ok:
        raise TemporaryError(answer.error)
    return answer.answer


def fetch_status(path: Path) -> dict[str, Any]:
    """How the agent behind a status socket is; members: see `docs/agent.md`.

    Raises:
        AgentNotRunningError: nobody answers there.
    """
    answer: dict[str, Any] = fetch(path, "status")
    return answer


def fetch_metrics(path: Path) -> str:
    """The metrics of the agent behind a status socket, in Prometheus' text format.

    Raises:
        AgentNotRunningError: nobody answers there.
    """
    return str(fetch(path, "metrics"))


def _read_line(sock: socket.socket, bytes_max: int, timeout_s: float) -> bytes:
    """One line without its end, all of it within `timeout_s`: whoever sends byte by byte must not hold up the others.

    Raises:
        ValueError: it is longer than `bytes_max`, or cut.
        TimeoutError: it took too long.
    """
    deadline_s = time.monotonic() + timeout_s
    data = bytearray()
    while not data.endswith(b"\n"):
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the line took too long")
        sock.settimeout(left_s)
        chunk = sock.recv(min(65_536, bytes_max + 1 - len(data)))
        if not chunk:
            raise ValueError("the line was cut")
        data += chunk
        if len(data) > bytes_max:
            raise ValueError(f"the line is longer than {bytes_max} bytes")
    sock.settimeout(timeout_s)
    return bytes(data[:-1])


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        with _address(path) as address:
            listener.bind(address)
        # Nobody can connect before `listen`, so nobody can while the mode is still the umask's.
        path.chmod(_MODE)
        listener.listen(BACKLOG_MAX)
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"[status] socket = {str(path)!r} cannot be made ({error}); give a path in a folder that the agent may "
            "write to"
        ) from error
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    """Remove the socket of an agent that was killed; refuse to take anything else's place."""
    if not path.is_socket():
        if path.exists():
            raise ConfigurationError(f"[status] socket = {str(path)!r} exists and is not a socket; give another path")
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(CLIENT_TIMEOUT_S)
        try:
            with _address(path) as address:
                probe.connect(address)
        except ConnectionRefusedError:
            path.unlink()
            return
    raise ConfigurationError(
        f"[status] socket = {str(path)!r}: another agent listens there; stop it, or give each agent its own socket"
    )


@contextlib.contextmanager
def _address(path: Path) -> Iterator[str]:
    """The address of a Unix socket; beyond the kernel's 107 bytes by way of its open folder."""
    if len(os.fsencode(path)) <= _PATH_BYTES_MAX:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)

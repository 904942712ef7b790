"""The device's own inference endpoint: Open Inference Protocol v2 on a Unix socket, or on loopback (see
`contract.inference`).

It stands beside sampling and never before it: few threads, bounded bodies, and what it asks of the models waits for the
worker that scores the live windows. A connection carries one request; beyond `CONNECTIONS_MAX`, 503 is said at once.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import socketserver
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

import structlog

from contract.errors import ConfigurationError
from contract.inference import BINARY_HEADER, InferenceLimits, Unanswered, encode, encode_error, too_large
from edge_agent.models.answers import DEVICE_LIMITS, Answer, Served, answer

__all__ = ["DEVICE_LIMITS", "Address", "Endpoint", "Served", "read_address"]

_log = structlog.get_logger()

THREADS_MAX = 2
"""Requests that are worked on; the rest of the connections waits for them."""
CONNECTIONS_MAX = 8
"""Answered and waiting together; more are told 503."""
SILENCE_S = 5.0
"""Longest wait for the next bytes of a request, or for a client to take some of the answer."""
CONNECTION_S = 30.0
"""Longest life of a connection."""
LINGER_S = 1.0
"""Longest wait for the rest of a body that was refused."""
DISCARDED_BYTES_MAX = 64 * 1024 * 1024
"""Read and thrown away of a body that is refused, so that the client sees why."""
SOCKET_MODE = 0o660
_UNIX = "unix:"
_CHUNK = 64 * 1024
_BUSY = b'{"error":"8 requests are being answered; try again in a moment"}'.replace(b"8", str(CONNECTIONS_MAX).encode())


class Address(NamedTuple):
    """Where to listen."""

    path: str
    """Of the Unix socket; empty for TCP."""
    host: str
    port: int


def read_address(listen: str) -> Address:
    """Read `unix:/path` or `127.0.0.1:port`.

    Raises:
        ConfigurationError: it is neither, or reachable from other machines.
    """
    if listen.startswith(_UNIX):
        path = listen.removeprefix(_UNIX)
        if not path.startswith("/") or len(os.fsencode(path)) > 107:
            raise ConfigurationError(
                f"[models.endpoint] listen = {listen!r}: a socket needs an absolute path of at most 107 bytes, such as "
                "unix:/run/headwater/models.sock"
            )
        return Address(path, "", 0)
    try:
        parts = urlsplit(f"//{listen}")
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", None
    if port is None or parts.path or parts.query or parts.username is not None:
        raise ConfigurationError(
            f"[models.endpoint] listen = {listen!r} is no address; write unix:/run/headwater/models.sock or "
            "127.0.0.1:8090"
        )
    if not _is_loopback(host):
        raise ConfigurationError(
            f"[models.endpoint] listen = {listen!r} is reachable from other machines, and the endpoint asks nobody who "
            "they are; write 127.0.0.1 or a Unix socket"
        )
    return Address("", "127.0.0.1" if host == "localhost" else host, port)


class Endpoint:
    """The endpoint's server: start it, close it.

    Args:
        listen: `unix:/path` or `127.0.0.1:port` (port 0: any free one).
        served: the models.
        limits: of a request.

    Raises:
        ConfigurationError: nothing can listen there.
    """

    def __init__(self, listen: str, served: Served, limits: InferenceLimits = DEVICE_LIMITS) -> None:
        self._server = _Server(read_address(listen), listen, served, limits)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.2,), name="models-endpoint", daemon=True
        )

    @property
    def port(self) -> int:
        """Of TCP; 0 for a Unix socket."""
        address = self._server.socket.getsockname()
        return 0 if isinstance(address, str | bytes) else int(address[1])

    @property
    def refused(self) -> int:
        """Connections that were told 503 because too many were being answered."""
        return self._server.refused

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def close(self) -> None:
        """Answer no more; what is being answered is cut off."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()


class _Server(socketserver.BaseServer):
    """Accepts, and hands connections to few threads."""

    def __init__(self, address: Address, listen: str, served: Served, limits: InferenceLimits) -> None:
        super().__init__(address, _Handler)
        self.served, self.limits = served, limits
        self.local = bool(address.path)
        self.refused = 0
        self._lock = threading.Lock()
        self._ends_s: dict[socket.socket, float] = {}
        self.socket = _listening(address, listen)
        self._made = _identity(address.path)
        self._pool = ThreadPoolExecutor(THREADS_MAX, "models-endpoint")
        self._porter = ThreadPoolExecutor(1, "models-endpoint-full")
        self._turned_away = 0

    def fileno(self) -> int:
        """For the selector."""
        return self.socket.fileno()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept."""
        return self.socket.accept()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection to a thread, or refuse it."""
        with self._lock:
            full = len(self._ends_s) >= CONNECTIONS_MAX
            lost = full and self._turned_away >= CONNECTIONS_MAX
            if full:
                self.refused += 1
                self._turned_away += not lost
            else:
                self._ends_s[request] = time.monotonic() + CONNECTION_S
        if lost:
            request.close()
        elif full:
            self._porter.submit(self._refuse, request)
        else:
            self._pool.submit(self._serve, request, client_address)

    def _refuse(self, request: socket.socket) -> None:
        try:
            _turn_away(request)
        finally:
            with self._lock:
                self._turned_away -= 1
            request.close()

    def _serve(self, request: socket.socket, client_address: Any) -> None:
        try:
            _Handler(request, client_address, self)
        except OSError as error:
            _log.debug("models_endpoint_connection_lost", error=str(error))
        except Exception as fault:  # noqa: BLE001 - a bug that one request finds must not end the endpoint
            _log.error("models_endpoint_fault", exc_info=fault)
        finally:
            with self._lock:
                self._ends_s.pop(request, None)
            request.close()

    def service_actions(self) -> None:
        """Cut connections that took too long, whatever they wait for. Called several times a second."""
        now_s = time.monotonic()
        with self._lock:
            late = [connection for connection, end_s in self._ends_s.items() if end_s <= now_s]
        for connection in late:
            _cut(connection)

    def server_close(self) -> None:
        """Free the address and the threads."""
        self.socket.close()
        with self._lock:
            left = list(self._ends_s)
        for connection in left:
            _cut(connection)
        for pool in (self._pool, self._porter):
            pool.shutdown(wait=False, cancel_futures=True)
        path = cast("Address", self.server_address).path
        if path and self._made is not None and _identity(path) == self._made:
            Path(path).unlink(missing_ok=True)


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    server: _Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "headwater-agent", ""
    timeout = SILENCE_S
    _read_whole = False

    def do_GET(self) -> None:
        """Metadata and health."""
        self._read_whole = "Content-Length" not in self.headers and "Transfer-Encoding" not in self.headers
        self._send(self._checked() or answer(self.server.served, "GET", self.path, b"", self.server.limits))

    def do_POST(self) -> None:
        """Inference."""
        refusal = self._checked()
        if refusal is None:
            try:
                body = self._body()
            except Unanswered as unanswered:
                refusal = Answer(unanswered.status, encode_error(unanswered))
            else:
                refusal = answer(self.server.served, "POST", self.path, body, self.server.limits)
        self._send(refusal)

    def _checked(self) -> Answer | None:
        """A page in a browser must not reach the endpoint under a name of its own."""
        if self.server.local:
            return None
        host = self.headers.get("Host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if _is_loopback(name):
            return None
        return Answer(
            403, encode({"error": f"this endpoint is not known as {host[:80]!r}; ask 127.0.0.1 or localhost"})
        )

    def _body(self) -> bytes:
        if self.headers.get(BINARY_HEADER) is not None:
            raise Unanswered(400, f"{BINARY_HEADER} is set, and binary tensors are not served; send JSON numbers")
        text = self.headers.get("Content-Length", "")
        if not (text.isascii() and text.isdigit() and len(text) < 16):
            raise Unanswered(411, f"Content-Length is {text[:40]!r}; send the body's length, and no chunks")
        length = int(text)
        if length > self.server.limits.body_bytes_max:
            raise too_large(self.server.limits)
        body = self.rfile.read(length)
        self._read_whole = True
        if len(body) < length:
            raise Unanswered(400, f"the body ended after {len(body)} of {length} bytes; send it again")
        return body

    def finish(self) -> None:
        """Read on after a refusal: a client that finds the connection closed while it sends never sees why."""
        super().finish()
        if not self._read_whole:
            _linger(self.connection)

    def _send(self, found: Answer) -> None:
        self.send_response(found.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(found.body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(found.body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses, as JSON too."""
        self.close_connection = True
        said = " ".join(filter(None, (message, explain))) or "refused"
        self._send(Answer(code, encode({"error": f"{said[:200]}; send HTTP/1.1, GET or POST"})))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a request is nobody's event."""


def _listening(address: Address, listen: str) -> socket.socket:
    family = socket.AF_UNIX if address.path else socket.AF_INET6 if ":" in address.host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        if address.path:
            _remove_stale(address.path)
            made.bind(address.path)
            Path(address.path).chmod(SOCKET_MODE)  # before `listen`: nobody got in yet
        else:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((address.host, address.port))
        made.listen(CONNECTIONS_MAX)
    except OSError as error:
        made.close()
        raise ConfigurationError(
            f"[models.endpoint] listen = {listen!r}: cannot listen there ({error}); choose another address"
        ) from error
    return made


def _remove_stale(path: str) -> None:
    """A socket that a killed agent left behind is in the way; one that somebody listens on, or a file, stays."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(f"{path} is there and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
        trial.settimeout(1.0)
        try:
            trial.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            Path(path).unlink(missing_ok=True)
            return
    raise FileExistsError(f"somebody listens on {path}")


def _identity(path: str) -> tuple[int, int] | None:
    if not path:
        return None
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _turn_away(connection: socket.socket) -> None:
    """Say 503, and read what the client still sends, so that it hears it."""
    head = (
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
        b"Connection: close\r\nContent-Length: " + str(len(_BUSY)).encode() + b"\r\n\r\n"
    )
    try:
        connection.settimeout(LINGER_S)
        connection.sendall(head + _BUSY)
        _linger(connection)
    except OSError:
        pass


def _linger(connection: socket.socket) -> None:
    """Whoever finds a connection closed while it sends never sees why: read on, for a while."""
    connection.settimeout(LINGER_S)
    left = DISCARDED_BYTES_MAX
    try:
        connection.shutdown(socket.SHUT_WR)
        while left > 0 and (read := len(connection.recv(_CHUNK))):
            left -= read
    except OSError:
        pass


def _cut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


def _is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False

"""A proxy in front of an object store that spoils answers: the request may have taken effect, the client cannot
know."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

HANG_S_MAX = 60.0


class Spoil(Enum):
    """What happens to a request."""

    REFUSE = "503, and nothing was done"
    IGNORE = "no answer, and nothing was done"
    UNAVAILABLE_AFTER = "done, then 503"
    DROP_AFTER = "done, then the connection is closed without an answer"
    HANG_AFTER = "done, then no answer"


Rule = Callable[[str, str], Spoil | None]
"""(method, path) → what to do to the request; None to pass it through."""


class SpoilingProxy:
    """Listens on a loopback port; a context manager. `rule` may be changed at any time."""

    def __init__(self, endpoint: str) -> None:
        parts = urlsplit(endpoint)
        self.rule: Rule = lambda _method, _path: None
        self.spoiled: list[str] = []
        self.stopping = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                proxy._handle(self, parts.hostname or "", parts.port or 80)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_any  # noqa: N815 - names of http.server

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def spoil_once(self, method: str, part: str, how: Spoil) -> None:
        """Spoil the next request of a method whose path contains a text, and no other."""
        left = [how]
        lock = threading.Lock()

        def rule(found_method: str, path: str) -> Spoil | None:
            with lock:
                return left.pop() if left and found_method == method and part in path else None

        self.rule = rule

    def _handle(self, request: BaseHTTPRequestHandler, host: str, port: int) -> None:
        body = request.rfile.read(int(request.headers.get("content-length") or 0))
        how = self.rule(request.command, request.path)
        if how is not None:
            self.spoiled.append(f"{request.command} {request.path}")
        if how is Spoil.REFUSE:
            self._answer(request, 503, [], b"")
            return
        if how is Spoil.IGNORE:
            self._hang(request)
            return
        connection = http.client.HTTPConnection(host, port, timeout=HANG_S_MAX)
        try:
            # The headers go on as they came, Host included: it is part of the signature.
            connection.putrequest(request.command, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            status, headers, content = response.status, response.getheaders(), response.read()
        finally:
            connection.close()
        if how is Spoil.UNAVAILABLE_AFTER:
            self._answer(request, 503, [], b"")
        elif how is Spoil.DROP_AFTER:
            request.close_connection = True
        elif how is Spoil.HANG_AFTER:
            self._hang(request)
        else:
            self._answer(request, status, headers, content)

    def _hang(self, request: BaseHTTPRequestHandler) -> None:
        self.stopping.wait(HANG_S_MAX)
        request.close_connection = True

    @staticmethod
    def _answer(request: BaseHTTPRequestHandler, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        request.send_response_only(status)
        length = str(len(content))
        for name, value in headers:
            if name.lower() == "content-length" and request.command == "HEAD":
                length = value
            elif name.lower() not in ("content-length", "transfer-encoding", "connection"):
                request.send_header(name, value)
        request.send_header("Content-Length", length)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)

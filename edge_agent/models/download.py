"""One file over HTTP, into a file that grows: goes on where the last attempt ended, hashes as it goes, stops when told.

Ranges: RFC 9110, section 14. What is downloaded is named by its hash, so a wrong byte can only cost time.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from contract.errors import HeadwaterError, TemporaryError
from contract.models import Artifact

CHUNK_BYTES = 64 * 1024
REDIRECTS_MAX = 3
ETAG_CHARS_MAX = 200
TURN_S = 600.0
"""Longest attempt, seconds, where the server can go on from there: other models of the device wait for their turn."""
SLOW_S, SLOW_BYTES = 60.0, 4 * 1024
"""A server that gives fewer bytes in so many seconds only holds the line."""
_OK, _PARTIAL, _RANGE_WRONG = 200, 206, 416
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", re.ASCII)


class Cancel(threading.Event):
    """An event that also ends what cannot wait for an event."""

    def __init__(self) -> None:
        super().__init__()
        self._hook: Callable[[], object] | None = None
        self._hook_lock = threading.Lock()

    def on_set(self, hook: Callable[[], object] | None) -> None:
        """Call this when set; at once where it is set already. None: nothing any more."""
        with self._hook_lock:
            self._hook = hook
            if hook is None or not self.is_set():
                return
        hook()

    def set(self) -> None:
        """Set it, and call the hook."""
        super().set()
        with self._hook_lock:
            hook = self._hook
        if hook is not None:
            hook()


class DownloadError(TemporaryError):
    """It did not come, or not whole. Try again later; what came is kept."""


class WrongContentError(HeadwaterError):
    """All of it came at once, and it is not what the manifest names."""


class Timeouts(NamedTuple):
    """Seconds."""

    connect_s: float
    read_s: float
    """Longest silence."""


def download(url: str, artifact: Artifact, partial: Path, timeouts: Timeouts, cancel: Cancel) -> None:
    """Complete a half download; when this returned, the file has the artifact's size and hash, but may not be durable.

    Args:
        url: of the artifact.
        artifact: what it should be.
        partial: where it is collected; what is there already is not asked for again.
        timeouts: of the connection.
        cancel: ends it at once.

    Raises:
        DownloadError: not now, or cancelled.
        WrongContentError: the server has something else under this name; nothing was kept.
        OSError: the disk refuses.
    """
    collected = _Collected(partial, artifact.size)
    began_at = collected.size
    if collected.size < artifact.size:
        _fetch(url, artifact, collected, timeouts, cancel)
    if collected.digest.hexdigest() == artifact.sha256:
        collected.tag.unlink(missing_ok=True)
        return
    collected.drop()
    if began_at:
        raise DownloadError(f"{url}: what was kept of an earlier attempt does not fit the rest; it begins anew")
    raise WrongContentError(
        f"{url} gave {artifact.size} bytes with another hash than {artifact.sha256}; publish the release again"
    )


class _Collected:
    """What is there of a file, and its hash."""

    def __init__(self, path: Path, size_max: int) -> None:
        self.path, self.digest, self.size = path, hashlib.sha256(), 0
        self.tag = path.with_name(path.name + ".etag")
        """Keeps the ETag of the file that a half download is of."""
        try:
            with path.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    self.add(chunk)
        except FileNotFoundError:
            pass
        if self.size > size_max:
            self.drop()

    def add(self, chunk: bytes) -> None:
        self.digest.update(chunk)
        self.size += len(chunk)

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)
        self.tag.unlink(missing_ok=True)
        self.digest, self.size = hashlib.sha256(), 0


def _fetch(url: str, artifact: Artifact, collected: _Collected, timeouts: Timeouts, cancel: Cancel) -> None:
    """Ask for the rest, and append it."""
    import urllib3  # several MB, and only wanted while something is downloaded

    headers = {"Accept-Encoding": "identity"}
    if collected.size:
        headers["Range"] = f"bytes={collected.size}-"
        with contextlib.suppress(OSError, UnicodeDecodeError):
            headers["If-Range"] = collected.tag.read_text("ascii")
    pool = urllib3.PoolManager(
        timeout=urllib3.Timeout(connect=timeouts.connect_s, read=timeouts.read_s),
        retries=urllib3.Retry(total=REDIRECTS_MAX, connect=0, read=0, redirect=REDIRECTS_MAX, status=0, other=0),
    )
    line = _Line()
    pool.pool_classes_by_scheme = line.pools()
    # Timeouts are of silence: a server that trickles its headers is never silent, and nobody could tell it to end.
    alarm = threading.Timer(timeouts.connect_s + timeouts.read_s, line.cut)
    alarm.daemon = True
    try:
        cancel.on_set(line.cut)
        alarm.start()
        response = pool.request("GET", url, headers=headers, preload_content=False, decode_content=False)
        alarm.cancel()
        try:
            cancel.on_set(lambda: _shut(response))
            first = b""
            if response.status in (_OK, _PARTIAL):
                # Headers that were cut off look like whole ones: what is there already counts until something follows.
                first = response.read1(CHUNK_BYTES)
                if not first:
                    raise DownloadError(f"{url}: the connection ended before the file began; the rest follows")
            _begin(response, url, artifact, collected)
            _receive(response, first, url, artifact, collected, cancel)
        finally:
            cancel.on_set(None)
            response.close()
    except urllib3.exceptions.HTTPError as error:
        raise DownloadError(f"{url}: {str(error)[:200]}; is the address right, and the server up?") from error
    finally:
        alarm.cancel()
        cancel.on_set(None)
        pool.clear()


class _Line:
    """The connections of one download, so that another thread can cut them whatever they wait for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._is_cut = False

    def pools(self) -> dict[str, Any]:
        """What a pool manager makes its connections of, by scheme."""
        import urllib3
        from urllib3.connection import HTTPConnection, HTTPSConnection

        opened = self._opened

        class Plain(HTTPConnection):
            def connect(self) -> None:
                super().connect()
                opened(self.sock)

        class Secure(HTTPSConnection):
            def connect(self) -> None:
                super().connect()
                opened(self.sock)

        class PlainPool(urllib3.HTTPConnectionPool):
            ConnectionCls = Plain

        class SecurePool(urllib3.HTTPSConnectionPool):
            ConnectionCls = Secure

        return {"http": PlainPool, "https": SecurePool}

    def cut(self) -> None:
        """End all of them, and those to come."""
        with self._lock:
            self._is_cut = True
            sockets, self._sockets = self._sockets, []
        for each in sockets:
            with contextlib.suppress(OSError):
                # Below TLS, whose own way to end would disturb the thread that reads.
                socket.socket.shutdown(each, socket.SHUT_RDWR)

    def _opened(self, made: socket.socket) -> None:
        with self._lock:
            self._sockets.append(made)
            late = self._is_cut
        if late:
            self.cut()


def _begin(response: Any, url: str, artifact: Artifact, collected: _Collected) -> None:
    """Judge the answer's head; what is there already and does not count is dropped."""
    have = collected.size
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.strip().lower() not in ("", "identity"):
        # Its bytes are not those that have a hash, and half of them is no use either.
        collected.drop()
        raise DownloadError(f"{url}: sent as {encoding[:40]!r}, though not asked for; let the host send it as it is")
    if response.status == _PARTIAL:
        shown = response.headers.get("Content-Range", "")
        if not _goes_on(shown, have, artifact.size):
            collected.drop()
            raise DownloadError(
                f"{url}: asked for {have}- of {artifact.size} bytes, got {shown[:80]!r}; it begins anew"
            )
        return
    if response.status == _RANGE_WRONG:
        collected.drop()
        raise DownloadError(f"{url}: the server has no more than {have} bytes; it begins anew")
    if response.status != _OK:
        raise DownloadError(f"{url}: HTTP {response.status}; publish the release there, or correct [models] url")
    length = response.headers.get("Content-Length", "")
    if length and length != str(artifact.size):
        # Not final: it may be the page of a captive portal, or a proxy's.
        raise DownloadError(f"{url}: {length} bytes, not {artifact.size}; is there a portal or proxy in between?")
    collected.drop()
    etag = response.headers.get("ETag", "")
    if etag.startswith('"') and etag.isascii() and len(etag) <= ETAG_CHARS_MAX:
        collected.tag.write_text(etag, "ascii")


def _goes_on(content_range: str, have: int, size: int) -> bool:
    """Whether a part is the next one; it may be shorter than was asked for (RFC 9110, 15.3.7): the rest follows."""
    found = _CONTENT_RANGE.fullmatch(content_range.strip())
    return found is not None and (
        int(found[1]) == have and have <= int(found[2]) < size and found[3] in ("*", str(size))
    )


def _receive(response: Any, first: bytes, url: str, artifact: Artifact, collected: _Collected, cancel: Cancel) -> None:
    resumable = response.status == _PARTIAL or response.headers.get("Accept-Ranges") == "bytes"
    pace = _Pace(url, collected.size, resumable=resumable)
    with collected.path.open("ab") as file:
        # What has come is taken at once: of a whole chunk, a connection that breaks would take all away again.
        chunk = first
        while chunk and not cancel.is_set():
            if collected.size + len(chunk) > artifact.size:
                raise DownloadError(f"{url}: more than {artifact.size} bytes; is there a portal or proxy in between?")
            file.write(chunk)
            collected.add(chunk)
            if collected.size < artifact.size:
                pace.check(collected.size)
            chunk = response.read1(CHUNK_BYTES)
    if collected.size < artifact.size:
        why = "it was not wanted any more" if cancel.is_set() else "the connection ended; the rest follows"
        raise DownloadError(f"{url}: {collected.size} of {artifact.size} bytes: {why}")


class _Pace:
    """Ends an attempt that would hold the line for ever, though it is never silent."""

    def __init__(self, url: str, size: int, *, resumable: bool) -> None:
        self._url, now_s = url, time.monotonic()
        self._turn_ends_s = now_s + TURN_S if resumable else None
        self._looked_s, self._looked_size = now_s, size

    def check(self, size: int) -> None:
        """Raises DownloadError."""
        now_s = time.monotonic()
        if self._turn_ends_s is not None and now_s > self._turn_ends_s:
            raise DownloadError(f"{self._url}: {size} bytes after {TURN_S:g} s; the rest follows in another turn")
        if now_s - self._looked_s < SLOW_S:
            return
        if size - self._looked_size < SLOW_BYTES:
            raise DownloadError(
                f"{self._url}: fewer than {SLOW_BYTES} bytes in {SLOW_S:g} s; is the network, or the host, so slow?"
            )
        self._looked_s, self._looked_size = now_s, size


def _shut(response: Any) -> None:
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        response.shutdown()

"""`GET /models/…`: what devices read of releases, straight from the lake. Any static host of that folder does as well.

Everything here but `timestamp.json` is written once and named by number or hash, so caches may keep it for ever. What a
device believes of it is not decided here.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import re
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import structlog
from aiohttp import web

from contract.errors import TemporaryError
from contract.models import METADATA_BYTES_MAX
from gateway.http import error
from gateway.metrics import GatewayMetrics
from gateway.offload import in_thread
from lake.errors import ObjectMissingError
from lake.store import Store

_log = structlog.get_logger()

DOWNLOADS_MAX = 32
"""Of artifacts at the same time; more are told to come back."""
READINGS_MAX = 32
"""The same of metadata and manifests: small, and not to wait for the long downloads of others, since without them a
device cannot even tell whether an order is right."""
CHUNK_BYTES = 256 * 1024
"""Read from the lake at once: this much memory per download; metadata is read whole, for its hash."""
SLICE_BYTES = 32 * 1024
SLICE_TIMEOUT_S = 30.0
"""A client that does not take a slice within it is cut off; it resumes where it was."""
RETRY_AFTER_S = "2"
_NAME = "[a-z0-9][a-z0-9._-]{0,62}"
_METADATA = re.compile(r"metadata/(?:(?:[1-9][0-9]{0,9}\.(?:root|targets|snapshot))|timestamp)\.json", re.ASCII)
_BY_HASH = re.compile(
    rf"(?:artifacts/([0-9a-f]{{64}})|targets/{_NAME}/([0-9a-f]{{64}})\.[1-9][0-9]{{0,9}}\.json)", re.ASCII
)
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})", re.ASCII | re.IGNORECASE)
_FOR_EVER = "public, max-age=31536000, immutable"

Result = TypeVar("Result")


class Span(NamedTuple):
    """Bytes of a file, end not included."""

    start: int
    end: int


class Unsatisfiable(NamedTuple):
    """A range beyond the end."""


def parse_range(header: str | None, size: int) -> Span | Unsatisfiable | None:
    """One range of bytes (RFC 9110, 14.1.2).

    Args:
        header: value of `Range`.
        size: of the file, bytes.

    Returns:
        None for the whole file: without the header, and where it says what we do not serve (RFC 9110, 14.2).
    """
    found = _RANGE.fullmatch(header.strip()) if header is not None else None
    if found is None or found[1] == found[2] == "":
        return None
    if found[1] == "":
        suffix = int(found[2])
        return Span(max(0, size - suffix), size) if suffix and size else Unsatisfiable()
    start, end = int(found[1]), min(int(found[2]) + 1, size) if found[2] else size
    if found[2] and int(found[2]) < start:
        return None
    return Span(start, end) if start < size else Unsatisfiable()


class ModelFiles:
    """Serves the folder `models/` of the lake.

    Args:
        store: gives the lake, with the credentials of now.
        metrics: counts bytes.
    """

    def __init__(self, store: Callable[[], Store], metrics: GatewayMetrics) -> None:
        self._store, self._metrics = store, metrics
        self._running, self._reading = 0, 0
        metrics.watch("model_downloads", "Downloads of releases under way", lambda: self._running, DOWNLOADS_MAX)

    def routes(self) -> list[web.RouteDef]:
        """For `gateway.http.HttpApi`; HEAD comes with GET."""
        return [web.get("/models/{path:.+}", self.serve)]

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """The handler of `/models/{path}`."""
        path = request.match_info["path"]
        is_artifact = path.startswith("artifacts/")
        if (self._running >= DOWNLOADS_MAX) if is_artifact else (self._reading >= READINGS_MAX):
            return _later(f"{DOWNLOADS_MAX if is_artifact else READINGS_MAX} downloads are under way")
        self._running += is_artifact
        self._reading += not is_artifact
        try:
            return await self._serve(request, path)
        except ObjectMissingError:
            raise web.HTTPNotFound from None
        except TemporaryError as error:
            return _later(str(error)[:300])
        finally:
            self._running -= is_artifact
            self._reading -= not is_artifact

    async def _serve(self, request: web.Request, path: str) -> web.StreamResponse:
        by_hash = _BY_HASH.fullmatch(path)
        if by_hash is not None:
            size = await self._asked(lambda store: store.size(f"models/{path}"))
            kind = "application/octet-stream" if by_hash[1] else "application/json"
            return await self._answer(request, path, by_hash[1] or by_hash[2], size, kind, None)
        if _METADATA.fullmatch(path) is None:
            raise web.HTTPNotFound
        data = await self._asked(lambda store: store.get_range(f"models/{path}", 0, METADATA_BYTES_MAX))
        return await self._answer(request, path, hashlib.sha256(data).hexdigest(), len(data), "application/json", data)

    async def _answer(
        self, request: web.Request, path: str, sha256: str, size: int, kind: str, data: bytes | None
    ) -> web.StreamResponse:
        tag = f'"{sha256}"'
        caching = "no-cache" if path == "metadata/timestamp.json" else _FOR_EVER
        headers = {"ETag": tag, "Cache-Control": caching, "Accept-Ranges": "bytes"}
        if tag in _tags(request.headers.get("If-None-Match", "")):
            return web.Response(status=304, headers=headers)
        span: Span | Unsatisfiable | None = None
        if request.headers.get("If-Range", tag) == tag:
            span = parse_range(request.headers.get("Range"), size)
        if isinstance(span, Unsatisfiable):
            return web.Response(status=416, headers=headers | {"Content-Range": f"bytes */{size}"})
        part = Span(0, size) if span is None else span
        if span is not None:
            headers["Content-Range"] = f"bytes {part.start}-{part.end - 1}/{size}"
        response = web.StreamResponse(status=200 if span is None else 206, headers=headers | {"Content-Type": kind})
        response.content_length = part.end - part.start
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        try:
            await self._stream(response, path, part, data)
        except (TemporaryError, ObjectMissingError, TimeoutError, ConnectionError) as cause:
            # The headers are out: to end before what they promised is all that is left, and clients resume from there.
            _log.info("model_download_broken", path=path, error=str(cause) or type(cause).__name__)
            if request.transport is not None:
                request.transport.abort()
        return response

    async def _stream(self, response: web.StreamResponse, path: str, part: Span, data: bytes | None) -> None:
        at = part.start
        while at < part.end:
            length = min(CHUNK_BYTES, part.end - at)
            if data is None:
                chunk = await self._asked(functools.partial(_range, path=f"models/{path}", start=at, length=length))
            else:
                chunk = data[at : at + length]
            if len(chunk) != length:
                raise ConnectionAbortedError(f"{path} ended at {at + len(chunk)} bytes")
            for begin in range(0, length, SLICE_BYTES):
                async with asyncio.timeout(SLICE_TIMEOUT_S):
                    await response.write(chunk[begin : begin + SLICE_BYTES])
            self._metrics.model_bytes.inc(length)
            at += length
        await response.write_eof()

    async def _asked(self, question: Callable[[Store], Result]) -> Result:
        return await in_thread(lambda: question(self._store()), "models-read")


def _range(store: Store, *, path: str, start: int, length: int) -> bytes:
    return store.get_range(path, start, length)


def _tags(header: str) -> set[str]:
    return {tag.strip().removeprefix("W/") for tag in header.split(",")}


def _later(why: str) -> web.Response:
    response = error(503, "busy", why, f"try again in {RETRY_AFTER_S} s, from where you are")
    response.headers["Retry-After"] = RETRY_AFTER_S
    return response

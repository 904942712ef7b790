"""Open Inference Protocol v2 over HTTP for every approved release in the registry (see `contract.inference`).

The gateway's work is committing batches. So inference has few threads and a bounded queue, says 503 where both are
full, and ends a model that takes too long; the event loop never reads a body's JSON nor waits for the lake.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import structlog
from aiohttp import web

from contract.errors import HeadwaterError, TemporaryError
from contract.inference import (
    BINARY_HEADER,
    InferenceLimits,
    ServerMetadata,
    Tensor,
    Unanswered,
    decode_request,
    encode,
    encode_error,
    metadata_of,
    response_of,
    tensor_of,
    too_large,
    window_of,
)
from contract.models import Manifest
from gateway.http import INFERENCE_PREFIX
from gateway.metrics import GatewayMetrics
from gateway.models import ModelCache
from gateway.offload import NotStartedError, in_thread
from gateway.settings import InferenceSettings
from lake.scoring import ModelTimeoutError, Scores

_log = structlog.get_logger()

READ_TIMEOUT_S = 10.0
"""For the body of a request."""
GRACE_S = 1.0
"""A thread that is ended may take so much longer to say so."""

Result = TypeVar("Result")
Answered = Callable[[web.Request], Awaitable[Any]]


class Inference:
    """The routes under /v2. For one event loop.

    Args:
        settings: bounds.
        cache: the models.
        metrics: counts requests.
    """

    def __init__(self, settings: InferenceSettings, cache: ModelCache, metrics: GatewayMetrics) -> None:
        self._settings, self._cache, self._metrics = settings, cache, metrics
        self._limits = InferenceLimits(
            body_bytes_max=settings.body_bytes_max, cells_max=settings.cells_max, batch_max=settings.batch_max
        )
        self._waiting = 0
        self._threads = 0
        self._slots = asyncio.Semaphore(settings.workers)
        metrics.watch(
            "inference_requests_running", "Inference requests at work", lambda: self._waiting, settings.requests_max
        )
        metrics.watch("inference_threads", "Threads that score or load", lambda: self._threads, settings.workers)

    def routes(self) -> list[web.RouteDef]:
        """All of them."""
        found = [
            web.get(INFERENCE_PREFIX, self._answered(self._server)),
            web.get(f"{INFERENCE_PREFIX}/health/live", self._answered(self._live)),
            web.get(f"{INFERENCE_PREFIX}/health/ready", self._ready),
        ]
        for path in (
            f"{INFERENCE_PREFIX}/models/{{model}}",
            f"{INFERENCE_PREFIX}/models/{{model}}/versions/{{version}}",
        ):
            found += [
                web.get(path, self._answered(self._metadata)),
                web.get(f"{path}/ready", self._answered(self._model_ready)),
                web.post(f"{path}/infer", self._answered(self._infer)),
            ]
        return found

    def _answered(self, handler: Answered) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """A handler whose refusals are answered in the protocol's words."""

        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                body, status = await handler(request), 200
            except Unanswered as refusal:
                body, status = encode_error(refusal), refusal.status
            except TimeoutError:
                message = f"no answer within {self._settings.timeout_s:g} s; send fewer windows, or try again later"
                body, status = encode_error(Unanswered(504, message)), 504
            except TemporaryError as trouble:
                message = f"the lake did not answer ({str(trouble)[:300]}); try again later"
                body, status = encode_error(Unanswered(503, message)), 503
            except ModelTimeoutError as trouble:
                body, status = encode_error(Unanswered(504, str(trouble))), 504
            except HeadwaterError as trouble:
                _log.error("inference_failed", path=request.path[:200], error=str(trouble))
                body, status = encode_error(Unanswered(500, str(trouble))), 500
            headers = {"Retry-After": "1"} if status == 503 else None
            return web.Response(body=body, status=status, content_type="application/json", headers=headers)

        return handle

    async def _server(self, request: web.Request) -> bytes:
        return encode(ServerMetadata(name="headwater-gateway", version="2"))

    async def _live(self, request: web.Request) -> bytes:
        return encode({"live": True})

    async def _ready(self, request: web.Request) -> web.Response:
        """Ready is a gateway that can tell which releases there are."""

        def look() -> None:
            self._cache.look()

        trouble = ""
        try:
            await self._bounded(lambda: self._work(look))
        except TimeoutError:
            trouble = f"the lake did not answer within {self._settings.timeout_s:g} s; try again later"
        except HeadwaterError as error:
            trouble = str(error)
        body = {"ready": False, "error": trouble} if trouble else {"ready": True}
        return web.Response(body=encode(body), status=503 if trouble else 200, content_type="application/json")

    async def _metadata(self, request: web.Request) -> bytes:
        name, version = _asked(request)

        def find() -> bytes:
            versions = sorted(manifest.version for manifest in self._cache.approved(name))
            return encode(metadata_of(self._cache.manifest(name, version), versions))

        return await self._bounded(lambda: self._work(find))

    async def _model_ready(self, request: web.Request) -> bytes:
        """Ready is a release that could be loaded: it is loaded for it."""
        name, version = _asked(request)

        def load() -> bytes:
            self._cache.scorer(self._cache.manifest(name, version), self._settings.timeout_s)
            return encode({"name": name, "ready": True})

        return await self._bounded(lambda: self._work(load))

    async def _infer(self, request: web.Request) -> bytes:
        began_s = time.monotonic()
        name, version = _asked(request)
        if request.headers.get(BINARY_HEADER) is not None:
            raise Unanswered(400, f"{BINARY_HEADER} is set, and binary tensors are not served; send JSON numbers")

        async def work() -> bytes:
            body = await self._body(request)
            return await self._work(lambda: self._score(name, version, body, began_s + self._settings.timeout_s))

        try:
            return await self._bounded(work)
        finally:
            self._metrics.inference_seconds.observe(time.monotonic() - began_s)

    async def _bounded(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """Refuse before a body is read what could not be held."""
        if self._waiting >= self._settings.requests_max:
            raise Unanswered(503, f"{self._waiting} inference requests are being answered; try again in a moment")
        self._waiting += 1
        try:
            async with asyncio.timeout(self._settings.timeout_s + GRACE_S):
                return await work()
        finally:
            self._waiting -= 1

    async def _work(self, work: Callable[[], Result]) -> Result:
        """Run in one of few threads. A thread that hangs keeps its place: there are never more of them."""
        await self._slots.acquire()
        loop = asyncio.get_running_loop()

        def leave() -> None:
            self._threads -= 1
            self._slots.release()

        def run() -> Result:
            try:
                return work()
            finally:
                try:
                    loop.call_soon_threadsafe(leave)
                except RuntimeError:
                    pass  # the loop is closed: the process ends

        self._threads += 1
        try:
            return await in_thread(run, "inference")
        except NotStartedError:
            leave()
            raise

    async def _body(self, request: web.Request) -> bytearray:
        """All of it, but never more than may be."""
        if (request.content_length or 0) > self._limits.body_bytes_max:
            raise too_large(self._limits)
        body = bytearray()
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                async for piece in request.content.iter_any():
                    body += piece
                    if len(body) > self._limits.body_bytes_max:
                        raise too_large(self._limits)
        except TimeoutError:
            raise Unanswered(408, f"the body did not come within {READ_TIMEOUT_S:g} s; send it again") from None
        return body

    def _score(self, name: str, version: str | None, body: bytearray, ends_s: float) -> bytes:
        """What happens in the thread: read, load, score, write."""
        import numpy as np

        manifest = self._cache.manifest(name, version)
        request = decode_request(body, self._limits)
        window = window_of(request, manifest, self._limits)
        scorer = self._cache.scorer(manifest, self._left_s(manifest, ends_s))
        values = np.frombuffer(window.values, np.float32).reshape(window.shape)
        scores = scorer.score(values, self._left_s(manifest, ends_s))
        self._metrics.inference_windows.labels(name, str(manifest.version)).inc(window.shape[0])
        return encode(response_of(manifest, request, tensors_of(scores)))

    def _left_s(self, manifest: Manifest, ends_s: float) -> float:
        left_s = ends_s - time.monotonic()
        if left_s <= 0:
            raise Unanswered(
                504,
                f"model {manifest.model} version {manifest.version} was not reached within "
                f"{self._settings.timeout_s:g} s; try again later",
            )
        return left_s


def tensors_of(scores: Scores) -> Sequence[Tensor]:
    """The outputs of a model by their names."""
    return [tensor_of(name, values) for name, values in scores._asdict().items() if values is not None]


def _asked(request: web.Request) -> tuple[str, str | None]:
    return request.match_info["model"], request.match_info.get("version")

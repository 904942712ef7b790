"""The HTTP API: health, metrics, devices and streams. JSON in, JSON out; every error says what to do about it.

It asks nobody who they are, so by default it listens on loopback only and answers only requests that were addressed
there: a page in a browser cannot reach it under a name of its own.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec
import structlog
from aiohttp import web

from contract.desired import check_members
from contract.errors import ConfigurationError, TemporaryError
from contract.limits import CONTROL_BYTES_MAX, SEQ_MAX
from contract.messages import DesiredStream, Watermark
from gateway.devices import Device
from gateway.engine import StreamView
from gateway.metrics import GatewayMetrics
from gateway.offload import in_thread
from gateway.registry import Refused, Registry
from gateway.settings import HttpSettings
from gateway.watch import Trouble

_log = structlog.get_logger()

REQUESTS_MAX = 64
"""Requests at the same time; more are told to come back."""
ORDERS_MAX = 8
"""Desired documents being committed at the same time; each waits for the lake in a thread."""
READ_TIMEOUT_S = 10.0
"""For the body of a request."""
PAGE_MAX, PAGE_DEFAULT = 10_000, 1_000
REPORTS = "committed and being published; see the device's reported for its revision, or refused"
AWAITED = "committed; this gateway has no report of the device, and only the device can judge it: it waits there"
INFERENCE_PREFIX = "/v2"
CLIENT_GONE = 499
"""For the count alone: the client hung up before it had the answer (nginx's number for it)."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Views(NamedTuple):
    """What the API shows. All of it may be asked from the event loop's thread, and answers at once."""

    sick: Callable[[], Sequence[Trouble]]
    """Why the process should be restarted; empty when it is well."""
    unready: Callable[[], Sequence[Trouble]]
    """Why it does no work now; empty when it does."""
    streams: Callable[[], Sequence[StreamView]]
    watermarks: Callable[[str], Sequence[Watermark]]
    registry: Registry


class _DesiredBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    streams: dict[str, DesiredStream]
    replaces: int | None = None


_encode = msgspec.json.Encoder().encode
_decode_desired = msgspec.json.Decoder(_DesiredBody).decode

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def answer(content: Any, status: int = 200) -> web.Response:
    """A JSON response."""
    return web.Response(body=_encode(content), status=status, content_type="application/json")


def error(status: int, code: str, message: str, remedy: str) -> web.Response:
    """An error, always of the same shape."""
    return answer({"error": {"code": code, "message": message, "remedy": remedy}}, status)


class HttpApi:
    """Routes and their server. Start and stop it in one event loop.

    Args:
        settings: where to listen.
        views: what to show.
        metrics: exposed, and counts requests.
        more: routes of others.
    """

    def __init__(
        self,
        settings: HttpSettings,
        views: Views,
        metrics: GatewayMetrics,
        more: Sequence[web.AbstractRouteDef] = (),
    ) -> None:
        self._settings, self._views, self._metrics, self._more = settings, views, metrics, more
        self._running = 0
        self._ordering = 0
        self._runner: web.AppRunner | None = None

    def application(self) -> web.Application:
        """The routes, without a server."""
        app = web.Application(middlewares=[self._guard], client_max_size=CONTROL_BYTES_MAX)
        app.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._exposition),
                web.get("/v1/streams", self._streams),
                web.get("/v1/devices", self._devices),
                web.get("/v1/devices/{device}", self._device),
                web.put("/v1/devices/{device}/desired", self._set_desired),
                *self._more,
            ]
        )
        return app

    async def start(self) -> int:
        """Listen.

        Returns:
            The port.

        Raises:
            ConfigurationError: the address is taken, or not one of this machine.
        """
        settings = self._settings
        self._runner = web.AppRunner(self.application(), access_log=None, keepalive_timeout=15.0, shutdown_timeout=2.0)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, settings.host, settings.port, backlog=128).start()
        except OSError as failure:
            await self._runner.cleanup()
            raise ConfigurationError(
                f"gateway.toml: [http] host = {settings.host!r}, port = {settings.port}: cannot listen there "
                f"({failure}); choose another port, or port = 0 for any free one"
            ) from failure
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """What holds for every request: a bound, a JSON error whatever happens, a count."""
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else "other"
        response: web.StreamResponse
        if not self._settings.allow_remote_http and not _addressed_to_loopback(request):
            response = _refusal(
                request,
                403,
                "wrong_host",
                f"this API is not known as {request.host[:80]!r}",
                "ask 127.0.0.1 or localhost",
            )
        elif self._running >= REQUESTS_MAX:
            response = _refusal(
                request, 503, "busy", f"{REQUESTS_MAX} requests are being answered", "try again in a moment"
            )
        else:
            self._running += 1
            try:
                response = await handler(request)
            except web.HTTPException as known:
                response = _translated(known, request)
            except TimeoutError:
                response = _refusal(
                    request,
                    408,
                    "timeout",
                    f"the request's body did not come within {READ_TIMEOUT_S:g} s",
                    "send it again",
                )
            except ConnectionError:
                response = web.Response(status=CLIENT_GONE)
            except Exception as fault:  # noqa: BLE001 - a bug that one request finds must not look like a dead gateway
                self._metrics.faults.labels("http").inc()
                _log.error("http_fault", route=route, exc_info=fault)
                response = _refusal(
                    request, 500, "internal_fault", f"unexpected {type(fault).__name__}", "look into the log"
                )
            finally:
                self._running -= 1
        self._metrics.http_requests.labels(route, str(response.status)).inc()
        return response

    async def _healthz(self, request: web.Request) -> web.Response:
        return _condition(self._views.sick(), "ok", "sick")

    async def _readyz(self, request: web.Request) -> web.Response:
        return _condition([*self._views.sick(), *self._views.unready()], "ready", "not_ready")

    async def _exposition(self, request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.exposition(), content_type="text/plain", charset="utf-8")

    async def _streams(self, request: web.Request) -> web.Response:
        streams = sorted(self._views.streams(), key=lambda stream: stream.name)
        return answer({"streams": [_stream_json(stream) for stream in streams]})

    async def _devices(self, request: web.Request) -> web.Response:
        text = request.query.get("limit", str(PAGE_DEFAULT))
        if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= PAGE_MAX):
            return error(400, "bad_limit", f"limit = {text[:40]!r}", f"give a number of 1 to {PAGE_MAX}")
        if not self._views.registry.loaded:
            return _not_read()
        limit = int(text)
        # One more than asked for tells whether there is another page.
        found = self._views.registry.devices(request.query.get("after", ""), limit + 1)
        page = found[:limit]
        after = page[-1].name if len(found) > limit else None
        return answer({"devices": [_device_summary(device) for device in page], "after": after})

    async def _device(self, request: web.Request) -> web.Response:
        name = request.match_info["device"]
        if not self._views.registry.loaded:
            return _not_read()
        device = self._views.registry.device(name)
        if device is None:
            return error(
                404,
                "unknown_device",
                f"device {name[:80]!r} was never seen by this gateway",
                "look at GET /v1/devices; a device is known once it published its status or had a batch committed",
            )
        return answer(_device_json(device, self._views.watermarks(name)))

    async def _set_desired(self, request: web.Request) -> web.Response:
        name = request.match_info["device"]
        if request.content_type != "application/json":
            return error(
                415, "not_json", f"content type {request.content_type[:80]!r}", "send Content-Type: application/json"
            )
        async with asyncio.timeout(READ_TIMEOUT_S):
            body = await request.read()
        try:
            check_members(body)
            wanted = _decode_desired(body)
        except (msgspec.MsgspecError, ValueError, RecursionError) as mistake:
            return error(
                400,
                "bad_document",
                f"the body is not a desired document: {str(mistake)[:200]}",
                'send {"streams": {"NAME": {"enabled": true, "rate_hz": 10, "max_batch_rows": 500, '
                '"max_batch_age_s": 5}}}, leaving out what the device shall decide itself',
            )
        if self._ordering >= ORDERS_MAX:
            return error(503, "busy", f"{ORDERS_MAX} documents are being committed", "try again in a moment")
        if wanted.replaces is not None and not 0 <= wanted.replaces <= SEQ_MAX:
            return error(
                400, "bad_document", f"replaces = {wanted.replaces}", "give the revision you read, or leave it out"
            )
        self._ordering += 1
        try:
            desired = await in_thread(
                functools.partial(self._views.registry.set_desired, name, wanted.streams, wanted.replaces),
                "http-order",
            )
        except Refused as refusal:
            status = 409 if refusal.code == "conflict" else 422
            message, _, remedy = str(refusal).rpartition("; ")
            return error(status, refusal.code, message, remedy)
        except TemporaryError as trouble:
            return error(
                503,
                "lake_unreachable",
                f"the lake did not answer, so it is not known whether the document is in force: {str(trouble)[:300]}",
                f"look at GET /v1/devices/{name}, then try again",
            )
        finally:
            self._ordering -= 1
        device = self._views.registry.device(name)
        note = REPORTS if device is not None and device.reported is not None else AWAITED
        content = {"device": name, "revision": desired.revision, "streams": desired.streams, "note": note}
        return answer(content, 202)


def _not_read() -> web.Response:
    """What was heard of a device so far is half of what is known of it, and a device not heard yet is not unknown."""
    return error(
        503,
        "register_not_read",
        "this gateway has not read control/devices yet",
        "try again in a moment; if it lasts, GET /readyz tells what the lake answers",
    )


def _condition(troubles: Sequence[Trouble], good: str, bad: str) -> web.Response:
    reasons = [{"code": trouble.code, "message": trouble.message} for trouble in troubles]
    return answer({"status": bad if reasons else good, "reasons": reasons}, 503 if reasons else 200)


def _refusal(request: web.Request, status: int, code: str, message: str, remedy: str) -> web.Response:
    """An error, in the words of the API that was asked: the inference protocol has its own."""
    if request.path == INFERENCE_PREFIX or request.path.startswith(f"{INFERENCE_PREFIX}/"):
        return answer({"error": f"{message}; {remedy}"}, status)
    return error(status, code, message, remedy)


def _translated(known: web.HTTPException, request: web.Request) -> web.Response:
    where = f"{request.method} {request.path[:120]}"
    if known.status == 404:
        return _refusal(request, 404, "no_such_path", where, "see docs/gateway.md for what there is")
    if known.status == 405:
        return _refusal(request, 405, "no_such_method", where, "see docs/gateway.md for what there is")
    if known.status == 413:
        return _refusal(
            request, 413, "too_large", f"the body has more than {CONTROL_BYTES_MAX} bytes", "send a smaller one"
        )
    return _refusal(request, known.status, "refused", f"{where}: {known.reason}", "correct the request")


def _addressed_to_loopback(request: web.Request) -> bool:
    try:
        name = urlsplit(f"//{request.host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _time(at_us: int | None) -> str | None:
    """ISO 8601, UTC, microseconds."""
    if at_us is None:
        return None
    try:
        return (_EPOCH + timedelta(microseconds=at_us)).isoformat().replace("+00:00", "Z")
    except OverflowError:
        return None


def _stream_json(stream: StreamView) -> dict[str, Any]:
    return {
        "name": stream.name,
        "pending_batches": stream.pending_batches,
        "pending_bytes": stream.pending_bytes,
        "committing": stream.committing,
        "last_commit": _time(stream.last_commit_us),
        "committed_rows": stream.committed_rows,
        "failures": stream.failures,
        "last_error": stream.last_error or None,
        "isolated_lanes": stream.isolated_lanes,
    }


def _device_summary(device: Device) -> dict[str, Any]:
    return {
        "device": device.name,
        "online": device.online,
        "last_seen": _time(device.last_seen_us),
        "first_seen": _time(device.first_seen_us),
        "agent": device.agent,
        "desired_revision": device.revision,
    }


def _device_json(device: Device, watermarks: Sequence[Watermark]) -> dict[str, Any]:
    desired = device.desired
    return _device_summary(device) | {
        "presence": {"reason": device.reason, "since": _time(device.presence_us), "boot": device.boot},
        "reported": None if device.reported is None else msgspec.Raw(device.reported),
        "reported_at": _time(device.reported_us),
        "desired": None if desired is None else {"revision": desired.revision, "streams": desired.streams},
        "desired_at": _time(device.desired_us),
        "watermarks": [{"stream": mark.stream, "epoch": mark.epoch, "seq": mark.seq} for mark in watermarks],
    }

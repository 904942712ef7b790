"""Every answer of the API is JSON with a remedy where something is wrong; nothing unbounded is read; no bug ends it.

Mutants tried, each found here: answering a page of a foreign host; reading a body of any size; an exception's text in
the answer of an internal fault; 200 while not ready.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import ClientSession
from aiohttp.test_utils import TestClient, TestServer
from structlog.testing import capture_logs

from contract import topics
from contract.errors import TemporaryError
from contract.limits import CONTROL_BYTES_MAX
from contract.messages import Presence, Reported, ReportedStream, Watermark, encode
from gateway.engine import StreamView
from gateway.http import ORDERS_MAX, REQUESTS_MAX, HttpApi, Views
from gateway.settings import HttpSettings
from gateway.watch import Trouble
from tests.unit.gateway_parts import EPOCH, STREAM, fresh_metrics, value
from tests.unit.test_gateway_registry import BOOT, Bench


@pytest.fixture(autouse=True)
def logs():
    with capture_logs() as found:
        yield found


class Api:
    """The API over a real register, with conditions to set."""

    def __init__(self, tmp_path, settings: HttpSettings | None = None, *, read: bool = True) -> None:
        self.bench = Bench(tmp_path)
        if read:
            self.bench.registry.refresh()
        self.sick: list[Trouble] = []
        self.unready: list[Trouble] = []
        self.streams: Any = lambda: [StreamView(STREAM, 2, 3_000, True, 0, "", 0, 1_700_000_000_000_000, 500)]
        self.metrics = fresh_metrics()
        self.http = HttpApi(
            settings or HttpSettings(),
            Views(
                lambda: self.sick,
                lambda: self.unready,
                lambda: self.streams(),
                lambda device: (Watermark(STREAM, EPOCH, 7),),
                self.bench.registry,
            ),
            self.metrics,
        )

    @asynccontextmanager
    async def client(self) -> AsyncIterator[TestClient[Any, Any]]:
        async with TestClient(TestServer(self.http.application())) as client:
            yield client

    async def ask(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        async with self.client() as client, client.request(method, path, **options) as response:
            return response.status, await response.json()


async def test_health_and_readiness_say_why(tmp_path):
    api = Api(tmp_path)
    assert await api.ask("GET", "/healthz") == (200, {"status": "ok", "reasons": []})
    assert await api.ask("GET", "/readyz") == (200, {"status": "ready", "reasons": []})
    api.unready = [Trouble("lake_unreachable", "it burns")]
    assert await api.ask("GET", "/healthz") == (200, {"status": "ok", "reasons": []})
    reasons = [{"code": "lake_unreachable", "message": "it burns"}]
    assert await api.ask("GET", "/readyz") == (503, {"status": "not_ready", "reasons": reasons})
    api.sick = [Trouble("thread_died", "engine ended")]
    status, found = await api.ask("GET", "/readyz")
    assert status == 503
    assert [reason["code"] for reason in found["reasons"]] == ["thread_died", "lake_unreachable"]
    assert (await api.ask("GET", "/healthz"))[0] == 503


async def test_metrics_are_in_prometheus_text_format(tmp_path):
    api = Api(tmp_path)
    async with api.client() as client, client.get("/metrics") as response:
        text = await response.text()
        assert response.content_type == "text/plain"
    assert "# TYPE headwater_gateway_received_rows_total counter" in text
    assert "headwater_gateway_process_resident_memory_bytes" in text


async def test_streams_are_shown(tmp_path):
    status, found = await Api(tmp_path).ask("GET", "/v1/streams")
    assert status == 200
    assert found["streams"] == [
        {
            "name": STREAM,
            "pending_batches": 2,
            "pending_bytes": 3_000,
            "committing": True,
            "last_commit": "2023-11-14T22:13:20Z",
            "committed_rows": 500,
            "failures": 0,
            "last_error": None,
            "isolated_lanes": 0,
        }
    ]


async def test_a_device_is_shown_with_all_that_is_known_of_it(tmp_path):
    api = Api(tmp_path)
    api.bench.now_us = 1_700_000_000_000_001
    presence = Presence(online=True, reason="started", at_us=0, agent="agent/1", boot=BOOT)
    api.bench.registry.receive(topics.status("pi-1"), encode(presence))
    stream = ReportedStream(
        enabled=True,
        rate_hz=1.0,
        max_batch_rows=1,
        max_batch_age_s=1.0,
        readings=1,
        overruns=0,
        waiting_batches=0,
        waiting_rows=0,
        waiting_bytes=0,
        evicted_rows=0,
    )
    report = Reported(
        revision=0, agent="agent/1", boot=BOOT, clock_synced=True, started_at_us=0, streams={STREAM: stream}
    )
    api.bench.registry.receive(topics.reported("pi-1"), encode(report))
    status, found = await api.ask("GET", "/v1/devices/pi-1")
    assert status == 200
    assert found["online"] is True
    assert found["last_seen"] == "2023-11-14T22:13:20.000001Z"
    assert found["presence"] == {"reason": "started", "since": "2023-11-14T22:13:20.000001Z", "boot": BOOT}
    assert found["reported"]["streams"][STREAM]["readings"] == 1
    assert found["desired"] is None
    assert found["watermarks"] == [{"stream": STREAM, "epoch": EPOCH, "seq": 7}]


async def test_a_client_that_hangs_up_is_no_fault_of_the_gateway(tmp_path, logs):
    api = Api(tmp_path)

    def gone():
        raise ConnectionResetError("Cannot write to closing transport")

    api.streams = gone
    async with api.client() as client:
        await client.get("/v1/streams")
    assert value(api.metrics, "http_requests_total", route="/v1/streams", status="499") == 1
    assert value(api.metrics, "faults_total", where="http") == 0
    assert logs == []


async def test_devices_are_not_shown_by_half_before_the_table_was_read(tmp_path):
    before = Api(tmp_path)
    before.bench.hears("pi-1", online=False)
    before.bench.registry.write()
    api = Api(tmp_path, read=False)
    for path in ("/v1/devices", "/v1/devices/pi-1", "/v1/devices/pi-2"):
        status, found = await api.ask("GET", path)
        assert (status, found["error"]["code"]) == (503, "register_not_read")
    api.bench.registry.refresh()
    assert (await api.ask("GET", "/v1/devices/pi-1"))[1]["online"] is False
    assert (await api.ask("GET", "/v1/devices/pi-2"))[0] == 404


async def test_devices_come_in_pages(tmp_path):
    api = Api(tmp_path)
    for number in range(5):
        api.bench.hears(f"pi-{number}")
    seen, after = [], ""
    while after is not None:
        status, page = await api.ask("GET", "/v1/devices", params={"limit": "2", "after": after})
        assert status == 200
        seen += [device["device"] for device in page["devices"]]
        after = page["after"]
    assert seen == [f"pi-{number}" for number in range(5)]


async def test_a_desired_document_is_set_and_shown(tmp_path):
    api = Api(tmp_path)
    status, found = await api.ask(
        "PUT", "/v1/devices/pi-1/desired", json={"streams": {STREAM: {"rate_hz": 10}}, "replaces": 0}
    )
    assert status == 202
    assert "waits there" in found.pop("note")
    assert found == {"device": "pi-1", "revision": 1, "streams": {STREAM: {"rate_hz": 10}}}
    status, found = await api.ask("GET", "/v1/devices/pi-1")
    assert found["desired"] == {"revision": 1, "streams": {STREAM: {"rate_hz": 10}}}
    status, found = await api.ask("PUT", "/v1/devices/pi-1/desired", json={"streams": {}, "replaces": 0})
    assert status == 409
    assert found["error"]["remedy"] == "read it again, then decide"


GOOD = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "code"),
    [
        ("GET", "/v1/nothing", {}, 404, "no_such_path"),
        ("POST", "/healthz", {}, 405, "no_such_method"),
        ("GET", "/v1/devices/unknown", {}, 404, "unknown_device"),
        ("GET", "/v1/devices?limit=0", {}, 400, "bad_limit"),
        ("GET", "/v1/devices?limit=x", {}, 400, "bad_limit"),
        ("GET", "/v1/devices?limit=99999999999999999999", {}, 400, "bad_limit"),
        ("PUT", "/v1/devices/pi-1/desired", {"data": b"{}"}, 415, "not_json"),
        ("PUT", "/v1/devices/pi-1/desired", {"data": b"{", "headers": GOOD}, 400, "bad_document"),
        (
            "PUT",
            "/v1/devices/pi-1/desired",
            {"data": b'{"streams": {"s": {"rate_hz": 1, "rate_hz": 2}}}', "headers": GOOD},
            400,
            "bad_document",
        ),
        ("PUT", "/v1/devices/pi-1/desired", {"data": b"\xff", "headers": GOOD}, 400, "bad_document"),
        ("PUT", "/v1/devices/pi-1/desired", {"data": b"[" * 9_000, "headers": GOOD}, 400, "bad_document"),
        ("PUT", "/v1/devices/pi-1/desired", {"json": {"streams": {"s": {"rat_hz": 1}}}}, 400, "bad_document"),
        ("PUT", "/v1/devices/pi-1/desired", {"json": {"streams": {}, "replaces": -1}}, 400, "bad_document"),
        ("PUT", "/v1/devices/pi-1/desired", {"json": {"streams": {"s": {"rate_hz": 0}}}}, 422, "out_of_range"),
        ("PUT", "/v1/devices/pi-1/desired", {"json": {"streams": {"s": {"rate_hz": 1e6}}}}, 422, "out_of_range"),
        ("PUT", "/v1/devices/Pi%201/desired", {"json": {"streams": {}}}, 422, "bad_name"),
        (
            "PUT",
            "/v1/devices/pi-1/desired",
            {"data": b" " * (CONTROL_BYTES_MAX + 1), "headers": GOOD},
            413,
            "too_large",
        ),
    ],
)
async def test_every_refusal_is_json_with_a_remedy(tmp_path, method, path, options, status, code):
    found_status, found = await Api(tmp_path).ask(method, path, **options)
    assert found_status == status
    assert found["error"]["code"] == code
    assert found["error"]["message"]
    assert found["error"]["remedy"]


async def test_a_lake_that_does_not_answer_is_told_and_so_is_the_doubt(tmp_path):
    api = Api(tmp_path)
    api.bench.trouble = TemporaryError("no answer")
    status, found = await api.ask("PUT", "/v1/devices/pi-1/desired", json={"streams": {}})
    assert status == 503
    assert "not known whether" in found["error"]["message"]


async def test_a_bug_is_counted_and_its_text_stays_in_the_log(tmp_path, logs):
    api = Api(tmp_path)

    def trip() -> None:
        raise ZeroDivisionError("secret text")

    api.streams = trip
    status, found = await api.ask("GET", "/v1/streams")
    assert status == 500
    assert "secret text" not in str(found)
    assert value(api.metrics, "faults_total", where="http") == 1
    assert value(api.metrics, "http_requests_total", route="/v1/streams", status="500") == 1
    assert [entry["event"] for entry in logs] == ["http_fault"]


async def test_a_page_that_reaches_loopback_under_a_name_of_its_own_gets_nothing(tmp_path):
    for host in ("evil.example", "127.0.0.1.evil.example:8080", "169.254.1.1", ""):
        status, found = await Api(tmp_path).ask("GET", "/v1/devices", headers={"Host": host})
        assert (status, found["error"]["code"]) == (403, "wrong_host")
    for host in ("localhost:1", "127.0.0.1", "[::1]:8080"):
        assert (await Api(tmp_path).ask("GET", "/v1/devices", headers={"Host": host}))[0] == 200
    remote = Api(tmp_path, HttpSettings(host="0.0.0.0", allow_remote_http=True))
    assert (await remote.ask("GET", "/v1/devices", headers={"Host": "gateway.example"}))[0] == 200


async def test_more_requests_than_the_limit_are_told_to_come_back(tmp_path):
    api = Api(tmp_path)
    api.http._running = REQUESTS_MAX
    status, found = await api.ask("GET", "/healthz")
    assert (status, found["error"]["code"]) == (503, "busy")


async def test_documents_that_wait_for_the_lake_are_bounded(tmp_path):
    api = Api(tmp_path)
    api.http._ordering = ORDERS_MAX
    status, found = await api.ask("PUT", "/v1/devices/pi-1/desired", json={"streams": {}})
    assert (status, found["error"]["code"]) == (503, "busy")


async def test_it_listens_where_it_is_told_and_stops(tmp_path):
    api = Api(tmp_path, HttpSettings(port=0))
    port = await api.http.start()
    async with ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/healthz") as response:
            assert response.status == 200
        await api.http.stop()
        with pytest.raises(OSError, match="connect"):
            await session.get(f"http://127.0.0.1:{port}/healthz")

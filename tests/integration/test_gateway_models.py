"""The gateway serves releases as a static host would, with ranges, in bounded memory; and keeps signatures fresh.

Mutants tried, each made a test here fail: paths not checked; `If-Range` not looked at; the timestamp cached for ever;
no bound on downloads.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from structlog.testing import capture_logs

from contract.models import METADATA_BYTES_MAX
from gateway import models_http
from gateway.http import HttpApi, Views
from gateway.models_http import CHUNK_BYTES, DOWNLOADS_MAX, READINGS_MAX, ModelFiles, Span, Unsatisfiable, parse_range
from gateway.resigning import Resigner
from gateway.settings import HttpSettings, ModelsSettings
from lake.errors import StoreUnavailableError
from lake.releases import Releases
from lake.store import Store
from lake.trust import rotation
from tests.trust_world import MODEL, Device, World, manifest
from tests.unit.gateway_parts import fresh_metrics, value

DAY_S = 86_400.0
BIG = bytes(range(251)) * 8_000  # some 2 MB, no repetition at the size of a chunk


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.approve()
    return world


class Gateway:
    """The HTTP API of a gateway, over the lake of a world."""

    def __init__(self, store: Any) -> None:
        self.metrics = fresh_metrics()
        self.files = ModelFiles(lambda: store, self.metrics)
        nothing: Any = lambda *_: []  # noqa: E731
        views = Views(nothing, nothing, nothing, nothing, nothing)
        self.http = HttpApi(HttpSettings(port=0), views, self.metrics, self.files.routes())

    @asynccontextmanager
    async def client(self) -> AsyncIterator[TestClient[Any, Any]]:
        async with TestClient(TestServer(self.http.application())) as client:
            yield client

    @contextmanager
    def serving(self) -> Iterator[str]:
        """In a thread of its own, for clients that block; gives the URL."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        try:
            port = asyncio.run_coroutine_threadsafe(self.http.start(), loop).result(10)
            yield f"http://127.0.0.1:{port}/models/"
            asyncio.run_coroutine_threadsafe(self.http.stop(), loop).result(10)
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)
            loop.close()


def artifact_of(world: World, data: bytes) -> str:
    return f"/models/artifacts/{Releases(world.store).put_artifact(data).sha256}"


@pytest.mark.parametrize(
    ("header", "size", "found"),
    [
        (None, 10, None),
        ("bytes=0-3", 10, Span(0, 4)),
        ("bytes=4-", 10, Span(4, 10)),
        ("bytes=4-99", 10, Span(4, 10)),
        ("bytes=-3", 10, Span(7, 10)),
        ("bytes=-99", 10, Span(0, 10)),
        ("bytes=9-9", 10, Span(9, 10)),
        ("Bytes=0-0", 10, Span(0, 1)),
        ("bytes=10-", 10, Unsatisfiable()),
        ("bytes=-0", 10, Unsatisfiable()),
        ("bytes=0-", 0, Unsatisfiable()),
        ("bytes=3-1", 10, None),
        ("bytes=-", 10, None),
        ("bytes=0-1,3-4", 10, None),
        ("lines=0-1", 10, None),
        ("bytes=a-b", 10, None),
        ("bytes=0-9999999999999999999999", 10, None),
    ],
)
def test_a_range_is_read_as_rfc_9110_has_it(header: str | None, size: int, found: Any) -> None:
    assert parse_range(header, size) == found


def test_a_device_is_served_as_by_any_static_host(world: World) -> None:
    with Gateway(world.store).serving() as url:
        device = Device(world, url)
        assert device.follow(world.order())[1] == manifest()
        world.approve(2)
        assert device.follow(world.order(sequence=2, version=2))[1] == manifest(2)


async def test_an_artifact_comes_whole_and_in_parts(world: World) -> None:
    path = artifact_of(world, BIG)
    gateway = Gateway(world.store)
    async with gateway.client() as client:
        whole = await client.get(path)
        assert (whole.status, await whole.read()) == (200, BIG)
        assert whole.headers["ETag"] == f'"{hashlib.sha256(BIG).hexdigest()}"'
        assert "immutable" in whole.headers["Cache-Control"]
        assert whole.headers["Accept-Ranges"] == "bytes"
        assert whole.headers["Content-Type"] == "application/octet-stream"
        assert value(gateway.metrics, "model_bytes_total") == len(BIG)
        for start, end in ((0, 1), (CHUNK_BYTES - 1, CHUNK_BYTES + 1), (1_000_000, len(BIG))):
            part = await client.get(path, headers={"Range": f"bytes={start}-{end - 1}"})
            assert (part.status, await part.read()) == (206, BIG[start:end])
            assert part.headers["Content-Range"] == f"bytes {start}-{end - 1}/{len(BIG)}"
        beyond = await client.get(path, headers={"Range": f"bytes={len(BIG)}-"})
        assert (beyond.status, beyond.headers["Content-Range"]) == (416, f"bytes */{len(BIG)}")
        head = await client.head(path)
        assert (head.status, head.headers["Content-Length"], await head.read()) == (200, str(len(BIG)), b"")


async def test_a_download_goes_on_only_in_the_same_file(world: World) -> None:
    path = artifact_of(world, BIG)
    async with Gateway(world.store).client() as client:
        tag = (await client.head(path)).headers["ETag"]
        same = await client.get(path, headers={"Range": "bytes=100-", "If-Range": tag})
        assert same.status == 206
        other = await client.get(path, headers={"Range": "bytes=100-", "If-Range": '"another"'})
        assert (other.status, len(await other.read())) == (200, len(BIG))
        assert (await client.get(path, headers={"If-None-Match": f'"x", W/{tag}'})).status == 304


async def test_only_the_timestamp_is_asked_for_again(world: World) -> None:
    async with Gateway(world.store).client() as client:
        stamp = await client.get("/models/metadata/timestamp.json")
        assert (stamp.status, stamp.headers["Cache-Control"]) == (200, "no-cache")
        assert stamp.headers["ETag"] == f'"{hashlib.sha256(await stamp.read()).hexdigest()}"'
        world.approve(2)
        again = await client.get("/models/metadata/timestamp.json", headers={"If-None-Match": stamp.headers["ETag"]})
        assert again.status == 200
        root = await client.get("/models/metadata/1.root.json")
        assert (root.status, "immutable" in root.headers["Cache-Control"]) == (200, True)


@pytest.mark.parametrize(
    "path",
    [
        "metadata/2.root.json",
        "metadata/none.json",
        "metadata/01.root.json",
        "metadata/",
        "artifacts/" + "0" * 64,
        "artifacts/../metadata/timestamp.json",
        "..%2fcontrol/releases/_delta_log/00000000000000000000.json",
        "%2e%2e/control/x",
        "artifacts%00",
        "targets/gestures/1.json",
        f"targets/../{'0' * 64}.1.json",
        "artifacts/" + "A" * 64,
    ],
)
async def test_nothing_else_is_served(world: World, path: str) -> None:
    (world.folder / "lake" / "control").mkdir(exist_ok=True)
    (world.folder / "lake" / "control" / "x").write_text("secret")
    async with Gateway(world.store).client() as client:
        # By hand: a client's library would tidy the path up before it sends it.
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        writer.write(f"GET /models/{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
    assert answer.split(b" ")[1] in (b"404", b"400")
    assert b"secret" not in answer


class SlowStore:
    """A store whose reads wait, or fail, as a test says."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.gate = threading.Event()
        self.held = "models/"
        """What waits at the gate."""
        self.reads = 0
        self.failing = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get_range(self, path: str, start: int, length: int) -> bytes:
        self.reads += 1
        assert length <= max(CHUNK_BYTES, METADATA_BYTES_MAX)
        if path.startswith(self.held):
            self.gate.wait(10)
        if self.failing:
            raise StoreUnavailableError("cannot read")
        return self._store.get_range(path, start, length)


async def test_downloads_beyond_the_bound_come_back_later(world: World) -> None:
    path, store = artifact_of(world, BIG), SlowStore(world.store)
    async with Gateway(store).client() as client:
        running = [asyncio.ensure_future(client.get(path)) for _ in range(DOWNLOADS_MAX)]
        while store.reads < DOWNLOADS_MAX:
            await asyncio.sleep(0.01)
        refused = await client.get(path)
        assert (refused.status, refused.headers["Retry-After"]) == (503, "2")
        store.held = "models/artifacts/"
        for small in ("metadata/timestamp.json", "metadata/1.root.json"):
            assert (await client.get(f"/models/{small}")).status == 200, "who downloads for hours holds up no order"
        assert (await refused.json())["error"]["code"] == "busy"
        store.gate.set()
        assert [len(await (await one).read()) for one in running] == [len(BIG)] * DOWNLOADS_MAX
        assert (await client.get(path)).status == 200


async def test_readers_of_metadata_have_a_bound_of_their_own(world: World) -> None:
    path, store = artifact_of(world, BIG), SlowStore(world.store)
    store.held = "models/metadata/"
    async with Gateway(store).client() as client:
        running = [asyncio.ensure_future(client.get("/models/metadata/timestamp.json")) for _ in range(READINGS_MAX)]
        while store.reads < READINGS_MAX:
            await asyncio.sleep(0.01)
        assert (await client.get("/models/metadata/1.root.json")).status == 503
        assert await (await client.get(path)).read() == BIG
        store.gate.set()
        assert {(await one).status for one in running} == {200}
        assert (await client.get("/models/metadata/1.root.json")).status == 200


async def test_a_lake_that_fails_is_told_before_the_first_byte_and_seen_after_it(world: World) -> None:
    path, store = artifact_of(world, BIG), SlowStore(world.store)
    store.gate.set()
    store.failing = True
    async with Gateway(store).client() as client:
        refused = await client.get("/models/metadata/timestamp.json")
        assert (refused.status, (await refused.json())["error"]["code"]) == (503, "busy")
        answer = await client.get(path)
        assert answer.status == 200
        with pytest.raises(aiohttp.ClientError):
            await answer.read()
        store.failing = False
        assert await (await client.get(path, headers={"Range": "bytes=5-9"})).read() == BIG[5:10]


async def test_a_client_that_takes_nothing_is_cut_off(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models_http, "SLICE_TIMEOUT_S", 0.2)
    path = artifact_of(world, BIG * 20)
    gateway = Gateway(world.store)
    async with gateway.client() as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port, limit=1024)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        await writer.drain()
        await asyncio.wait_for(reader.read(10), 5)
        async with asyncio.timeout(10):
            while value(gateway.metrics, "model_downloads"):
                await asyncio.sleep(0.05)
        writer.close()


def resigner(world: World, **settings: Any) -> Resigner:
    return Resigner(
        ModelsSettings(online_key=str(world.keys.file("online")), **settings), lambda: world.store, fresh_metrics()
    )


def test_a_gateway_publishes_what_people_approved(world: World) -> None:
    data = msgspec.json.encode(manifest(2))
    world.repository().put_target(f"{MODEL}/2.json", data)
    world.repository().sign_targets([world.targets], add={f"{MODEL}/2.json": data})
    gateways = [resigner(world) for _ in range(2)]
    for gateway in gateways:
        assert gateway.look()
    assert not world.repository().is_behind()
    assert world.repository().published().timestamp.version == 3
    assert gateways[0].left_s("timestamp") == pytest.approx(7 * DAY_S, abs=60)
    assert gateways[0].left_s("root") == pytest.approx(365 * DAY_S, abs=60)


def test_a_gateway_signs_before_its_signatures_expire(world: World) -> None:
    world.at -= 4 * DAY_S
    world.repository().publish([world.online], force=True)
    before = world.repository().published().timestamp.version
    gateway = resigner(world)
    gateway.start()
    try:
        with_patience(lambda: world.repository().published().timestamp.version == before + 1)
    finally:
        assert gateway.close(5)


def with_patience(condition: Any) -> None:
    waiting = threading.Event()
    for _ in range(500):
        if condition():
            return
        waiting.wait(0.02)
    raise AssertionError("it never came true")


def test_a_gateway_without_the_key_watches(world: World) -> None:
    world.at -= 4 * DAY_S
    world.repository().publish([world.online], force=True)
    before = world.repository().published().timestamp.version
    gateway = Resigner(ModelsSettings(), lambda: world.store, fresh_metrics())
    assert gateway.look()
    assert world.repository().published().timestamp.version == before
    assert gateway.left_s("timestamp") == pytest.approx(3 * DAY_S, abs=60)


def test_a_gateway_whose_key_was_rotated_away_says_so_once_and_goes_on(world: World) -> None:
    gateway = resigner(world)
    assert gateway.may_sign(world.online.public_key.keyid) is None
    assert gateway.look()
    assert gateway.may_sign(world.online.public_key.keyid)
    new = world.keys.make("online.next")
    rotation.rotate_online(world.repository(), [world.root], world.online, new)
    with capture_logs() as logs:
        assert gateway.look() and gateway.look()
    told = [log for log in logs if log["event"] == "models_not_signed"]
    assert len(told) == 1
    assert "keys rotate" in told[0]["error"]
    assert not gateway.may_sign(world.online.public_key.keyid), "nor does it sign orders any more"
    assert gateway.may_sign(new.public_key.keyid)
    assert gateway.left_s("timestamp") > 0, "it still watches"
    # The new key in the file is taken up without a restart.
    world.keys.adopt("online")
    world.online = new
    data = msgspec.json.encode(manifest(2))
    world.repository().put_target(f"{MODEL}/2.json", data)
    world.repository().sign_targets([world.targets], add={f"{MODEL}/2.json": data})
    assert gateway.look()
    assert not world.repository().is_behind()


def test_a_gateway_of_a_fleet_without_models_is_quiet(tmp_path: Path, world: World) -> None:
    empty = Store(msgspec.structs.replace(world.store.settings, url=f"file://{tmp_path}/empty"))
    gateway = Resigner(ModelsSettings(), lambda: empty, fresh_metrics())
    with capture_logs() as logs:
        assert gateway.look()
    assert logs == []
    assert gateway.left_s("timestamp") != gateway.left_s("timestamp")  # NaN


async def test_requests_are_counted_by_route(world: World) -> None:
    gateway = Gateway(world.store)
    async with gateway.client() as client:
        await client.get("/models/metadata/timestamp.json")
    assert isinstance(gateway.files.routes()[0], web.RouteDef)
    assert b'http_requests_total{route="/models/{path}",status="200"} 1.0' in gateway.metrics.exposition()

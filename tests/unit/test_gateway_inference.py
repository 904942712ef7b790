"""Prediction over HTTP where the lake is away, or somebody means harm: no server but aiohttp's, no model.

Mistakes that a test here is for: ready whatever the lake says; a body unpacked before it is measured.
"""

from __future__ import annotations

import asyncio
import json
import tracemalloc
import zlib

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer
from prometheus_client import CollectorRegistry

from gateway.inference import Inference
from gateway.metrics import GatewayMetrics
from gateway.models import ModelCache
from gateway.settings import InferenceSettings
from lake.errors import StoreUnavailableError
from lake.releases import ReleaseBook

MIB = 1024 * 1024


class Register:
    """Releases of a lake that answers, or not."""

    def __init__(self) -> None:
        self.failure: Exception | None = None

    def look(self) -> ReleaseBook:
        if self.failure is not None:
            raise self.failure
        return ReleaseBook()


@pytest.fixture
def register():
    return Register()


@pytest.fixture
def ask(register):
    """Asks a server of its own: status and answer."""
    now_s = [0.0]

    def asked(method: str, path: str, **rest):
        now_s[0] += 60
        metrics = GatewayMetrics(CollectorRegistry())
        cache = ModelCache(lambda: register, 1, MIB, metrics, lambda: now_s[0])
        inference = Inference(InferenceSettings(), cache, metrics)

        async def over_http():
            application = web.Application()
            application.add_routes(inference.routes())
            server = TestServer(application)
            await server.start_server()
            try:
                async with ClientSession() as session, session.request(method, server.make_url(path), **rest) as answer:
                    return answer.status, json.loads(await answer.read())
            finally:
                await server.close()

        return asyncio.run(over_http())

    return asked


def test_a_gateway_is_ready_where_it_can_tell_which_releases_there_are(ask, register):
    assert ask("GET", "/v2/health/ready") == (200, {"ready": True})
    register.failure = StoreUnavailableError("the bucket burns")
    assert ask("GET", "/v2/health/ready") == (503, {"ready": False, "error": "the bucket burns"})
    assert ask("GET", "/v2/health/live") == (200, {"live": True})
    status, refusal = ask("GET", "/v2/models/shaker")
    assert (status, list(refusal)) == (503, ["error"])


def test_a_packed_body_is_refused_by_its_unpacked_size_and_never_held_whole(ask):
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    nothing = bytes(MIB)
    bomb = b"".join(packer.compress(nothing) for _ in range(256)) + packer.flush()
    assert len(bomb) < 2 * MIB
    tracemalloc.start()
    try:
        status, refusal = ask("POST", "/v2/models/shaker/infer", data=bomb, headers={"Content-Encoding": "gzip"})
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (status, "the body has more than 16777216 bytes" in refusal["error"]) == (413, True)
    assert most < 96 * MIB

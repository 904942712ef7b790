"""Servers that tests share. Each is real, and started when the first test asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.servers import BrokerServer, Servers, StoreServer


@pytest.fixture(scope="session")
def shared_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """The servers of the whole session."""
    with Servers(tmp_path_factory.mktemp("servers")) as servers:
        yield servers


@pytest.fixture(scope="session")
def mosquitto(shared_servers: Servers) -> BrokerServer:
    """A mosquitto that tests share: use topics and client ids of your own, and leave it running."""
    return shared_servers.mosquitto()


@pytest.fixture(scope="session")
def iotcore(shared_servers: Servers) -> BrokerServer:
    """An embedded broker that tests share: use topics and client ids of your own, and leave it running.

    A client id must not move between its MQTT 5 and its 3.1.1 port within moments: the broker may then take the end of
    the earlier connection for the end of the later one.
    """
    return shared_servers.iotcore()


@pytest.fixture(scope="session")
def object_store(shared_servers: Servers) -> StoreServer:
    """A SeaweedFS that tests share: use a prefix of your own, and leave it running."""
    return shared_servers.seaweed()


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    """Servers of this test alone, to be killed, frozen and filled."""
    with Servers(tmp_path / "servers") as own:
        yield own


@pytest.fixture(params=["iotcore", "mosquitto"])
def any_broker(request: pytest.FixtureRequest) -> BrokerServer:
    """Each of the shared brokers in turn."""
    broker: BrokerServer = request.getfixturevalue(request.param)
    return broker

"""Real agents, a real broker, and a gateway of a page (`agent_bench`): what an agent keeps through its own death."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.agent_bench import AgentProcess, FakeGateway, agents
from tests.integration.servers import PATIENCE_S, BrokerServer, wait_until

Agents = Callable[..., AgentProcess]
NUMBERS = """
[streams.numbers]
driver = "callable"
options = { function = "numbers_sensor:read", search_path = "." }
sampling = { mode = "interval", rate_hz = 50 }
max_batch_rows = 10
max_batch_age_s = 0.2
[uplink]
ack_timeout_s = 2
reconnect_base_s = 0.1
reconnect_max_s = 0.5
"""
SENSOR = """
import itertools, os
_numbers = itertools.count()

def read():
    return {"n": next(_numbers), "pid": os.getpid()}
"""


@pytest.fixture
def agent_of(tmp_path: Path) -> Iterator[Agents]:
    (tmp_path / "numbers_sensor.py").write_text(SENSOR)
    with agents() as make:

        def numbers(url: str, device: str, config: str = NUMBERS, **options: object) -> AgentProcess:
            config = config.replace('search_path = "."', f'search_path = "{tmp_path}"')
            return make(tmp_path / device, url, device, config, **options)

        yield numbers


def runs(gateway: FakeGateway) -> list[list[int]]:
    """The numbers in the lake, by process of the agent."""
    found: dict[int, list[int]] = {}
    for row in gateway.rows("numbers"):
        found.setdefault(row["pid"], []).append(row["n"])
    return list(found.values())


def test_readings_arrive_once_and_in_order(agent_of: Agents, any_broker: BrokerServer) -> None:
    device = f"steady-{any_broker.name}"
    with FakeGateway(any_broker.url, device) as gateway:
        agent = agent_of(any_broker.url, device)
        agent.start()
        wait_until(lambda: len(gateway.rows("numbers")) >= 100, PATIENCE_S, "100 rows")
        assert agent.terminate() == 0, agent.tail()
        status = gateway.rows("numbers")
        assert [row["n"] for row in status] == list(range(len(status)))
        assert gateway.gaps == []

"""A real agent whose disk fills up while no gateway acknowledges: what it keeps, what it drops, and how it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.agent_bench import FakeGateway, agents
from tests.integration.servers import BrokerServer, wait_until
from tests.integration.small_disks import mounted, unmounted

CONFIG = """
[buffer]
path = "DISK/buffer.db"
[streams.blobs]
driver = "callable"
options = { function = "blob_sensor:read", search_path = "HERE" }
sampling = { mode = "interval", rate_hz = 100 }
max_batch_rows = 5
max_batch_age_s = 0.1
[uplink]
ack_timeout_s = 1
"""
SENSOR = """
import itertools, os

_numbers = itertools.count()

def read():
    return {"n": next(_numbers), "blob": os.urandom(8_000)}
"""


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 8 MiB."""
    where = tmp_path / "small"
    mounted(["-t", "tmpfs", "-o", "size=8m", "tmpfs"], where)
    try:
        yield where
    finally:
        unmounted(where)


def test_a_full_disk_costs_what_memory_cannot_hold_and_takes_readings_again_when_it_is_drained(
    small: Path, tmp_path: Path, mosquitto: BrokerServer
) -> None:
    """Everything accepted arrives once, everything else is counted and told.

    Mutants tried: all that waits in memory stored in one step, for which a full disk has no room, however empty the
    buffer's file is.
    """
    (small / "somebody-elses.log").write_bytes(bytes(4 * 1024 * 1024))
    (tmp_path / "blob_sensor.py").write_text(SENSOR)
    with agents() as make:
        config = CONFIG.replace("HERE", str(tmp_path)).replace("DISK", str(small))
        agent = make(tmp_path / "agent", mosquitto.url, "full", config)
        agent.start()
        full = agent.wait_status(lambda status: status["streams"]["blobs"]["dropped_rows"] > 100, "rows are dropped")
        assert full["buffer"]["unstored_batches"] <= 64
        assert "free space on this disk" in full["buffer"]["unavailable"]
        with FakeGateway(mosquitto.url, "full") as gateway:
            before = full["streams"]["blobs"]["accepted_rows"]
            agent.wait_status(
                lambda status: (
                    not status["buffer"]["unavailable"] and status["streams"]["blobs"]["accepted_rows"] > before + 300
                ),
                "readings are taken again",
            )
            last = agent.wait_status(lambda status: status["buffer"]["batches"] < 20, "drained")
            assert agent.terminate() == 0, agent.tail()
            wait_until(lambda: any(e["kind"] == "agent_stopped" for e in gateway.rows("headwater.events")), 5, "all")
            numbers = [row["n"] for row in gateway.rows("blobs")]
            events = gateway.rows("headwater.events")
    assert len(numbers) == len(set(numbers)) >= last["streams"]["blobs"]["accepted_rows"]
    assert gateway.gaps == []
    dropped = sum(event["rows"] for event in events if event["kind"] == "dropped")
    assert len(numbers) + dropped == max(numbers) + 1
    assert [event["kind"] for event in events].count("buffer_unavailable") >= 1

"""Real agents, a real broker, and a gateway of a page (`agent_bench`): what an agent keeps through its own death."""

from __future__ import annotations

import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from contract import topics
from contract.messages import Presence, Reported, decode
from edge_agent.buffer.connection import PAGE_BYTES
from edge_agent.buffer.port import StreamCaps
from edge_agent.buffer.sqlite import SqliteBuffer
from edge_agent.clock import DeviceClock
from edge_agent.identity import hardware_fingerprint
from edge_agent.offline import BufferUnreadableError, fetch_buffer
from edge_agent.status import AgentNotRunningError, fetch, fetch_metrics
from tests.integration.agent_bench import AgentProcess, FakeGateway, agents
from tests.integration.servers import PATIENCE_S, BrokerServer, MqttClient, Servers, wait_until

Agents = Callable[..., AgentProcess]
NUMBERS = """
[streams.numbers]
driver = "callable"
options = { function = "numbers_sensor:read", search_path = "HERE" }
sampling = { mode = "interval", rate_hz = 200 }
max_batch_rows = 10
max_batch_age_s = 0.2
[uplink]
ack_timeout_s = 2
reconnect_base_s = 0.1
reconnect_max_s = 0.5
"""
SENSOR = """
import itertools, os, pathlib

_numbers = itertools.count()
_file = pathlib.Path(__file__).with_name(f"read-{os.getpid()}").open("ab", buffering=0)

def read():
    _file.write(b".")
    return {"n": next(_numbers), "pid": os.getpid()}
"""


@pytest.fixture
def agent_of(tmp_path: Path) -> Iterator[Agents]:
    (tmp_path / "numbers_sensor.py").write_text(SENSOR)
    with agents() as make:

        def numbers(url: str, device: str, config: str = NUMBERS, **options: object) -> AgentProcess:
            return make(tmp_path / device, url, device, config.replace("HERE", str(tmp_path)), **options)

        yield numbers


def last_read(tmp_path: Path, pid: int) -> int:
    """The last number that the sensor of a process gave."""
    return (tmp_path / f"read-{pid}").stat().st_size - 1


def at_least(gateway: FakeGateway, rows: int) -> bool:
    return len(gateway.rows("numbers")) >= rows


def numbers_of(gateway: FakeGateway, pid: int) -> list[int]:
    return [row["n"] for row in gateway.rows("numbers") if row["pid"] == pid]


def test_what_the_buffer_accepted_survives_sigkill_and_arrives_once(
    agent_of: Agents, any_broker: BrokerServer, tmp_path: Path
) -> None:
    """Each process counts from 0; what it lost at its death can only be a tail, never a row in between.

    Mutants tried: the sampler's rows stored after they are sent (a hole per kill); sent batches deleted.
    """
    device = f"killed-{any_broker.name}"
    with FakeGateway(any_broker.url, device) as gateway:
        agent = agent_of(any_broker.url, device)
        pids = []
        for kills in range(5):
            agent.start()
            pids.append(agent.pid)
            if kills % 2:
                gateway.committing.clear()
            agent.wait_status(lambda status: status["streams"]["numbers"]["accepted_rows"] >= 30, "accepted rows")
            agent.kill()
            gateway.committing.set()
        agent.start()
        pids.append(agent.pid)
        wait_until(lambda: len(numbers_of(gateway, pids[-1])) >= 30, PATIENCE_S, "rows of the last process")
        assert agent.terminate() == 0, agent.tail()
        for pid in pids:
            found = numbers_of(gateway, pid)
            assert found == list(range(len(found)))
            assert len(found) >= 30
        assert numbers_of(gateway, pids[-1])[-1] == last_read(tmp_path, pids[-1])
        assert gateway.gaps == []


def test_sigterm_stores_and_sends_everything_that_was_read_and_says_goodbye(
    agent_of: Agents, mosquitto: BrokerServer, tmp_path: Path
) -> None:
    """Mutants tried: the uplink drained before the recorder has stored; samplers stopped last."""
    with FakeGateway(mosquitto.url, "drained") as gateway:
        agent = agent_of(mosquitto.url, "drained")
        agent.start()
        wait_until(lambda: len(gateway.rows("numbers")) >= 20, PATIENCE_S, "rows")
        gateway.committing.clear()
        wait_until(lambda: last_read(tmp_path, agent.pid) > len(gateway.rows("numbers")) + 20, PATIENCE_S, "a backlog")
        agent.signal(signal.SIGTERM)
        gateway.committing.set()
        assert agent.wait() == 0, agent.tail()
        assert numbers_of(gateway, agent.pid) == list(range(last_read(tmp_path, agent.pid) + 1))
        wait_until(lambda: gateway.presences[-1].reason == "stopped", PATIENCE_S, "the goodbye")
        assert [event["detail"]["synced"] for event in gateway.events("agent_stopped")] in ([True], [False])
        assert gateway.gaps == []


def test_an_agent_that_is_stopped_without_a_gateway_keeps_what_it_holds_for_the_next_start(
    agent_of: Agents, mosquitto: BrokerServer, tmp_path: Path
) -> None:
    with FakeGateway(mosquitto.url, "kept") as gateway:
        gateway.committing.clear()
        agent = agent_of(mosquitto.url, "kept", NUMBERS + "drain_timeout_s = 0.5\n")
        agent.start()
        agent.wait_status(lambda status: status["buffer"]["rows"] >= 30, "rows in the buffer")
        first = agent.pid
        assert agent.terminate() == 0, agent.tail()
        gateway.committing.set()
        agent.start()
        wait_until(lambda: numbers_of(gateway, agent.pid), PATIENCE_S, "rows of the second process")
        assert agent.terminate() == 0, agent.tail()
        assert numbers_of(gateway, first) == list(range(last_read(tmp_path, first) + 1))
        assert gateway.gaps == []


def test_a_killed_broker_costs_time_and_no_rows(agent_of: Agents, servers: Servers, tmp_path: Path) -> None:
    broker = servers.mosquitto()
    with FakeGateway(broker.url, "patient") as gateway:
        agent = agent_of(broker.url, "patient")
        agent.start()
        for rows in (20, 80, 140):
            wait_until(partial(at_least, gateway, rows), PATIENCE_S, f"{rows} rows")
            broker.kill()
            gateway.restart()
        wait_until(lambda: len(gateway.rows("numbers")) >= 200, PATIENCE_S, "200 rows")
        assert agent.status()["uplink"]["last_loss"]
        assert agent.terminate() == 0, agent.tail()
        # What the broker took with it is sent again after a timeout, perhaps only by the next process.
        first, expected = agent.pid, list(range(last_read(tmp_path, agent.pid) + 1))
        agent.start()
        wait_until(lambda: len(gateway.rows("numbers")) > len(expected), PATIENCE_S, "rows of the next process")
        assert numbers_of(gateway, first) == expected
        assert gateway.gaps == []


def test_desired_configuration_is_applied_kept_across_restarts_and_refused_whole_when_bad(
    agent_of: Agents, mosquitto: BrokerServer
) -> None:
    with FakeGateway(mosquitto.url, "remote") as gateway:

        def reported(good: Callable[[Reported], bool], what: str) -> None:
            wait_until(
                lambda: gateway.reports and good(gateway.reports[-1]), PATIENCE_S, f"{what}: {gateway.reports[-1:]}"
            )

        agent = agent_of(mosquitto.url, "remote")
        agent.start()
        reported(lambda last: last.revision == 0 and last.streams["numbers"].rate_hz == 200, "its own file")
        gateway.desire(3, numbers={"rate_hz": 20.0, "max_batch_rows": 3})
        reported(lambda last: last.revision == 3 and last.streams["numbers"].rate_hz == 20, "applied")
        wait_until(lambda: gateway.lake[gateway.sent[-1]].num_rows <= 3, PATIENCE_S, "batches of 3 rows")

        gateway.desire(4, numbers={"rate_hz": 1e9, "max_batch_rows": 7}, nothing={})
        reported(lambda last: last.refused is not None and last.refused.revision == 4, "refused")
        last = gateway.reports[-1]
        assert (last.revision, last.streams["numbers"].max_batch_rows) == (3, 3)
        assert last.refused is not None
        assert "rate_hz = 1000000000 is outside" in last.refused.reason

        # Events wait for their batch in memory; what a kill may take is not the point here.
        wait_until(lambda: gateway.events("config_applied"), PATIENCE_S, "told as an event")
        # The broker has the bad document only; what is in force comes from the device's own disk.
        agent.kill()
        gateway.reports.clear()
        agent.start()
        reported(lambda last: last.revision == 3 and last.streams["numbers"].rate_hz == 20, "in force after a restart")
        reported(lambda last: last.refused is not None and last.refused.revision == 4, "still refused")

        gateway.desire(5, numbers={"enabled": False})
        reported(lambda last: last.revision == 5 and not last.streams["numbers"].enabled, "switched off")
        assert gateway.reports[-1].streams["numbers"].rate_hz == 200
        assert gateway.reports[-1].refused is None
        agent.wait_status(lambda status: status["streams"]["numbers"]["state"] == "disabled", "the sampler rests")
        assert agent.terminate() == 0, agent.tail()
        assert [event["detail"]["revision"] for event in gateway.events("config_applied")] == [3, 5]
        assert {event["detail"]["revision"] for event in gateway.events("config_refused")} == {4}


def test_a_desired_document_that_no_longer_fits_the_devices_own_file_is_refused_at_the_start(
    agent_of: Agents, mosquitto: BrokerServer
) -> None:
    with FakeGateway(mosquitto.url, "changed") as gateway:
        agent = agent_of(mosquitto.url, "changed")
        agent.start()
        gateway.desire(1, numbers={"max_batch_rows": 5})
        agent.wait_status(lambda status: status["revision"] == 1, "applied")
        agent.kill()
        toml = agent.folder / "agent.toml"
        toml.write_text(toml.read_text().replace("streams.numbers", "streams.renamed"))
        agent.start()
        status = agent.wait_status(lambda status: status["refused"], "refused")
        assert (status["revision"], status["refused"]["revision"]) == (0, 1)
        assert "no stream 'numbers'" in status["refused"]["reason"]
        assert status["streams"]["renamed"]["max_batch_rows"] == 10


def test_what_the_retained_ack_covers_is_not_sent_again_after_a_start(
    agent_of: Agents, mosquitto: BrokerServer
) -> None:
    with FakeGateway(mosquitto.url, "informed") as gateway:
        gateway.committing.clear()
        agent = agent_of(mosquitto.url, "informed")
        agent.start()
        wait_until(lambda: len([key for key in gateway.sent if key[0] == "numbers"]) >= 6, PATIENCE_S, "batches")
        agent.kill()
        _, epoch, _ = next(key for key in gateway.sent if key[0] == "numbers")
        gateway.acknowledge("numbers", epoch, 4)
        gateway.sent.clear()
        agent.start()
        first = wait_until(
            lambda: next((key for key in gateway.sent if key[0] == "numbers"), None), PATIENCE_S, "the first batch"
        )
        assert first == ("numbers", epoch, 5)


@pytest.mark.parametrize("broker_remembers", [True, False])
def test_a_restored_card_image_loses_and_doubles_nothing(
    agent_of: Agents, mosquitto: BrokerServer, tmp_path: Path, broker_remembers: bool
) -> None:
    """The buffer goes back in time: its next batches would have numbers that the lake has already.

    Mutants tried: the ack believed although the buffer cannot know of it (the batches of the last process vanish).
    """
    device = f"restored-{broker_remembers}".lower()
    with FakeGateway(mosquitto.url, device) as gateway:
        agent = agent_of(mosquitto.url, device)
        agent.start()
        wait_until(lambda: len(gateway.rows("numbers")) >= 20, PATIENCE_S, "rows before the image")
        agent.kill()
        image = tmp_path / "image"
        shutil.copytree(agent.folder, image, ignore=shutil.ignore_patterns("*.sock"))
        pids = [agent.pid]
        agent.start()
        pids.append(agent.pid)
        wait_until(lambda: len(numbers_of(gateway, pids[-1])) >= 50, PATIENCE_S, "rows after the image")
        agent.kill()
        shutil.rmtree(agent.folder)
        shutil.copytree(image, agent.folder)
        if not broker_remembers:
            gateway.forget_acks()
        agent.start()
        pids.append(agent.pid)
        wait_until(lambda: len(numbers_of(gateway, pids[-1])) >= 50, PATIENCE_S, "rows of the restored agent")
        assert agent.terminate() == 0, agent.tail()
        for pid in pids:
            found = numbers_of(gateway, pid)
            assert found == list(range(len(found)))
        assert len(numbers_of(gateway, pids[-1])) == last_read(tmp_path, pids[-1]) + 1
        assert len(gateway.epochs("numbers")) == 2
        assert gateway.gaps == []
        kinds = [event["kind"] for kind in ("buffer_restored", "epoch_opened") for event in gateway.events(kind)]
        assert kinds


HASTE = """
import edge_agent.uplink
from numbers_sensor import read

edge_agent.uplink.TAKEN_OVER_S = 0.5
"""


def test_a_second_device_of_the_same_name_is_reported_and_mixes_nothing_up(
    agent_of: Agents, any_broker: BrokerServer, tmp_path: Path
) -> None:
    device = f"p-twin-{any_broker.name}"
    (tmp_path / "haste.py").write_text(HASTE)
    config = NUMBERS.replace("HERE", str(tmp_path)).replace("numbers_sensor:", "haste:")
    with FakeGateway(any_broker.url, device) as gateway:
        first = agent_of(any_broker.url, device, config)
        second = AgentProcess(tmp_path / "other", any_broker.url, device, config)
        try:
            first.start()
            wait_until(lambda: numbers_of(gateway, first.pid), PATIENCE_S, "rows of the first")
            second.start()
            wait_until(lambda: gateway.events("taken_over"), PATIENCE_S, f"noticed; {first.tail()}")
            wait_until(lambda: numbers_of(gateway, second.pid), PATIENCE_S, "rows of the second")
            for agent in (first, second):
                agent.terminate()
            for agent in (first, second):
                found = numbers_of(gateway, agent.pid)
                assert found == list(range(len(found)))
            assert len(gateway.epochs("numbers")) == 2
            assert gateway.gaps == []
        finally:
            second.end()


def test_a_restart_is_not_taken_for_a_second_device(agent_of: Agents, any_broker: BrokerServer) -> None:
    """Mutants tried: the own status subscribed to last (its retained presence arrives when all else is ready)."""
    device = f"alone-{any_broker.name}"
    with FakeGateway(any_broker.url, device) as gateway:
        agent = agent_of(any_broker.url, device)
        for end in (agent.kill, agent.kill, agent.terminate):
            agent.start()
            wait_until(lambda: numbers_of(gateway, agent.pid), PATIENCE_S, "rows")
            end()
        assert len(gateway.events("agent_started")) == 3
        assert gateway.events("taken_over") == []


def test_the_last_will_tells_that_a_killed_agent_is_gone(agent_of: Agents, mosquitto: BrokerServer) -> None:
    with FakeGateway(mosquitto.url, "p-mortal") as gateway:
        agent = agent_of(mosquitto.url, "p-mortal")
        agent.start()
        wait_until(lambda: gateway.presences, PATIENCE_S, "presence")
        assert (gateway.presences[-1].online, gateway.presences[-1].reason) == (True, "started")
        agent.kill()
        wait_until(lambda: gateway.presences[-1].reason == "lost", PATIENCE_S, "the will")
        with MqttClient(mosquitto.url, "late") as late:
            late.subscribe(topics.status("p-mortal"))
            retained = late.receive()
            assert retained.retain
            assert not decode(bytes(retained.payload), Presence).online


def test_systemd_hears_ready_alive_and_stopping(agent_of: Agents, mosquitto: BrokerServer, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        address = f"\0headwater-{tmp_path.name}-notify"
        manager.bind(address)
        manager.settimeout(PATIENCE_S)
        environment = {"NOTIFY_SOCKET": "@" + address[1:], "WATCHDOG_USEC": "400000"}
        agent = agent_of(mosquitto.url, "notified", NUMBERS + "drain_timeout_s = 0.1\n", environment=environment)
        agent.start()
        heard = [manager.recv(4096)]
        while heard.count(b"WATCHDOG=1") < 3:
            heard.append(manager.recv(4096))
        assert heard[0] == b"READY=1"
        assert any(line.startswith(b"STATUS=") for line in heard)
        agent.signal(signal.SIGTERM)
        while heard[-1] != b"STOPPING=1":
            heard.append(manager.recv(4096))
        assert agent.wait() == 0


def test_systemd_hears_that_a_damaged_buffer_takes_its_time(
    agent_of: Agents, mosquitto: BrokerServer, tmp_path: Path
) -> None:
    """Ended by TimeoutStartSec in the middle, saving it would begin again for ever."""
    agent = agent_of(mosquitto.url, "patient", NUMBERS, environment={"NOTIFY_SOCKET": str(tmp_path / "n")})
    path = agent.buffer
    clock = DeviceClock("ab" * 16, lambda: True)
    caps = StreamCaps(bytes_max=1 << 20, age_max_s=1e9)
    buffer = SqliteBuffer(path, {}, 1 << 20, clock.read, hardware_fingerprint(), default_caps=caps)
    for number in range(200):
        buffer.append("old", bytes([number]) * 700, 1, clock.read())
    buffer.close()
    content = bytearray(path.read_bytes())
    interior = next(at for at in range(4 * PAGE_BYTES, len(content), PAGE_BYTES) if content[at] == 5)
    content[interior : interior + 40] = bytes([0x77]) * 40
    path.write_bytes(content)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "n"))
        manager.settimeout(PATIENCE_S)
        agent.start()
        heard = [manager.recv(4096)]
        while heard[-1] != b"READY=1":
            heard.append(manager.recv(4096))
        assert heard == [b"EXTEND_TIMEOUT_USEC=60000000", b"READY=1"]
        assert fetch(agent.socket, "status")["buffer"]["opened"] == "corrupt_replaced"


HANG = """
import threading
import numbers_sensor
import edge_agent.supervisor
import edge_agent.uplink

edge_agent.supervisor.STALL_S = 0.5
_calls = 0

def read():
    global _calls
    _calls += 1
    if _calls == 20:
        edge_agent.uplink.Uplink._round = lambda self: threading.Event().wait()
    return numbers_sensor.read()
"""
DEATH = """
import numbers_sensor
import edge_agent.recorder
import edge_agent.uplink

_calls = 0

def _die(self):
    raise RuntimeError("a mistake")

def read():
    global _calls
    _calls += 1
    if _calls == 20:
        edge_agent.{module}.{kind}._round = _die
    return numbers_sensor.read()
"""


def test_the_watchdog_is_not_fed_while_a_thread_hangs(
    agent_of: Agents, mosquitto: BrokerServer, tmp_path: Path
) -> None:
    """systemd then restarts the agent. Mutants tried: the watchdog fed by every round of the main thread."""
    (tmp_path / "hanging.py").write_text(HANG)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "n"))
        manager.settimeout(PATIENCE_S)
        environment = {"NOTIFY_SOCKET": str(tmp_path / "n"), "WATCHDOG_USEC": "200000"}
        agent = agent_of(
            mosquitto.url, "hanging", NUMBERS.replace("numbers_sensor:", "hanging:"), environment=environment
        )
        agent.start()
        wait_until(lambda: "thread_hangs" in agent.tail(), PATIENCE_S, f"noticed; {agent.tail()}")
        manager.settimeout(1.0)
        heard: list[bytes] = []
        with pytest.raises(TimeoutError):
            while len(heard) < 1_000:
                heard.append(manager.recv(4096))
        assert heard.count(b"WATCHDOG=1") >= 1


@pytest.mark.parametrize(("module", "kind"), [("recorder", "Recorder"), ("uplink", "Uplink")])
def test_a_thread_that_dies_ends_the_process_with_the_reason_and_a_restart_goes_on(
    agent_of: Agents, mosquitto: BrokerServer, tmp_path: Path, module: str, kind: str
) -> None:
    """Mutants tried: deaths of threads not looked for."""
    (tmp_path / f"dying_{module}.py").write_text(DEATH.format(module=module, kind=kind))
    device = f"dying-{module}"
    with FakeGateway(mosquitto.url, device) as gateway:
        agent = agent_of(mosquitto.url, device, NUMBERS.replace("numbers_sensor:", f"dying_{module}:"))
        agent.start()
        first = agent.pid
        assert agent.wait() == 1, agent.tail()
        assert "RuntimeError: a mistake" in agent.tail()
        assert f"thread={module}" in agent.tail()
        wait_until(lambda: gateway.presences[-1].online is False, PATIENCE_S, "told to be gone")
        toml = agent.folder / "agent.toml"
        toml.write_text(toml.read_text().replace(f"dying_{module}:", "numbers_sensor:"))
        agent.start()
        wait_until(lambda: numbers_of(gateway, agent.pid), PATIENCE_S, "rows of the second process")
        found = numbers_of(gateway, first)
        assert found == list(range(len(found)))
        assert gateway.gaps == []


def test_the_status_socket_tells_how_the_agent_is(agent_of: Agents, mosquitto: BrokerServer) -> None:
    with FakeGateway(mosquitto.url, "open") as gateway:
        gateway.committing.clear()
        agent = agent_of(mosquitto.url, "open")
        agent.start()
        status = agent.wait_status(
            lambda status: status["uplink"]["window_batches"] and status["buffer"]["rows"] >= 20, "a full window"
        )
        assert status["device"] == "open"
        assert status["uplink"]["connected"]
        assert status["buffer"]["opened"] == "new"
        stream = status["streams"]["numbers"]
        assert (stream["state"], stream["rate_hz"], stream["enabled"]) == ("running", 200.0, True)
        assert stream["readings"] >= stream["accepted_rows"] >= stream["waiting_rows"] >= 20
        lane = next(lane for lane in fetch(agent.socket, "buffer") if lane["stream"] == "numbers")
        assert (lane["live"], lane["first_seq"]) == (True, 1)
        text = fetch_metrics(agent.socket)
        for line in ('headwater_agent_rows_total{stream="numbers"}', "headwater_agent_connected 1.0"):
            assert line in text
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert float(values["headwater_agent_storage_written_bytes"]) > 4096.0
        assert float(values["headwater_agent_resident_bytes"]) > 1e7
        gateway.committing.set()
        wait_until(
            lambda: "headwater_agent_ack_seconds_count 0.0" not in fetch_metrics(agent.socket), PATIENCE_S, "acks"
        )


def test_two_agents_cannot_share_a_buffer(agent_of: Agents, mosquitto: BrokerServer) -> None:
    agent = agent_of(mosquitto.url, "shared")
    agent.start()
    agent.wait_status(lambda status: status["buffer"]["rows"], "running")
    other = AgentProcess(agent.folder, mosquitto.url, "shared")
    other.start()
    assert other.wait() == 2
    assert "error: " in other.tail()
    assert agent.status()["device"] == "shared"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("[streams.s]\ndriver = 'thermometer'\n", "[streams.s] there is no sensor driver 'thermometer'"),
        ("[streams.s]\ndriver = 'host'\noptions = { disc = '/' }\n", "[streams.s] driver 'host' has no option 'disc'"),
        ("[status]\nsocket = 'agent.toml'\n", "exists and is not a socket"),
        ("[metrics]\nlisten = '203.0.113.1:1'\n", "[metrics] listen"),
        ("[uplink]\nwindow = 5\n", "[uplink] window = 5 is an unknown key"),
    ],
)
def test_a_wrong_configuration_ends_the_start_with_the_remedy(
    agent_of: Agents, mosquitto: BrokerServer, config: str, says: str
) -> None:
    agent = agent_of(mosquitto.url, "wrong", config)
    agent.start()
    assert agent.wait() == 2, agent.tail()
    assert says in agent.tail()


def test_what_waits_in_a_killed_agent_can_be_looked_at_without_it(agent_of: Agents, mosquitto: BrokerServer) -> None:
    agent = agent_of(mosquitto.url, "p-dead")
    agent.start()
    agent.wait_status(lambda status: status["buffer"]["rows"] >= 20, "rows")
    asked = {lane["epoch"]: lane for lane in fetch_buffer(agent.socket, agent.buffer)}
    agent.kill()
    with pytest.raises(AgentNotRunningError):
        fetch_buffer(agent.socket)
    files = {path.name: path.read_bytes() for path in agent.folder.glob("buffer.db*") if path.name != "buffer.db-shm"}
    found = {lane["epoch"]: lane for lane in fetch_buffer(agent.socket, agent.buffer)}
    assert found.keys() >= asked.keys()
    numbers = next(lane for lane in found.values() if lane["stream"] == "numbers")
    assert numbers["rows"] >= 20
    assert numbers["last_seq"] - numbers["first_seq"] + 1 == numbers["batches"]
    assert {name: (agent.folder / name).read_bytes() for name in files} == files
    with pytest.raises(BufferUnreadableError, match="cannot be read"):
        fetch_buffer(agent.socket, agent.folder / "nothing.db")
    agent.start()
    status = agent.wait_status(lambda status: status["buffer"]["rows"] >= numbers["rows"], "the agent goes on with it")
    assert status["buffer"]["opened"] == "resumed"

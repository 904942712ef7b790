"""What the agent's tests share: a gateway of a page, a lake in memory, and agents as real processes."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import msgspec
import pyarrow as pa

from contract import topics
from contract.codec import decode_body, unseal
from contract.errors import TemporaryError
from contract.limits import DEFAULT_LIMITS
from contract.messages import Ack, Desired, Presence, Reported, Rewind, Watermark, decode, encode
from edge_agent.status import fetch_status
from tests.integration.servers import PATIENCE_S, MqttClient, wait_until

ROOT = Path(__file__).parents[2]


class FakeGateway:
    """Keeps the contract for one device: admits in order, commits at once into a dictionary, acknowledges.

    Attributes:
        lake: (stream, epoch, seq) to rows; survives `restart`, as a lake does.
        committing: clear it, and nothing is committed or acknowledged.
    """

    def __init__(self, url: str, device: str) -> None:
        self.device = device
        self.lake: dict[tuple[str, str, int], pa.RecordBatch] = {}
        self.sent: list[tuple[str, str, int]] = []
        """Every batch that arrived, in the order of arrival, repeated ones too."""
        self.repeated: list[tuple[str, str, int]] = []
        self.gaps: list[tuple[str, str, int]] = []
        self.presences: list[Presence] = []
        self.reports: list[Reported] = []
        self.faults: list[BaseException] = []
        self.committing = threading.Event()
        self.committing.set()
        self._committed: dict[tuple[str, str], int] = {}
        self._url = url
        self._connect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(PATIENCE_S)
        self._client.close()
        assert not self.faults, self.faults

    def restart(self, url: str | None = None) -> None:
        """Connect again, as after the broker was killed; what is committed stays."""
        self._stop.set()
        self._thread.join(PATIENCE_S)
        self._client.close()
        self._url = url or self._url
        self._connect()

    def desire(self, revision: int, **streams: Mapping[str, Any]) -> None:
        """Publish a desired document, retained."""
        self.desire_bytes(encode(msgspec.convert({"revision": revision, "streams": streams}, Desired)))

    def desire_bytes(self, payload: bytes) -> None:
        self._client.publish(topics.desired(self.device), payload, retain=True)

    def acknowledge(self, stream: str, epoch: str, seq: int) -> None:
        """Publish one ack, retained, whatever is committed."""
        self._client.publish(
            topics.ack(self.device), encode(Ack(committed=(Watermark(stream, epoch, seq),))), retain=True
        )

    def forget_acks(self) -> None:
        """Clear what the broker retains of them, as a broker that lost its state."""
        self._client.publish(topics.ack(self.device), b"", retain=True)

    def rows(self, stream: str) -> list[dict[str, Any]]:
        """All rows of a stream, by epoch in order of arrival, then by seq."""
        epochs = list(dict.fromkeys(epoch for name, epoch, _ in self.sent if name == stream))
        keys = sorted((key for key in self.lake if key[0] == stream), key=lambda key: (epochs.index(key[1]), key[2]))
        return [row for key in keys for row in self.lake[key].to_pylist()]

    def epochs(self, stream: str) -> list[str]:
        return list(dict.fromkeys(epoch for name, epoch, _ in self.lake if name == stream))

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Rows of the events stream of this kind, `detail` decoded."""
        found = [row for row in self.rows("headwater.events") if row["kind"] == kind]
        return [row | {"detail": msgspec.json.decode(row["detail"])} for row in found]

    def _connect(self) -> None:
        self._stop = threading.Event()
        self._client = MqttClient(self._url, f"gateway-{self.device}")
        for topic in (f"{topics.ROOT}/up/+/{self.device}/+", topics.status(self.device), topics.reported(self.device)):
            self._client.subscribe(topic)
        self._thread = threading.Thread(target=self._run, args=(self._client, self._stop), daemon=True)
        self._thread.start()

    def _run(self, client: MqttClient, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                message = client.messages.get(timeout=0.05)
            except queue.Empty:
                continue
            payload = bytes(message.payload)
            try:
                if message.topic == topics.status(self.device):
                    self.presences.append(decode(payload, Presence))
                elif message.topic == topics.reported(self.device):
                    self.reports.append(decode(payload, Reported))
                else:
                    self._take(client, message.topic, payload)
            except BaseException as error:  # noqa: BLE001 - the test fails with it at the end
                self.faults.append(error)

    def _take(self, client: MqttClient, topic: str, payload: bytes) -> None:
        name = topics.parse_up(topic)
        envelope, body = unseal(payload)
        assert (name.device, name.stream) == (envelope.device, envelope.stream)
        lane, key = (envelope.stream, envelope.epoch), (envelope.stream, envelope.epoch, envelope.seq)
        rows = decode_body(body, envelope, DEFAULT_LIMITS)
        self.sent.append(key)
        if not self.committing.is_set():
            return
        committed = self._committed.get(lane, 0)
        if envelope.seq <= committed:
            if not self.lake[key].equals(rows):
                self.faults.append(AssertionError(f"{key} was sent with other rows before"))
            self.repeated.append(key)
        elif envelope.seq == committed + 1 or envelope.seq == envelope.floor:
            self.gaps += [(*lane, seq) for seq in range(committed + 1, envelope.seq)]
            self.lake[key] = rows
            self._committed[lane] = envelope.seq
        else:
            rewind = Rewind(stream=envelope.stream, epoch=envelope.epoch, expected=committed + 1)
            client.client.publish(topics.rewind(self.device), encode(rewind), qos=0)
            return
        marks = tuple(Watermark(stream, epoch, seq) for (stream, epoch), seq in self._committed.items())
        client.client.publish(topics.ack(self.device), encode(Ack(committed=marks)), qos=1, retain=True)


class AgentProcess:
    """One agent as a process, with its folder.

    Args:
        folder: of `agent.toml`, the buffer and the socket.
        url: the broker.
        device: its name.
        config: further TOML.
        environment: further variables.
    """

    def __init__(
        self, folder: Path, url: str, device: str, config: str = "", environment: Mapping[str, str] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.device = folder, device
        self.log = folder / "agent.log"
        self.buffer = folder / "buffer.db"
        self.socket = folder / "agent.sock"
        self._environment = {**os.environ, **(environment or {})}
        self.configure(url, config)
        self.process: subprocess.Popen[bytes] | None = None

    def configure(self, url: str, config: str) -> None:
        head = f'device = "{self.device}"\n[broker]\nurl = "{url}"\n[log]\nlevel = "debug"\n'
        (self.folder / "agent.toml").write_text(head + config)

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "edge_agent", "--config", str(self.folder / "agent.toml")],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
            )

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Its exit code."""
        assert self.process is not None
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the agent still runs after {timeout_s:g} s:\n{self.tail()}") from None

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def terminate(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait()

    def status(self) -> dict[str, Any]:
        """The answer of its status socket; empty while nobody answers."""
        try:
            return fetch_status(self.socket)
        except TemporaryError:
            return {}

    def wait_status(self, good: Callable[[dict[str, Any]], object], what: str) -> dict[str, Any]:
        def asked() -> dict[str, Any] | None:
            assert self.process is None or self.process.poll() is None, f"the agent ended:\n{self.tail()}"
            answer = self.status()
            return answer if answer and good(answer) else None

        found: dict[str, Any] = wait_until(asked, PATIENCE_S, f"{what}; {self.status()}\n{self.tail()}")
        return found

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4_000:] if self.log.exists() else ""

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE_S)


@contextmanager
def agents() -> Iterator[Callable[..., AgentProcess]]:
    """Makes agents, and ends those that still run."""
    made: list[AgentProcess] = []

    def make(*arguments: Any, **options: Any) -> AgentProcess:
        made.append(AgentProcess(*arguments, **options))
        return made[-1]

    try:
        yield make
    finally:
        for agent in made:
            agent.end()

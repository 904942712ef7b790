"""Real gateway processes, light devices that keep the protocol, and the books: the lake against what was accepted."""

from __future__ import annotations

import http.client
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError

from contract import topics
from contract.batches import Clock, Envelope
from contract.codec import encode_body, seal
from contract.messages import Ack, Rewind, decode
from edge_agent.buffer.memory import MemoryBuffer
from edge_agent.buffer.port import StreamCaps
from edge_agent.sender import Sender, SenderSettings
from headwater.stack import launch
from headwater.stack.objectstore import StoreAccess
from tests.integration.servers import PATIENCE_S, MqttClient, wait_until

ROOT = Path(__file__).parents[2]
STREAM = "vibration"
BOOT = "cd" * 16


START_S = 2 * PATIENCE_S
"""Importing everything takes two seconds of CPU, and a machine that runs other tests may give it a tenth of a core."""


class GatewayProcess:
    """One gateway in its own process, configured by a real gateway.toml; a context manager that kills it.

    Args:
        folder: for its file and log.
        broker: URL.
        lake: the table `[lake]`.
        environ: more environment.
        wait: whether a start waits until it is ready.
        program: what the process runs.
        settings: further top-level keys and tables.
    """

    def __init__(
        self,
        folder: Path,
        broker: str,
        lake: Mapping[str, Any],
        *,
        name: str = "gateway",
        environ: Mapping[str, str] | None = None,
        wait: bool = True,
        program: str = "import sys; from gateway.__main__ import main; sys.exit(main())",
        **settings: Any,
    ) -> None:
        self.folder = folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        tables: dict[str, Any] = {
            "flush_interval_s": 0.2,
            "unready_after_s": 1.0,
            **settings,
            "broker": {"url": broker, "reconnect_base_s": 0.05, "reconnect_max_s": 0.5, **settings.get("broker", {})},
            "lake": dict(lake),
            "http": {"port": 0, **settings.get("http", {})},
            "registry": {"write_interval_s": 0.2, "refresh_interval_s": 1.0, **settings.get("registry", {})},
            "log": {"format": "json"},
        }
        self.config = self.folder / "gateway.toml"
        self.config.write_text(_toml(tables))
        self.log = self.folder / "gateway.log"
        self._environ = {**os.environ, **(environ or {})}
        self._wait, self._program = wait, program
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            # Left alive it would listen to the broker of later tests, and take their batches into a lake of its own.
            self.kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, and wait until it listens, or until it is ready."""
        seen = len(self.events("http_listening"))
        with self.log.open("ab") as log:
            # `launch` binds it to the life of this process: a test run that is killed leaves nothing behind.
            bound = (sys.executable, "-I", "-S", launch.__file__, str(os.getpid()), "0")
            argv = (*bound, sys.executable, "-c", self._program, "--config", str(self.config))
            self._process = subprocess.Popen(argv, cwd=ROOT, env=self._environ, stdout=log, stderr=log)
        listening = wait_until(
            lambda: self.events("http_listening")[seen:] or self._process.poll() is not None, START_S, "it listens"
        )
        assert isinstance(listening, list), self.log.read_text()
        self.port = listening[-1]["port"]
        if self._wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        wait_until(lambda: self.get("/readyz")[0] == 200, START_S, f"ready: {self.get('/readyz')}")
        wait_until(lambda: self.get("/v1/devices?limit=1")[0] == 200, PATIENCE_S, "the register is read")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def freeze(self) -> None:
        """SIGSTOP, and wait until the kernel says that it is stopped."""
        self.signal(signal.SIGSTOP)
        stat = Path(f"/proc/{self.pid}/stat")
        wait_until(lambda: stat.read_text().rsplit(")", 1)[1].split()[0] == "T", PATIENCE_S, "it is stopped")

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait_exit()

    def wait_exit(self) -> int:
        assert self._process is not None
        return self._process.wait(PATIENCE_S)

    def request(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes, Mapping[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()})
            response = connection.getresponse()
            return response.status, response.read(), dict(response.getheaders())
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, Any]:
        try:
            status, body, _ = self.request("GET", path)
        except OSError:
            return 0, None
        return status, json.loads(body)

    def put(self, path: str, document: Any) -> tuple[int, Any]:
        status, body, _ = self.request("PUT", path, json.dumps(document).encode(), Content_Type="application/json")
        return status, json.loads(body)

    def metrics(self) -> dict[str, float]:
        """Every sample by its name, labels included, without the prefix."""
        _, body, _ = self.request("GET", "/metrics")
        lines = [line for line in body.decode().splitlines() if line and not line.startswith("#")]
        return {
            name.removeprefix("headwater_gateway_"): float(number)
            for name, _, number in (line.rpartition(" ") for line in lines)
        }

    def metric(self, name: str) -> float:
        return self.metrics().get(name, 0.0)

    def events(self, name: str) -> list[dict[str, Any]]:
        """Log lines of one event."""
        if not self.log.exists():
            return []
        lines = self.log.read_text().splitlines()
        found = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return [line for line in found if line.get("event") == name]


def _toml(table: Mapping[str, Any], prefix: str = "") -> str:
    plain = [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, Mapping)]
    for key, value in table.items():
        if isinstance(value, Mapping):
            plain += ["", f"[{prefix}{key}]", _toml(value, f"{prefix}{key}.")]
    return "\n".join(plain)


def s3_lake(access: StoreAccess, prefix: str, *, endpoint: str | None = None, **more: Any) -> dict[str, Any]:
    """The table `[lake]` for a store; keys go through the environment (`s3_environ`)."""
    return {
        "url": f"s3://{access.bucket}/{prefix}",
        "endpoint": endpoint or access.endpoint,
        "region": access.region,
        "allow_http": True,
        **more,
    }


def s3_environ(access: StoreAccess) -> dict[str, str]:
    return {"AWS_ACCESS_KEY_ID": access.key, "AWS_SECRET_ACCESS_KEY": access.secret}


class Lake(NamedTuple):
    """A lake as a reader without Headwater sees it."""

    root: str
    options: dict[str, str]

    @classmethod
    def local(cls, folder: Path) -> Lake:
        return cls(str(folder), {})

    @classmethod
    def s3(cls, access: StoreAccess, prefix: str) -> Lake:
        return cls(
            f"s3://{access.bucket}/{prefix}",
            {
                "AWS_ENDPOINT_URL": access.endpoint,
                "AWS_ACCESS_KEY_ID": access.key,
                "AWS_SECRET_ACCESS_KEY": access.secret,
                "AWS_REGION": access.region,
                "AWS_ALLOW_HTTP": "true",
            },
        )

    def table(self, path: str) -> DeltaTable | None:
        try:
            return DeltaTable(f"{self.root}/{path}", storage_options=self.options)
        except TableNotFoundError:
            return None

    def read(self, path: str) -> pa.Table | None:
        table = self.table(path)
        return None if table is None else table.to_pyarrow_table()

    def quarantine(self) -> list[dict[str, Any]]:
        table = self.read("inbox/quarantine")
        return [] if table is None else table.to_pylist()

    def batches(self, stream: str = STREAM) -> dict[tuple[str, str, int], list[float]]:
        """(device, epoch, seq) → values of `x` in the order of their rows."""
        table = self.read(f"raw/{stream}")
        found: dict[tuple[str, str, int], list[tuple[int, float]]] = {}
        if table is not None:
            columns = [table[name].to_pylist() for name in ("_device", "_epoch", "_seq", "_row", "x")]
            for device, epoch, seq, row, x in zip(*columns, strict=True):
                found.setdefault((device, epoch, seq), []).append((row, x))
        return {key: [x for _, x in sorted(rows)] for key, rows in found.items()}


def body_of(values: Iterable[float]) -> bytes:
    numbers = np.fromiter(values, float)
    now_us = time.time_ns() // 1000
    ts = pa.array(np.arange(len(numbers)) + now_us, pa.timestamp("us", tz="UTC"))
    return encode_body(pa.record_batch({"ts": ts, "x": pa.array(numbers)}))


class Devices:
    """Devices that keep the protocol, all in one thread over one connection; a context manager.

    Args:
        broker: URL.
        names: of the devices.
        rows: of each batch.
        rate: batches a second of each device, made while `producing` is set; 0: only by `append`.
    """

    def __init__(
        self, broker: str, names: Iterable[str], *, rows: int = 20, rate: float = 0.0, stream: str = STREAM
    ) -> None:
        self.names = list(names)
        self.stream = stream
        self.accepted: dict[tuple[str, str, int], list[float]] = {}
        """(device, epoch, seq) → values, of every batch that a buffer took."""
        self.producing = threading.Event()
        self._rows, self._rate = rows, rate
        self._next_value = 0.0
        self._lock = threading.Lock()
        caps = StreamCaps(bytes_max=1 << 30, age_max_s=1e9)
        settings = SenderSettings(ack_timeout_s=1.0, ack_timeout_max_s=3.0, window_batches_max=32)
        self._buffers = {name: MemoryBuffer({stream: caps}, bytes_max=1 << 32) for name in self.names}
        self._senders = {name: Sender(buffer, settings, random.Random(1)) for name, buffer in self._buffers.items()}
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self.client = MqttClient(broker, f"devices-{os.getpid()}-{random.getrandbits(32):x}")
        for name in self.names:
            self.client.subscribe(topics.ack(name))
            self.client.subscribe(topics.rewind(name), qos=0)
        self._thread = threading.Thread(target=self._run, name="devices", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopping.set()
        self._thread.join(PATIENCE_S)
        self.client.close()

    def append(self, name: str, batches: int = 1) -> None:
        """A device's buffer takes batches."""
        with self._lock:
            for _ in range(batches):
                values = [self._next_value + row for row in range(self._rows)]
                self._next_value += self._rows
                clock = Clock(synced=True, wall_us=time.time_ns() // 1000, monotonic_us=0, boot=BOOT)
                appended = self._buffers[name].append(self.stream, body_of(values), self._rows, clock)
                self._senders[name].stored(self.stream, appended.epoch)
                self.accepted[name, appended.epoch, appended.seq] = values

    def append_all(self, batches: int = 1) -> None:
        for name in self.names:
            self.append(name, batches)

    @property
    def waiting(self) -> int:
        """Batches that are not acknowledged."""
        assert self._error is None, self._error
        with self._lock:
            return sum(lane.batches for buffer in self._buffers.values() for lane in buffer.lanes())

    def acknowledged(self) -> set[tuple[str, str, int]]:
        """(device, epoch, seq) of every batch that a device let go of."""
        with self._lock:
            held = set()
            for name, buffer in self._buffers.items():
                for lane in buffer.lanes():
                    seq = 0
                    while (batch := buffer.peek(self.stream, lane.epoch, seq)) is not None:
                        seq = batch.seq
                        held.add((name, lane.epoch, seq))
            return self.accepted.keys() - held

    def wait_drained(self, timeout_s: float = 60.0) -> None:
        """Wait until everything is acknowledged."""
        wait_until(lambda: self.waiting == 0, timeout_s, f"acknowledged: {self.waiting} batches wait")

    def check(self, lake: Lake) -> None:
        """Every accepted batch is in the lake once, with its values; and nothing else of these devices."""
        found = {key: rows for key, rows in lake.batches(self.stream).items() if key[0] in self.names}
        wrong = {key for key, rows in found.items() if self.accepted.get(key) != rows}
        lost = self.accepted.keys() - found.keys()
        assert not wrong, f"doubled or altered: {sorted(wrong)[:5]} of {len(wrong)}"
        assert not lost, f"lost: {sorted(lost)[:5]} of {len(lost)}"

    def _run(self) -> None:
        try:
            due_s = time.monotonic()
            while not self._stopping.is_set():
                if self.producing.is_set() and self._rate:
                    if time.monotonic() >= due_s:
                        self.append_all()
                        due_s += 1 / self._rate
                else:
                    due_s = time.monotonic()
                self._listen()
                with self._lock:
                    for name in self.names:
                        self._send(name)
        except BaseException as error:
            self._error = error
            raise

    def _listen(self) -> None:
        try:
            message = self.client.messages.get(timeout=0.005)
            while True:
                self._tell(message.topic, message.payload)
                message = self.client.messages.get_nowait()
        except queue.Empty:
            return

    def _tell(self, topic: str, payload: bytes) -> None:
        name = topic.rpartition("/")[2]
        now_s = time.monotonic()
        with self._lock:
            if topic == topics.rewind(name):
                self._senders[name].rewind(decode(payload, Rewind), now_s)
            else:
                for mark in decode(payload, Ack).committed:
                    self._senders[name].acknowledged(mark, now_s)

    def _send(self, name: str) -> None:
        sender, buffer = self._senders[name], self._buffers[name]
        while (batch := sender.next_batch(time.monotonic())) is not None:
            body = buffer.body(batch.stream, batch.epoch, batch.seq)
            floor = buffer.floor(batch.stream, batch.epoch)
            assert body is not None
            assert floor is not None
            sender.sent(batch, time.monotonic())
            envelope = Envelope(
                name,
                batch.stream,
                batch.epoch,
                batch.seq,
                floor,
                batch.rows,
                time.time_ns() // 1000,
                batch.clock,
                batch.crc32,
            )
            self.client.client.publish(topics.up(name, batch.stream), seal(envelope, body), qos=1)

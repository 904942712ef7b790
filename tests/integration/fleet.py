"""A whole fleet of real processes: devices, broker, gateways, object store; and the books that must balance."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow.compute as pc
from deltalake import DeltaTable

from contract.batches import Clock
from edge_agent.buffer.port import LaneInfo
from edge_agent.buffer.sqlite import SqliteBuffer
from edge_agent.identity import hardware_fingerprint
from edge_agent.status import fetch_status
from headwater.stack.lifecycle import Policy
from headwater.stack.supervisor import ChildSpec
from simulators.faults.processes import ProcessFaults
from simulators.faults.store import Answer, StoreFault, StoreFaultProxy, When
from tests.integration.counting_source import FIELDS, expected
from tests.integration.servers import Servers, wait_until

ROOT = Path(__file__).parents[2]
STREAM = "counted"
SOON = Policy(backoff_min_s=0.2, backoff_max_s=1.0, stop_timeout_s=120.0)


class Books(NamedTuple):
    """What the lake holds, against what the buffers gave out."""

    rows: int
    lost: int
    duplicated: int
    wrong: int
    runs: int


class Fleet:
    """Starts everything; a context manager that stops everything.

    Args:
        folder: data and logs.
        broker: `mosquitto` or `iotcore`.
        devices: agents, each its own process with its own buffer.
        gateways: all of them own every shard, so each batch has more than one that would commit it.
    """

    def __init__(self, folder: Path, *, broker: str = "mosquitto", devices: int = 8, gateways: int = 2) -> None:
        self.folder = folder
        self.servers = Servers(folder)
        self._broker_kind = broker
        self.devices = [f"pi-{number}" for number in range(devices)]
        self.gateways = [f"gateway-{number}" for number in range(gateways)]

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.servers.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.servers.close()
        self.proxy.close()

    def _start(self) -> None:
        self.broker = self.servers.broker(self._broker_kind)
        self.store = self.servers.seaweed()
        self.proxy = StoreFaultProxy(self.store.port)
        access = self.store.access
        environment = {"AWS_ACCESS_KEY_ID": access.key, "AWS_SECRET_ACCESS_KEY": access.secret}
        for name in self.gateways:
            config = self._write(
                name,
                f'''
                flush_interval_s = 0.5
                [broker]
                url = "{self.broker.url}"
                reconnect_max_s = 1.0
                [lake]
                url = "s3://{access.bucket}/lake"
                endpoint = "http://{self.proxy.address}"
                region = "{access.region}"
                allow_http = true
                timeout_s = 10.0
                [http]
                port = 0
                ''',
            )
            self._child(name, ["-m", "gateway", "--config", str(config)], tier=1, env=environment)
        for name in self.devices:
            fields = ", ".join(f'{field} = "{kind}"' for field, kind in FIELDS.items())
            config = self._write(
                name,
                f'''
                device = "{name}"
                [broker]
                url = "{self.broker.url}"
                [uplink]
                ack_timeout_s = 3.0
                ack_timeout_max_s = 6.0
                reconnect_base_s = 0.2
                reconnect_max_s = 1.0
                drain_timeout_s = 110.0
                [streams.{STREAM}]
                driver = "callable"
                max_batch_rows = 100
                max_batch_age_s = 0.5
                options = {{ function = "tests.integration.counting_source:read", fields = {{ {fields} }} }}
                sampling = {{ mode = "interval", rate_hz = 20.0 }}
                ''',
            )
            answers = functools.partial(self._answers, name)
            self._child(name, ["-m", "edge_agent", "--config", str(config)], tier=2, ready=answers)

    def _write(self, name: str, text: str) -> Path:
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.toml"
        path.write_text("\n".join(line.strip() for line in text.splitlines()))
        return path

    def _child(
        self,
        name: str,
        arguments: list[str],
        *,
        tier: int,
        env: dict[str, str] | None = None,
        ready: Callable[[], None] | None = None,
    ) -> None:
        log = self.folder / "logs" / f"{name}.log"
        argv = (sys.executable, *arguments)
        spec = ChildSpec(name=name, argv=argv, log=log, env=env or {}, cwd=ROOT, tier=tier, ready=ready, policy=SOON)
        self.servers.supervisor.start([spec], 60.0)

    def pid_of(self, name: str) -> int | None:
        """Process id of a device, gateway, the broker or the store."""
        return self.servers.supervisor.pid(name)

    def _answers(self, device: str) -> None:
        self.status(device)

    def status(self, device: str) -> dict[str, Any]:
        """What an agent says of itself."""
        return fetch_status(self.folder / device / "agent.sock")

    def lake_options(self) -> dict[str, str]:
        """Storage options for reading the lake past the fault proxy."""
        access = self.store.access
        return {
            "AWS_ENDPOINT_URL": access.endpoint,
            "AWS_ACCESS_KEY_ID": access.key,
            "AWS_SECRET_ACCESS_KEY": access.secret,
            "AWS_REGION": access.region,
            "AWS_ALLOW_HTTP": "true",
        }

    def table(self) -> DeltaTable:
        """The stream's table."""
        uri = f"s3://{self.store.access.bucket}/lake/raw/{STREAM}"
        return DeltaTable(uri, storage_options=self.lake_options())

    def drain(self) -> None:
        """SIGTERM to every agent: it stops its sensors, sends all it holds, and ends."""
        self.servers.supervisor.stop(self.devices)

    def lanes(self, device: str) -> Sequence[LaneInfo]:
        """What is in the buffer of an agent that does not run."""
        clock = Clock(synced=False, wall_us=0, monotonic_us=0, boot="0" * 32)
        path = self.folder / device / "buffer.db"
        buffer = SqliteBuffer(path, {}, 2**30, lambda: clock, hardware_fingerprint())
        try:
            return buffer.lanes()
        finally:
            buffer.close()

    def books(self) -> Books:
        """Balance: every batch that a buffer gave a seq is in the lake, each row once, with the value it had."""
        table = self.table().to_pyarrow_table(columns=["_device", "_epoch", "_seq", "_row", "run", "n", "x", "y"])
        keys = (
            table.select(["_device", "_epoch", "_seq", "_row"])
            .group_by(["_device", "_epoch", "_seq", "_row"])
            .aggregate([])
        )
        duplicated = table.num_rows - keys.num_rows
        lost = runs = 0
        for device in self.devices:
            mine = table.filter(pc.equal(table["_device"], device))
            for run in mine["run"].unique().to_pylist():
                numbers = np.sort(mine.filter(pc.equal(mine["run"], run))["n"].to_numpy())
                runs += 1
                distinct = np.unique(numbers)
                duplicated += len(numbers) - len(distinct)
                # What a buffer accepted of one process life is a beginning of what it measured: a hole is a loss.
                lost += int(distinct[-1]) + 1 - len(distinct)
            for lane in self.lanes(device):
                if lane.stream == STREAM:
                    there = mine.filter(pc.equal(mine["_epoch"], lane.epoch))["_seq"].unique()
                    lost += lane.last_seq - len(there)
        x, y = expected(table["n"].to_numpy())
        same_x = table["x"].to_numpy().view(np.uint64) == x.view(np.uint64)
        same_y = table["y"].to_numpy().view(np.uint32) == y.view(np.uint32)
        return Books(table.num_rows, lost, duplicated, int((~(same_x & same_y)).sum()), runs)

    def kill_in_commit(self, faults: ProcessFaults) -> None:
        """SIGKILL to every gateway right after the store took a commit whose answer nobody sees."""
        path = f"raw/{STREAM}/_delta_log/.*[.]json"
        self.proxy.inject([StoreFault(name="commit", when=When.AFTER, answer=Answer.RESET, method="PUT", path=path)])
        try:
            wait_until(lambda: any(seen.fault == "commit" for seen in self.proxy.seen()), 30.0, "a commit is under way")
            faults.kill(*self.gateways)
        finally:
            self.proxy.inject([])

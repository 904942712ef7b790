"""Broker, object store and gateway as real processes for a benchmark, and what they cost."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import psutil

from headwater.stack.broker import Mosquitto
from headwater.stack.objectstore import Seaweed
from headwater.stack.ports import PortBook
from headwater.stack.probes import HttpProbe
from headwater.stack.supervisor import ChildSpec, Supervisor

ROOT = Path(__file__).parents[1]
START_TIMEOUT_S = 60.0
BROKER, STORE, GATEWAY = "broker", "store", "gateway"
"""As the supervisor knows them."""


class Usage(NamedTuple):
    """What a process used so far."""

    cpu_s: float
    rss_mib: float


class BenchServers:
    """mosquitto, SeaweedFS and one gateway over a folder; a context manager that stops them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.supervisor = Supervisor()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.supervisor.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.supervisor.close()

    def _start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        wanted = {**Mosquitto.PORTS, **Seaweed.PORTS, "gateway_http": None}
        ports = PortBook(self._folder / "ports.json").claim(dict.fromkeys(wanted))
        broker = Mosquitto(self._part("broker"), log=self._log("broker"), ports=ports)
        store = Seaweed(self._part("store"), log=self._log("store"), ports=ports)
        self.broker_url, self.access = broker.url, store.access
        config = self._part(GATEWAY) / "gateway.toml"
        config.write_text(
            f"""
            [broker]
            url = "{broker.url}"
            [lake]
            url = "{self.access.url}"
            endpoint = "{self.access.endpoint}"
            region = "{self.access.region}"
            allow_http = true
            [http]
            port = {ports["gateway_http"]}
            """
        )
        gateway = ChildSpec(
            name=GATEWAY,
            argv=(sys.executable, "-m", "gateway", "--config", str(config)),
            log=self._log(GATEWAY),
            env={"AWS_ACCESS_KEY_ID": self.access.key, "AWS_SECRET_ACCESS_KEY": self.access.secret},
            cwd=ROOT,
            tier=20,
            ready=HttpProbe(url=f"http://127.0.0.1:{ports['gateway_http']}/readyz"),
        )
        self.supervisor.start([broker.spec(), store.spec(), gateway], START_TIMEOUT_S)

    def divide_cores(self, away: str) -> None:
        """Keep the servers to the first core, and the process `away` to the others; with one core alone, nothing.

        Threads that they start later inherit it.
        """
        first, *others = sorted(os.sched_getaffinity(0))
        if not others:
            return
        for name in (BROKER, STORE, GATEWAY, away):
            for process in self._family(name):
                for thread in process.threads():
                    os.sched_setaffinity(thread.id, others if name == away else {first})

    def start(self, name: str, argv: tuple[str, ...]) -> None:
        """Start one more process."""
        spec = ChildSpec(name=name, argv=argv, log=self._log(name), cwd=ROOT, tier=30)
        self.supervisor.start([spec], START_TIMEOUT_S)

    def usage(self, name: str) -> Usage:
        """CPU time and memory of a process and its children."""
        family = self._family(name)
        times = [one.cpu_times() for one in family]
        cpu_s = sum(time.user + time.system for time in times)
        return Usage(cpu_s, sum(one.memory_info().rss for one in family) / 2**20)

    def _family(self, name: str) -> list[psutil.Process]:
        pid = self.supervisor.pid(name)
        assert pid is not None, f"{name} does not run"
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]

    def _part(self, name: str) -> Path:
        part = self._folder / name
        part.mkdir(parents=True, exist_ok=True)
        return part

    def _log(self, name: str) -> Path:
        return self._part("logs") / f"{name}.log"

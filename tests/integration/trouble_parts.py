"""Real agents, real gateways, a lake with signed releases, and the troubles that can be made between them.

Agents come in groups. Each group has a model of its own name, so that groups do not wait for each other's rollouts, and
a tag of that name, by which rollouts choose it.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec
import pyarrow as pa

from contract import topics
from contract.messages import Reported, decode
from contract.models import FINAL_STATES, DeviceState, Manifest, Probe, ReportedModel, ReportedOrder
from headwater.stack import launch
from lake.approval import Approver, approve
from lake.releases import ReleaseEventKind, Releases
from lake.store import Store, StoreSettings
from lake.trust.keys import KeyFolder
from lake.trust.repository import TrustRepository
from simulators.faults.proxy import FaultProxy
from tests.integration.agent_bench import ROOT, AgentProcess
from tests.integration.gateway_parts import GatewayProcess, Lake
from tests.integration.models_bench import Faults, known_answers, manifest_of, serving
from tests.integration.servers import MqttClient, free_port, wait_until

STATE_S = 600.0
"""For a state to be reached: fifty agents and their child processes share the cores. Never a measure of speed."""
START_TOGETHER = 8
"""Agents that start at the same moment."""
QUICK = {"interval_s": 0.5, "settle_s": 1.0, "republish_s": 5.0, "sweep_s": 5.0}
LOOK_S = 0.5
ANSWERS_MORE = 2
CONFIG = """
device = "{device}"
tags = ["{group}", "everybody"]
[broker]
url = "{broker}"
[log]
level = "info"
format = "json"
[streams.numbers]
driver = "callable"
options = {{ function = "trouble_sensor:read", search_path = "{sensors}" }}
sampling = {{ mode = "interval", rate_hz = 4 }}
max_batch_age_s = 2.0
[models]
url = "{models}"
root = "{anchor}"
retry_base_s = 0.2
retry_max_s = 1.0
read_timeout_s = 15.0
probe_timeout_s = {probe_timeout_s}
[clock]
assume_synced = true
[uplink]
reconnect_base_s = 0.1
reconnect_max_s = 1.0
"""
SENSOR = """
import itertools

_numbers = itertools.count()

def read():
    n = next(_numbers)
    return {"x": float(n % 7) + 0.5, "y": 0.25}
"""
SHIFTED = """
import datetime
import time

_time_ns = time.time_ns
time.time_ns = lambda: _time_ns() + {shift_s} * 1_000_000_000
time.time = lambda: time.time_ns() / 1e9


class _Shifted(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)


datetime.datetime = _Shifted
"""
"""What Python runs before anything else of an agent and its children: a wall clock that is wrong by `shift_s`."""


def eventually(predicate: Callable[[], object], what: str) -> Any:
    """`wait_until` for what costs something to ask: a gateway, or the lake."""
    pause = threading.Event()
    deadline = time.monotonic() + STATE_S
    while not (found := predicate()):
        assert time.monotonic() < deadline, f"not within {STATE_S:g} s: {what}"
        pause.wait(LOOK_S)
    return found


class TroubleLake:
    """A lake in a folder, its keys, and who releases into it.

    Args:
        folder: of all this.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = folder / "lake" / "models"
        self.url = f"file://{folder}/lake"
        self.store = Store(StoreSettings(url=self.url, fsync=False))
        self.releases = Releases(self.store)
        keys = KeyFolder(folder / "keys")
        self._targets, self.online, root = keys.make("targets"), keys.make("online"), keys.make("root")
        anchor = TrustRepository(self.store).initialise([root], self._targets, self.online)
        keys.write_anchor(anchor)
        self.anchor, self.online_file = keys.anchor_path, keys.file("online")
        self._trust = TrustRepository(self.store, anchor=anchor)

    def release(
        self, name: str, data: bytes, *, probe: bool = True, wrong: str = "", signed: bool = True, **changes: Any
    ) -> Manifest:
        """The next version of a model, approved.

        Args:
            name: the model.
            data: ONNX.
            probe: whether it has windows with known answers.
            wrong: the column of these that is not what the model says.
            signed: False: the register calls it approved, and no key of the targets has signed it.
            changes: of the manifest.
        """
        made = manifest_of(data, name=name, **{"metrics": (), **changes})
        if probe:
            known = self.releases.put_artifact(known_answers(data, made, wrong=wrong))
            made = msgspec.structs.replace(made, probe=Probe(artifact=known, score_tolerance=0.0))
        self.releases.put_artifact(data)
        version = self.releases.publish(made, who="ada", why="a test").manifest.version
        if signed:
            approver = Approver(self._trust, self._targets, self.online, "ada")
            return approve(self.releases, name, version, approver, "a test").release.manifest
        return self.releases.record(ReleaseEventKind.APPROVED, name, version, who="eve", why="a test").manifest

    def damage(self, sha256: str) -> None:
        """Other bytes of the same length under an artifact's name."""
        path = self.models / "artifacts" / sha256
        path.write_bytes(b"x" * path.stat().st_size)


class BoundAgent(AgentProcess):
    """An agent that ends with the process that started it: a run that is killed leaves no fifty agents behind."""

    def start(self) -> None:
        bound = (sys.executable, "-I", "-S", launch.__file__, str(os.getpid()), "0")
        argv = (*bound, sys.executable, "-m", "edge_agent", "--config", str(self.folder / "agent.toml"))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                argv, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment
            )


class Told(NamedTuple):
    """A row of `headwater.events` of the kind `model_state`."""

    device: str
    ts: int
    """Device clock, microseconds."""
    detail: dict[str, Any]


class Fleet:
    """Agents in groups behind a broker, gateways, and what all of them said; a context manager.

    Args:
        folder: of all this.
        broker: URL.
    """

    def __init__(self, folder: Path, broker: str) -> None:
        self.broker = broker
        self.lake = TroubleLake(folder)
        self.rows = Lake.local(folder / "lake")
        self.port = free_port()
        """Of the first gateway, before and after it is killed."""
        self.gateway = self.another_gateway("one", self.port)
        self.agents: dict[str, AgentProcess] = {}
        self.groups: dict[str, list[str]] = {}
        self.first: dict[str, Manifest] = {}
        """What each group ran first."""
        self.reported: dict[str, Reported] = {}
        self.ordered: dict[str, list[bytes]] = {}
        """Every document with orders that was published to a device."""
        self._folder = folder
        (folder / "trouble_sensor.py").write_text(SENSOR)
        self._stack = ExitStack()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="trouble-fleet", daemon=True)
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.client = stack.enter_context(MqttClient(self.broker, f"trouble-{self._folder.name[-40:]}"))
            for topic in (f"{topics.ROOT}/reported/+", f"{topics.ROOT}/assign/+"):
                self.client.subscribe(topic)
            stack.enter_context(self.gateway)
            self._thread.start()
            stack.callback(self._thread.join)
            stack.callback(self._stopping.set)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()
        assert self._error is None, self._error

    def another_gateway(self, name: str, port: int = 0) -> GatewayProcess:
        """One more over the same lake and broker."""
        lake = {"url": self.lake.url, "fsync": False}
        key = {"online_key": str(self.lake.online_file), "resign_interval_s": 5.0}
        # Dozens of streams with a row a second: a commit a second for each is plenty.
        return GatewayProcess(
            self.lake.folder,
            self.broker,
            lake,
            name=name,
            models=key,
            rollouts=QUICK,
            http={"port": port},
            flush_interval_s=2.0,
        )

    # Devices.

    def start(self, group: str, count: int, first: bytes, *, models: str = "", probe_timeout_s: float = 120.0) -> None:
        """Start a group of agents, and approve the release that they shall run first.

        Args:
            group: the name of their model and of their tag.
            count: how many.
            first: the model that they run first.
            models: where they fetch releases; else from the first gateway.
            probe_timeout_s: of their settings.
        """
        names = [f"{group}-{number}" for number in range(count)]
        for name in names:
            folder = self._folder / "agents" / name
            (folder / "clock").mkdir(parents=True)
            path = os.pathsep.join(filter(None, (str(folder / "clock"), os.environ.get("PYTHONPATH", ""))))
            agent = BoundAgent(folder, self.broker, name, environment={"PYTHONPATH": path})
            self._stack.callback(agent.end)
            (folder / "agent.toml").write_text(
                CONFIG.format(
                    device=name,
                    group=group,
                    broker=self.broker,
                    sensors=self._folder,
                    models=models or f"http://127.0.0.1:{self.port}/models/",
                    anchor=self.lake.anchor,
                    probe_timeout_s=probe_timeout_s,
                )
            )
            self.agents[name] = agent
        self.groups[group] = names
        self.first[group] = self.lake.release(group, first)
        for at in range(0, count, START_TOGETHER):
            for name in names[at : at + START_TOGETHER]:
                self.agents[name].start()
            for name in names[at : at + START_TOGETHER]:
                wait_until(lambda name=name: name in self.reported, STATE_S, f"{name} reports")

    def all_known(self, names: Iterable[str]) -> None:
        """Wait until the gateway knows these devices to be online, with their tags."""
        wanted = set(names)

        def known() -> bool:
            status, found = self.gateway.get("/v1/devices?limit=10000")
            return status == 200 and wanted <= {each["device"] for each in found["devices"] if each["online"] is True}

        eventually(known, "the gateway knows all devices")

    def shift_clock(self, name: str, shift_s: int) -> None:
        """Start an agent again with a wall clock that is wrong by so much; 0 for the right one."""
        agent = self.agents[name]
        assert agent.terminate() == 0, agent.tail()
        hook = agent.folder / "clock" / "sitecustomize.py"
        hook.unlink(missing_ok=True)
        if shift_s:
            hook.write_text(SHIFTED.format(shift_s=shift_s))
        agent.start()

    def told(self, name: str, model: str) -> ReportedModel | None:
        """What a device last reported of a model."""
        found = self.reported.get(name)
        return None if found is None else found.models.get(model)

    def wait(self, name: str, rollout: str, *states: DeviceState, model: str = "") -> ReportedModel:
        """Wait until a device reports one of these states of a rollout's order; final ones where none is given."""
        model = model or name.rpartition("-")[0]
        wanted = set(states) or FINAL_STATES

        def reached() -> ReportedModel | None:
            told = self.told(name, model)
            order = None if told is None else told.order
            return told if order is not None and order.rollout == rollout and order.state in wanted else None

        told: ReportedModel = wait_until(reached, STATE_S, f"{name}: {rollout} {sorted(wanted)}")
        return told

    def order_of(self, name: str, model: str = "") -> ReportedOrder:
        """The order that a device last reported."""
        told = self.told(name, model or name.rpartition("-")[0])
        assert told is not None
        assert told.order is not None
        return told.order

    def log_states(self, name: str) -> list[dict[str, Any]]:
        """Every state that a device logged: `version`, `sequence`, `state`, `reason`."""
        lines = self.agents[name].log.read_text(errors="replace").splitlines()
        return [json.loads(line) for line in lines if '"model_state"' in line and line.endswith("}")]

    def mirror(self) -> tuple[str, Faults]:
        """The releases at another address than the gateway's, and what is wrong there."""
        return self._stack.enter_context(serving(self.lake.models))

    def line(self) -> tuple[str, FaultProxy]:
        """The releases at the first gateway, over a line that can be cut."""
        proxy = self._stack.enter_context(FaultProxy(self.port))
        return f"http://{proxy.address}/models/", proxy

    # Rollouts.

    def post(self, path: str, document: Mapping[str, Any], gateway: GatewayProcess | None = None) -> dict[str, Any]:
        """Act on rollouts over HTTP; who and why are added."""
        body = json.dumps({"who": "ada", "why": "a test", **document}).encode()
        status, answer, _ = (gateway or self.gateway).request("POST", path, body, Content_Type="application/json")
        assert status in (200, 201), answer
        return dict(json.loads(answer))

    def roll_out(self, manifest: Manifest, to: str, *, bad: bool = False, **spec: Any) -> str:
        """Start a rollout to a tag; its name.

        Args:
            manifest: of the release.
            to: the tag.
            bad: judged only when every device has come to an end, so that none is spared what the others meet.
                Else all must commit.
            spec: over all that.
        """
        stage = {"committed_share_min": 1.0, "failure_share_max": 0.1, "bake_s": 0, "max_wait_s": 2 * STATE_S}
        if bad:
            stage |= {"committed_share_min": 0.01, "failures_min_executed": len(self.groups[to])}
        trial = {"shadow_windows": 2, "trial_windows": 2, "timeout_s": STATE_S, "disagreement_share_max": 0.5}
        order = {
            "model": manifest.model,
            "version": manifest.version,
            "stages": ["100%"],
            "target": [f"tag:{to}"],
            "stage": stage | spec.pop("stage", {}),
            "trial": trial | spec.pop("trial", {}),
            "rollback_on_abort": False,
            **spec,
        }
        return str(self.post("/v1/rollouts", {"spec": order})["rollout"])

    def rollout(self, name: str) -> dict[str, Any]:
        status, found = self.gateway.get(f"/v1/rollouts/{name}")
        return dict(found) if status == 200 else {"state": "unknown"}

    def wait_rollout(self, name: str, state: str) -> dict[str, Any]:
        """Wait for a rollout's state; fails at once where it ended in another."""

        def reached() -> dict[str, Any] | None:
            found = self.rollout(name)
            ended = found["state"] in ("succeeded", "aborted", "rolled_back")
            assert found["state"] == state or not ended or state == "rolled_back", (found["state"], found["reason"])
            return found if found["state"] == state else None

        found: dict[str, Any] = eventually(reached, f"{name} {state}: {self.rollout(name)}")
        return found

    def history(self, name: str) -> list[dict[str, Any]]:
        return list(self.gateway.get(f"/v1/rollouts/{name}/history")[1]["events"])

    # The lake.

    def events(self, *names: str) -> list[Told]:
        """What these devices told of the states of their models, as the lake has it."""
        table = self._read("raw/headwater.events", ["_device", "ts", "kind", "detail"])
        return [
            Told(row["_device"], row["ts"], json.loads(row["detail"]))
            for row in table.to_pylist()
            if row["kind"] == "model_state" and row["_device"] in names
        ]

    def wait_event(self, name: str, sequence: int, state: str) -> Told:
        """Wait for an event about an order in the lake."""

        def found() -> Told | None:
            told = (each for each in self.events(name) if each.detail["state"] == state)
            return next((each for each in told if each.detail.get("sequence") == sequence), None)

        told: Told = eventually(found, f"the lake has {state} of order {sequence} of {name}")
        return told

    def predictions(self, model: str) -> dict[tuple[str, int], int]:
        """Rows of predictions in the lake by device and release."""
        table = self._read(f"raw/predictions.{model}", ["_device", "release"])
        found: dict[tuple[str, int], int] = {}
        for device, release in zip(table["_device"].to_pylist(), table["release"].to_pylist(), strict=True):
            found[device, release] = found.get((device, release), 0) + 1
        return found

    def answer(self, model: str, release: int, names: Iterable[str]) -> None:
        """Wait until each of these devices has predicted more with a release, and the lake has it."""
        wanted, before = list(names), self.predictions(model)

        def more() -> bool:
            now = self.predictions(model)
            return all(now.get((name, release), 0) >= before.get((name, release), 0) + ANSWERS_MORE for name in wanted)

        eventually(more, f"release {release} of {model} answers on {wanted}: {before}")

    def _read(self, path: str, columns: list[str]) -> pa.Table:
        table = self.rows.table(path)
        if table is None:
            return pa.table({name: [] for name in columns})
        found = table.to_pyarrow_table(columns=columns)
        if "ts" in columns:
            found = found.set_column(columns.index("ts"), "ts", found["ts"].cast(pa.int64()))
        return found

    def _listen(self) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    message = self.client.messages.get(timeout=0.1)
                except queue.Empty:
                    continue
                kind, name = message.topic.split("/")[-2:]
                payload = bytes(message.payload)
                if kind == "assign":
                    self.ordered.setdefault(name, []).append(payload)
                elif payload:
                    self.reported[name] = decode(payload, Reported)
        except BaseException as error:
            self._error = error
            raise


def kill_at(fleet: Fleet, wanted: Mapping[str, str], sequences: Mapping[str, int] | None = None) -> dict[str, str]:
    """SIGKILL each agent as soon as it logs a state of its latest order, and start it again.

    Args:
        fleet: whose agents.
        wanted: state of each device.
        sequences: the last order of each device that does not count.

    Returns:
        The last state that each had logged when it was dead.
    """
    died: dict[str, str] = {}
    past = dict(sequences or {})
    deadline = time.monotonic() + STATE_S
    while len(died) < len(wanted):
        assert time.monotonic() < deadline, f"not reached: {set(wanted) - set(died)}"
        for name, state in wanted.items():
            if name in died:
                continue
            new = [each for each in fleet.log_states(name) if each["sequence"] > past.get(name, 0)]
            if any(each["state"] == state for each in new):
                fleet.agents[name].kill()
                died[name] = fleet.log_states(name)[-1]["state"]
                fleet.agents[name].start()
        threading.Event().wait(0.01)
    return died

"""The whole road on one machine: object store, broker, gateway and devices as supervised processes over one folder.

Start goes from the sinks to the sources, stop from the sources to the sinks: devices flush and send what they hold,
the gateway commits what it got, and only then broker and store go. What is not sent stays in the devices' buffers, and
a start over the same folder goes on from there.

    DATA/lock ports.json stack.json   who is here, and where everything is
    DATA/store broker gateway         of the servers
    DATA/keys                         release keys: of a fleet, root and targets keys belong on no server
    DATA/devices/NAME                 agent.toml, buffer.db, agent.sock, models/
    DATA/recordings                   what the devices replay
    DATA/logs                         one log per process, three files of 4 MiB at most
"""

from __future__ import annotations

import http.client
import os
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import msgspec
import structlog

from contract.broker import BrokerAddress
from contract.errors import ConfigurationError, TemporaryError
from edge_agent.status import fetch_status
from headwater import itself, plan, toml
from headwater.lake_access import store_settings
from headwater.place import DevicePlace, LakePlace, StackRecord, record_path
from headwater.plan import DevicePlan, UpOptions
from headwater.stack.broker import Broker, Iotcore, Mosquitto
from headwater.stack.errors import NotReady
from headwater.stack.folder import DataFolder
from headwater.stack.lifecycle import Policy, State
from headwater.stack.objectstore import Seaweed
from headwater.stack.ports import HOST, PortBook, is_free, listener, write_whole
from headwater.stack.probes import MqttProbe
from headwater.stack.supervisor import ChildSpec, Supervisor
from headwater.turn import turn
from lake.credentials import require_credentials
from lake.store import Store, StoreSettings
from lake.trust.keys import KeyFolder

_log = structlog.get_logger()

GATEWAY_TIER, DEVICE_TIER = 20, 30
HTTP_PORT = 8080
HTTP_TIMEOUT_S = 5.0
START_TIMEOUT_S = 120.0
WATCH_INTERVAL_S = 1.0
TRAINER_LOOKS_S = 2.0


class ChildFailed(TemporaryError):
    """A process of the stack was started again and again, and never became ready."""


class Stack:
    """The processes of one machine.

    Args:
        options: what to run.
        folder: the data folder, locked.
        supervisor: runs the processes.
        environment: of this process; names the keys of an external store.
        say: told in a few words what is being done.
    """

    def __init__(
        self,
        options: UpOptions,
        *,
        folder: DataFolder,
        supervisor: Supervisor,
        environment: Mapping[str, str],
        say: Callable[[str], None],
    ) -> None:
        self.options = options
        self.environment = environment
        self._folder, self._supervisor, self._say = folder, supervisor, say
        self._book = PortBook(folder.ports)
        recordings = folder.path / "recordings"
        self.devices = plan.plan_devices(options, recordings)
        plan.write_recordings(self.devices, recordings)
        self.places = tuple(self._place(device) for device in self.devices)
        """Where the files of each device are."""
        self.notes: list[str] = []
        """What turned out otherwise than asked for."""
        self.replaced: list[DevicePlan] = []
        """What devices were replaced by, in this order."""
        self.store: StoreSettings
        self.record: StackRecord
        self._keys: KeyFolder | None = None

    def start(self) -> StackRecord:
        """Start everything, sinks first; returns when all is ready, and the record says where.

        Raises:
            StartFailed: a process did not become ready; its log says why.
            ConfigurationError: what was asked for cannot be.
            TemporaryError: an external broker or store does not answer.
        """
        with turn():
            self._start_servers()
        self._supervisor.start([self._device(device) for device in self.devices], START_TIMEOUT_S)
        return self.record

    @property
    def keys(self) -> Path | None:
        """The folder of release keys; None where there are no models."""
        return None if self._keys is None else self._keys.path

    def replace_device(self, device: DevicePlan) -> None:
        """Stop a device, and start it with other streams, over the same buffer.

        Raises:
            StartFailed: it did not become ready.
        """
        self.replaced.append(device)
        self._supervisor.stop([device_child(device.name)])
        self._supervisor.start([self._device(device)], START_TIMEOUT_S)

    def start_trainer(self, recipe: Path) -> None:
        """Start the process that learns again when a trigger says so.

        Raises:
            StartFailed: it did not become ready.
        """
        self._supervisor.start([self._trainer(recipe)], START_TIMEOUT_S)

    def _start_servers(self) -> None:
        """Choose the ports, write down where everything is, and start all but the devices."""
        self._refuse_taken_port()
        specs: list[ChildSpec] = []
        lake, table = self._lake(specs)
        self.store = lake
        if self.options.models:
            if specs:
                self._say("starting store")
            self._supervisor.start(specs, START_TIMEOUT_S)
            specs = []
            self._keys = self._release_keys(lake)
        broker, kind = self._broker(specs)
        port = self._http_port()
        self.record = StackRecord(
            pid=os.getpid(),
            broker=broker,
            broker_kind=kind,
            lake=LakePlace(
                url=lake.url,
                endpoint=lake.endpoint,
                region=lake.region if lake.endpoint else None,
                embedded=self.options.lake == "embedded",
            ),
            http=f"http://{HOST}:{port}",
            devices=self.places,
            logs=str(self._folder.part("logs")),
        )
        specs.append(self._gateway(broker, table, port))
        write_whole(record_path(self._folder.path), msgspec.json.format(msgspec.json.encode(self.record)), 0o644)
        count = len(self.devices)
        servers = ", ".join(spec.name for spec in specs)
        self._say(f"starting {servers}, {count} device{'s' if count != 1 else ''}")
        self._supervisor.start(specs, START_TIMEOUT_S)

    def run(self, stop: threading.Event, seconds: float | None, tick: Callable[[], None] = lambda: None) -> None:
        """Stay until told to stop, or for `seconds`; `tick` is called about once a second.

        Raises:
            ChildFailed: a process gave up.
        """
        waited_s = 0.0
        while not stop.is_set() and (seconds is None or waited_s < seconds):
            pause_s = WATCH_INTERVAL_S if seconds is None else min(WATCH_INTERVAL_S, seconds - waited_s)
            stop.wait(pause_s)
            waited_s += pause_s
            self.check()
            tick()

    def check(self) -> None:
        """See whether every process is well, or about to be.

        Raises:
            ChildFailed: one gave up.
        """
        for child in self._supervisor.status():
            if child.state == State.FAILED:
                raise ChildFailed(f"{child.name} does not come up: {child.trouble}; see {child.log}")

    def stop_devices(self) -> None:
        """Stop the sources: they flush, send what they hold for a while, and end."""
        self._say("stopping devices: they send what they hold")
        self._supervisor.stop([device_child(device.name) for device in self.devices])

    def stop(self) -> None:
        """Stop everything, sources first. Children that were never started are no matter."""
        self._say("stopping")
        self._supervisor.stop()

    @property
    def restarts(self) -> dict[str, int]:
        """How often each process that died was started again."""
        return {child.name: child.restarts_total for child in self._supervisor.status() if child.restarts_total}

    def _lake(self, specs: list[ChildSpec]) -> tuple[StoreSettings, dict[str, object]]:
        """How this process reaches the lake, and the table `[lake]` of the gateway."""
        if self.options.lake == "embedded":
            ports = self._book.claim(Seaweed.PORTS)
            seaweed = Seaweed(self._folder.part("store"), log=self._folder.log("store"), ports=ports)
            specs.append(seaweed.spec())
            access = seaweed.access
            keys = self._folder.part("gateway") / "credentials.toml"
            write_whole(keys, toml.dumps({"access_key": access.key, "secret_key": access.secret}).encode(), 0o600)
            table: dict[str, object] = {
                "url": access.url,
                "endpoint": access.endpoint,
                "region": access.region,
                "allow_http": True,
                "credentials_file": keys.name,
            }
            return store_settings(access), table
        settings = StoreSettings.from_environment(self.options.lake, self.environment)
        require_credentials(settings, self.environment)
        # Ask now: a gateway that cannot write would only be seen as devices that keep their data.
        try:
            Store(settings).probe()
        except TemporaryError as error:
            at = f" at {settings.endpoint}" if settings.endpoint else ""
            raise NotReady(f"--lake {settings.url}{at}: {error}; start the store, or name another") from error
        table = {"url": settings.url}
        if settings.endpoint is not None:
            table |= {"endpoint": settings.endpoint, "region": settings.region, "allow_http": settings.allow_http}
        return settings, table

    def _release_keys(self, lake: StoreSettings) -> KeyFolder | None:
        """The keys of the lake's releases, made where there are none; None where they are another's."""
        from headwater.key_folder import make_keys

        path = self._folder.path / "keys"
        folder = KeyFolder(path, None)
        try:
            if path.exists():
                self._folder.part("keys")  # refuses one that belongs to another user
            make_keys(folder, Store(lake))
        except ConfigurationError as error:
            self.notes.append(f"no models: {error}")
            return None
        return folder

    def _broker(self, specs: list[ChildSpec]) -> tuple[str, str]:
        wanted = self.options.broker
        if wanted not in ("embedded", "mosquitto"):
            _ask_broker(wanted)
            return wanted, "external"
        folder, log = self._folder.part("broker"), self._folder.log("broker")
        broker: Broker
        if wanted == "mosquitto":
            broker, kind = Mosquitto(folder, log=log, ports=self._book.claim(Mosquitto.PORTS)), "mosquitto"
        else:
            broker, kind = Iotcore(folder, log=log, ports=self._book.claim(Iotcore.PORTS)), "iotcore"
        specs.append(broker.spec())
        return broker.url, kind

    def _refuse_taken_port(self) -> None:
        """The port that was asked for, or none: who names one has told others. Before anything is started."""
        wanted = self.options.port
        if wanted and not is_free(wanted):
            raise ConfigurationError(
                f"--port {wanted} is taken{listener(wanted)}; stop that, or choose another (0 takes a free one)"
            )

    def _http_port(self) -> int:
        """The port that was asked for; unasked, any will do."""
        wanted = self.options.port
        if wanted:
            return wanted
        port = self._book.claim({"http": HTTP_PORT if wanted is None else None})["http"]
        if wanted is None and port != HTTP_PORT:
            self.notes.append(f"port {HTTP_PORT} is taken: the gateway listens on {port}")
        return port

    def _place(self, device: DevicePlan) -> DevicePlace:
        folder = self._device_folder(device)
        return DevicePlace(
            name=device.name,
            config=str(folder / "agent.toml"),
            socket=str(folder / "agent.sock"),
            buffer=str(folder / "buffer.db"),
        )

    def _device_folder(self, device: DevicePlan) -> Path:
        return self._folder.part("devices") / device.name

    def _gateway(self, broker: str, lake: Mapping[str, object], port: int) -> ChildSpec:
        folder = self._folder.part("gateway")
        config = folder / "gateway.toml"
        models = None if self._keys is None else plan.gateway_models(str(self._keys.path / "online.pem"))
        text = toml.dumps(plan.gateway_config(broker, lake, port, models))
        return ChildSpec(
            name="gateway",
            argv=itself.command("headwater", "gateway", "run", "--config", str(config)),
            log=self._folder.log("gateway"),
            env=itself.environment(self.environment),
            cwd=folder,
            tier=GATEWAY_TIER,
            prepare=partial(write_whole, config, text.encode(), 0o600),
            ready=partial(_ask_gateway, port, "/readyz"),
            policy=Policy(
                alive_interval_s=None,
                ready_timeout_s=60.0,
                stop_timeout_s=plan.GATEWAY_DRAIN_S + 10.0,
                starts_failed_max=4,
            ),
        )

    def _trainer(self, recipe: Path) -> ChildSpec:
        argv = ("train", "watch", str(recipe), "--data", str(self._folder.path), "--keys", str(self.keys))
        return ChildSpec(
            name="trainer",
            argv=itself.command("headwater", *argv, "--interval", f"{TRAINER_LOOKS_S:g}", "--json"),
            log=self._folder.log("trainer"),
            env=itself.environment(self.environment),
            cwd=recipe.parent,
            tier=DEVICE_TIER,
            policy=Policy(alive_interval_s=None, stop_timeout_s=15.0, starts_failed_max=4),
        )

    def _device(self, device: DevicePlan) -> ChildSpec:
        folder = self._device_folder(device)
        config = folder / "agent.toml"
        keys, record = self._keys, self.record
        models = (
            None
            if keys is None
            else plan.agent_models(record.http, str(keys.path / "root.json"), folder / "models.sock")
        )
        text = toml.dumps(plan.agent_config(device, record.broker, models))

        def prepare() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(config, text.encode(), 0o600)

        return ChildSpec(
            name=device_child(device.name),
            argv=itself.command("headwater", "agent", "run", "--config", str(config)),
            log=self._folder.log(device.name),
            env=itself.environment(self.environment),
            cwd=self._folder.part("devices"),
            tier=DEVICE_TIER,
            prepare=prepare,
            ready=partial(_ask_agent, folder / "agent.sock"),
            policy=Policy(ready_timeout_s=60.0, stop_timeout_s=plan.DRAIN_S + 15.0, starts_failed_max=4),
        )


def device_child(name: str) -> str:
    """Name of a device's process: none of a server's, whatever the device is called."""
    return f"device {name}"


def _ask_gateway(port: int, path: str) -> None:
    connection = http.client.HTTPConnection(HOST, port, timeout=HTTP_TIMEOUT_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        text = answer.read(1000).decode("utf-8", "replace")
    except http.client.HTTPException as error:
        raise NotReady(f"gateway {HOST}:{port}{path}: {error!r}") from error
    finally:
        connection.close()
    if answer.status != 200:
        raise NotReady(f"gateway {HOST}:{port}{path}: {answer.status} {text}")


def _ask_agent(socket: Path) -> None:
    fetch_status(socket)


def _ask_broker(url: str) -> None:
    if "@" in url:
        raise ConfigurationError(
            "--broker: `up` gives its devices no username; use a broker that asks for none, or run agents and gateway "
            "from files of their own (docs/agent.md, docs/gateway.md)"
        )
    try:
        address = BrokerAddress.parse(url)
    except ValueError as error:
        raise ConfigurationError(f"--broker {error}") from error
    try:
        # An empty name: TLS with the authorities that the system trusts.
        MqttProbe(host=address.host, port=address.port, ca_file="" if address.tls else None)()
    except OSError as error:
        raise NotReady(f"--broker {url}: {error}; start it, or name another") from error

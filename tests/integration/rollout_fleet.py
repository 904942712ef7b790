"""Simulated devices behind a real broker, real releases in a real lake, and the command line as a person types it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import pytest
from paho.mqtt.client import MQTTMessage
from securesystemslib.dsse import Envelope

from contract import topics
from contract.messages import Assignments, Presence, decode, encode
from contract.models import ASSIGNMENT_TYPE, Assignment
from headwater import cli
from lake.store import Store, StoreSettings
from lake.trust.keys import KeyFolder
from lake.trust.repository import TrustRepository
from tests.integration.gateway_parts import GatewayProcess
from tests.integration.release_parts import release
from tests.integration.servers import PATIENCE_S, MqttClient, wait_until
from tests.rollout_devices import SimulatedDevice, manifest_of

BOOT = "ef" * 16
QUICK = {"interval_s": 0.2, "settle_s": 0.5, "republish_s": 2.0, "sweep_s": 2.0}


class Fleet:
    """Devices over one connection, in one thread; a context manager.

    Each hears only its own topic, and only while it is online: what the broker retained reaches it when it returns.

    Args:
        broker: URL.
        devices: what they are.
        key: the public key that orders must be signed by.
        pace_s: between two steps of a device; they can be stopped with `hold`.
    """

    def __init__(self, broker: str, devices: Iterable[SimulatedDevice], key: Any, *, pace_s: float = 0.02) -> None:
        self.devices = {device.name: device for device in devices}
        self.hold = threading.Event()
        """While set, devices read orders but go no further."""
        self._broker, self._key, self._pace_s = broker, key, pace_s
        self._lock = threading.Lock()
        self._client = MqttClient(broker, f"fleet-{next(iter(self.devices))}")
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="fleet", daemon=True)

    def __enter__(self) -> Self:
        for name in self.devices:
            self.switch(name, True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopping.set()
        self._thread.join(PATIENCE_S)
        self._client.close()
        assert self._error is None, self._error

    def switch(self, name: str, online: bool) -> None:
        """Connect a device, or take it away as its last will would say."""
        with self._lock:
            if online:
                self._client.subscribe(topics.assign(name))
            else:
                self._client.client.unsubscribe(topics.assign(name))
            said = Presence(
                online=online, reason="started" if online else "lost", at_us=1, agent="simulated/1", boot=BOOT
            )
            self._client.publish(topics.status(name), encode(said), retain=True)
            if online:
                self._report(name)

    def active(self, model: str) -> dict[str, int]:
        """Version that each device runs."""
        with self._lock:
            assert self._error is None, self._error
            return {name: device.active.get(model, 0) for name, device in self.devices.items()}

    def read(self) -> dict[str, list[Assignment]]:
        """Orders that each device followed."""
        with self._lock:
            assert self._error is None, self._error
            return {name: list(device.read) for name, device in self.devices.items()}

    def _run(self) -> None:
        try:
            while not self._stopping.wait(self._pace_s):
                with self._lock:
                    heard = self._listen()
                    for name, device in self.devices.items():
                        if (not self.hold.is_set() and device.step()) or name in heard:
                            self._report(name)
        except BaseException as error:
            self._error = error
            raise

    def wait_retained(self, names: Iterable[str], version: int) -> None:
        """Wait until the broker would give each of these devices an order for this version and for no other."""
        wanted = {name: {version} for name in names}
        found: dict[str, set[int]] = {}

        def reached() -> bool:
            while not watcher.messages.empty():
                name, orders = self._opened(watcher.messages.get())
                found[name] = {order.version for order in orders}
            return found == wanted

        with MqttClient(self._broker, f"watch-{next(iter(self.devices))}") as watcher:
            for name in wanted:
                watcher.subscribe(topics.assign(name))
            wait_until(reached, PATIENCE_S, f"orders for version {version} are retained")

    def _listen(self) -> set[str]:
        heard = set()
        while not self._client.messages.empty():
            name, orders = self._opened(self._client.messages.get())
            heard |= {name for order in orders if self.devices[name].receive(order)}
        return heard

    def _opened(self, message: MQTTMessage) -> tuple[str, list[Assignment]]:
        """Whom a document is for, and its orders, each with a signature that holds."""
        orders = []
        for envelope in decode(message.payload, Assignments).envelopes:
            opened = Envelope.from_dict(dict(envelope))
            opened.verify([self._key], 1)
            assert opened.payload_type == ASSIGNMENT_TYPE
            orders.append(msgspec.json.decode(opened.payload, type=Assignment))
        return message.topic.rpartition("/")[2], orders

    def _report(self, name: str) -> None:
        # Without waiting for the broker: fifty devices report eight states each.
        said = self.devices[name].reported()
        self._client.client.publish(topics.reported(name), encode(said), qos=1, retain=True)


class Bench:
    """A lake with approved releases, the online key, and what a person types.

    Args:
        folder: for all of it.
        capsys: reads what the command line answers.
    """

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys
        (folder / "lake").mkdir()
        self.url = f"file://{folder}/lake"
        self.store = Store(StoreSettings(url=self.url, fsync=False))
        keys = KeyFolder(folder)
        root, targets, online = (keys.make(name) for name in ("root", "targets", "online"))
        keys.write_anchor(TrustRepository(self.store).initialise([root], targets, online))
        self.key = online.public_key

    def release(self, model: str, *, approved: bool = True) -> int:
        """The next version of a model, approved unless told otherwise."""
        content = f"{model} {self.folder} {approved} {self.store}".encode()
        releases = len(self.releases(model))
        made = release(self.store, manifest_of(model), content + bytes(releases), approved=approved)
        return made.version

    def releases(self, model: str) -> list[Any]:
        from lake.releases import Releases

        return Releases(self.store).look().of_model(model)

    def gateway(self, broker: str, name: str = "gateway", *, key: bool = True, **settings: Any) -> GatewayProcess:
        """A gateway that is quick to decide."""
        models = {"online_key": str(self.folder / "online.pem")} if key else {}
        rollouts = QUICK | settings.pop("rollouts", {})
        lake = {"url": self.url, "fsync": False}
        return GatewayProcess(self.folder, broker, lake, name=name, models=models, rollouts=rollouts, **settings)

    def typed(self, *words: str) -> list[Any]:
        """What `headwater … --json` answers; fails unless it ends with 0."""
        code, out, err = self.tried(*words, "--json")
        assert code == 0, err
        return [json.loads(line) for line in out.splitlines()]

    def tried(self, *words: str) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        self._capsys.readouterr()
        code = 0
        try:
            cli.main([*words, "--lake", self.url])
        except SystemExit as end:
            code = int(end.code or 0)
        said = self._capsys.readouterr()
        return code, said.out, said.err

    def start(self, release: str, *options: str) -> str:
        """Start a rollout; its name."""
        [said] = self.typed("rollout", "start", release, "--why", "a better model", "--by", "ada", *options)
        return str(said["rollout"])

    def state(self, rollout: str) -> Mapping[str, Any]:
        [said] = self.typed("rollout", "status", rollout)
        return dict(said)

    def wait(self, rollout: str, state: str, timeout_s: float = 60.0) -> Mapping[str, Any]:
        """Wait for a state; answers how the rollout is then."""
        with suppress(AssertionError):
            wait_until(lambda: self.state(rollout)["state"] == state, timeout_s, state)
        found = self.state(rollout)
        assert found["state"] == state, found
        return found

    def history(self, rollout: str) -> list[Any]:
        return self.typed("rollout", "history", rollout)

    @contextmanager
    def spec(self, text: str) -> Iterator[str]:
        """A specification in a file."""
        path = self.folder / "rollout.toml"
        path.write_text(text)
        yield str(path)

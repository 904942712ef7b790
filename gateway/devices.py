"""What is known of each device, and which changes are worth a row. Pure: a fold over events and arriving documents.

Rows of `control/devices` say when a device was first seen, went online or offline, and what it was told to be. The rest
(last seen, reported state) is known again minutes after a restart, and is not written.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec

from contract.messages import Desired, Presence, Reported, encode
from contract.models import MODELS_MAX, ReportedModel

FIRST_SEEN, ONLINE, OFFLINE, DESIRED = "first_seen", "online", "offline", "desired"
REPORTED_BYTES_MAX = 64 * 1024 * 1024
"""Reported documents in memory, as JSON; beyond, those that were reported longest ago are forgotten."""
REPORTED_MODELS_MAX = 400_000
"""Models as last reported, of all devices together, about 1 kB each; beyond, the oldest reports are forgotten."""
TAGS_MAX = 32
"""Tags remembered of one device."""


class DeviceEvent(NamedTuple):
    """One row of `control/devices`. What an event does not say is None."""

    at_us: int
    """Gateway wall clock, microseconds since 1970-01-01 UTC."""
    device: str
    event: str
    """`first_seen`, `online`, `offline` or `desired`."""
    reason: str | None = None
    agent: str | None = None
    boot: str | None = None
    revision: int | None = None
    document: str | None = None
    """With `desired`: the document, JSON."""
    gateway: str | None = None
    """Who wrote the row."""


class Device(msgspec.Struct, kw_only=True):
    """One device, as of now."""

    name: str
    first_seen_us: int | None = None
    last_seen_us: int | None = None
    online: bool | None = None
    """None: it never said."""
    presence_us: int | None = None
    """When `online` last changed, or was first said."""
    reason: str | None = None
    agent: str | None = None
    boot: str | None = None
    reported: bytes | None = None
    """Its reported document, JSON."""
    reported_us: int | None = None
    tags: tuple[str, ...] = ()
    """As it last reported."""
    models: Mapping[str, ReportedModel] = {}
    """Likewise, by model."""
    desired: Desired | None = None
    desired_us: int | None = None

    @property
    def revision(self) -> int:
        """Revision of its desired document, 0 where there is none."""
        return 0 if self.desired is None else self.desired.revision


class DeviceBook:
    """All devices. Not thread-safe.

    Args:
        devices_max: beyond, the device seen longest ago is left out; its rows stay in the lake.
        reported_bytes_max: see `REPORTED_BYTES_MAX`.
        reported_models_max: see `REPORTED_MODELS_MAX`.
    """

    def __init__(
        self,
        devices_max: int,
        reported_bytes_max: int = REPORTED_BYTES_MAX,
        reported_models_max: int = REPORTED_MODELS_MAX,
    ) -> None:
        self.devices_max, self._reported_bytes_max = devices_max, reported_bytes_max
        self._reported_models_max = reported_models_max
        self._devices: OrderedDict[str, Device] = OrderedDict()
        self._reported: OrderedDict[str, int] = OrderedDict()
        self.reported_bytes = 0
        self._models: OrderedDict[str, int] = OrderedDict()
        self.reported_models = 0

    def __len__(self) -> int:
        return len(self._devices)

    def __iter__(self) -> Iterator[Device]:
        return iter(self._devices.values())

    def get(self, name: str) -> Device | None:
        """A device, or None."""
        return self._devices.get(name)

    def fold(self, events: Iterable[DeviceEvent]) -> list[Device]:
        """Learn from rows, in any order and repeated.

        Returns:
            The devices whose desired document became another one.
        """
        changed: dict[str, Device] = {}
        for event in sorted(events, key=lambda event: event.at_us):
            device = self._touch(event.device)
            if event.event == DESIRED:
                if event.document is not None and (event.revision or 0) > device.revision:
                    device.desired = msgspec.json.decode(event.document, type=Desired)
                    device.desired_us = event.at_us
                    changed[device.name] = device
                continue
            device.first_seen_us = min(event.at_us, device.first_seen_us or event.at_us)
            device.last_seen_us = max(event.at_us, device.last_seen_us or event.at_us)
            if event.event in (ONLINE, OFFLINE) and event.at_us >= (device.presence_us or 0):
                device.online, device.reason = event.event == ONLINE, event.reason
                device.presence_us, device.agent, device.boot = event.at_us, event.agent, event.boot
        return list(changed.values())

    def presence(self, name: str, said: Presence, now_us: int) -> list[DeviceEvent]:
        """A presence document came, perhaps a retained one; returns what is new."""
        events = self._first(name, now_us)
        device = self._touch(name)
        device.last_seen_us = now_us
        same = (device.online, device.boot, device.agent) == (said.online, said.boot, said.agent)
        device.agent, device.boot = said.agent, said.boot
        if not same:
            device.online, device.presence_us, device.reason = said.online, now_us, said.reason
            kind = ONLINE if said.online else OFFLINE
            events.append(DeviceEvent(now_us, name, kind, said.reason, said.agent, said.boot))
        return events

    def reports(self, name: str, said: Reported, now_us: int) -> list[DeviceEvent]:
        """A reported document came; returns what is new."""
        events = self._first(name, now_us)
        self.learn(name, said, now_us)
        return events

    def learn(self, name: str, said: Reported, now_us: int) -> None:
        """Remember a reported document, whether the device is new or not."""
        device = self._touch(name)
        device.last_seen_us = device.reported_us = now_us
        self._forget_report(name)
        device.reported = encode(said)
        self._reported[name] = len(device.reported)
        self.reported_bytes += len(device.reported)
        while self.reported_bytes > self._reported_bytes_max:
            self._forget_report(next(iter(self._reported)))
        self._forget_models(name)
        device.tags = said.tags[:TAGS_MAX]
        device.models = dict(list(said.models.items())[:MODELS_MAX])
        if device.models:
            self._models[name] = len(device.models)
            self.reported_models += len(device.models)
        while self.reported_models > self._reported_models_max:
            self._forget_models(next(iter(self._models)))

    def heard(self, names: Iterable[str], now_us: int) -> list[DeviceEvent]:
        """Batches of these devices were committed; returns what is new."""
        events: list[DeviceEvent] = []
        for name in names:
            events += self._first(name, now_us)
            self._touch(name).last_seen_us = now_us
        return events

    def _first(self, name: str, now_us: int) -> list[DeviceEvent]:
        device = self._touch(name)
        if device.first_seen_us is not None:
            return []
        device.first_seen_us = now_us
        return [DeviceEvent(now_us, name, FIRST_SEEN)]

    def _touch(self, name: str) -> Device:
        device = self._devices.get(name)
        if device is None:
            device = self._devices[name] = Device(name=name)
            if len(self._devices) > self.devices_max:
                oldest, _ = self._devices.popitem(last=False)
                self._forget_report(oldest)
                self._forget_models(oldest)
        self._devices.move_to_end(name)
        return device

    def _forget_report(self, name: str) -> None:
        self.reported_bytes -= self._reported.pop(name, 0)
        device = self._devices.get(name)
        if device is not None:
            device.reported = None

    def _forget_models(self, name: str) -> None:
        self.reported_models -= self._models.pop(name, 0)
        device = self._devices.get(name)
        if device is not None:
            device.models = {}

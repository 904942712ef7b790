"""Driver `hwmon`: temperatures, voltages, fans, currents and powers of the kernel's hardware monitoring chips.

Reads `/sys/class/hwmon/hwmon*/…_input` (`power…_average` where a chip has no input). Source of names and units: Linux
kernel, Documentation/hwmon/sysfs-interface.rst. A channel that does not answer, or whose `…_fault` says so, is null.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa

from edge_agent.sensors.options import parse_options
from edge_agent.sensors.port import Reading, Sensor, SensorConfigError, SensorError
from edge_agent.sensors.sysfs import read_number, read_text, slug

_CHANNEL = re.compile(r"(temp|in|fan|curr|power|energy|humidity)(\d+)_(input|average)")
_UNITS: Mapping[str, tuple[float, str]] = {
    "temp": (1_000, "c"),  # millidegree Celsius
    "in": (1_000, "v"),  # millivolt
    "fan": (1, "rpm"),
    "curr": (1_000, "a"),  # milliampere
    "power": (1_000_000, "w"),  # microwatt
    "energy": (1_000_000, "j"),  # microjoule
    "humidity": (1_000, "percent"),  # milli-percent
}
"""Channel kind to the divisor that makes it SI, and the unit at the end of the field's name."""


class HwmonOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `hwmon`."""

    chips: list[str] = []
    """Names of chips to read; empty reads all."""
    fields: list[str] = []
    """Fields to keep; empty keeps all that the chips have."""
    labels: bool = False
    """Name fields after the chip's labels (`coretemp_package_id_0_c`) instead of its channels (`coretemp_temp1_c`)."""
    root: str = "/sys"


class _Channel(NamedTuple):
    field: str
    value: Path
    fault: Path | None
    divisor: float


def create(options: Mapping[str, Any]) -> Sensor:
    """The factory of driver `hwmon`."""
    return HwmonSensor(parse_options(HwmonOptions, options, "hwmon"))


class HwmonSensor:
    """The channels that are there when it is opened."""

    def __init__(self, options: HwmonOptions) -> None:
        self._options = options
        self._channels: list[_Channel] = []

    @property
    def schema(self) -> pa.Schema | None:
        """One float64 field per channel; None before the first open."""
        return pa.schema([(channel.field, pa.float64()) for channel in self._channels]) if self._channels else None

    def open(self) -> None:
        """Find the chips and their channels.

        Raises:
            SensorError: there is none; a module may be loaded later.
            SensorConfigError: a named chip or field is missing among those that are there.
        """
        base = Path(self._options.root) / "class" / "hwmon"
        chips = _chips(base)
        if not chips:
            raise SensorError(f"driver 'hwmon': no chip under {base}; load the kernel module of the board's sensors")
        names = sorted(name for name, _ in chips)
        for wanted in self._options.chips:
            if wanted not in names:
                raise SensorConfigError(f"driver 'hwmon': there is no chip {wanted!r}; there are {names}")
        channels = [
            channel
            for name, folder in chips
            if not self._options.chips or name in self._options.chips
            for channel in _channels(name, folder, self._options.labels)
        ]
        self._channels = _selected(channels, self._options.fields)
        if not self._channels:
            raise SensorError(f"driver 'hwmon': the chips {names} have no channel to read")

    def read(self, stop: threading.Event) -> Reading:
        """All channels, one after the other; some chips take milliseconds each."""
        values = {channel.field: _value(channel) for channel in self._channels}
        if all(value is None for value in values.values()):
            raise SensorError(f"driver 'hwmon': none of {len(values)} channels answers")
        return Reading(values)

    def close(self) -> None:
        """Nothing is held."""


def _chips(base: Path) -> list[tuple[str, Path]]:
    """Name and folder of each chip; names that occur again get `_2`, `_3`, … in the order of their place on the bus.

    The numbers of `hwmonN` change from boot to boot, the place does not.
    """
    found = []
    for folder in sorted(base.glob("hwmon*")):
        try:
            name = slug(read_text(folder / "name"))
        except OSError:
            continue  # It went away between listing and reading.
        place = str((folder / "device").resolve()) if (folder / "device").exists() else folder.name
        found.append((name or folder.name, place, folder))
    chips: list[tuple[str, Path]] = []
    seen: dict[str, int] = {}
    for name, _, folder in sorted(found):
        seen[name] = seen.get(name, 0) + 1
        chips.append((name if seen[name] == 1 else f"{name}_{seen[name]}", folder))
    return chips


def _channels(chip: str, folder: Path, labels: bool) -> list[_Channel]:
    found: dict[tuple[str, int], tuple[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        match = _CHANNEL.fullmatch(path.name)
        # An average stands in only where there is no momentary value.
        if match and (match[3] == "input" or not (folder / f"{match[1]}{match[2]}_input").exists()):
            found[(match[1], int(match[2]))] = (match[3], path)
    channels, taken = [], set()
    for (kind, number), (item, path) in sorted(found.items()):
        divisor, unit = _UNITS[kind]
        field = f"{chip}_{kind}{number}{'_average' if item == 'average' else ''}_{unit}"
        if labels:
            label = _label(folder / f"{kind}{number}_label")
            field = f"{chip}_{label}_{unit}" if label and f"{chip}_{label}_{unit}" not in taken else field
        taken.add(field)
        fault = folder / f"{kind}{number}_fault"
        channels.append(_Channel(field, path, fault if fault.exists() else None, divisor))
    return channels


def _label(path: Path) -> str:
    try:
        return slug(read_text(path))
    except OSError:
        return ""  # Labels are optional.


def _selected(channels: list[_Channel], fields: list[str]) -> list[_Channel]:
    if not fields:
        return channels
    by_field = {channel.field: channel for channel in channels}
    for field in fields:
        if field not in by_field:
            raise SensorConfigError(f"driver 'hwmon': there is no field {field!r}; there are {sorted(by_field)}")
    return [by_field[field] for field in fields]


def _value(channel: _Channel) -> float | None:
    if channel.fault is not None and read_number(channel.fault) == 1:
        return None
    raw = read_number(channel.value)
    return None if raw is None else raw / channel.divisor

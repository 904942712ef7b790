"""What Linux Industrial I/O says about a device: its channels, their scales, and their units.

Source of names and units: Linux kernel, Documentation/ABI/testing/sysfs-bus-iio.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from edge_agent.sensors.port import SensorConfigError, SensorError
from edge_agent.sensors.sysfs import read_number, read_text, slug, write_text

_NAME = re.compile(r"(?P<type>[a-z]+)(?P<index>\d*(?:-[a-z]+\d+)?)(?:_(?P<modifier>.+))?")
_UNITS: Mapping[str, tuple[float, str]] = {
    "accel": (1.0, "m_s2"),
    "gravity": (1.0, "m_s2"),
    "anglvel": (1.0, "rad_s"),
    "deltaangl": (1.0, "rad"),
    "deltavelocity": (1.0, "m_s"),
    "velocity": (1.0, "m_s"),
    "angl": (1.0, "rad"),
    "incli": (1.0, "deg"),
    "rot": (1.0, "deg"),
    "magn": (1e-4, "t"),  # gauss
    "temp": (1e-3, "c"),  # milli degrees Celsius
    "voltage": (1e-3, "v"),  # millivolts
    "current": (1e-3, "a"),  # milliamps
    "power": (1e-3, "w"),  # milliwatts
    "energy": (1.0, "j"),
    "capacitance": (1e-9, "f"),  # nanofarads
    "resistance": (1.0, "ohm"),
    "pressure": (1e3, "pa"),  # kilopascal
    "humidityrelative": (1e-3, "percent"),  # milli percent
    "concentration": (1.0, "percent"),
    "positionrelative": (1e-3, "percent"),  # milli percent
    "illuminance": (1.0, "lx"),
    "distance": (1.0, "m"),
}
"""Channel type to the factor from the kernel's unit to the field's, and the unit at the end of the field's name."""


class IioOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of `iio`."""

    device: str
    """Name, label or id (`iio:device0`) of the device."""
    channels: list[str] = []
    """Channels as the kernel names them without `in_`: `accel_x`, `voltage0`; empty reads all."""
    type: Literal["float32", "float64"] = "float32"
    """Type of all fields. float32 holds raw values of up to 24 bits exactly."""
    sampling_frequency_hz: float = 0.0
    """Written to the device's `sampling_frequency`; 0 leaves it as it is."""
    buffered: bool = False
    trigger: str = ""
    """Buffered: name of the trigger; empty leaves the one that is set."""
    buffer_rows: int = 4096
    """Buffered: how many scans the kernel holds for us. What does not fit is lost in the kernel, uncounted."""
    watermark_rows: int = 64
    """Buffered: how many scans to wait for, where the kernel knows a watermark."""
    root: str = "/sys"
    dev: str = "/dev"


class Channel(NamedTuple):
    """One channel of a device."""

    name: str
    """As the kernel names it, without `in_`."""
    field: str
    value: Path | None
    """The attribute of a polled read; None where the channel can only be buffered."""
    scaled: bool
    """Whether the polled attribute is in the kernel's unit already."""
    offset: float
    factor: float
    """`(raw + offset) * factor` is the field's value."""
    unit_factor: float
    """What a polled scaled attribute is multiplied with."""


def find_device(options: IioOptions) -> Path:
    """The sysfs folder of the device.

    Raises:
        SensorError: there is none of that name, label or id; naming those there are.
        SensorConfigError: there are several.
    """
    base = Path(options.root) / "bus" / "iio" / "devices"
    known: dict[Path, set[str]] = {}
    for folder in sorted(base.glob("iio:device*")):
        names = {folder.name}
        for attribute in ("name", "label"):
            try:
                names.add(read_text(folder / attribute))
            except OSError:
                continue  # A label is optional, and the device may go away between listing and reading.
        known[folder] = names
    matches = [folder for folder, names in known.items() if options.device in names]
    if len(matches) > 1:
        raise SensorConfigError(
            f"driver 'iio': {len(matches)} devices are called {options.device!r}; name one of "
            f"{[folder.name for folder in matches]}"
        )
    if not matches:
        raise SensorError(
            f"driver 'iio': no device {options.device!r} under {base}; there are "
            f"{sorted(name for names in known.values() for name in names)}"
        )
    return matches[0]


def set_frequency(folder: Path, options: IioOptions) -> None:
    """Write the sampling frequency, if one is configured."""
    if options.sampling_frequency_hz:
        write_text(folder / "sampling_frequency", f"{options.sampling_frequency_hz:g}", "iio")


def find_channels(folder: Path, wanted: list[str], polled: bool) -> list[Channel]:
    """The input channels of a device, in the order of their names, or of `wanted`.

    Raises:
        SensorConfigError: a wanted channel is not there, or there is none at all.
    """
    attributes = {path.name for path in folder.iterdir()}
    names = {
        name[3 : -len(suffix)]
        for name in attributes
        for suffix in ("_raw", "_input")
        if name.startswith("in_") and name.endswith(suffix)
    }
    if not polled:
        names |= {name for name in wanted if name not in names}
    missing = [name for name in wanted if name not in names]
    if missing or not names:
        raise SensorConfigError(
            f"driver 'iio': {folder.name} has no channel {', '.join(missing) or 'at all'}; there are {sorted(names)}"
        )
    return [_channel(folder, attributes, name) for name in wanted or sorted(names, key=_natural)]


def _channel(folder: Path, attributes: set[str], name: str) -> Channel:
    match = _NAME.fullmatch(name)
    kind = match["type"] if match else name
    scale = _shared(folder, attributes, name, "scale")
    offset = _shared(folder, attributes, name, "offset")
    raw, scaled = f"in_{name}_raw", f"in_{name}_input"
    use_input = scaled in attributes and (raw not in attributes or scale is None)
    unit_factor, unit = _UNITS.get(kind, (1.0, ""))
    if scale is None and not use_input:
        # Without a scale the kernel does not know the unit either.
        unit_factor, unit = 1.0, "raw"
    value = folder / (scaled if use_input else raw) if use_input or raw in attributes else None
    field = f"{slug(name)}_{unit}" if unit else slug(name)
    factor = (1.0 if scale is None else scale) * unit_factor
    return Channel(name, field, value, use_input, offset or 0.0, factor, unit_factor)


def _shared(folder: Path, attributes: set[str], name: str, what: str) -> float | None:
    """The scale or offset of a channel: its own, or one shared by its kind, the most special first."""
    match = _NAME.fullmatch(name)
    candidates = [name]
    if match:
        kind, index, modifier = match["type"], match["index"], match["modifier"]
        if modifier:
            candidates += [f"{kind}_{modifier}", f"{kind}{index}"]
        if "-" in index:
            candidates.append(f"{kind}-{kind}")
        candidates.append(kind)
    for candidate in candidates:
        if f"in_{candidate}_{what}" in attributes:
            return read_number(folder / f"in_{candidate}_{what}")
    return None


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]

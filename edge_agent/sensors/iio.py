"""Driver `iio`: converters, accelerometers, pressure, light and the like, through Linux Industrial I/O.

Two ways: *polled*, one read of `in_…_raw` or `in_…_input` per channel (tens to hundreds of readings per second), here;
and *buffered* (`iio_buffer`), where the kernel collects whole scans and hands them over in blocks (kHz).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from edge_agent.sensors.iio_buffer import IioBufferSensor
from edge_agent.sensors.iio_channels import Channel, IioOptions, find_channels, find_device, set_frequency
from edge_agent.sensors.options import parse_options
from edge_agent.sensors.port import Reading, Sensor, SensorError
from edge_agent.sensors.sysfs import read_number


def create(options: Mapping[str, Any]) -> Sensor:
    """The factory of driver `iio`."""
    parsed = parse_options(IioOptions, options, "iio")
    return IioBufferSensor(parsed) if parsed.buffered else IioSensor(parsed)


class IioSensor:
    """Polls the channels that are there when it is opened."""

    def __init__(self, options: IioOptions) -> None:
        self._options = options
        self._channels: list[Channel] = []

    @property
    def schema(self) -> pa.Schema | None:
        """One field per channel; None before the first open."""
        kind = pa.type_for_alias(self._options.type)
        return pa.schema([(channel.field, kind) for channel in self._channels]) if self._channels else None

    def open(self) -> None:
        """Find the device and its channels, with their scales as they are now.

        Raises:
            SensorError: the device is not there.
            SensorConfigError: it has no such channel, or refuses the sampling frequency.
        """
        folder = find_device(self._options)
        set_frequency(folder, self._options)
        self._channels = find_channels(folder, self._options.channels, polled=True)

    def read(self, stop: threading.Event) -> Reading:
        """All channels, one after the other; they are not sampled at the same moment."""
        values = {channel.field: _value(channel) for channel in self._channels}
        if all(value is None for value in values.values()):
            raise SensorError(f"driver 'iio': none of the channels of {self._options.device!r} answers")
        return Reading(values)

    def close(self) -> None:
        """Nothing is held."""


def _value(channel: Channel) -> float | None:
    raw = read_number(channel.value) if channel.value is not None else None
    if raw is None:
        return None
    return raw * channel.unit_factor if channel.scaled else (raw + channel.offset) * channel.factor

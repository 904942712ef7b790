"""Buffered capture of driver `iio`: the kernel samples on its trigger, and hands over whole scans through /dev.

Source of the layout: Linux kernel, Documentation/iio/iio_devbuf.rst. Each channel is aligned to its own size, and a
scan to that of its largest channel. Types such as `be:s12/16>>4` are 12 valid bits, signed, big endian, in 16, shifted
by 4. Storage of 8, 16, 32 and 64 bits is understood; repeated elements (quaternions) are not.

Tested against a synthetic sysfs tree and a FIFO in place of the device node, not on hardware.
"""

from __future__ import annotations

import os
import re
import select
import struct
import threading
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from edge_agent import compute as pc
from edge_agent.sensors.iio_channels import Channel, IioOptions, find_channels, find_device, set_frequency
from edge_agent.sensors.port import Block, SensorConfigError, SensorError
from edge_agent.sensors.sysfs import read_number, read_text, write_text

_TYPE = re.compile(r"(be|le):([sfu])(\d+)/(\d+)(?:X(\d+))?(?:>>(\d+))?")
_CODES = {("s", 8): "b", ("u", 8): "B", ("s", 16): "h", ("u", 16): "H", ("s", 32): "i", ("u", 32): "I"}
_CODES |= {("s", 64): "q", ("u", 64): "Q", ("f", 16): "e", ("f", 32): "f", ("f", 64): "d"}
_TIMESTAMP = "timestamp"
_POLL_S = 0.2
_ROWS_MAX = 65_536


class Element(NamedTuple):
    """How one channel lies in a scan."""

    name: str
    position: int
    """Its place among the channels of the scan."""
    endian: str
    """`<` or `>`, as struct has it."""
    code: str
    """Type code of struct."""
    bits: int
    storage_bits: int
    shift: int


def parse_element(name: str, text: str, index: int) -> Element:
    """Read a scan element's type.

    Raises:
        SensorConfigError: naming the channel and the type that is not understood.
    """
    match = _TYPE.fullmatch(text)
    code = _CODES.get((match[2], int(match[4]))) if match else None
    if match is None or code is None or int(match[5] or 1) > 1 or not 1 <= int(match[3]) <= int(match[4]):
        raise SensorConfigError(
            f"driver 'iio': channel {name!r} has the scan type {text!r}, which is not understood; "
            "leave it out of channels"
        )
    endian = "<" if match[1] == "le" else ">"
    return Element(name, index, endian, code, int(match[3]), int(match[4]), int(match[6] or 0))


class ScanLayout:
    """Where the channels are in a scan, and how to take a row of scans apart. Pure.

    Args:
        elements: the enabled channels, in any order.

    Attributes:
        scan_bytes: length of a scan, padding included.
    """

    def __init__(self, elements: list[Element]) -> None:
        self._elements = sorted(elements, key=lambda element: element.position)
        offset, largest = 0, 1
        places: list[tuple[int, Element]] = []
        for element in self._elements:
            size = element.storage_bits // 8
            offset = -(-offset // size) * size
            places.append((offset, element))
            offset += size
            largest = max(largest, size)
        self.scan_bytes = -(-offset // largest) * largest
        self._formats = [self._format(places, endian) for endian in "<>"]

    def decode(self, scans: bytes) -> dict[str, pa.Array]:
        """The values of each channel, shifted, masked and sign-extended, not scaled.

        Args:
            scans: a whole number of scans, at least one.
        """
        columns: dict[str, pa.Array] = {}
        for layout, elements in self._formats:
            if elements:
                # One C loop over all scans per byte order; no Python code runs per row.
                rows = zip(*struct.iter_unpack(layout, scans), strict=True)
                columns |= {
                    element.name: _clean(element, values) for element, values in zip(elements, rows, strict=True)
                }
        return columns

    def _format(self, places: list[tuple[int, Element]], endian: str) -> tuple[str, list[Element]]:
        text, position, elements = endian, 0, []
        for offset, element in places:
            if element.endian == endian:
                text += f"{offset - position}x{element.code}"
                position = offset + element.storage_bits // 8
                elements.append(element)
        return text + f"{self.scan_bytes - position}x", elements


def _clean(element: Element, values: tuple[int | float, ...]) -> pa.Array:
    if element.code in "efd":
        return pa.array(values, type=pa.float64())
    if element.code == "Q" and element.bits == element.storage_bits:
        return pa.array(values, type=pa.uint64())
    if element.code == "Q":
        # Read as unsigned; only the valid bits stay, which fit int64.
        # The shift is unsigned too: with a signed one Arrow would look for a common type, and refuse the upper half.
        numbers = pc.shift_right(pa.array(values, type=pa.uint64()), pa.scalar(element.shift, pa.uint64()))
        return pc.bit_wise_and(numbers, pa.scalar(2**element.bits - 1, pa.uint64())).cast(pa.int64())
    numbers = pa.array(values, type=pa.int64())
    if element.bits == 64:
        return numbers
    numbers = pc.bit_wise_and(pc.shift_right(numbers, element.shift), 2**element.bits - 1)
    if element.code.islower():
        sign = 2 ** (element.bits - 1)
        numbers = pc.subtract(pc.bit_wise_xor(numbers, sign), sign)
    return numbers


class IioBufferSensor:
    """Captures scans of a device; one process at a time can."""

    def __init__(self, options: IioOptions) -> None:
        self._options = options
        if not (options.buffer_rows >= 1 and 1 <= options.watermark_rows <= options.buffer_rows):
            raise SensorConfigError(
                f"driver 'iio': buffer_rows = {options.buffer_rows}, watermark_rows = {options.watermark_rows}; "
                "choose 1 <= watermark_rows <= buffer_rows"
            )
        self._channels: list[Channel] = []
        self._layout = ScanLayout([])
        self._control: Path | None = None
        self._file = -1
        self._rest = b""
        self._interval_ns: int | None = None

    @property
    def schema(self) -> pa.Schema | None:
        """One field per channel; None before the first open."""
        kind = pa.type_for_alias(self._options.type)
        return pa.schema([(channel.field, kind) for channel in self._channels]) if self._channels else None

    def open(self) -> None:
        """Choose the channels, start the kernel's buffer and open the device node.

        Raises:
            SensorError: the device is not there, or busy.
            SensorConfigError: it cannot capture, or may not be set up.
        """
        folder = find_device(self._options)
        elements, control = _scan_folders(folder)
        if elements is None or control is None:
            raise SensorConfigError(f"driver 'iio': {folder.name} has no buffer; leave out buffered = true")
        write_text(control / "enable", "0", "iio")
        set_frequency(folder, self._options)
        if self._options.trigger:
            write_text(folder / "trigger" / "current_trigger", self._options.trigger, "iio")
        available = {path.name[3:-3] for path in elements.glob("in_*_en")}
        wanted = self._options.channels or sorted(available - {_TIMESTAMP})
        missing = [name for name in wanted if name not in available]
        if missing:
            raise SensorConfigError(
                f"driver 'iio': {folder.name} cannot buffer {missing}; it can buffer {sorted(available)}"
            )
        timed = _TIMESTAMP in available
        if timed:
            _stamp_with_wall_clock(folder)
        enabled = [*wanted, *([_TIMESTAMP] if timed else [])]
        for name in sorted(available):
            write_text(elements / f"in_{name}_en", str(int(name in enabled)), "iio")
        self._layout = ScanLayout([_element(elements, name) for name in enabled])
        self._interval_ns = None if timed else _interval_ns(folder)
        self._channels = find_channels(folder, list(wanted), polled=False)
        write_text(control / "length", str(self._options.buffer_rows), "iio")
        if (control / "watermark").exists():
            write_text(control / "watermark", str(self._options.watermark_rows), "iio")
        self._control, self._rest = control, b""
        self._open_node(Path(self._options.dev) / folder.name)
        write_text(control / "enable", "1", "iio")

    def read(self, stop: threading.Event) -> Block | None:
        """What the kernel has collected, waiting for it; None when `stop` ends the wait."""
        if self._file < 0:
            raise SensorError("driver 'iio' was read before it was opened")
        size = self._layout.scan_bytes
        while not stop.is_set():
            if not select.select([self._file], [], [], _POLL_S)[0]:
                continue
            try:
                data = os.read(self._file, size * min(self._options.buffer_rows, _ROWS_MAX))
            except BlockingIOError:
                continue
            except OSError as error:
                raise SensorError(f"driver 'iio': the buffer of {self._options.device!r} broke off: {error}") from error
            if not data:
                raise SensorError(f"driver 'iio': the buffer of {self._options.device!r} has ended")
            data = self._rest + data
            whole = len(data) // size * size
            self._rest = data[whole:]
            if whole:
                return self._block(data[:whole])
        return None

    def close(self) -> None:
        """Stop the kernel's buffer and let go of the device node."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        if self._control is not None:
            control, self._control = self._control, None
            write_text(control / "enable", "0", "iio")

    def _open_node(self, node: Path) -> None:
        try:
            self._file = os.open(node, os.O_RDONLY | os.O_NONBLOCK)
        except PermissionError as error:
            raise SensorConfigError(
                f"driver 'iio': {node} may not be read; give the agent's user that right"
            ) from error
        except OSError as error:
            raise SensorError(f"driver 'iio': {node} cannot be opened now: {error}") from error

    def _block(self, scans: bytes) -> Block:
        values = self._layout.decode(scans)
        kind = pa.type_for_alias(self._options.type)
        columns = {}
        for channel in self._channels:
            numbers = values[channel.name].cast(pa.float64(), safe=False)
            scaled = pc.multiply(pc.add(numbers, channel.offset), channel.factor)
            columns[channel.field] = scaled.cast(kind)
        if self._interval_ns is not None:
            return Block(columns, interval_ns=self._interval_ns)
        return Block(columns, ts_us=pc.divide(values[_TIMESTAMP], 1000))


def _scan_folders(folder: Path) -> tuple[Path | None, Path | None]:
    """Where the scan elements and the buffer's switches are: together since kernel 5.11, apart before."""
    if (folder / "buffer0").is_dir():
        return folder / "buffer0", folder / "buffer0"
    if (folder / "scan_elements").is_dir() and (folder / "buffer").is_dir():
        return folder / "scan_elements", folder / "buffer"
    return None, None


def _element(elements: Path, name: str) -> Element:
    try:
        text, index = read_text(elements / f"in_{name}_type"), read_text(elements / f"in_{name}_index")
    except OSError:
        # Channels of one kind may share the type: in_voltage_type for in_voltage0_en.
        shared = re.sub(r"[\d_].*$", "", name)
        try:
            text, index = read_text(elements / f"in_{shared}_type"), read_text(elements / f"in_{name}_index")
        except OSError as error:
            raise SensorError(f"driver 'iio': the scan element {name!r} cannot be read now: {error}") from error
    return parse_element(name, text, int(index))


def _stamp_with_wall_clock(folder: Path) -> None:
    clock = folder / "current_timestamp_clock"
    # Kernels before 4.5 know only the wall clock, and have no such switch.
    if clock.exists():
        write_text(clock, "realtime", "iio")


def _interval_ns(folder: Path) -> int:
    frequency = read_number(folder / "sampling_frequency")
    if not frequency or frequency <= 0:
        raise SensorConfigError(
            f"driver 'iio': {folder.name} has neither a timestamp channel nor a sampling_frequency, so rows would have "
            "no time; leave out buffered = true"
        )
    return round(1e9 / frequency)

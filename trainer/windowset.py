"""The windows of a dataset with what is known of each, and how they stand on disk: `windows.npy` and `index.arrow`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from trainer.errors import DataError

Float32s = npt.NDArray[np.float32]
Int64s = npt.NDArray[np.int64]
Strings = npt.NDArray[np.str_]

WINDOWS_FILE = "windows.npy"
INDEX_FILE = "index.arrow"
CHUNK_BYTES = 16 * 1024 * 1024
_META = b"headwater.windows"
_MISSING = "the dataset in {folder} cannot be read ({error}); make it again: headwater train dataset RECIPE"


class WindowMeta(msgspec.Struct, frozen=True, kw_only=True):
    """What holds for all windows of a dataset."""

    fields: tuple[str, ...]
    """Names of the channels, in their order."""
    dtypes: tuple[str, ...]
    """Arrow types of the fields as the lake has them."""
    classes: tuple[str, ...]
    """The labels that occur, sorted; empty where there are none."""
    sample_rate_hz: float | None
    """One over the median time between readings; None where there was no pair of readings."""
    streams: Mapping[str, int]
    """Delta version of every table that was read, by stream (`watch`) or path (`control/labels`)."""


@dataclass(frozen=True, eq=False)
class WindowSet:
    """Windows of all devices: by device, then in the order in which they were recorded."""

    windows: Float32s
    """`[N, W, C]`; NaN where the value was null. Perhaps a read-only map of the file."""
    labels: Strings | None
    """`[N]`; "" for a window without. None where the recipe has no labels."""
    groups: Strings
    """`[N]`: who must not be on both sides of a split."""
    devices: Strings
    """`[N]`."""
    starts_us: Int64s
    """`[N]`: ts of the first reading, microseconds since 1970-01-01 UTC."""
    ends_us: Int64s
    """`[N]`: ts of the last reading, which is the time of the window."""
    meta: WindowMeta

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the channels."""
        return self.meta.fields

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels that occur, sorted."""
        return self.meta.classes

    def __len__(self) -> int:
        """How many windows."""
        return len(self.windows)

    def chunks(self) -> Iterator[slice]:
        """The windows in pieces of about CHUNK_BYTES, for work that should not hold them all."""
        size = max(1, CHUNK_BYTES // max(1, self.windows[:1].nbytes))
        for start in range(0, len(self.windows), size):
            yield slice(start, min(start + size, len(self.windows)))

    def pieces(self, rows: Int64s) -> Iterator[Float32s]:
        """Some of the windows, `float32[M, W, C]` of about CHUNK_BYTES at a time."""
        size = max(1, CHUNK_BYTES // max(1, self.windows[:1].nbytes))
        for start in range(0, len(rows), size):
            yield self.windows[rows[start : start + size]]

    def sha256(self) -> str:
        """Of windows, labels, groups and times as they are used."""
        digest = hashlib.sha256()
        digest.update(repr((self.windows.shape, self.fields)).encode())
        for piece in self.chunks():
            digest.update(np.ascontiguousarray(self.windows[piece], "<f4").data)
        for column in (self.labels, self.groups, self.devices):
            digest.update("\0".join(() if column is None else column.tolist()).encode() + b"\1")
        digest.update(self.ends_us.astype("<i8").tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write both files into a folder that is there.

        Raises:
            OSError: the disk refused.
        """
        np.save(folder / WINDOWS_FILE, self.windows)
        self.save_index(folder)

    def save_index(self, folder: Path) -> None:
        """Write all but the windows themselves."""
        columns = {
            "device": pa.array(self.devices.tolist(), pa.string()),
            "group": pa.array(self.groups.tolist(), pa.string()),
            "label": pa.nulls(len(self), pa.string())
            if self.labels is None
            else pa.array(self.labels.tolist(), pa.string()),
            "start_us": pa.array(self.starts_us, pa.int64()),
            "end_us": pa.array(self.ends_us, pa.int64()),
        }
        table = pa.table(columns).replace_schema_metadata({_META: msgspec.json.encode(self.meta)})
        with pa.OSFile(str(folder / INDEX_FILE), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)

    @classmethod
    def load(cls, folder: Path, *, mapped: bool = True) -> WindowSet:
        """Read what `save` wrote.

        Args:
            folder: that holds both files.
            mapped: leave the windows on disk and read them as they are needed.

        Raises:
            DataError: the files are not there, or are not what they should be.
        """
        try:
            windows = np.load(folder / WINDOWS_FILE, mmap_mode="r" if mapped else None, allow_pickle=False)
            with pa.OSFile(str(folder / INDEX_FILE), "rb") as source:
                table = pa.ipc.open_file(source).read_all()
            meta = msgspec.json.decode((table.schema.metadata or {})[_META], type=WindowMeta)
        except (OSError, ValueError, KeyError, pa.ArrowException, msgspec.DecodeError) as error:
            raise DataError(_MISSING.format(folder=folder, error=error)) from error
        if windows.ndim != 3 or len(windows) != table.num_rows or windows.dtype != np.float32:
            found = f"{windows.dtype} {windows.shape} beside {table.num_rows} rows of index"
            raise DataError(_MISSING.format(folder=folder, error=found))
        unlabelled = table.column("label").null_count == table.num_rows
        return cls(
            windows,
            None if unlabelled else _strings(table.column("label")),
            _strings(table.column("group")),
            _strings(table.column("device")),
            table.column("start_us").to_numpy(),
            table.column("end_us").to_numpy(),
            meta,
        )


class WindowWriter:
    """Writes `windows.npy` piece by piece, so that no more than a piece is in memory. Use it with `with`.

    The header of an .npy file has room for a first dimension that grows (numpy.lib.format, since 1.23), so it is
    written again, as long as it was, when the number of windows is known.
    """

    def __init__(self, folder: Path, rows: int, channels: int) -> None:
        self._shape = (rows, channels)
        self._file = (folder / WINDOWS_FILE).open("wb")
        self.count = 0
        self._header()

    def __enter__(self) -> WindowWriter:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            if kind is None:
                self._file.seek(0)
                self._header()
        finally:
            self._file.close()

    def append(self, windows: Float32s) -> None:
        """Add windows.

        Args:
            windows: `[M, W, C]`.

        Raises:
            OSError: the disk refused.
        """
        self._file.write(np.ascontiguousarray(windows, "<f4").data)
        self.count += len(windows)

    def _header(self) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (self.count, *self._shape)}
        np.lib.format.write_array_header_1_0(self._file, header)


def _strings(column: pa.ChunkedArray) -> Strings:
    return np.array(column.to_pylist(), dtype=np.str_)

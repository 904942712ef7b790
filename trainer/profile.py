"""What a dataset's rows are like, device by device: the figures behind the data checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import pyarrow as pa

from contract.models import Window
from trainer.errors import DataError
from trainer.rows import DeviceRows, Float32s, Int64s
from trainer.windows import runs_of

Row = TypeVar("Row", bound=msgspec.Struct)


class DeviceProfile(msgspec.Struct, frozen=True, kw_only=True):
    """One device."""

    device: str
    group: str
    rows: int
    windows: int
    """Kept."""
    dropped_mixed: int
    """Windows over more than one label."""
    dropped_unlabelled: int
    windowed_rows: int
    """Rows that stand in at least one window, labelled or not."""
    duplicates: int
    """Rows with a `ts` that the device had before, in whatever epoch."""
    backwards: int
    """Rows with a `ts` before that of the row before."""
    runs: int
    """Stretches without a gap."""
    step_us: float | None
    """Median time between readings; None with fewer than two."""
    first_us: int
    last_us: int


class FieldProfile(msgspec.Struct, frozen=True, kw_only=True):
    """One field of one device."""

    device: str
    field: str
    nulls: int
    nans: int
    """NaN that the device itself recorded."""
    infinite: int
    minimum: float | None
    maximum: float | None
    stuck_rows: int
    """In stretches without a gap that have one and the same value for longer than `[checks] stuck_s`."""
    stuck_s: float
    """How long those took together."""


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """All devices, and all their fields."""

    devices: list[DeviceProfile]
    fields: list[FieldProfile]

    def save(self, folder: Path) -> None:
        """Write `devices.arrow` and `fields.arrow`.

        Raises:
            OSError: the disk refused.
        """
        for name, rows in (("devices", self.devices), ("fields", self.fields)):
            table = pa.Table.from_pylist([msgspec.structs.asdict(row) for row in rows])
            with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)

    @classmethod
    def load(cls, folder: Path) -> Profile:
        """Read what `save` wrote.

        Raises:
            DataError: the files are not there, or are not what they should be.
        """
        return cls(
            devices=_load(folder / "devices.arrow", DeviceProfile), fields=_load(folder / "fields.arrow", FieldProfile)
        )


def _load(path: Path, kind: type[Row]) -> list[Row]:
    try:
        with pa.OSFile(str(path), "rb") as source:
            return msgspec.convert(pa.ipc.open_file(source).read_all().to_pylist(), list[kind])  # type: ignore[valid-type]
    except (OSError, pa.ArrowException, msgspec.ValidationError) as error:
        raise DataError(f"{path} cannot be read ({error}); make it again: headwater train dataset RECIPE") from error


def device_figures(rows: DeviceRows, window: Window) -> dict[str, Any]:
    """The figures of a `DeviceProfile` that its rows alone decide."""
    steps = np.diff(rows.ts_us)
    rising = steps[steps > 0]
    return {
        "device": rows.device,
        "rows": len(rows.ts_us),
        "duplicates": len(rows.ts_us) - len(np.unique(rows.ts_us)),
        "backwards": int((steps < 0).sum()),
        "runs": len(runs_of(rows.ts_us, window, rows.epochs).starts),
        "step_us": float(np.median(rising)) if len(rising) else None,
        "first_us": int(rows.ts_us.min()),
        "last_us": int(rows.ts_us.max()),
    }


def field_profiles(rows: DeviceRows, fields: tuple[str, ...], window: Window, stuck_s: float) -> list[FieldProfile]:
    """The figures of each field of a device.

    Args:
        rows: of the device.
        fields: names of its columns.
        window: whose gaps end a stretch of one value.
        stuck_s: how long such a stretch may be.
    """
    runs = runs_of(rows.ts_us, window, rows.epochs).starts
    return [_field(rows, number, name, runs, stuck_s) for number, name in enumerate(fields)]


def _field(rows: DeviceRows, number: int, name: str, runs: Int64s, stuck_s: float) -> FieldProfile:
    values = rows.values[:, number]
    finite = values[np.isfinite(values)]
    stuck_rows, stuck_us = _stuck(values, rows.ts_us, runs, stuck_s * 1e6)
    return FieldProfile(
        device=rows.device,
        field=name,
        nulls=int(rows.nulls[number]),
        nans=int(np.isnan(values).sum()) - int(rows.nulls[number]),
        infinite=int(np.isinf(values).sum()),
        minimum=float(finite.min()) if len(finite) else None,
        maximum=float(finite.max()) if len(finite) else None,
        stuck_rows=stuck_rows,
        stuck_s=stuck_us / 1e6,
    )


def _stuck(values: Float32s, ts_us: Int64s, runs: Int64s, limit_us: float) -> tuple[int, int]:
    """Rows and microseconds of all stretches of one value that are longer than the limit; NaN equals nothing."""
    starts = np.union1d(runs, np.flatnonzero(values[1:] != values[:-1]) + 1).astype(np.int64)
    lengths = np.diff(starts, append=len(values))
    took_us = ts_us[starts + lengths - 1] - ts_us[starts]
    stuck = took_us > limit_us
    return int(lengths[stuck].sum()), int(took_us[stuck].sum())

"""Real recordings: the smartwatch data set that ships inside the `seglearn` wheel, as devices that can be replayed.

Ten people did seven shoulder exercises with a watch on either wrist: 140 recordings of acceleration (`ax ay az`, g) and
angular velocity (`wx wy wz`, rad/s), sampled at 50 Hz, 244,102 rows. Source: D. Burns and others, "Shoulder
physiotherapy exercise recognition: machine learning the inertial signals from a smartwatch", Physiological
Measurement 39 (2018), arXiv:1802.01489; BSD licence. Only the data file is read; the package is not imported.

**Reading a pickle.** The file is a numpy object array, so its content is a pickle, and unpickling can run code. Here it
cannot: the file must have the SHA-256 it had when it was read and checked by people (the lock file pins the wheel by
hash as well), and the unpickler knows the four names that such an array needs, and no other.

**Precision.** The file holds float64, but every value is a decimal of six places with rounding noise of earlier
arithmetic behind it (`-0.018608999999999983`). float32 holds all six places of every value, and is what a watch sends,
so that is what the devices carry, unless `precision="float64"` asks for the file's own bits.
"""

from __future__ import annotations

import _codecs
import hashlib
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from contract.batches import TS_TYPE
from contract.errors import ConfigurationError
from contract.names import TS

FIELDS = ("ax", "ay", "az", "wx", "wy", "wz")
RATE_HZ = 50
INTERVAL_US = 1_000_000 // RATE_HZ
STREAM = "watch"
LABELS_STREAM = "exercise"

FILE = "seglearn/data/watch_dataset.npy"
FILE_SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"
REMEDY = "run: pip install 'headwater[simulators]'"

Precision: TypeAlias = Literal["float32", "float64"]


class RecordingsMissing(ConfigurationError):
    """The recordings are not installed, or are not the ones that were checked. The message says what to install."""


@dataclass(frozen=True, eq=False, slots=True)
class Recording:
    """One exercise of one person, as one wrist felt it."""

    number: int
    """Place in the file, from 0."""
    subject: int
    """The person, 1 to 10."""
    side: Literal["left", "right"]
    exercise: str
    """`ABD`, `ER`, `FEL`, `IR`, `PEN`, `ROW` or `TRAP`, as the data set names them."""
    values: npt.NDArray[np.float64]
    """`[rows, 6]`, read-only, 50 Hz, in the order of `FIELDS`."""

    @property
    def device(self) -> str:
        """The device that replays it: `watch-s01-l` for the left wrist of person 1."""
        return f"watch-s{self.subject:02}-{self.side[0]}"


def find_watch_file() -> Path:
    """Where the data file is installed.

    Raises:
        RecordingsMissing: when the distribution `seglearn` is not installed, or lacks the file.
    """
    try:
        listed = files("seglearn") or []
    except PackageNotFoundError as error:
        raise RecordingsMissing(f"the watch recordings are not installed (seglearn is missing); {REMEDY}") from error
    for entry in listed:
        if entry.as_posix() == FILE and (path := Path(str(entry.locate()))).is_file():
            return path
    raise RecordingsMissing(f"the installed seglearn has no {FILE}; {REMEDY}")


def load_watch(path: Path | None = None) -> tuple[Recording, ...]:
    """All 140 recordings, in the order of the file; 18 MB.

    Args:
        path: the data file; None finds the installed one.

    Raises:
        RecordingsMissing: when the file is not there, or is not the one that was checked.
    """
    path = path or find_watch_file()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecordingsMissing(f"the watch recordings {path} cannot be read ({error}); {REMEDY}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != FILE_SHA256:
        raise RecordingsMissing(
            f"{path} has SHA-256 {found}, not {FILE_SHA256}: it is damaged, or another version, and is not opened; "
            f"{REMEDY}"
        )
    content = _unpickle(data)
    names, exercises = content["X_labels"], content["y_labels"]
    assert tuple(names) == FIELDS  # follows from the checksum
    recordings = []
    parts = zip(content["X"], content["y"], content["subject"], content["side"], strict=True)
    for number, (values, exercise, subject, side) in enumerate(parts):
        values.setflags(write=False)
        recordings.append(
            Recording(number, int(subject), "right" if side else "left", exercises[int(exercise)], values)
        )
    return tuple(recordings)


def by_device(recordings: Sequence[Recording]) -> dict[str, tuple[Recording, ...]]:
    """The recordings of each device, in the order of the file; devices in alphabetical order."""
    found: dict[str, list[Recording]] = {}
    for recording in recordings:
        found.setdefault(recording.device, []).append(recording)
    return {device: tuple(found[device]) for device in sorted(found)}


def watch_table(recordings: Sequence[Recording], precision: Precision = "float32") -> pa.Table:
    """The recordings one after the other as rows of the stream `watch`: `ts`, `ax` … `wz`.

    `ts` counts 20 ms a row from 1970-01-01; a replay puts its own time in its place.
    """
    values = np.concatenate([recording.values for recording in recordings]).astype(precision)
    columns = [pa.array(np.ascontiguousarray(values[:, i])) for i in range(len(FIELDS))]
    return pa.table([_times(len(values)), *columns], names=[TS, *FIELDS])


def labels_table(recordings: Sequence[Recording]) -> pa.Table:
    """What was going on at each row of `watch_table`: `ts`, `exercise`, `recording`, `subject`.

    A device reports these on change only, so the stream `exercise` has one row per recording.
    """
    rows = [len(recording.values) for recording in recordings]
    return pa.table(
        {
            TS: _times(sum(rows)),
            "exercise": pa.array(np.repeat([recording.exercise for recording in recordings], rows), pa.string()),
            "recording": pa.array(np.repeat([recording.number for recording in recordings], rows), pa.int32()),
            "subject": pa.array(np.repeat([recording.subject for recording in recordings], rows), pa.int32()),
        }
    )


def _times(rows: int) -> pa.Array:
    return pa.array(np.arange(rows, dtype=np.int64) * INTERVAL_US).cast(TS_TYPE)


def _array(kind: type, shape: tuple[int, ...], code: bytes) -> npt.NDArray[Any]:
    """Stands for `numpy.core.multiarray._reconstruct`: an empty array, which the pickle then fills."""
    return np.ndarray.__new__(kind, shape, np.dtype(code.decode()))


_ALLOWED: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy.core.multiarray", "_reconstruct"): _array,
    ("_codecs", "encode"): _codecs.encode,
}


class _Unpickler(pickle.Unpickler):
    """Knows what the data file needs, and nothing that could act."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise RecordingsMissing(f"the recordings ask for {module}.{name}, which they never did; {REMEDY}") from None


def _unpickle(data: bytes) -> dict[str, Any]:
    """The dictionary inside the object array inside the .npy file (numpy.lib.format, version 1.0)."""
    file = io.BytesIO(data)
    assert np.lib.format.read_magic(file) == (1, 0)
    np.lib.format.read_array_header_1_0(file)
    # The bytes were checked, and the unpickler reaches nothing but arrays.
    content = _Unpickler(file, encoding="latin1").load()
    return dict(content.item())

"""The watch recordings: found without importing their package, checked before they are opened, carried without loss."""

from __future__ import annotations

import pickle
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from contract.batches import TS_TYPE, check_batch
from contract.limits import DEFAULT_LIMITS
from contract.names import is_name
from simulators import recordings
from simulators.recordings import (
    FIELDS,
    Recording,
    RecordingsMissing,
    by_device,
    find_watch_file,
    labels_table,
    load_watch,
    watch_table,
)


@pytest.fixture(scope="module")
def watch() -> tuple[Recording, ...]:
    return load_watch()


def test_all_recordings_are_there_as_described(watch: tuple[Recording, ...]) -> None:
    assert len(watch) == 140
    assert [recording.number for recording in watch] == list(range(140))
    assert sum(len(recording.values) for recording in watch) == 244_102
    assert {recording.subject for recording in watch} == set(range(1, 11))
    assert {recording.exercise for recording in watch} == {"PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW"}
    assert all(recording.values.dtype == np.float64 and recording.values.shape[1] == 6 for recording in watch)
    assert "seglearn" not in sys.modules


def test_the_first_row_is_the_one_in_the_file(watch: tuple[Recording, ...]) -> None:
    assert watch[0].subject == 7
    assert watch[0].side == "right"
    assert watch[0].exercise == "PEN"
    assert watch[0].values[0].tolist() == [
        -1.083608,
        -0.018608999999999983,
        -0.027259999999999954,
        0.41141,
        -1.603097,
        -2.488642,
    ]


def test_each_person_and_side_is_one_device_with_every_exercise(watch: tuple[Recording, ...]) -> None:
    devices = by_device(watch)
    assert list(devices) == [f"watch-s{subject:02}-{side}" for subject in range(1, 11) for side in "lr"]
    assert all(is_name(device) for device in devices)
    assert all(len({recording.exercise for recording in each}) == len(each) == 7 for each in devices.values())


def test_float32_keeps_every_recorded_decimal(watch: tuple[Recording, ...]) -> None:
    """Six places in the file; float32 gives the same six places back for each of 1,464,612 values.

    Mutants tried: float16 (fails).
    """
    values = np.concatenate([recording.values for recording in watch])
    table = watch_table(watch)
    for column, field in enumerate(FIELDS):
        carried = table[field].to_numpy().astype(np.float64)
        assert np.array_equal(np.round(carried, 6), np.round(values[:, column], 6))


def test_float64_is_the_file_to_the_bit(watch: tuple[Recording, ...]) -> None:
    table = watch_table(watch[:3], "float64")
    values = np.concatenate([recording.values for recording in watch[:3]])
    for column, field in enumerate(FIELDS):
        assert table[field].to_numpy().tobytes() == np.ascontiguousarray(values[:, column]).tobytes()


def test_tables_are_batches_at_50_hz_and_labels_stand_beside_every_row(watch: tuple[Recording, ...]) -> None:
    device = by_device(watch)["watch-s03-l"]
    rows, labels = watch_table(device), labels_table(device)
    for table in (rows, labels):
        assert table.schema.field("ts").type == TS_TYPE
        check_batch(table.combine_chunks().to_batches()[0], DEFAULT_LIMITS)
    assert rows["ts"] == labels["ts"]
    assert set(np.diff(rows["ts"].cast(pa.int64()).to_numpy())) == {20_000}
    starts = [0, *np.cumsum([len(recording.values) for recording in device])[:-1].tolist()]
    assert labels["recording"].take(starts).to_pylist() == [recording.number for recording in device]
    assert set(labels["subject"].to_pylist()) == {3}


def test_a_missing_wheel_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(recordings, "files", missing)
    with pytest.raises(RecordingsMissing, match=r"pip install 'headwater\[simulators\]'"):
        load_watch()


def test_a_file_that_is_not_the_checked_one_is_never_unpickled(tmp_path: Path) -> None:
    """Mutants tried: the comparison of checksums left out (the file of this test is then opened)."""
    other = tmp_path / "watch_dataset.npy"
    data = bytearray(find_watch_file().read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    with pytest.raises(RecordingsMissing, match="SHA-256"):
        load_watch(other)
    with pytest.raises(RecordingsMissing, match="cannot be read"):
        load_watch(tmp_path / "none.npy")


def test_the_unpickler_reaches_nothing_that_could_act(tmp_path: Path) -> None:
    """Mutants tried: `find_class` that falls back to the one of `pickle` (the folder is made)."""

    class Act:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            import os

            return os.mkdir, (str(tmp_path / "made"),)

    header = find_watch_file().read_bytes()[:128]
    with pytest.raises(RecordingsMissing, match="mkdir"):
        recordings._unpickle(header + pickle.dumps(Act(), protocol=2))
    assert not (tmp_path / "made").exists()

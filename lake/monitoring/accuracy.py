"""How right a release was, once labels have come: predictions joined with what was true, window by window.

Labels are changes (a stream: a label holds from its `ts` until the next row of that device) or intervals
(`control/labels`). A window counts only where one and the same label holds from its first to its last reading. The
latest change of a device does not count before the next one has come: until then nobody knows how far it reaches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from contract.errors import ConfigurationError
from contract.names import PREDICTIONS_PREFIX
from lake.duck import identifier, literal
from lake.monitoring.feed import Predictions, parse, with_all_columns
from lake.monitoring.policy import LabelSource
from lake.query import Lake

Int64s = npt.NDArray[np.int64]
LABEL_ROWS_MAX = 2_000_000


class Intervals(NamedTuple):
    """The labels of one device: intervals that do not overlap, rising; neighbours differ or do not touch."""

    starts_us: Int64s
    ends_us: Int64s
    """The first moment at which it no longer holds."""
    labels: list[str]

    def over(self, starts_us: Int64s, ends_us: Int64s) -> list[str]:
        """The label that holds over each whole window, "" where there is none or more than one.

        Args:
            starts_us: `[N]`: of the first reading.
            ends_us: `[N]`: of the last.
        """
        at = np.searchsorted(self.starts_us, starts_us, side="right") - 1
        inside = (at >= 0) & (ends_us < self.ends_us[np.maximum(at, 0)]) if len(self.starts_us) else at >= 0
        return [self.labels[place] if good else "" for place, good in zip(at.tolist(), inside.tolist(), strict=True)]


class ClassFigures(msgspec.Struct, frozen=True):
    """One label."""

    windows: int
    """In which it was true."""
    precision: float
    """0 where it was never said."""
    recall: float
    f1: float


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """A release on a device, or on all."""

    release: int
    device: str
    """Empty: all devices."""
    windows: int
    labelled: int
    """Windows over which one label is known to hold."""
    accuracy: float | None
    """None where nothing is labelled."""
    macro_f1: float | None
    """Mean of F1 over the labels that were true, or said."""
    classes: dict[str, ClassFigures]

    @property
    def coverage(self) -> float:
        """Part of the windows that is labelled."""
        return self.labelled / self.windows if self.windows else 0.0


def labels_query(source: LabelSource, stream: str) -> str:
    """The SELECT that gives the labels: `_device, ts, label` or `_device, start, end, label`."""
    if source.sql:
        return f"SELECT * FROM ({source.sql})"
    if source.stream:
        said = f'{identifier(source.field)}::VARCHAR AS "label"'
        return f"SELECT _device, ts, {said} FROM {identifier(source.stream)} ORDER BY _device, ts, _seq, _row"
    return (
        f'SELECT device AS _device, "start", "end", "label" FROM {identifier(source.table)} '
        f'WHERE stream = {literal(stream)} ORDER BY device, "start", sequence'
    )


def read_labels(lake: Lake, source: LabelSource, stream: str) -> dict[str, Intervals]:
    """The labels of all devices.

    Raises:
        ConfigurationError: the answer lacks a column, or has too many rows.
        UnknownStreamError: there is no such table yet.
        StoreUnavailableError: the store did not answer.
    """
    answer = lake.sql(f"{labels_query(source, stream)} LIMIT {LABEL_ROWS_MAX + 1}")
    if answer.num_rows > LABEL_ROWS_MAX:
        raise ConfigurationError(f"there are more than {LABEL_ROWS_MAX} labels; give changes or intervals")
    return intervals_of(answer)


def intervals_of(answer: pa.Table) -> dict[str, Intervals]:
    """Sort labels by device.

    Args:
        answer: columns of `labels_query`, of changes in the order in which they were recorded.

    Raises:
        ConfigurationError: it lacks a column.
    """
    begins = "start" if "start" in answer.column_names else "ts"
    for name in ("_device", begins, "label", *(["end"] if begins == "start" else [])):
        if name not in answer.column_names:
            raise ConfigurationError(
                f"the labels have the columns {answer.column_names} and no {name}; [labels] sql must give _device, ts, "
                "label or _device, start, end, label"
            )
    starts = _times(answer.column(begins))
    ends = _times(answer.column("end")) if begins == "start" else [0] * len(starts)
    labels = [label or "" for label in answer.column("label").cast(pa.string()).to_pylist()]
    by_device: dict[str, list[tuple[int, int, str]]] = {}
    for device, start, end, label in zip(answer.column("_device").to_pylist(), starts, ends, labels, strict=True):
        by_device.setdefault(device, []).append((start, end, label))
    found = {}
    for device, rows in by_device.items():
        rows.sort(key=lambda row: row[0])
        if begins == "ts":
            # The last one is not over yet.
            rows = [(row[0], after[0], row[2]) for row, after in itertools.pairwise(rows)]
        found[device] = disjoint(rows)
    return found


def disjoint(rows: Sequence[tuple[int, int, str]]) -> Intervals:
    """Cut intervals so that none overlap, of those that do the one that began last counts, and join neighbours with
    one label.

    Args:
        rows: `(start, end, label)`, by rising start; of equals the later row counts.
    """
    edges = sorted({moment for start, end, _ in rows for moment in (start, end)})
    pieces: list[tuple[int, int, str]] = []
    open_: list[tuple[int, int, str]] = []
    number = 0
    for begin, end in itertools.pairwise(edges):
        while number < len(rows) and rows[number][0] <= begin:
            open_.append(rows[number])
            number += 1
        # The one that began last is on top; what is over beneath it is dropped when it comes up.
        while open_ and open_[-1][1] <= begin:
            open_.pop()
        if not open_ or not open_[-1][2]:
            continue
        label = open_[-1][2]
        if pieces and pieces[-1][1] == begin and pieces[-1][2] == label:
            pieces[-1] = pieces[-1][0], end, label
        else:
            pieces.append((begin, end, label))
    return Intervals(
        np.array([piece[0] for piece in pieces], np.int64),
        np.array([piece[1] for piece in pieces], np.int64),
        [piece[2] for piece in pieces],
    )


def read_predictions(lake: Lake, model: str, since_us: int, rows_max: int) -> Predictions:
    """The latest predictions.

    Args:
        lake: to ask.
        model: whose.
        since_us: not older, by the devices' clocks, microseconds since 1970-01-01 UTC.
        rows_max: not more.

    Raises:
        UnknownStreamError: no device has predicted yet.
        StoreUnavailableError: the store did not answer.
    """
    answer = lake.sql(
        f"SELECT _device, release, window_start, ts, label FROM {identifier(PREDICTIONS_PREFIX + model)} "
        f"WHERE ts >= make_timestamptz({since_us}) ORDER BY ts DESC LIMIT {rows_max}"
    )
    return parse(with_all_columns(answer))


def measure(rows: Predictions, labels: Mapping[str, Intervals]) -> list[Accuracy]:
    """Accuracy of every release on every device, and on all devices together.

    Args:
        rows: predictions.
        labels: by device.
    """
    true = np.full(len(rows), "", dtype=object)
    devices = np.array(rows.device, dtype=object)
    for device, intervals in labels.items():
        own = np.flatnonzero(devices == device)
        true[own] = intervals.over(rows.start_us[own], rows.end_us[own])
    said = np.array(rows.label, dtype=object)
    found = []
    for release in np.unique(rows.release).tolist():
        of_release = rows.release == release
        found.append(figures_of(release, "", true[of_release], said[of_release]))
        for device in sorted(set(devices[of_release])):
            own = of_release & (devices == device)
            found.append(figures_of(release, device, true[own], said[own]))
    return found


def figures_of(release: int, device: str, true: Iterable[str], said: Iterable[str]) -> Accuracy:
    """Figures of pairs; those whose truth is "" only count as windows."""
    pairs = list(zip(true, said, strict=True))
    known = [pair for pair in pairs if pair[0]]
    classes = {}
    for label in sorted({label for pair in known for label in pair if label}):
        hits = sum(pair == (label, label) for pair in known)
        support = sum(truth == label for truth, _ in known)
        claimed = sum(answer == label for _, answer in known)
        f1 = 2 * hits / (support + claimed)
        classes[label] = ClassFigures(
            support, hits / claimed if claimed else 0.0, hits / support if support else 0.0, f1
        )
    right = sum(truth == answer for truth, answer in known)
    return Accuracy(
        release=release,
        device=device,
        windows=len(pairs),
        labelled=len(known),
        accuracy=right / len(known) if known else None,
        macro_f1=sum(one.f1 for one in classes.values()) / len(classes) if classes else None,
        classes=classes,
    )


def _times(column: pa.ChunkedArray) -> list[int]:
    if not pa.types.is_timestamp(column.type):
        raise ConfigurationError(f"a time of the labels is {column.type}; write ::TIMESTAMPTZ in [labels] sql")
    forever = np.iinfo(np.int64).max
    moments = column.cast(pa.timestamp("us", tz=column.type.tz), safe=False).cast(pa.int64())
    return [forever if moment is None else moment for moment in moments.to_pylist()]

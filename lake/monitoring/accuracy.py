"""How right a release was, once labels have come: predictions joined with what was true, window by window.

Labels are changes (a stream: a label holds from its `ts` until the next row of that device) or intervals
(`control/labels`). A window counts only where one and the same label holds from its first to its last reading. The
latest change of a device does not count before the next one has come: until then nobody knows how far it reaches.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from contract.errors import ConfigurationError
from contract.names import PREDICTIONS_PREFIX
from lake.duck import identifier, literal
from lake.monitoring.feed import Predictions, empty, parse, with_all_columns
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


def accuracy_of(
    lake: Lake, model: str, source: LabelSource, stream: str, since_us: int, rows_max: int
) -> list[Accuracy]:
    """Accuracy of every release of a model on every device that predicted since then, and on all devices together.

    Only windows that a label may reach are read: where few devices of many are labelled, or labels are days late, the
    latest windows of all devices would hold none of them.

    Args:
        lake: to ask.
        model: whose predictions.
        source: of the labels.
        stream: that the model eats.
        since_us: no windows that end before, by the devices' clocks, microseconds since 1970-01-01 UTC.
        rows_max: windows that are held against labels; of more, the latest.

    Raises:
        ConfigurationError: as `read_labels`.
        UnknownStreamError: there are no labels, or no device has predicted yet.
        StoreUnavailableError: the store did not answer.
    """
    labels = read_labels(lake, source, stream, since_us)
    windows = count_predictions(lake, model, since_us)
    rows = read_predictions(lake, model, since_us, rows_max, labels)
    return measure(rows, labels, windows)


def labels_query(source: LabelSource, stream: str, since_us: int | None = None) -> str:
    """The SELECT that gives the labels: `_device, start, end, label`, or what `[labels] sql` gives.

    Args:
        source: of the labels.
        stream: that is labelled.
        since_us: those that are over by then are left out, microseconds since 1970-01-01 UTC; None for none. What
            `[labels] sql` gives is not looked into.
    """
    if source.sql:
        return f"SELECT * FROM ({source.sql})"
    over = "" if since_us is None else f' AND "end" > make_timestamptz({since_us})'
    if source.stream:
        said = identifier(source.field)
        is_nan = f"typeof({said}) IN ('FLOAT', 'DOUBLE') AND {said}::VARCHAR = 'nan'"
        # The latest change of a device has no end, and is not known to hold.
        return (
            f'SELECT * FROM (SELECT _device, ts AS "start", lead(ts) OVER (PARTITION BY _device ORDER BY ts, _seq, '
            f'_row) AS "end", CASE WHEN {is_nan} THEN \'\' ELSE {said}::VARCHAR END AS "label" '
            f'FROM {identifier(source.stream)}) WHERE "end" > "start"{over} ORDER BY _device, "start"'
        )
    return (
        f'SELECT device AS _device, "start", "end", "label" FROM {identifier(source.table)} '
        f'WHERE stream = {literal(stream)}{over} ORDER BY device, "start", sequence'
    )


def read_labels(lake: Lake, source: LabelSource, stream: str, since_us: int | None = None) -> dict[str, Intervals]:
    """The labels of all devices.

    Args:
        lake: to ask.
        source, stream, since_us: as of `labels_query`.

    Raises:
        ConfigurationError: the answer lacks a column, or has too many rows.
        UnknownStreamError: there is no such table yet.
        StoreUnavailableError: the store did not answer.
    """
    answer = lake.sql(f"{labels_query(source, stream, since_us)} LIMIT {LABEL_ROWS_MAX + 1}")
    if answer.num_rows > LABEL_ROWS_MAX:
        raise ConfigurationError(f"there are more than {LABEL_ROWS_MAX} labels; give changes or intervals")
    return intervals_of(answer)


def intervals_of(answer: pa.Table) -> dict[str, Intervals]:
    """Sort labels by device.

    Args:
        answer: `_device, start, end, label`, or `_device, ts, label` of changes in the order in which they were
            recorded.

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
    labels = _texts(answer.column("label"))
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


def read_predictions(
    lake: Lake, model: str, since_us: int, rows_max: int, labels: Mapping[str, Intervals] | None = None
) -> Predictions:
    """The latest predictions.

    Args:
        lake: to ask.
        model: whose.
        since_us: not older, by the devices' clocks, microseconds since 1970-01-01 UTC.
        rows_max: not more.
        labels: only windows of these devices that end between the first and the last label; None for all.

    Raises:
        UnknownStreamError: no device has predicted yet.
        StoreUnavailableError: the store did not answer.
    """
    within = ""
    if labels is not None:
        spans = [
            f"({literal(device)}, {found.starts_us[0]}, {found.ends_us.max()})"
            for device, found in labels.items()
            if len(found.starts_us)
        ]
        if not spans:
            return parse(empty())
        within = (
            f"JOIN (VALUES {', '.join(spans)}) l(device, start_us, end_us) ON p._device = l.device "
            "AND epoch_us(p.ts) >= l.start_us AND epoch_us(p.ts) < l.end_us "
        )
    answer = lake.sql(
        f"SELECT p._device, p.release, p.window_start, p.ts, p.label FROM {_source(model)} p {within}"
        f"WHERE p.ts >= make_timestamptz({since_us}) ORDER BY p.ts DESC LIMIT {rows_max}"
    )
    return parse(with_all_columns(answer))


def count_predictions(lake: Lake, model: str, since_us: int) -> dict[tuple[int, str], int]:
    """Windows by release and device.

    Args: as of `read_predictions`.
    """
    answer = lake.sql(
        f"SELECT coalesce(release, 0) AS release, _device, count(*) AS windows FROM {_source(model)} "
        f"WHERE ts >= make_timestamptz({since_us}) GROUP BY ALL"
    )
    return {(row["release"], row["_device"]): row["windows"] for row in answer.to_pylist()}


def _source(model: str) -> str:
    return identifier(PREDICTIONS_PREFIX + model)


def measure(
    rows: Predictions, labels: Mapping[str, Intervals], windows: Mapping[tuple[int, str], int] | None = None
) -> list[Accuracy]:
    """Accuracy of every release on every device, and on all devices together (device "").

    Args:
        rows: predictions.
        labels: by device.
        windows: how many there are by release and device, where `rows` are not all of them.
    """
    names: dict[str, int] = {"": 0}
    said = np.array([names.setdefault(label, len(names)) for label in rows.label], np.int64)
    true = np.zeros(len(rows), np.int64)
    groups: dict[tuple[int, str], int] = {key: number for number, key in enumerate(windows or {})}
    keys = zip(rows.release.tolist(), rows.device, strict=True)
    group = np.array([groups.setdefault(key, len(groups)) for key in keys], np.int64)
    for (_, device), own in _rows_of(groups, group):
        if device in labels and len(own):
            found = labels[device].over(rows.start_us[own], rows.end_us[own])
            true[own] = [names.setdefault(label, len(names)) for label in found]
    words = list(names)
    pairs: list[Pairs] = [{} for _ in groups]
    found_codes, counts = np.unique((group * len(words) + true) * len(words) + said, return_counts=True)
    for code, count in zip(found_codes.tolist(), counts.tolist(), strict=True):
        place, pair = divmod(code, len(words) ** 2)
        pairs[place][words[pair // len(words)], words[pair % len(words)]] = count
    told = []
    for release in sorted({release for release, _ in groups}):
        total: Pairs = {}
        all_windows = 0
        of_devices = []
        for (_, device), number in sorted(each for each in groups.items() if each[0][0] == release):
            here = sum(pairs[number].values()) if windows is None else windows.get((release, device), 0)
            all_windows += here
            for pair, count in pairs[number].items():
                total[pair] = total.get(pair, 0) + count
            of_devices.append(_figures(release, device, pairs[number], here))
        told += [_figures(release, "", total, all_windows), *of_devices]
    return told


Pairs = dict[tuple[str, str], int]
"""How often what was true, and what was said, came together."""


def _rows_of(groups: Mapping[tuple[int, str], int], group: Int64s) -> Iterator[tuple[tuple[int, str], Int64s]]:
    """The places of each group's rows."""
    order = np.argsort(group, kind="stable")
    edges = np.searchsorted(group[order], np.arange(len(groups) + 1))
    for key, number in groups.items():
        yield key, order[edges[number] : edges[number + 1]]


def figures_of(release: int, device: str, true: Iterable[str], said: Iterable[str]) -> Accuracy:
    """Figures of pairs; those whose truth is "" only count as windows."""
    pairs = Counter(zip(true, said, strict=True))
    return _figures(release, device, pairs, pairs.total())


def _figures(release: int, device: str, pairs: Mapping[tuple[str, str], int], windows: int) -> Accuracy:
    support: Counter[str] = Counter()
    claimed: Counter[str] = Counter()
    hits: Counter[str] = Counter()
    for (truth, answer), count in pairs.items():
        if not truth:
            continue
        support[truth] += count
        claimed[answer] += count
        hits[truth] += count if truth == answer else 0
    labelled = support.total()
    classes = {
        label: ClassFigures(
            support[label],
            hits[label] / claimed[label] if claimed[label] else 0.0,
            hits[label] / support[label] if support[label] else 0.0,
            2 * hits[label] / (support[label] + claimed[label]),
        )
        for label in sorted(support.keys() | claimed.keys())
        if label
    }
    return Accuracy(
        release=release,
        device=device,
        windows=windows,
        labelled=labelled,
        accuracy=hits.total() / labelled if labelled else None,
        macro_f1=sum(one.f1 for one in classes.values()) / len(classes) if classes else None,
        classes=classes,
    )


def _texts(column: pa.ChunkedArray) -> list[str]:
    """Labels as text, "" for none. NaN is none, as in training."""
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    return [text or "" for text in column.cast(pa.string()).to_pylist()]


def _times(column: pa.ChunkedArray) -> list[int]:
    if not pa.types.is_timestamp(column.type):
        raise ConfigurationError(f"a time of the labels is {column.type}; write ::TIMESTAMPTZ in [labels] sql")
    forever = np.iinfo(np.int64).max
    moments = column.cast(pa.timestamp("us", tz=column.type.tz), safe=False).cast(pa.int64())
    return [forever if moment is None else moment for moment in moments.to_pylist()]

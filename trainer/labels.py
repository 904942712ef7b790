"""What was true at each row: changes or intervals of a label table, joined to the rows of a device by time."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from contract.errors import ConfigurationError
from lake.columns import DEVICE
from lake.duck import identifier
from trainer.errors import DataError, RecipeError
from trainer.recipe import Labels
from trainer.windows import UNLABELLED, Codes, Int64s

LABEL_ROWS_MAX = 10_000_000
"""Changes or intervals of all devices, which are held in memory."""
CLASSES_MAX = 1_000
_FOREVER = np.iinfo(np.int64).max


class Track(NamedTuple):
    """The labels of one device, by rising start; no two at one moment."""

    starts_us: Int64s
    """`[M]`."""
    ends_us: Int64s
    """`[M]`: the first moment at which it no longer holds."""
    codes: Codes
    """`[M]`: index into `LabelBook.classes`, or UNLABELLED."""

    def at(self, ts_us: Int64s) -> Codes:
        """The label at each moment.

        Args:
            ts_us: `[N]`, in any order.

        Returns:
            `[N]`: codes.
        """
        if not len(self.starts_us):
            return np.full(len(ts_us), UNLABELLED, np.int32)
        found = np.searchsorted(self.starts_us, ts_us, side="right") - 1
        held = (found >= 0) & (ts_us < self.ends_us[found])
        return np.where(held, self.codes[found], UNLABELLED).astype(np.int32)


_NO_LABELS = Track(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int32))


class LabelBook(NamedTuple):
    """The labels of all devices."""

    classes: tuple[str, ...]
    """Names by code, sorted."""
    otherwise: int
    """Code of rows that have no label."""
    tracks: Mapping[str, Track]
    rows: int
    """Of the label table."""
    nan_rows: int
    """Of them, whose label is NaN or empty text: nobody can mean that."""

    def at(self, device: str, ts_us: Int64s) -> Codes:
        """The label of each row of a device: `[N]` codes."""
        codes = self.tracks.get(device, _NO_LABELS).at(ts_us)
        return codes if self.otherwise == UNLABELLED else np.where(codes == UNLABELLED, self.otherwise, codes)


def labels_query(labels: Labels, stream: str) -> str:
    """The SELECT that gives the labels: `_device, ts, label` or `_device, start, end, label`.

    Labels of a stream are made text here, as `lake.monitoring.accuracy` does it: there they are compared with the
    classes of the model. NaN becomes empty text, which is counted.

    Args:
        labels: of the recipe.
        stream: that is labelled.
    """
    if labels.sql:
        return labels.sql
    if labels.stream:
        # Rows in the order in which they were recorded: of two changes at one moment the later row counts.
        said = identifier(labels.field)
        is_nan = f"typeof({said}) IN ('FLOAT', 'DOUBLE') AND {said}::VARCHAR = 'nan'"
        return (
            f"SELECT {DEVICE}, ts, CASE WHEN {is_nan} THEN '' ELSE {said}::VARCHAR END AS \"label\" "
            f"FROM {identifier(labels.stream)} ORDER BY {DEVICE}, ts, _seq, _row"
        )
    # Of intervals that begin at one moment the one imported last counts: a correction.
    return (
        f'SELECT device AS {DEVICE}, "start", "end", "label" FROM {identifier(labels.table)} '
        f"WHERE stream = '{stream}' ORDER BY device, \"start\", sequence"
    )


def read_labels(answer: pa.Table, labels: Labels) -> LabelBook:
    """Sort an answer to `labels_query` by device.

    Raises:
        RecipeError: it lacks a column, or one is of a type that cannot be.
        DataError: there are too many rows or classes.
    """
    if answer.num_rows > LABEL_ROWS_MAX:
        raise DataError(
            f"the labels have more than {LABEL_ROWS_MAX} rows; give changes or intervals instead of one label per row"
        )
    begins = "start" if "start" in answer.column_names else "ts"
    for name in (DEVICE, begins, "label"):
        if name not in answer.column_names:
            raise RecipeError(
                f"[labels] gives the columns {answer.column_names} and no {name}; it must give _device, ts, label or "
                "_device, start, end, label"
            )
    devices = np.array(answer.column(DEVICE).to_pylist(), dtype=object)
    starts = _times(answer, begins)
    texts, nan_rows = _texts(answer.column("label"))
    classes = tuple(sorted({text for text in texts if text} | ({labels.otherwise} if labels.otherwise else set())))
    if len(classes) > CLASSES_MAX:
        raise DataError(
            f"the labels have {len(classes)} different values, more than {CLASSES_MAX}; a classification needs few: "
            "is [labels] field the right column?"
        )
    code_of = {text: code for code, text in enumerate(classes)} | {"": UNLABELLED}
    codes = np.array([code_of[text] for text in texts], dtype=np.int32)
    ends = _times(answer, "end") if begins == "start" and "end" in answer.column_names else None
    order = np.lexsort((np.arange(len(starts)), starts, devices.astype(np.str_))) if len(starts) else np.arange(0)
    tracks = {}
    edges = np.flatnonzero(devices[order][1:] != devices[order][:-1]) + 1 if len(order) else order
    for part in np.split(order, edges) if len(order) else ():
        begin = starts[part]
        end = np.append(begin[1:], _FOREVER) if ends is None else ends[part]
        tracks[str(devices[part[0]])] = flattened(Track(begin, end, codes[part]))
    return LabelBook(classes, code_of[labels.otherwise], tracks, answer.num_rows, nan_rows)


def flattened(track: Track) -> Track:
    """Intervals that overlap as ones that do not: at each moment that holds which began last and has not ended.

    Args:
        track: by rising start; of equal starts the later in the track counts as begun later.
    """
    if not (track.starts_us[1:] < track.ends_us[:-1]).any():
        return track
    bounds = np.unique(np.concatenate((track.starts_us, track.ends_us)))
    codes = np.full(len(bounds), UNLABELLED, np.int32)
    open_: list[tuple[int, int]] = []
    """Heap of (minus number in the track, end): the one that began last is on top."""
    coming = 0
    for number, bound in enumerate(bounds):
        while coming < len(track.starts_us) and track.starts_us[coming] <= bound:
            heapq.heappush(open_, (-coming, int(track.ends_us[coming])))
            coming += 1
        while open_ and open_[0][1] <= bound:
            heapq.heappop(open_)
        if open_:
            codes[number] = track.codes[-open_[0][0]]
    return Track(bounds, np.append(bounds[1:], _FOREVER), codes)


def _texts(column: pa.ChunkedArray) -> tuple[list[str], int]:
    """Labels as text, "" for none; and how many are NaN or empty.

    The text is the one that `lake.monitoring.accuracy` compares answers with: a truth value is `true`, not `True`.
    """
    try:
        told = column.cast(pa.string()).to_pylist()
    except pa.ArrowException as error:
        raise RecipeError(
            f"[labels] label is {column.type}, not text or a number; write label::VARCHAR in its sql"
        ) from error
    texts, bad = [], 0
    for value, text in zip(column.to_pylist(), told, strict=True):
        if text is None:
            texts.append("")
        elif (isinstance(value, float) and math.isnan(value)) or not text.strip():
            texts.append("")
            bad += 1
        else:
            texts.append(text)
    return texts, bad


def _times(answer: pa.Table, name: str) -> npt.NDArray[np.int64]:
    """A column of times as microseconds since 1970-01-01 UTC; null is forever."""
    column = answer.column(name)
    if not pa.types.is_timestamp(column.type):
        raise ConfigurationError(f"[labels] {name} is {column.type}, not a time; write {name}::TIMESTAMPTZ in its sql")
    moments = column.cast(pa.timestamp("us", tz=column.type.tz), safe=False).cast(pa.int64())
    return np.asarray(moments.fill_null(_FOREVER).to_numpy(), dtype=np.int64)

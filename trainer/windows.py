"""Cutting windows out of one device's rows, by the rule of `contract.models.Window`. Pure, vectorised."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from contract.models import Window

Float32s = npt.NDArray[np.float32]
Int64s = npt.NDArray[np.int64]
Codes = npt.NDArray[np.int32]

Span = Literal["drop", "majority", "last"]
_ONE_EPOCH: Int64s = np.zeros(0, np.int64)
UNLABELLED = -1
"""Code of a row or window without a label."""
MIXED = -2
"""Code of a window over more than one label that shall be dropped."""


class Runs(NamedTuple):
    """Stretches of rows without a gap in which `ts` does not go back."""

    starts: Int64s
    """`[R]`: index of the first row of each."""
    lengths: Int64s
    """`[R]`: rows of each."""


def runs_of(ts_us: Int64s, window: Window, epochs: Int64s = _ONE_EPOCH) -> Runs:
    """Where a device's rows fall apart.

    Args:
        ts_us: `[N]`, in the order in which they were recorded, microseconds since 1970-01-01 UTC.
        window: whose `gap_us` counts.
        epochs: index of the first row of every epoch but the first.
    """
    if not len(ts_us):
        nothing = np.zeros(0, np.int64)
        return Runs(nothing, nothing)
    steps = np.diff(ts_us)
    breaks = np.flatnonzero((steps < 0) | (steps > window.gap_us)) + 1
    starts = np.union1d(np.union1d([0], breaks), epochs).astype(np.int64)
    return Runs(starts, np.diff(starts, append=len(ts_us)))


def window_starts(ts_us: Int64s, window: Window, epochs: Int64s = _ONE_EPOCH) -> Int64s:
    """Index of the first row of every complete window, rising; a window is the `window.rows` rows from there on.

    Args: as of `runs_of`.
    """
    runs = runs_of(ts_us, window, epochs)
    counts = np.maximum(0, (runs.lengths - window.rows) // window.stride + 1)
    before = np.cumsum(counts) - counts
    within = np.arange(counts.sum(), dtype=np.int64) - np.repeat(before, counts)
    starts: Int64s = np.repeat(runs.starts, counts) + within * window.stride
    return starts


def views(values: Float32s, rows: int) -> Float32s:
    """Every stretch of `rows` neighbouring rows, without a copy.

    Args:
        values: `[N, C]`, at least `rows` of them.
        rows: of a window.

    Returns:
        `[N - rows + 1, rows, C]`, read-only; indexed with `window_starts` it gives the windows.
    """
    return np.lib.stride_tricks.sliding_window_view(values, rows, axis=0).transpose(0, 2, 1)


def window_codes(codes: Codes, starts: Int64s, rows: int, span: Span) -> Codes:
    """The label of every window, out of the labels of its rows.

    Args:
        codes: `[N]`: the label of each row as a number, UNLABELLED where it has none.
        starts: `[M]`: as `window_starts` gives them.
        rows: of a window.
        span: what becomes of a window over more than one label (see `trainer.recipe.Labels`).

    Returns:
        `[M]`: a code, UNLABELLED, or MIXED for windows that `drop` drops.
    """
    last = codes[starts + rows - 1] if len(starts) else np.zeros(0, np.int32)
    if span == "last" or not len(starts):
        return last
    changes = np.concatenate(([0], np.cumsum(codes[1:] != codes[:-1])))
    mixed = np.flatnonzero(changes[starts] != changes[starts + rows - 1])
    found = last.copy()
    if span == "drop":
        found[mixed] = MIXED
        return found
    for number in mixed:  # only windows at a change of label: few
        found[number] = _majority(codes[starts[number] : starts[number] + rows])
    return found


def _majority(codes: Codes) -> int:
    """The code that most rows have; of equals the one that comes last."""
    found, counts = np.unique(codes, return_counts=True)
    candidates = found[counts == counts.max()]
    return int(codes[np.flatnonzero(np.isin(codes, candidates))[-1]])

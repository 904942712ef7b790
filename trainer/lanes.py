"""Windows of a lane whose rows come piece by piece: the same windows as of all rows at once, in bounded memory. Pure.

A lane is one (device, epoch) of a stream. Rows are only ever added at its end, so what was cut stays what it was, and
cutting can go on at the first row of any window that was cut. Windows do not reach over two epochs: a device whose
buffer begins anew begins an empty window.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from contract.models import Window
from trainer.windows import Float32s, Int64s, runs_of, views, window_starts

Int32s = npt.NDArray[np.int32]


class LaneRows(NamedTuple):
    """Rows of one lane in recorded order."""

    ts_us: Int64s
    """`[N]`, microseconds since 1970-01-01 UTC."""
    seq: Int64s
    """`[N]`: number of the batch."""
    row: Int32s
    """`[N]`: place in the batch."""
    values: Float32s
    """`[N, C]`, NaN for null."""

    def part(self, start: int, end: int | None = None) -> LaneRows:
        """Some of them, without a copy."""
        piece = slice(start, end)
        return LaneRows(self.ts_us[piece], self.seq[piece], self.row[piece], self.values[piece])

    def then(self, more: LaneRows) -> LaneRows:
        """These, and more behind them."""
        return LaneRows(
            np.concatenate((self.ts_us, more.ts_us)),
            np.concatenate((self.seq, more.seq)),
            np.concatenate((self.row, more.row)),
            np.concatenate((self.values, more.values)),
        )

    def copy(self) -> LaneRows:
        """With memory of their own."""
        return LaneRows(self.ts_us.copy(), self.seq.copy(), self.row.copy(), self.values.copy())


class Cuts(NamedTuple):
    """Complete windows of one lane."""

    rows: LaneRows
    """Of which they were cut."""
    starts: Int64s
    """`[M]`: index in `rows` of the first row of each, rising."""
    ends: Int64s
    """`[M]`: of the last row."""

    def keep(self, mask: npt.NDArray[np.bool_]) -> Cuts:
        """Some of them."""
        return Cuts(self.rows, self.starts[mask], self.ends[mask])

    def windows(self, begin: int, end: int) -> Float32s:
        """`[end - begin, W, C]`, a copy."""
        starts = self.starts[begin:end]
        rows = int(self.ends[begin] - self.starts[begin]) + 1
        found: Float32s = views(self.rows.values, rows)[starts]
        return found


class LaneCutter:
    """Cuts the windows of one lane.

    Args:
        window: the rule.
    """

    def __init__(self, window: Window) -> None:
        self._window = window
        self._rest: LaneRows | None = None

    def feed(self, rows: LaneRows) -> Cuts:
        """Take the next rows of the lane; the windows that they complete."""
        before = 0 if self._rest is None else len(self._rest.ts_us)
        rows = rows if self._rest is None else self._rest.then(rows)
        starts = window_starts(rows.ts_us, self._window)
        ends = starts + self._window.rows - 1
        self._keep_rest(rows, starts)
        return Cuts(rows, starts, ends).keep(ends >= before)

    def _keep_rest(self, rows: LaneRows, starts: Int64s) -> None:
        """The rows that later windows need: fewer than a window and a stride."""
        runs = runs_of(rows.ts_us, self._window)
        if not len(runs.starts):
            return
        run = int(runs.starts[-1])
        begin = int(starts[-1]) if len(starts) and starts[-1] >= run else run
        self._rest = rows.part(begin).copy()

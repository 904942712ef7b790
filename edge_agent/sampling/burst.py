"""Bursts: rows around an event, with history from before it. Pure.

While no condition is active, rows go into a ring of `pre_rows`. When one becomes active, a burst begins with what the
ring holds; it goes on while any condition is active, and for `post_rows` rows after the last active one; an event in
those rows extends it. Each row is kept at most once, in order. A burst has at most `rows_max` rows: a longer event is
cut there, and no new burst begins until all conditions were inactive once.
"""

from __future__ import annotations

from collections import deque

import pyarrow as pa

from edge_agent import compute as pc
from edge_agent.sampling.settings import Burst
from edge_agent.sampling.slices import rows_of
from edge_agent.sampling.triggers import condition
from edge_agent.sensors.port import Reading, Sample


class BurstMachine:
    """Decides over runs of rows that are alike; knows nothing of their values.

    Attributes:
        bursts: bursts begun.
        truncated: bursts cut at `rows_max`.
    """

    def __init__(self, post_rows: int, rows_max: int) -> None:
        self._post_rows, self._rows_max = post_rows, rows_max
        self._in_burst = False
        self._rows = 0
        self._post_left = 0
        self._spent = False
        self.bursts = 0
        self.truncated = 0

    def run(self, active: bool, rows: int, held: int) -> list[tuple[bool, int]]:
        """What becomes of `rows` rows in a row that are all active or all not.

        Args:
            active: whether the rows are active.
            rows: how many there are, at least 1.
            held: rows in the ring now, which a beginning burst takes along.

        Returns:
            (keep, count) pieces, whose counts add up to `rows`. A kept piece takes what the ring holds before it.
        """
        pieces: list[tuple[bool, int]] = []
        while rows:
            if not self._in_burst and active and not self._spent:
                self._in_burst, self._rows = True, held
                self.bursts += 1
            count = self._keep(active, rows) if self._in_burst else 0
            if count:
                pieces.append((True, count))
                held = 0
                rows -= count
                continue
            # Not in a burst, or it just ended: the rest of the run is history.
            self._spent = self._spent and active
            pieces.append((False, rows))
            rows = 0
        return pieces

    def _keep(self, active: bool, rows: int) -> int:
        """How many of the next rows the burst takes; 0 when it ends before them."""
        wanted = rows if active else min(rows, self._post_left)
        count = min(wanted, self._rows_max - self._rows)
        if count == 0:
            self._in_burst = False
            if wanted:
                self.truncated += 1
                self._spent = active
            return 0
        self._rows += count
        self._post_left = self._post_rows if active else self._post_left - count
        return count


class BurstMode:
    """Keeps the rows around events.

    Args:
        settings: triggers and sizes.
        schema: `ts` and the stream's fields.

    Raises:
        SensorConfigError: a trigger names a field that the stream does not have, or that is not a number.
    """

    def __init__(self, settings: Burst, schema: pa.Schema) -> None:
        self._conditions = [condition(trigger, schema) for trigger in settings.trigger]
        self._machine = BurstMachine(settings.post_rows, settings.rows_max)
        self._pre_rows = settings.pre_rows
        self._ring: deque[Sample] = deque()
        self.held_rows = 0

    @property
    def bursts(self) -> int:
        """Bursts begun."""
        return self._machine.bursts

    @property
    def truncated(self) -> int:
        """Bursts cut at `rows_max`."""
        return self._machine.truncated

    def feed(self, sample: Sample) -> list[Sample]:
        """The rows that are kept, in order; history first where a burst begins."""
        kept: list[Sample] = []
        start = 0
        for active, rows in self._runs(sample):
            for keep, count in self._machine.run(active, rows, self.held_rows):
                piece = sample if isinstance(sample, Reading) else rows_of(sample, start, count)
                start += count
                if keep:
                    kept += self._ring
                    kept.append(piece)
                    self._ring.clear()
                    self.held_rows = 0
                else:
                    self._hold(piece, count)
        return kept

    def _runs(self, sample: Sample) -> list[tuple[bool, int]]:
        if isinstance(sample, Reading):
            active = False
            for each in self._conditions:
                # Every condition has to see every row, also when another one is active already.
                active = each.update(sample.values[each.field], sample.ts_us or 0) or active
            return [(active, 1)]
        if not sample.num_rows:
            return []
        times = sample.column(0).view(pa.int64())
        mask = pa.repeat(False, sample.num_rows)
        for each in self._conditions:
            mask = pc.or_(mask, each.update_all(sample.column(each.field), times))
        encoded = pc.run_end_encode(mask)
        runs, start = [], 0
        for active, end in zip(encoded.values.to_pylist(), encoded.run_ends.to_pylist(), strict=True):
            runs.append((bool(active), end - start))
            start = end
        return runs

    def _hold(self, piece: Sample, rows: int) -> None:
        """Put rows into the ring, and drop the oldest beyond `pre_rows`."""
        self._ring.append(piece)
        self.held_rows += rows
        while self.held_rows > self._pre_rows:
            oldest = self._ring.popleft()
            spare = self.held_rows - self._pre_rows
            if isinstance(oldest, Reading):
                self.held_rows -= 1
            elif oldest.num_rows <= spare:
                self.held_rows -= oldest.num_rows
            else:
                self._ring.appendleft(rows_of(oldest, spare, oldest.num_rows - spare))
                self.held_rows -= spare

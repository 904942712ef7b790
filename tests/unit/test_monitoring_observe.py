"""What a gateway remembers of releases at work.

Mutants tried, each made a test here fail: the release with the latest `ts` is taken for the newest.
"""

from __future__ import annotations

import numpy as np

from lake.monitoring.feed import Predictions
from lake.monitoring.observe import Bounds, Observer

YEAR_US = 366 * 86_400_000_000


def rows(device: str, release: int, *end_us: int) -> Predictions:
    count = len(end_us)
    ends = np.array(end_us, dtype=np.int64)
    zeros = np.zeros(count, dtype=np.int64)
    releases = np.full(count, release, dtype=np.int64)
    return Predictions(
        [device] * count, releases, ends - 1, ends, np.zeros(count), [""] * count, zeros, zeros, [None] * count
    )


def test_the_release_whose_windows_came_last_is_the_newest_whatever_the_clock_of_the_device_says():
    observer = Observer(Bounds())
    observer.add(rows("pi-1", 1, 1_000, 1_000 + 5 * YEAR_US))
    observer.add(rows("pi-2", 1, 1_000))
    observer.add(rows("pi-1", 2, 2_000))
    assert observer.newest() == {"pi-1": 2, "pi-2": 1}
    observer.add(rows("pi-1", 1, 3_000))
    assert observer.newest() == {"pi-1": 1, "pi-2": 1}, "it went back"

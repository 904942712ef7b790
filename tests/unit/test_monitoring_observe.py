"""What a gateway remembers of releases at work.

Mutants tried, each made a test here fail: the release with the latest `ts` is taken for the newest.
"""

from __future__ import annotations

import numpy as np

from lake.monitoring.feed import Predictions
from lake.monitoring.observe import Bounds, Observer
from lake.monitoring.recent import Ring

YEAR_US = 366 * 86_400_000_000


def rows(device: str, release: int, *end_us: int, width: int | None = None) -> Predictions:
    count = len(end_us)
    ends = np.array(end_us, dtype=np.int64)
    zeros = np.zeros(count, dtype=np.int64)
    releases = np.full(count, release, dtype=np.int64)
    features = [None if width is None else np.arange(width, dtype=np.float64)] * count
    return Predictions(
        [device] * count, releases, ends - 1, ends, np.zeros(count), [""] * count, zeros, zeros, features
    )


def test_the_release_whose_windows_came_last_is_the_newest_whatever_the_clock_of_the_device_says():
    observer = Observer(Bounds())
    observer.add(rows("pi-1", 1, 1_000, 1_000 + 5 * YEAR_US))
    observer.add(rows("pi-2", 1, 1_000))
    observer.add(rows("pi-1", 2, 2_000))
    assert observer.newest() == {"pi-1": 2, "pi-2": 1}
    observer.add(rows("pi-1", 1, 3_000))
    assert observer.newest() == {"pi-1": 1, "pi-2": 1}, "it went back"


def test_a_device_that_invents_releases_pushes_no_other_out():
    observer = Observer(Bounds(devices_max=10, releases_max=2))
    observer.add(rows("pi-1", 1, 1_000))
    for release in range(100):
        observer.add(rows("rogue", release, 1_000))
    assert observer.held() == [(1, "pi-1"), (98, "rogue"), (99, "rogue")]
    assert (len(observer), observer.forgotten) == (3, 98)
    assert observer.newest() == {"pi-1": 1, "rogue": 99}


def test_features_of_another_number_than_the_release_has_are_not_kept():
    observer = Observer(Bounds(windows_max=50))
    for width in (7, 3, 1_000):
        observer.add(rows("pi-1", 1, *range(1, 11), width=width), width=lambda release: 3)
    found = observer.measure((1, "pi-1"), None, 0.25, 1.0)
    assert (found.windows, found.sampled) == (30, 10)


def test_what_is_forgotten_is_gone_with_its_device():
    observer = Observer(Bounds())
    observer.add(rows("pi-1", 1, 1_000))
    observer.add(rows("pi-1", 2, 1_000))
    observer.forget((2, "pi-1"))
    assert observer.newest() == {"pi-1": 1}
    observer.forget((1, "pi-1"))
    assert (observer.newest(), len(observer), observer.forgotten) == ({}, 0, 0)


def test_the_latest_windows_count_in_the_order_in_which_they_came():
    kept = Ring(4, np.int64)
    for value in range(3):
        kept.add(value)
    assert kept.values().tolist() == [0, 1, 2]
    for value in range(3, 10):
        kept.add(value)
    assert (kept.values().tolist(), len(kept)) == ([6, 7, 8, 9], 4)
    observer = Observer(Bounds(windows_max=3))
    observer.add(rows("pi-1", 1, *(1_000_000 * moment for moment in (1, 50, 60, 61, 63))))
    found = observer.measure((1, "pi-1"), None, 0.25, 1.0)
    assert (found.windows, found.last_us, found.rate_per_s) == (3, 63_000_000, 2 / 3)

"""Predictions as they arrive: each once, commit by commit, whatever fails on the way.

Mistakes that a test here is for: a commit counted as given before its files are read; skipped ones counted
at each call; all that is new read before the first is given; no look whether the table is still the same.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from lake.errors import StoreUnavailableError
from lake.monitoring.feed import PredictionFeed
from lake.store import Store
from tests.monitoring_parts import MODEL, Device, World, store_in


@pytest.fixture
def store(tmp_path):
    return store_in(tmp_path / "lake")


@pytest.fixture
def device(store):
    return Device(store, "pi-1")


WORLD = World(np.random.default_rng(2))


def taken(feed: PredictionFeed, rows_max: int = 10_000) -> list[int]:
    """Rows of each piece."""
    return [len(rows) for rows in feed.take(rows_max)]


def test_rows_come_once_and_commit_by_commit(store, device):
    feed = PredictionFeed(store, MODEL)
    assert taken(feed) == []
    for count in (3, 4):
        device.predict(*WORLD.windows(count))
    assert taken(feed) == [3, 4]
    assert taken(feed) == []
    device.predict(*WORLD.windows(5))
    assert taken(feed) == [5]


def test_one_commit_after_the_other_is_held_in_memory(store, device, monkeypatch):
    for count in (3, 4, 5):
        device.predict(*WORLD.windows(count))
    read = []
    monkeypatch.setattr(PredictionFeed, "_read", counted(PredictionFeed._read, read))
    pieces = PredictionFeed(store, MODEL).take(10_000)
    next(pieces)
    assert len(read) == 1
    next(pieces)
    assert len(read) == 2


def counted(read, calls):
    def reading(self, path):
        calls.append(path)
        return read(self, path)

    return reading


def test_after_a_failure_what_was_not_given_comes_and_nothing_comes_twice(store, device, monkeypatch):
    feed = PredictionFeed(store, MODEL)
    for count in (3, 4, 5):
        device.predict(*WORLD.windows(count))
    get, files = Store.get, []

    def burning(self, path):
        if path.endswith(".parquet"):
            files.append(path)
            if len(files) == 2:
                raise StoreUnavailableError("it burns")
        return get(self, path)

    monkeypatch.setattr(Store, "get", burning)
    pieces = feed.take(10_000)
    assert len(next(pieces)) == 3
    with pytest.raises(StoreUnavailableError):
        next(pieces)
    assert taken(feed) == [4, 5]
    assert taken(feed) == []
    assert (feed.skipped_commits, feed.skipped_files) == (0, 0)


def test_of_more_than_may_be_read_the_newest_are_and_the_others_are_counted_once(store, device):
    feed = PredictionFeed(store, MODEL)
    device.predict(*WORLD.windows(1))
    assert taken(feed) == [1]
    for count in (3, 4, 5, 6):
        device.predict(*WORLD.windows(count))
    assert taken(feed, rows_max=8) == [5, 6]
    assert feed.skipped_commits == 2
    assert taken(feed, rows_max=8) == []
    assert feed.skipped_commits == 2


def test_a_table_that_was_restored_or_begun_anew_is_read_from_there_on(store, device, tmp_path):
    """A feed that waits for the version it knew is blind until the table has grown as long again."""
    feed = PredictionFeed(store, MODEL)
    for count in (3, 4, 5):
        device.predict(*WORLD.windows(count))
    assert taken(feed) == [3, 4, 5]
    folder = tmp_path / "lake" / "raw" / f"predictions.{MODEL}"
    shutil.copytree(folder, tmp_path / "backup")
    for count in (6, 7):
        device.predict(*WORLD.windows(count))
    assert taken(feed) == [6, 7]
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "backup", folder)
    assert taken(feed) == [3, 4, 5]
    assert taken(feed) == []
    shutil.rmtree(folder)
    assert taken(feed) == []
    Device(store, "pi-2").predict(*WORLD.windows(8))
    assert taken(feed) == [8]
    assert feed.skipped_commits == 0

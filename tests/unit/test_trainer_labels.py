"""A row's label is what held at its moment.

Mutants tried, each made a test here fail: `side="right"` of the look-up as "left"; an interval that includes its end;
of overlapping intervals the first instead of the last; NaN labels not counted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.errors import ConfigurationError
from trainer.errors import RecipeError
from trainer.labels import UNLABELLED, Track, flattened, labels_query, read_labels
from trainer.recipe import Labels

TIME = pa.timestamp("us", tz="UTC")


def table(label: Any, device: Any = "a", **times: list[int | None]) -> pa.Table:
    count = len(next(iter(times.values())))
    devices = [device] * count if isinstance(device, str) else device
    columns = {name: pa.array(values, pa.int64()).cast(TIME) for name, values in times.items()}
    return pa.table({"_device": devices, **columns, "label": label})


def named(book: Any, device: str, ts: list[int]) -> list[str]:
    return [book.classes[code] if code != UNLABELLED else "" for code in book.at(device, np.array(ts))]


def test_a_change_holds_until_the_next_one_of_the_same_device() -> None:
    changes = table(["run", "walk", "sit"], device=["a", "b", "a"], ts=[10, 15, 20])
    book = read_labels(changes, Labels(stream="exercise"))
    assert book.classes == ("run", "sit", "walk")
    assert named(book, "a", [9, 10, 19, 20, 10**15]) == ["", "run", "run", "sit", "sit"]
    assert named(book, "b", [14, 15, 10**15]) == ["", "walk", "walk"]
    assert named(book, "stranger", [15]) == [""]


def test_changes_may_come_in_any_order_and_null_ends_a_label() -> None:
    book = read_labels(table(["sit", "run", None], ts=[30, 10, 20]), Labels(stream="exercise"))
    assert named(book, "a", [10, 20, 29, 30]) == ["run", "", "", "sit"]
    assert book.nan_rows == 0


def test_of_two_changes_at_one_moment_the_later_row_counts() -> None:
    book = read_labels(table(["run", "sit"], ts=[10, 10]), Labels(stream="exercise"))
    assert named(book, "a", [10]) == ["sit"]


def test_an_interval_ends_before_its_end_and_otherwise_fills_the_rest() -> None:
    intervals = table(["bad", "bad"], start=[10, 40], end=[20, None])
    book = read_labels(intervals, Labels(sql="…", otherwise="good"))
    assert named(book, "a", [9, 10, 19, 20, 40, 10**15]) == ["good", "bad", "bad", "good", "bad", "bad"]
    assert named(book, "stranger", [15]) == ["good"]


def test_nan_and_empty_labels_are_counted_and_are_none() -> None:
    book = read_labels(table([1.0, float("nan"), 2.0], ts=[10, 20, 30]), Labels(stream="x"))
    assert book.nan_rows == 1
    assert named(book, "a", [10, 20, 30]) == ["1.0", "", "2.0"]
    assert read_labels(table(["x", " "], ts=[1, 2]), Labels(stream="x")).nan_rows == 1


def test_labels_without_what_they_need_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"no label.*_device, ts, label"):
        read_labels(table(["x"], ts=[1]).drop_columns(["label"]), Labels(sql="…"))
    with pytest.raises(ConfigurationError, match="ts is int64, not a time"):
        read_labels(pa.table({"_device": ["a"], "ts": [1], "label": ["x"]}), Labels(sql="…"))


def test_no_labels_at_all_are_no_error_here() -> None:
    empty = table(pa.array([], pa.string()), ts=[])
    assert named(read_labels(empty, Labels(stream="x")), "a", [1]) == [""]


def test_the_question_names_stream_and_table_safely() -> None:
    assert '"my ""field"" " AS "label"' in labels_query(Labels(stream="x", field='my "field" '), "watch")
    assert "WHERE stream = 'watch'" in labels_query(Labels(table="control/labels"), "watch")


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12), st.integers(0, 3)), max_size=12))
def test_of_overlapping_intervals_the_one_that_began_last_and_still_holds_counts(
    found: list[tuple[int, int, int]],
) -> None:
    found = sorted(found, key=lambda one: one[0])
    starts, lengths, codes = (np.array([one[part] for one in found], dtype=np.int64) for part in range(3))
    flat = flattened(Track(starts, starts + lengths, codes.astype(np.int32)))
    for moment in range(45):
        holding = [code for start, length, code in found if start <= moment < start + length]
        assert flat.at(np.array([moment]))[0] == (holding[-1] if holding else UNLABELLED)

"""A row's label is what held at its moment.

Mutants tried, each made a test here fail: `side="right"` of the look-up as "left"; an interval that includes its end;
of overlapping intervals the first instead of the last; NaN labels not counted; labels as Python writes them (`True`);
intervals without their `sequence`.
"""

from __future__ import annotations

from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.errors import ConfigurationError
from lake.monitoring import accuracy
from lake.monitoring.policy import LabelSource
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
    assert named(book, "a", [10, 20, 30]) == ["1", "", "2"]
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
    assert '"my ""field"" "::VARCHAR' in labels_query(Labels(stream="x", field='my "field" '), "watch")
    assert "WHERE stream = 'watch'" in labels_query(Labels(table="control/labels"), "watch")


@pytest.mark.parametrize(
    "values",
    [[True, False, True], [1, 0, -7], [1.0, 0.5, 1e20], ["run", "Walk ", "1.0"]],
    ids=["bool", "int", "float", "string"],
)
@pytest.mark.parametrize("by", ["stream", "sql"])
def test_a_class_has_the_text_that_monitoring_compares_answers_with(values: list[Any], by: str) -> None:
    count = len(values)
    changes = table(values, ts=[10, 20, 30]).append_column("_seq", [range(count)]).append_column("_row", [[0] * count])
    asked = {"stream": {"stream": "changes"}, "sql": {"sql": "SELECT _device, ts, label FROM changes ORDER BY ts"}}[by]
    with duckdb.connect() as database:
        database.register("changes", changes)
        trained = database.sql(labels_query(Labels(**asked), "watch")).to_arrow_table()
        watched = database.sql(accuracy.labels_query(LabelSource(**asked), "watch")).to_arrow_table()
    intervals = accuracy.intervals_of(watched)["a"]
    book = read_labels(trained, Labels(**asked))
    # The last one is not over yet before monitoring.
    assert named(book, "a", [10, 20]) == intervals.over(np.array([10, 20]), np.array([11, 21]))
    assert len(book.classes) == len(set(values))


def test_nan_in_a_stream_is_counted_but_a_text_may_say_nan() -> None:
    for values, nan_rows in (([1.0, float("nan")], 1), (["run", "nan"], 0)):
        changes = table(values, ts=[10, 20]).append_column("_seq", [[1, 2]]).append_column("_row", [[0, 0]])
        with duckdb.connect() as database:
            database.register("changes", changes)
            answer = database.sql(labels_query(Labels(stream="changes"), "watch")).to_arrow_table()
        assert read_labels(answer, Labels(stream="changes")).nan_rows == nan_rows


def test_of_two_intervals_that_begin_at_one_moment_the_later_import_counts() -> None:
    rows = 5_000  # enough for a sort by start alone to mix them
    sequence = np.random.default_rng(1).permutation(rows)
    labels = pa.table(
        {
            "stream": ["watch"] * rows,
            "device": ["a"] * rows,
            "start": pa.array([10] * rows, pa.int64()).cast(TIME),
            "end": pa.array([20] * rows, pa.int64()).cast(TIME),
            "label": [f"{number % 900}" for number in sequence.tolist()],
            "sequence": sequence,
        }
    )
    asked = Labels(table="labels")
    with duckdb.connect() as database:
        database.register("labels", labels)
        answer = database.sql(labels_query(asked, "watch")).to_arrow_table()
    assert named(read_labels(answer, asked), "a", [10]) == [f"{(rows - 1) % 900}"]


def test_a_label_that_is_no_text_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"label is list.*label::VARCHAR"):
        read_labels(table(pa.array([[1]]), ts=[1]), Labels(sql="…"))


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

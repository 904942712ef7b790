"""Predictions joined with labels: which windows count, and the figures against scikit-learn.

Mutants tried, each made a test here fail: a window judged by the label at its end; windows without a label counted as
wrong; F1 over the labels that were said only.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from contract.errors import ConfigurationError
from lake.monitoring.accuracy import figures_of, intervals_of, labels_query, measure
from lake.monitoring.feed import empty, parse
from lake.monitoring.policy import LabelSource

TIME = pa.timestamp("us", "UTC")


def changes(*rows: tuple[str, int, str | None]) -> pa.Table:
    return pa.table(
        {
            "_device": [device for device, _, _ in rows],
            "ts": pa.array([moment for _, moment, _ in rows], TIME),
            "label": pa.array([label for _, _, label in rows], pa.string()),
        }
    )


def over(intervals, *windows: tuple[int, int]) -> list[str]:
    return intervals.over(np.array([start for start, _ in windows]), np.array([end for _, end in windows]))


def test_a_window_counts_where_one_label_holds_from_its_first_to_its_last_reading():
    found = intervals_of(
        changes(("d", 10, "walk"), ("d", 20, "run"), ("d", 30, None), ("d", 40, "run"), ("d", 50, "x"))
    )
    said = over(found["d"], (5, 12), (10, 19), (10, 20), (20, 29), (25, 30), (31, 35), (40, 49), (45, 50), (50, 60))
    assert said == ["", "walk", "", "run", "", "", "run", "", ""]


def test_the_same_label_told_twice_is_one_label():
    found = intervals_of(changes(("d", 10, "walk"), ("d", 20, "walk"), ("d", 30, "run")))
    assert over(found["d"], (10, 29), (19, 20), (29, 30)) == ["walk", "walk", ""]


def test_devices_have_their_own_labels_and_the_latest_waits_for_the_next():
    found = intervals_of(changes(("a", 10, "walk"), ("b", 15, "run"), ("b", 20, "walk")))
    assert over(found["a"], (11, 12)) == [""]
    assert over(found["b"], (15, 19), (20, 21)) == ["run", ""]


def test_intervals_may_overlap_and_the_one_that_began_last_counts():
    table = pa.table(
        {
            "_device": ["d", "d"],
            "start": pa.array([0, 20], TIME),
            "end": pa.array([100, 30], TIME),
            "label": ["walk", "run"],
        }
    )
    found = intervals_of(table)["d"]
    assert over(found, (0, 19), (20, 29), (30, 99), (15, 25), (99, 100)) == ["walk", "run", "walk", "", ""]


def test_figures_are_those_of_scikit_learn():
    rng = np.random.default_rng(2)
    true, said = rng.choice(["a", "b", "c"], 300), rng.choice(["a", "b", "d"], 300)
    found = figures_of(1, "d", [*true, "", ""], [*said, "a", "b"])
    assert (found.windows, found.labelled, found.coverage) == (302, 300, pytest.approx(300 / 302))
    assert found.accuracy == pytest.approx(accuracy_score(true, said))
    assert found.macro_f1 == pytest.approx(f1_score(true, said, average="macro", zero_division=0))
    for number, name in enumerate(sorted(found.classes)):
        one = found.classes[name]
        assert one.precision == pytest.approx(precision_score(true, said, average=None, zero_division=0)[number])
        assert one.recall == pytest.approx(recall_score(true, said, average=None, zero_division=0)[number])


def test_without_labels_there_is_no_accuracy_rather_than_none_right():
    found = figures_of(1, "d", ["", ""], ["a", "b"])
    assert (found.accuracy, found.macro_f1, found.coverage) == (None, None, 0.0)
    assert measure(parse(empty()), {}) == []


def test_a_label_query_that_lacks_a_column_is_told():
    with pytest.raises(ConfigurationError, match="no label"):
        intervals_of(pa.table({"_device": ["d"], "ts": pa.array([1], TIME)}))
    assert 'FROM "exercise"' in labels_query(LabelSource(stream="exercise", field="kind"), "watch")
    assert "WHERE stream = 'it''s'" in labels_query(LabelSource(table="control/labels"), "it's")

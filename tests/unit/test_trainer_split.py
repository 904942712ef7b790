"""No group on both sides, no reading on both sides, three quarters to train, the same seed the same split.

Mutants tried, each made a test here fail: groups drawn window by window; no embargo, in the share and in the training
side; folds that ignore groups; the seed ignored; a class left untrained though it need not.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.trainer_sets import STEP_US, recipe, window_set, with_labels
from trainer.errors import DataError
from trainer.split import Split, load_split, save_split, split_windows

BY_GROUP = recipe(split={"by": "group", "group": "."})


def check_disjoint(split: Split, count: int) -> None:
    train, test = set(split.train.tolist()), set(split.test.tolist())
    assert not train & test
    assert train | test <= set(range(count))
    assert len(test) <= 0.25 * (len(train) + len(test))
    assert split.folds
    for fold in split.folds:
        learn, valid = set(fold.train.tolist()), set(fold.valid.tolist())
        assert not learn & valid
        assert learn | valid <= train
        assert learn
        assert valid


@settings(max_examples=40)
@given(st.lists(st.integers(1, 30), min_size=5, max_size=9), st.integers(0, 5))
def test_no_group_is_on_two_sides(counts: list[int], seed: int) -> None:
    dataset = window_set({f"g{number}": count for number, count in enumerate(counts)})
    if min(counts) > sum(counts) / 4:
        return
    split = split_windows(dataset, BY_GROUP, seed)
    check_disjoint(split, len(dataset))
    assert len(split.train) + len(split.test) == len(dataset)
    assert not set(dataset.groups[split.train].tolist()) & set(dataset.groups[split.test].tolist())
    for fold in split.folds:
        assert not set(dataset.groups[fold.train].tolist()) & set(dataset.groups[fold.valid].tolist())


def test_the_same_seed_draws_the_same_split_and_another_another() -> None:
    dataset = window_set({f"g{number}": 20 for number in range(12)})
    drawn = {seed: tuple(split_windows(dataset, BY_GROUP, seed).test.tolist()) for seed in range(6)}
    assert drawn[0] == tuple(split_windows(dataset, BY_GROUP, 0).test.tolist())
    assert len(set(drawn.values())) > 1


def test_the_share_comes_near_to_what_was_asked_for() -> None:
    dataset = window_set({f"g{number}": 20 for number in range(10)})
    assert len(split_windows(dataset, BY_GROUP, 1).test) == 40


def test_the_test_groups_that_are_named_judge() -> None:
    dataset = window_set({f"g{number}": 20 for number in range(8)})
    asked = recipe(split={"by": "group", "group": ".", "test_groups": ["g6", "g1"]})
    split = split_windows(dataset, asked, 1)
    assert set(dataset.groups[split.test].tolist()) == {"g1", "g6"}
    assert split.description == "test: group in (g1, g6)"
    with pytest.raises(DataError, match=r"test_groups names \['g9'\]"):
        split_windows(dataset, recipe(split={"by": "group", "group": ".", "test_groups": ["g9"]}), 1)
    with pytest.raises(DataError, match="three quarters"):
        many = recipe(split={"by": "group", "group": ".", "test_groups": ["g1", "g2", "g3"]})
        split_windows(dataset, many, 1)


def test_a_class_that_one_group_alone_has_is_trained() -> None:
    dataset = window_set({f"g{number}": 20 for number in range(8)})
    labels = ["rare" if group == "g3" else "a" if number % 2 else "b" for number, group in enumerate(dataset.groups)]
    for seed in range(20):
        split = split_windows(with_labels(dataset, labels), BY_GROUP, seed)
        assert "g3" in dataset.groups[split.train]


def test_groups_that_cannot_be_divided_are_told_with_the_remedy() -> None:
    with pytest.raises(DataError, match=r'3 groups.*by = "time"'):
        split_windows(window_set({"a": 20, "b": 20, "c": 20}), BY_GROUP, 1)


@settings(max_examples=40)
@given(st.lists(st.integers(20, 60), min_size=1, max_size=3), st.sampled_from((0.1, 0.2, 0.25)))
def test_by_time_no_reading_is_on_two_sides(counts: list[int], share: float) -> None:
    dataset = window_set({f"g{number}": count for number, count in enumerate(counts)})
    split = split_windows(dataset, recipe(split={"by": "time", "test": share}), 1)
    check_disjoint(split, len(dataset))
    length = 3 * STEP_US
    for learn, judge in ((split.train, split.test), *split.folds):
        assert dataset.ends_us[learn].max() + length < dataset.starts_us[judge].min()


def test_by_time_a_quarter_judges_where_a_quarter_was_asked_for() -> None:
    split = split_windows(window_set({"a": 400}), recipe(split={"by": "time", "test": 0.25}), 1)
    assert 0.24 < len(split.test) / (len(split.train) + len(split.test)) <= 0.25


def test_too_few_windows_are_told() -> None:
    with pytest.raises(DataError, match=r"leaves|too few"):
        split_windows(window_set({"a": 3}), recipe(split={"by": "time"}), 1)


def test_a_random_split_divides_windows_that_do_not_overlap() -> None:
    dataset = window_set({"a": 100})
    split = split_windows(dataset, recipe(split={"by": "random"}, window={"stride": 4}), 1)
    check_disjoint(split, 100)
    assert len(split.test) == 20
    assert sorted(np.concatenate((split.train, split.test)).tolist()) == list(range(100))


def test_a_split_is_read_back_as_it_was(tmp_path: Path) -> None:
    split = split_windows(window_set({f"g{number}": 20 for number in range(8)}), BY_GROUP, 1)
    save_split(split, tmp_path)
    found = load_split(tmp_path)
    assert found.description == split.description
    assert [part.tolist() for part in (found.train, found.test)] == [split.train.tolist(), split.test.tolist()]
    assert [[side.tolist() for side in fold] for fold in found.folds] == [
        [side.tolist() for side in fold] for fold in split.folds
    ]
    (tmp_path / "split.npz").write_bytes(b"PK damaged")
    with pytest.raises(DataError, match="headwater train checks"):
        load_split(tmp_path)
